"""The teacher's side of `pkt train --distill`: a folder of targets, found to fit the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.errors import CheckpointError, DataError, IncompatibleError, UsageError
from pkt.models import Model, vocabulary, vocabulary_sha256
from pkt.records import SampleSet

LOSSES = ("topk-kl", "kl")


@dataclass(frozen=True, slots=True)
class Teacher:
    """Opened targets: the objective of a run, and what its manifest says of them."""

    objective: Any  #: `pkt.training.Distillation`
    origin: dict[str, Any]


def require_pair(distill: str | None, folder: str | Path | None, weight: float) -> None:
    """Refuse one of ``--distill`` and ``--teacher-targets`` without the other, and odd values.

    Raises:
        UsageError: as said.

    """
    if distill is not None and distill not in LOSSES:
        raise UsageError(f"--distill {distill}: expected one of {', '.join(LOSSES)}")
    if distill and not folder:
        raise UsageError(
            f"--distill {distill}: from which teacher?",
            "add --teacher-targets DIR, which pkt align --targets-only writes, or --online "
            "--teacher MODEL",
        )
    if folder and not distill:
        raise UsageError("--teacher-targets: not used without --distill", "add --distill topk-kl")
    if not 0 < weight <= 1:
        raise UsageError(f"--distill-weight {weight:g}: expected more than 0, at most 1")
    if weight != 1 and not distill:
        raise UsageError("--distill-weight: not used without --distill", "add --distill topk-kl")


def open_teacher(
    folder: Path,
    distill: str,
    weight: float,
    student: Model,
    samples: SampleSet,
    options: Mapping[str, Any],
) -> Teacher:
    """The targets in ``folder``, which are of this student's vocabulary and of these very samples.

    Args:
        folder: that `pkt align` wrote.
        distill: ``topk-kl`` or ``kl``, which needs the logits of the whole vocabulary.
        weight: of the divergence.
        student: the model that learns.
        samples: what it learns from.
        options: how they were read: template, max_tokens, max_examples.

    Raises:
        UsageError: no such folder, or ``kl`` from a part of the vocabulary.
        CheckpointError: it is damaged.
        IncompatibleError: it holds something else, or another vocabulary's targets.
        DataError: the targets are of other data.

    """
    from pkt.training import Distillation

    opened = open_targets(folder, student, samples, options)
    targets, rows = opened.targets, opened.rows
    if not targets.top_k:
        raise no_logits(folder, f"--distill {distill}")
    if distill == "kl" and targets.top_k < rows:
        raise UsageError(
            f"--distill kl: expected the logits of all {rows} tokens, found the {targets.top_k} "
            f"largest in {folder}",
            "take --distill topk-kl, or write targets with --top-k 0",
        )
    return Teacher(Distillation(targets.of, rows, weight), opened.origin)


@dataclass(frozen=True, slots=True)
class Opened:
    """A folder of targets that are of this student and of these samples."""

    targets: Any  #: `pkt.targets.Targets`
    rows: int  #: tokens of the vocabulary, without rows that only pad it
    origin: dict[str, Any]  #: what the manifest of a run says of them
    student: Mapping[str, Any] | None  #: hashes of the one that states are mapped to


def open_targets(
    folder: Path, student: Model, samples: SampleSet, options: Mapping[str, Any]
) -> Opened:
    """Open ``folder`` and see what it was written for; arguments and errors as of `open_teacher`.

    Where it holds no logits, the vocabulary is the student's own.
    """
    from pkt.targets import FOLDER, Targets

    manifest = _manifest(folder)
    if manifest.get("method") != "targets":
        raise IncompatibleError(
            f"--teacher-targets {folder}: expected targets of pkt align, found a result of "
            f"'{manifest.get('method')}'"
        )
    try:
        said = dict(manifest["vocabulary"])
        data, given = dict(manifest["data"]), dict(manifest["options"])
        teacher = dict(manifest["teacher"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / "pkt_manifest.json", error) from error
    targets = Targets(folder / FOLDER)
    rows = _vocabulary_rows(folder, said, student) if targets.top_k else _own_rows(student)
    if data.get("sha256") != samples.sha256:
        raise DataError(
            f"--teacher-targets {folder}: {_difference(data, given, samples, options)}",
            "give the --data and the options that the targets were written with, or write new ones",
        )
    if targets.answers != [sample.loss_tokens for sample in samples.samples]:
        raise CheckpointError(f"{folder}: these targets are damaged: other examples than its data")
    origin = {"top_k": targets.top_k, "teacher": teacher, "sha256": targets.sha256}
    return Opened(targets, rows, origin, manifest.get("student"))


def no_logits(folder: Path | None, option: str) -> IncompatibleError:
    """The error for targets between two vocabularies, where logits are wanted."""
    lacking = f"{folder} holds no logits" if folder else "there are no logits to learn from"
    return IncompatibleError(
        f"{option}: {lacking}: teacher and student have different tokenizers",
        "take an objective without the KL, or a teacher of the student's tokenizer",
    )


def _vocabulary_rows(folder: Path, said: Mapping[str, Any], student: Model) -> int:
    try:
        rows, digest = int(said["rows"]), str(said["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / "pkt_manifest.json", error) from error
    if vocabulary_sha256(student) != digest or student.embedding.shape[0] < rows:
        raise IncompatibleError(
            f"--teacher-targets {folder}: written for a student of {rows} tokens with another "
            f"tokenizer than that of {student.name}",
            "write targets with this --student",
        )
    return rows


def _own_rows(student: Model) -> int:
    tokens = vocabulary(student) or {}
    return min(max(tokens.values(), default=-1) + 1, student.embedding.shape[0])


def _difference(
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    samples: SampleSet,
    options: Mapping[str, Any],
) -> str:
    """In what the data differ, as far as the manifest tells."""
    changed = [
        f"--{name.replace('_', '-')} was {given.get(name)}, is {value}"
        for name, value in options.items()
        if given.get(name) != value
    ]
    if not changed and data.get("count") != len(samples.samples):
        changed = [f"it has {data.get('count')} examples, expected {len(samples.samples)}"]
    return "; ".join(changed) or "the training data have changed since its targets were written"


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "pkt_manifest.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"--teacher-targets {folder}: expected a folder that pkt align wrote, found no "
            f"{path.name}",
            "an unfinished one is continued by its pkt align command",
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise _damaged(path, TypeError("no JSON object"))
    return found


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {type(error).__name__} {error}")
