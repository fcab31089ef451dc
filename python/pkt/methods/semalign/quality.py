"""How well a pair's maps carry what the teacher says: the quality report, step by step.

What mapped states say is read by the logit lens: their logits in the student against the logits of
the states they were mapped from, in the teacher. `dual` makes just this agree, so a good number is
a sound map and no evidence of a better student.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pkt.host import Costs, PeakMeter, describe, release_free_memory
from pkt.methods.semalign.heads import Made, open_heads, pair_maps
from pkt.methods.semalign.states import States, sweep_states
from pkt.methods.semalign.task import LENS_STATES, QualityTask
from pkt.output import MANIFEST, as_json, publish, run_folder
from pkt.pairing import unlike_attention
from pkt.records import Alignment
from pkt.report import write_alignment
from pkt.semantics import MAPS, Evidence, HeadPair
from pkt.similarity import Lens, lens_quality, linear_cka
from pkt.workplace import drop_tensors, tensor_folder

Notify = Callable[[str, int, int], None]


def run_quality(
    task: QualityTask,
    folder: Path | None = None,
    *,
    io: str = "mmap",
    device: str = "cpu",
    overwrite: bool = False,
    spool_dir: Path | None = None,
    notify: Notify = lambda phase, done, total: None,
) -> Alignment:
    """Measure a pair; with a ``folder``, leave report, maps and manifest there.

    Args:
        task: opened inputs and options.
        folder: OUT; ``None``: nothing is kept.
        io: mmap, buffered or direct.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        spool_dir: where hidden states lie meanwhile; ``None``: in OUT, or the system's folder for
            temporary files.
        notify: told of (phase, steps done, steps in all).

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    costs, peak = Costs(), PeakMeter()
    with peak.running(), _workplace(task, folder, overwrite, spool_dir) as place:
        # 1. The maps that the heads alone decide.
        with costs.phase("heads"):
            opened = partial(
                open_heads, task.teacher, task.student, task.shared, io=io, device=device
            )
            heads = opened(fold_norm=task.fold_norm)
            made = pair_maps(
                task.maps, heads, partial(opened, end="embedding"), place.maps, seed=task.seed,
                notify=partial(notify, "maps"),
            )  # fmt: skip
        # 2. States of both models at the same places, each streamed once.
        theirs, ours = (
            sweep_states(
                model, texts, place.spool / role, dtype=dtype, io=io, slots=task.plan.slots,
                device=device, notify=_named(notify, role), seconds=costs.seconds,
            )
            for role, model, texts, dtype in (
                ("teacher", task.teacher, task.teacher_texts, task.dtypes[0]),
                ("student", task.student, task.student_texts, task.dtypes[1]),
            )
        )  # fmt: skip
        # 3. What mapped states say, beside what they said before.
        with costs.phase("lens"):
            lens = _lens(task, heads, made, theirs, ours, torch.device(device))
        # 4. How alike the layers are, without any map.
        with costs.phase("similarity"):
            students = [ours.after(layer) for layer in range(1, ours.layers + 1)]
            alike = linear_cka(
                (theirs.after(layer) for layer in range(1, theirs.layers + 1)), students
            )
        found = _found(task, made, theirs, ours, lens, alike)
        run = {
            "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
            "bytes_streamed": theirs.bytes_read + ours.bytes_read,
            "peak_anonymous_bytes": peak.peak_bytes,
            "planned_bytes": task.plan.peak_bytes,
            "budget_bytes": task.plan.budget_bytes,
            "io": io,
            "maps_reused": list(made.reused),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "host": describe(),
        }
        if folder:
            _publish(folder, place, found, run)
    return Alignment(found, run, folder)


@dataclass(frozen=True)
class _Place:
    """Where a report is made."""

    spool: Path
    work: Path | None = None  #: OUT/.work

    @property
    def maps(self) -> Path | None:
        """Where maps are kept: those of an interrupted run are used again."""
        return self.work / "maps" if self.work else None


@contextmanager
def _workplace(
    task: QualityTask, folder: Path | None, overwrite: bool, spool_dir: Path | None
) -> Iterator[_Place]:
    if folder is None:
        if spool_dir:
            spool_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pkt-", dir=spool_dir) as name:
            yield _with_roles(Path(name))
        return
    with run_folder(folder, task.identity(), overwrite) as work:
        spool = work / "spool"
        drop_tensors(spool)  # of a run that was interrupted
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        yield _Place(_with_roles(tensor_folder(spool, spool_dir)).spool, work)


def _with_roles(folder: Path) -> _Place:
    for role in ("teacher", "student"):
        (folder / role).mkdir(exist_ok=True)
    return _Place(folder)


def _named(notify: Notify, role: str) -> Notify:
    return lambda phase, done, total: notify(role, done, total)


def _lens(
    task: QualityTask,
    heads: HeadPair,
    made: Made,
    theirs: States,
    ours: States,
    device: torch.device,
) -> dict[str, Lens]:
    """Logit lens of mapped states, by map, in the layers that are paired.

    Maps that are fitted on paired states see the other positions, not those they are judged by.
    """
    count = max(1, min(task.states // 2, LENS_STATES // len(task.pairs)))
    judged = torch.arange(count) * task.states // count
    rest = torch.ones(task.states, dtype=torch.bool).index_fill_(0, judged, value=False)
    states: list[torch.Tensor] = []
    mapped: dict[str, list[torch.Tensor]] = {name: [] for name in task.maps}
    for pair in task.pairs:
        whole = theirs.after(pair.teacher)
        states.append(whole[judged].to(device))
        for name in task.maps:
            matrix = made.maps.get(name)
            if matrix is None:
                both = (whole[rest], ours.after(pair.student)[rest])
                sizes = (heads.teacher.width, heads.student.width)
                matrix = MAPS[name].make(Evidence(sizes, states=both)).float()
            mapped[name].append(states[-1] @ matrix.to(device).T)
    release_free_memory()
    return lens_quality(
        ((rows, others) for _, rows, others in heads.chunks()),
        torch.stack(states),
        {name: torch.stack(each) for name, each in mapped.items()},
    )


def _found(
    task: QualityTask,
    made: Made,
    theirs: States,
    ours: States,
    lens: dict[str, Lens],
    alike: list[list[float]],
) -> dict[str, Any]:
    unlike = set(unlike_attention(task.pairs, theirs.kinds, ours.kinds))
    maps = {
        name: {
            "about": MAPS[name].about,
            "cosine": list(each.cosine),
            "top1": list(each.top1),
            "mean_cosine": _mean(each.cosine),
            "mean_top1": _mean(each.top1),
        }
        for name, each in lens.items()
    }
    return {
        **task.identity(),
        "vocabulary": {
            "same": task.shared.same,
            "shared": len(task.shared.pairs),
            "teacher": task.shared.teacher_tokens,
            "student": task.shared.student_tokens,
            "teacher_rows": task.teacher.embedding.shape[0],
            "student_rows": task.student.embedding.shape[0],
            "coverage": task.shared.coverage,
        },
        "heads": made.heads,
        "self_cosine": made.self_cosine,
        "positions": task.states,
        "pairs": [
            {
                "teacher": pair.teacher,
                "student": pair.student,
                "teacher_attention": theirs.kinds[pair.teacher - 1],
                "student_attention": ours.kinds[pair.student - 1],
                "unlike": pair in unlike,
                "similarity": alike[pair.teacher - 1][pair.student - 1],
            }
            for pair in task.pairs
        ],
        "maps": maps,
        "similarity": alike,
        "recommended": _recommended(maps, made),
        "files": ["maps"],
    }


def _recommended(maps: dict[str, Any], made: Made) -> dict[str, str] | None:
    """The map whose logits agree best, controls left out, and why."""
    serious = [name for name in maps if not MAPS[name].about.startswith("control")]
    if not serious:
        return None
    best = max(serious, key=lambda name: maps[name]["mean_cosine"])
    beside = [
        f"{name} {each['mean_cosine']:.2f}" for name, each in maps.items() if name != best
    ]  # fmt: skip
    why = (
        f"mapped states keep {maps[best]['mean_cosine']:.2f} of the centred logit-lens cosine and "
        f"{maps[best]['mean_top1']:.0%} of the top tokens"
    )
    why += f" ({', '.join(beside)})" if beside else ""
    if best != "cosine" and made.self_cosine:
        lost = made.self_cosine["student"]
        why += f"; cosine keeps {lost:.2f} of a student's state even within the student"
    if best == "dual":
        why += "; dual minimises this very error, so it says nothing yet of a better student"
    ridged = [role for role in ("teacher", "student") if made.heads[role]["ridge"]]
    if ridged:
        why += f"; the head of the {' and the '.join(ridged)} is nearly singular: a ridge was added"
    return {"map": best, "why": why}


def _publish(folder: Path, place: _Place, found: dict[str, Any], run: dict[str, Any]) -> None:
    assert place.work
    staged = place.work / "result"
    shutil.rmtree(staged, ignore_errors=True)  # a kill may have left half a file there
    staged.mkdir()
    write_alignment(staged / "report", found)
    (staged / "maps").mkdir()
    for path in sorted(place.work.glob("maps/*.safetensors")):
        path.rename(staged / "maps" / path.name)
    publish(folder, staged, {"pkt_run.json": as_json(run), MANIFEST: as_json(found)})


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
