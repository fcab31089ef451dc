"""`python -m pkt` is `pkt`."""

import sys

from pkt.cli import main

if __name__ == "__main__":
    sys.exit(main())
