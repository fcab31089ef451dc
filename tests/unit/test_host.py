"""Memory limits as the kernel writes them, and anonymous memory as it counts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pkt import host

MEMINFO = "MemTotal:       32000000 kB\nMemFree: 5 kB\nMemAvailable:   20000000 kB\n"
AVAILABLE = 20_000_000 << 10


def with_files(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(host, "_read", lambda path: files.get(str(path), ""))


def test_without_cgroups_the_system_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with_files(monkeypatch, {"/proc/meminfo": MEMINFO})
    assert host.memory_limit() == (AVAILABLE, "MemAvailable")


@pytest.mark.parametrize("place", ["", "/a", "/a/b"])
def test_cgroup_2_counts_at_every_level(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/a/b\n"}
    for level in ("", "/a", "/a/b"):
        files[f"/sys/fs/cgroup{level}/memory.max"] = "max\n"
    files[f"/sys/fs/cgroup{place}/memory.max"] = f"{4 << 30}\n"
    with_files(monkeypatch, files)
    limit, source = host.memory_limit()
    assert limit == 4 << 30
    assert "memory.max" in source


def test_cgroup_1_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/a\n",
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{3 << 30}\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    with_files(monkeypatch, files)
    limit, source = host.memory_limit()
    assert limit == 3 << 30
    assert "memory.limit_in_bytes" in source


@pytest.mark.parametrize(
    ("group", "limit", "stat"),
    [
        ("0::/a\n", "/sys/fs/cgroup/a/memory.max", "anon {anon}\nfile 7\nshmem {shmem}\n"),
        (
            "5:memory:/a\n",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "rss 1\nshmem 1\ntotal_rss {anon}\ntotal_shmem {shmem}\n",
        ),
    ],
    ids=["2", "1"],
)
def test_what_others_hold_in_memory_and_on_disks_of_memory_is_gone(
    group: str, limit: str, stat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = limit.rsplit("/", 1)[0]
    files = {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": group,
        "/proc/self/status": f"RssAnon:\t{1 << 20} kB\n",
        limit: f"{8 << 30}\n",
        f"{folder}/memory.stat": stat.format(anon=3 << 30, shmem=2 << 30),
    }
    with_files(monkeypatch, files)
    assert host.memory_limit()[0] == (8 - (3 - 1) - 2) << 30


def test_a_limit_above_what_is_there_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/a\n"}
    files["/sys/fs/cgroup/a/memory.max"] = str(1 << 50)
    with_files(monkeypatch, files)
    assert host.memory_limit() == (AVAILABLE, "MemAvailable")


def test_this_host_has_some_memory() -> None:
    limit, source = host.memory_limit()
    assert 100 << 20 < limit < 1 << 60
    assert source


def test_anonymous_memory_counts_what_is_allocated_and_not_what_is_mapped(tmp_path: Path) -> None:
    import mmap

    size = 64 << 20
    host.release_free_memory()  # else what tests before have freed may serve
    before = host.anonymous_bytes()
    assert before > 1 << 20
    held = bytearray(size)
    held[::4096] = b"x" * (size // 4096)
    assert host.anonymous_bytes() - before >= 0.9 * size
    del held
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(size)
    before = host.anonymous_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert host.anonymous_bytes() - before < 0.1 * size


def test_the_meter_sees_a_peak_that_is_gone_at_the_end() -> None:
    size = 64 << 20
    host.release_free_memory()
    meter = host.PeakMeter(seconds=0.002)
    before = meter.peak_bytes
    with meter.running():
        held = bytearray(size)
        held[::4096] = b"x" * (size // 4096)
        time.sleep(0.1)
        del held
    assert meter.peak_bytes - before >= 0.9 * size


def test_a_description_is_json_and_holds_no_name_of_the_host() -> None:
    import socket

    found = host.describe()
    assert found.keys() == {"processor", "cores", "memory_bytes", "system", "python"}
    assert int(found["cores"]) >= 1
    assert socket.gethostname() not in json.dumps(found)
