"""Where benches leave their results: a line with date and machine, then the numbers."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pkt.host import describe, multiplies_bfloat16

FOLDER = Path(__file__).resolve().parents[1] / "record"


def machine() -> str:
    host = describe()
    widened = "" if multiplies_bfloat16() else ", bfloat16 multiplied in float32"
    memory = int(host["memory_bytes"]) >> 30
    return f"{host['processor']}, {host['cores']} cores, {memory} GiB{widened}"


def long_seeds(path: Path, count: int) -> Path:
    """Texts of about 7000 tokens each, from the built-in stories."""
    source = resources.files("pkt").joinpath("data/demo/stories_train.jsonl")
    stories = [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines() if line]
    size = len(stories) // count if count > 33 else 30
    texts = [" ".join(stories[at * size : (at + 1) * size]) for at in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def make(folder: Path, *shape: str) -> Path:
    """A checkpoint of random weights, by `make_checkpoint.py`."""
    script = Path(__file__).with_name("make_checkpoint.py")
    command = [sys.executable, str(script), str(folder), *shape]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def write_record(name: str, lines: Sequence[str]) -> None:
    """Append to ``benches/record/NAME.txt`` and print."""
    FOLDER.mkdir(exist_ok=True)
    text = "\n".join([f"## {datetime.date.today().isoformat()}", *lines, ""])
    with (FOLDER / f"{name}.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
