"""Records as plain text: aligned columns, no colour, widths that a terminal of 100 shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pkt.config import format_bytes
from pkt.records import Extraction, MatchRow, Plan, Reading, Recording, SampleSet


def aligned(rows: Sequence[Sequence[str]], indent: int = 0, right: Sequence[int] = ()) -> str:
    """Rows of equal length as columns two spaces apart; columns ``right`` end together."""
    shown = [[readable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" " * indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def readable(text: str) -> str:
    """One line that cannot steer a terminal, whatever a file has put into it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def models_table(teacher: Mapping[str, Any], student: Mapping[str, Any] | None) -> str:
    """Both models side by side."""
    found = [teacher, student] if student else [teacher]

    def row(label: str, *cells: str) -> tuple[str, ...]:
        return (label, *cells)

    return aligned(
        [
            row("", *("teacher", "student")[: len(found)]),
            row("model", *(str(m["name"]) for m in found)),
            row("family", *(str(m["family"]) for m in found)),
            row("layers", *(str(m["layers"]) for m in found)),
            row("hidden size", *(str(m["hidden_size"]) for m in found)),
            row("heads (key-value)", *(f"{m['heads']} ({m['kv_heads']})" for m in found)),
            row("vocabulary", *(str(m["vocabulary"]) for m in found)),
            row("head", *("the embedding" if m["tied_head"] else "its own" for m in found)),
            row("stored as", *(", ".join(m["dtypes"]) for m in found)),
            row("parameters", *(format_count(m["parameters"]) for m in found)),
            row("size", *(_size(m["bytes"], m["shards"]) for m in found)),
        ]
    )


def match_table(rows: Sequence[MatchRow]) -> str:
    """Module / teacher shape / student shape / action."""
    head = ("module", "teacher shape", "student shape", "action")
    body = [(r.module, _shape(r.teacher_shape), _shape(r.student_shape), r.action) for r in rows]
    return aligned([head, *body])


_TIMES = {
    1: "once",
    2: "once to fit the maps and once more",
    3: "twice for attribution and once more",
    4: "twice for attribution, once to fit the maps and once more",
}


def plan_table(plan: Plan, reading: Reading | None = None) -> str:
    """The plan, part by part, and what it is held against."""
    ahead = "read while others are used" if plan.slots > 1 else "read and used in turn"
    slots = f"{plan.slots} of a layer, {ahead}; what they hold at the turn is not read again"
    scores = {"layer": "of a whole layer", "matrix": "of one matrix, X and dY on disk"}
    to_read = f"{format_bytes(plan.read_bytes)} of the teacher: both passes and the windows"
    rows = [
        ("slots", slots),
        ("scores held", scores[plan.scores]),
        ("to read", to_read),
        ("layer inputs kept", kept_inputs(plan)),
        *_disk_rows(plan),
        ("adapter", format_bytes(plan.adapter_bytes)),
        ("--device cuda", f"{format_bytes(plan.device_bytes)} of its memory, estimated"),
    ]
    return _plan_text(plan, rows, reading)


def forward_plan_table(plan: Plan, reading: Reading | None = None) -> str:
    """The plan of one pass forward, as `plan_table` prints that of an extraction."""
    times = _TIMES[plan.passes]
    ahead = "read while the other is used" if plan.slots > 1 else "read and used in turn"
    rows = [
        ("slots", f"{plan.slots} of a layer, {ahead}"),
        ("to read", f"{format_bytes(plan.read_bytes)}: the teacher, {times}"),
        ("to write", f"{format_bytes(plan.record_bytes)} of targets"),
        *_disk_rows(plan),
    ]
    return _plan_text(plan, rows, reading)


def resident_plan_table(plan: Plan, reading: Reading | None = None) -> str:
    """The plan of a teacher that stays in memory beside the student."""
    times = "once" if plan.passes == 1 else "twice for attribution and once to stay"
    rows = [("to read", f"{format_bytes(plan.read_bytes)}: the teacher, {times}")]
    if plan.spool_bytes:
        rows += _disk_rows(plan)
    return _plan_text(plan, rows, reading)


def _plan_text(plan: Plan, rows: list[tuple[str, str]], reading: Reading | None) -> str:
    """Memory part by part and what it is held against, then ``rows`` and how files are read."""
    budget = f"{format_bytes(plan.budget_bytes)}, {plan.budget_source}"
    parts = [(part.name, format_bytes(part.bytes), part.note) for part in plan.parts]
    allowed = [
        ("memory allowed", budget),
        ("smallest --max-ram", format_bytes(plan.smallest_bytes)),
    ]
    rows = [*allowed, *rows]
    if reading:
        rows.append(("io", f"{reading.mode}: {reading.reason}"))
    if reading and reading.rates:
        measured = ", ".join(f"{mode} {rate:.2f}" for mode, rate in reading.rates.items())
        rows.append(("", f"measured just now: {measured} GB/s"))
    peak = ("at the peak", format_bytes(plan.peak_bytes), "" if plan.fits else "DOES NOT FIT")
    table = aligned([*parts, peak], indent=2, right=[1])
    return f"plan\n{table}\n{aligned(rows, indent=2)}"


def kept_inputs(plan: Plan) -> str:
    """How many layers' inputs are on the disk at once, and what that costs."""
    if plan.spool_every == 1:
        return "of every layer"
    kept = f"of one layer in {plan.spool_every} (--spool-every)"
    if not plan.recomputed_layers:
        return kept
    return f"{kept}; {plan.recomputed_layers} layers are run forward once more"


def _disk_rows(plan: Plan) -> list[tuple[str, str]]:
    """What the run has on each disk while it runs, and what is free there."""
    if not plan.disks:
        size = plan.spool_bytes + plan.record_bytes
        return [("disk for OUT/.work", f"{format_bytes(size)} while it runs")]
    return [
        (
            f"disk for {disk.folder}",
            f"{format_bytes(disk.bytes)} while it runs, {format_bytes(disk.free_bytes)} free"
            + ("" if disk.bytes <= disk.free_bytes else ": DOES NOT FIT"),
        )
        for disk in plan.disks
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan's fields, its peak, and whether it fits."""
    disks = [asdict(disk) for disk in plan.disks]
    return {**asdict(plan), "disks": disks, "peak_bytes": plan.peak_bytes, "fits": plan.fits}


def seeds_line(seeds: SampleSet, max_tokens: int) -> str:
    """How many seeds, how long, and how many were cut."""
    cut = sum(sample.cut for sample in seeds.samples)
    line = (
        f"seeds: {len(seeds.samples)} of {seeds.tokens} tokens, {seeds.loss_tokens} in the loss, "
        f"template {seeds.template}"
    )
    return line + (f"; {cut} cut to {min(max_tokens, seeds.longest)} tokens" if cut else "")


def summary(made: Extraction, layers: int) -> str:
    """What a finished run found and cost."""
    manifest, run = made.manifest, made.run
    seconds: Mapping[str, float] = run["seconds"]
    slowest = sorted(seconds.items(), key=lambda item: -item[1])
    phases = ", ".join(f"{name} {value:.1f}" for name, value in slowest if value >= 0.05)
    rate = run.get("gigabytes_per_second")
    pace = f" at {rate} GB/s, {run['io']}" if rate else ""
    rows = [
        ("kept layers", f"{' '.join(map(str, manifest['layers']))}  (of 0 to {layers - 1})"),
        ("mean seed loss", f"{manifest['loss']:.4f} nats a token"),
        ("seconds", f"{sum(seconds.values()):.1f}: {phases}"),
        ("read", format_bytes(run["bytes_read"]) + pace),
        (
            "memory",
            f"{format_bytes(run['peak_anonymous_bytes'])} at the peak, "
            f"{format_bytes(run['planned_bytes'])} planned",
        ),
        ("report", str(made.folder / "report" / "index.html")),
    ]
    scorer = str(run.get("scorer", ""))
    if scorer.startswith("torch"):  # slower than what was meant to score
        rows.insert(-1, ("scored by", scorer))
    return aligned(rows)


def recording_summary(made: Recording) -> str:
    """What finished targets say of the teacher, and what they cost."""
    manifest, run = made.manifest, made.run
    slowest = sorted(run["seconds"].items(), key=lambda item: -item[1])
    phases = ", ".join(f"{name} {value:.1f}" for name, value in slowest if value >= 0.05)
    rate = run.get("gigabytes_per_second")
    rows = []
    if "tail" in manifest:
        outside = f"{100 * manifest['tail']:.2g} % of the probability is outside of the "
        rows = [
            ("teacher's loss", f"{manifest['loss']:.4f} nats an answer token"),
            ("tail", f"{outside}{manifest['options']['top_k']} tokens kept, as one bin"),
        ]
    if "pairs" in manifest:
        count = f"{manifest['rows']} of {len(manifest['pairs'])} layers, {manifest['width']} wide"
        kept = manifest["states"]["dtype"]
        rows.append(("states", f"{count}; {kept} is off by {manifest['rounding']:.2g} at most"))
    rows += [
        ("seconds", f"{sum(run['seconds'].values()):.1f}: {phases}"),
        (
            "read",
            format_bytes(run["bytes_read"]) + (f" at {rate} GB/s, {run['io']}" if rate else ""),
        ),
        (
            "memory",
            f"{format_bytes(run['peak_anonymous_bytes'])} at the peak, "
            f"{format_bytes(run['planned_bytes'])} planned",
        ),
    ]
    return aligned(rows)


def bars(scores: Sequence[float], kept: Sequence[int], width: int = 40) -> str:
    """A bar a teacher layer, kept layers marked."""
    unit = (max(scores, default=0.0) or 1.0) / width
    rows = [
        ("●" if layer in kept else " ", str(layer), "█" * round(score / unit), f"{score:.4g}")
        for layer, score in enumerate(scores)
    ]
    return aligned(rows, indent=2, right=[1, 3])


def windows_table(windows: Mapping[str, Mapping[str, Any]]) -> str:
    """Student matrix, teacher matrix, and the window's place."""
    head = ("student matrix", "teacher matrix", "rows", "columns", "score")
    body = [
        (key, str(w["teacher"]), _range(w.get("rows")), _range(w.get("cols")), f"{w['score']:.4g}")
        for key, w in windows.items()
    ]
    return aligned([head, *body], indent=2, right=[4])


def format_count(count: int) -> str:
    """A number of parameters: 1.24 B, 7.3 M, 812."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= 0.9995 * size:  # 999 950 is 1 M in three digits
            return f"{count / size:.3g} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """A time for people: ``1 h 52 min``, ``3 min 20 s``, ``12 s``, ``0.8 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _size(count: int, files: int) -> str:
    return f"{format_bytes(count)} in {files} file{'s' if files != 1 else ''}"


def _shape(shape: Sequence[int] | None) -> str:
    return " × ".join(map(str, shape)) if shape else "none"


def _range(indices: Sequence[int] | None) -> str:
    return f"{indices[0]}:{indices[-1]}" if indices else "single weights"
