"""The quality report of a pair as plain text: heads, maps, pairs, likeness of layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pkt.cli.tables import aligned
from pkt.config import format_bytes
from pkt.records import Alignment, AlignPlan

_SHADES = " ·░▒▓█"


def align_plan_table(plan: AlignPlan) -> str:
    """The plan, part by part, and what it is held against."""
    parts = [(part.name, format_bytes(part.bytes), part.note) for part in plan.parts]
    peak = ("at the peak", format_bytes(plan.peak_bytes), "" if plan.fits else "DOES NOT FIT")
    rows = [
        ("memory allowed", f"{format_bytes(plan.budget_bytes)}, {plan.budget_source}"),
        ("smallest --max-ram", format_bytes(plan.smallest_bytes)),
        ("to read", f"{format_bytes(plan.read_bytes)} of both models"),
    ]
    if plan.disk:
        free = f"{format_bytes(plan.disk.free_bytes)} free"
        size = f"{format_bytes(plan.disk.bytes)} while it runs, {free}"
        rows.append((f"disk for {plan.disk.folder}", size))
    return f"plan\n{aligned([*parts, peak], indent=2, right=[1])}\n{aligned(rows, indent=2)}"


def alignment_text(made: Alignment) -> str:
    """What was found, as a terminal shows it."""
    found = made.found
    parts = [_heads(found), _maps(found["maps"]), _pairs(found), _alike(found)]
    unlike = [pair for pair in found["pairs"] if pair["unlike"]]
    if unlike:
        named = ", ".join(f"{pair['teacher']}:{pair['student']}" for pair in unlike)
        parts.append(f"note: one layer slides over a window, the other does not: {named}")
    if found["recommended"]:
        parts.append(f"map: {found['recommended']['map']}\n{found['recommended']['why']}")
    if made.folder:
        parts.append(str(made.folder / "report" / "index.html"))
    return "\n\n".join(parts)


def alignment_json(made: Alignment) -> str:
    """The report as one JSON object."""
    folder = str(made.folder) if made.folder else None
    return json.dumps({"output_dir": folder, "manifest": made.found, "run": made.run}, indent=1)


def _heads(found: Mapping[str, Any]) -> str:
    both = [found["heads"]["teacher"], found["heads"]["student"]]
    words, selves = found["vocabulary"], found["self_cosine"]
    rows = [
        ("heads", "teacher", "student"),
        ("width", *(str(head["width"]) for head in both)),
        ("rank", *(str(head["rank"]) for head in both)),
        ("condition of G", *(_condition(head["condition"]) for head in both)),
        ("ridge", *(f"{head['ridge']:.3g}" if head["ridge"] else "none" for head in both)),
        ("norm folded in", *(head["norm"] for head in both)),
        ("tokens", str(words["teacher"]), str(words["student"])),
        ("rows without one", *(str(words[f"{r}_rows"] - words[r]) for r in ("teacher", "student"))),
    ]
    if selves:
        rows.append(("self-cosine of v1", *(f"{selves[r]:.3f}" for r in ("teacher", "student"))))
    shared = f"shared: {words['shared']} tokens, {words['coverage']:.1%} of the smaller vocabulary"
    if zero := found["heads"]["zero_rows"]:
        shared += f"; {zero} of them have a zero row and are left out"
    places = f"measured at {found['positions']} positions of {found['seeds']['count']} texts"
    return f"{aligned(rows)}\n{shared}\n{places}"


def _maps(maps: Mapping[str, Any]) -> str:
    head = ("map", "lens cosine", "same top token", "")
    body = [
        (name, f"{m['mean_cosine']:.3f}", f"{m['mean_top1']:.3f}", m["about"])
        for name, m in maps.items()
    ]
    return aligned([head, *body], right=[1, 2])


def _pairs(found: Mapping[str, Any]) -> str:
    """A line a pair: its layers, how alike they are, and each map's centred lens cosine."""
    names = list(found["maps"])
    head = ("teacher layer", "student layer", "CKA", *names)
    body = [
        (
            str(pair["teacher"]),
            str(pair["student"]) + ("*" if pair["unlike"] else ""),
            f"{pair['similarity']:.3f}",
            *(f"{found['maps'][name]['cosine'][index]:.3f}" for name in names),
        )
        for index, pair in enumerate(found["pairs"])
    ]
    return aligned([head, *body], right=range(len(head)))


def _alike(found: Mapping[str, Any]) -> str:
    """A character a layer pair, darker where it is more alike; the pairing in brackets."""
    values: Sequence[Sequence[float]] = found["similarity"]
    most = max(max(row) for row in values) or 1.0
    paired = {(pair["teacher"], pair["student"]) for pair in found["pairs"]}
    lines = ["layers alike (linear CKA); down: teacher, across: student, [ ]: paired"]
    for teacher, row in enumerate(values, 1):
        cells = ""
        for student, value in enumerate(row, 1):
            shade = _SHADES[max(0, min(len(_SHADES) - 1, int(value / most * len(_SHADES))))]
            cells += f"[{shade}]" if (teacher, student) in paired else f" {shade} "
        lines.append(f"{teacher:4} {cells}".rstrip())
    return "\n".join(lines)


def _condition(value: float | None) -> str:
    return "singular" if value is None else f"{value:.3g}"
