"""Sizes, YAML settings and the table of aliases."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkt.config import GIB, format_bytes, load_aliases, load_yaml, parse_bytes
from pkt.errors import UsageError

KNOWN = frozenset({"rank", "max_ram"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("1.5k", 1500),
        ("1073741824", GIB),
        ("812B", 812),
        ("2Ti", 2 << 40),
        ("0", 0),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lots",
        "-1",
        "8GiBs",
        "8 8",
        "1e9",
        "nan",
        "inf",
        "GiB",
        "8XB",
        "9" * 400 + "GiB",
        "2000000t",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1536, 10 * GIB, 3 << 40, 123_456_789])
def test_a_formatted_size_reads_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


def test_options_may_be_spelled_with_dashes(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max-ram: 8GiB\nrank: 4\n")
    assert load_yaml(path, KNOWN) == {"max_ram": "8GiB", "rank": 4}
    path.write_text("# nothing yet\n")
    assert load_yaml(path, KNOWN) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rnak: 3", "unknown option 'rnak'"),
        (b"config: other.yaml", "unknown option 'config'"),
        (b"- rank", "expected a mapping of options, found list"),
        (b"rank: [", "not valid YAML"),
        (b"rank: \xff", "not valid YAML"),
        (b"rank: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_yaml(path, KNOWN)
    assert raised.value.message.startswith(f"{path}: {said}")
    assert "\n" not in raised.value.message


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_yaml(tmp_path / "none.yaml", KNOWN)
    with pytest.raises(UsageError, match="cannot read"):
        load_yaml(tmp_path, KNOWN)


def test_the_users_aliases_override_the_built_in_ones(tmp_path: Path) -> None:
    built_in = load_aliases(None)
    assert built_in["70b"] == "meta-llama/Llama-2-70b-hf"
    path = tmp_path / "aliases.yaml"
    assert load_aliases(path) == built_in
    path.write_text("70b: /models/llama\nmine: ~/mine\n7: /models/seven\n")
    assert load_aliases(path) == {
        **built_in, "70b": "/models/llama", "mine": "~/mine", "7": "/models/seven"
    }  # fmt: skip
    path.write_text("")
    assert load_aliases(path) == built_in


@pytest.mark.parametrize("content", [b"- 70b", b"70b: 70", b"70b: [", b"70b: \xff", b"just text"])
def test_a_table_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "aliases.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_aliases(path)
    assert str(path) in raised.value.message
    assert "\n" not in raised.value.message
