"""One process beside two that share the seeds, a thread each; then two hosts with a link between.

The work is bound by arithmetic: a small teacher in the page cache and many tokens. Sides take
turns; a ratio is taken pair by pair, of the sweep (embed to backward) and of the whole run. With
--hosts two network namespaces are joined by a veth pair (root, and ip of iproute2): `torchrun
--nnodes 2`, each with an OUT of its own, must give the bytes of two ranks on one host. With --cut
the link goes down in the middle, and how long each side takes to say so is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import long_seeds, machine, make, write_record

SWEEP = ("embed", "forward", "head", "backward")
SPACES = ("pkt-a", "pkt-b")
LINKS = ("pkt-veth-a", "pkt-veth-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29547
LAUNCH = (sys.executable, "-m", "torch.distributed.run")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", **more}


def extract(out: Path, words: Sequence[str], ranks: int) -> dict[str, Any]:
    """Manifest and costs of a run in so many processes on this host."""
    launch = (*LAUNCH, "--nproc-per-node", str(ranks)) if ranks > 1 else (sys.executable,)
    command = [*launch, "-m", "pkt", "extract", *words, "-o", str(out), "--json", "-q"]
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment())
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "whole": time.perf_counter() - begun}


def sweep_seconds(found: Mapping[str, Any]) -> float:
    return sum(float(found["run"]["seconds"].get(name, 0.0)) for name in SWEEP)


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "pkt_run.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces and a link between them."""
    ip = ("ip",)
    try:
        for space in SPACES:
            subprocess.run((*ip, "netns", "add", space), check=True)
        pair = (*ip, "link", "add", LINKS[0], "netns", SPACES[0], "type", "veth", "peer", "name",
                LINKS[1], "netns", SPACES[1])  # fmt: skip
        subprocess.run(pair, check=True)
        for space, link, address in zip(SPACES, LINKS, ADDRESSES, strict=True):
            inside = (*ip, "-n", space)
            subprocess.run((*inside, "addr", "add", f"{address}/24", "dev", link), check=True)
            for name in (link, "lo"):
                subprocess.run((*inside, "link", "set", name, "up"), check=True)
        yield
    finally:
        for space in SPACES:
            subprocess.run((*ip, "netns", "del", space), stderr=subprocess.DEVNULL)


def start_host(node: int, out: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    command = [
        "ip", "netns", "exec", SPACES[node], *LAUNCH, "--nnodes", "2", "--node-rank", str(node),
        "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", str(PORT),
        "-m", "pkt", "extract", *words, "-o", str(out),
    ]  # fmt: skip
    env = environment(GLOO_SOCKET_IFNAME=LINKS[node])
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def across(folder: Path, words: Sequence[str], beside: Mapping[str, bytes]) -> str:
    """Both hosts to the end."""
    outs = folder / "host-0", folder / "host-1"
    begun = time.perf_counter()
    with two_hosts():
        hosts = [start_host(node, out, words) for node, out in enumerate(outs)]
        said = [host.communicate() for host in hosts]
    seconds = time.perf_counter() - begun
    for host, (_, text) in zip(hosts, said, strict=True):
        if host.returncode:
            sys.exit(text)
    same = "the same bytes as" if contents(outs[0]) == beside else "OTHER BYTES THAN"
    kept = "nothing is left" if not outs[1].exists() else "SOMETHING IS LEFT"
    run = json.loads((outs[0] / "pkt_run.json").read_text("utf-8"))
    return (
        f"two hosts, a rank and a thread each: {seconds:.1f} s, sweep "
        f"{sweep_seconds({'run': run}):.1f} s; {same} two ranks on one host; {kept} on the second"
    )


def cut(folder: Path, words: Sequence[str]) -> list[str]:
    """The link goes down in the forward pass."""
    outs = folder / "cut-0", folder / "cut-1"
    with two_hosts():
        hosts = [start_host(node, out, words) for node, out in enumerate(outs)]
        while not (outs[1] / ".work/spool/rank-1/input-00001.bin").exists():
            time.sleep(0.05)
        down = ("ip", "-n", SPACES[1], "link", "set", LINKS[1], "down")
        subprocess.run(down, check=True)
        begun = time.perf_counter()

        def hear(node: int) -> str:
            for line in hosts[node].stderr or ():
                if line.startswith("pkt: error: "):
                    seconds = time.perf_counter() - begun
                    return f"link cut; host {node} after {seconds:.0f} s: {line.strip()}"
            return f"link cut; host {node} SAID NOTHING"

        with ThreadPoolExecutor() as pool:
            lines = list(pool.map(hear, range(2)))
        for host in hosts:
            host.kill()
            host.communicate()
    return lines


def pairs(args: argparse.Namespace, folder: Path, words: Sequence[str]) -> list[str]:
    """One process and two, in turn."""
    sweeps, wholes, lines, apart = [], [], [], 0.0
    for index in range(args.pairs):
        found = {
            ranks: extract(folder / f"{ranks}-{index}", words, ranks)
            for ranks in ((1, 2) if index % 2 == 0 else (2, 1))
        }
        sweeps.append(sweep_seconds(found[1]) / sweep_seconds(found[2]))
        wholes.append(found[1]["whole"] / found[2]["whole"])
        one, two = (found[ranks]["manifest"]["layer_scores"] for ranks in (1, 2))
        apart = max(apart, *(abs(a - b) / b for a, b in zip(two, one, strict=True)))
        lines.append(
            f"one process {found[1]['whole']:.1f} s (sweep {sweep_seconds(found[1]):.1f}), "
            f"two {found[2]['whole']:.1f} s (sweep {sweep_seconds(found[2]):.1f})"
        )
    lines.append(
        f"two ranks are {statistics.median(sweeps):.2f} × as fast in the sweep, "
        f"{statistics.median(wholes):.2f} × in the whole; layer scores differ by {apart:.1e}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", default=None)
    parser.add_argument("--hosts", action="store_true", help="two namespaces too (root)")
    parser.add_argument("--cut", action="store_true", help="and a link that goes down (root)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    heads, ffn = max(1, args.hidden // 128), args.hidden * 43 // 16
    shape = ["--ffn", str(ffn), "--heads", str(heads), "--kv-heads", str(heads), "--vocab", "8192"]
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        wide, narrow = str(args.hidden), str(args.hidden // 2)
        teacher = make(folder / "teacher", "--layers", str(args.layers), "--hidden", wide, *shape)
        shape[1] = str(args.hidden // 2 * 43 // 16)
        student = make(
            folder / "student", "--layers", str(args.layers // 2), "--hidden", narrow, *shape
        )
        seeds = long_seeds(folder / "seeds.jsonl", args.limit)
        words = [
            f"--teacher={teacher}", f"--student={student}", f"--seeds={seeds}",
            f"--limit={args.limit}", f"--max-tokens={args.tokens}", f"--dtype={args.dtype}",
        ]  # fmt: skip
        lines = [
            f"{machine()}; {args.layers} layers, {args.hidden} wide, {args.dtype}, "
            f"{args.limit} seeds × {args.tokens} tokens, one thread a rank",
            *pairs(args, folder, words),
        ]
        if args.hosts:
            lines.append(across(folder, words, contents(folder / "2-0")))
        if args.cut:
            lines += cut(folder, words)
    if args.no_record:
        print("\n".join(lines))
    else:
        write_record("ranks", lines)


if __name__ == "__main__":
    main()
