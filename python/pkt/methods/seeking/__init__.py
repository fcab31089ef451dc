"""SEEKING: a LoRA start for a small student from a large teacher's most sensitive parameters.

Zhong et al., "Seeking Neural Nuggets: Knowledge Transfer in Large Language Models from a
Parametric Perspective", ICLR 2024, https://arxiv.org/abs/2310.11451, sections 3.1 and 3.2.

=================  ======================================================
paper              here
=================  ======================================================
sensitivity        `LayerScores`, summed over seeds, one layer at a time
layer selection    `pick_layers`: the student's number of teacher layers
sub-matrix         `choose` and `cut_window`: the window of largest sum
W = UΣVᵀ → B, A    `factorize`
=================  ======================================================
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from pkt.adapter import adapter_config, adapter_tensors, check_adapter, write_adapter
from pkt.card import model_card
from pkt.errors import PktError
from pkt.host import Costs, PeakMeter, one_thread
from pkt.methods.seeking.folders import shared_folder
from pkt.methods.seeking.record import manifest, run_record
from pkt.methods.seeking.steps import Notify, Start, extract_start, require_linear, score
from pkt.methods.seeking.task import DTYPES, Config, Task
from pkt.output import MANIFEST, as_json, publish
from pkt.processes import is_first, wait_for_all
from pkt.records import Extraction, Factors, Reading
from pkt.report import write_report
from pkt.selection import pick_layers
from pkt.stream import CheckpointSource
from pkt.sweep import build_skeleton
from pkt.workplace import drop_folder, tensors_of

__all__ = ["Config", "Task", "run"]


def run(
    task: Task,
    folder: Path,
    *,
    io: Reading,
    device: str = "cpu",
    overwrite: bool = False,
    notify: Notify = lambda phase, done, total: None,
) -> Extraction:
    """Extract a LoRA start; the same call continues a run that was interrupted.

    Args:
        task: opened inputs and options.
        folder: OUT.
        io: mmap, buffered or direct, and why.
        device: "cpu" or "cuda".
        overwrite: replace what an earlier run of pkt left in OUT.
        notify: told of (phase, steps done, steps in all).

    Returns:
        the finished run; in all but the first of several processes, without what it found.

    Raises:
        PktError: and its subclasses, see `pkt.errors`.

    """
    config, place = task.config, torch.device(device)
    dtype, costs, peak = DTYPES[config.dtype], Costs(), PeakMeter()
    weights = task.teacher.checkpoint.state()
    identity = {**task.identity(), "device": place.type, "weights": weights}
    with (
        peak.running(),
        one_thread(task.teacher.small),
        shared_folder(folder, identity, overwrite, task.processes) as (work, spool),
    ):
        with costs.phase("skeleton"):
            skeleton = build_skeleton(task.teacher.folder, dtype, place)
            student = build_skeleton(task.student.folder, torch.float32)
            require_linear(task, skeleton, student)
        source = CheckpointSource(task.teacher.checkpoint, io.mode, task.plan.slots, dtype, place)
        try:
            # 1. Sensitivity of every teacher parameter, summed over the seeds; the most
            #    sensitive sub-matrix of every weight, while its scores are in memory.
            scores = score(task, skeleton, source, spool, notify, costs.seconds)
            if not is_first():
                elsewhere = tensors_of(spool)
                wait_for_all()
                drop_folder(elsewhere, spool)
                return Extraction(folder, task.identity(), {})
            # 2. The teacher layers that feed the student's, in order.
            layers = pick_layers(scores.layers, task.student.layers, config.layers, config.seed)
            # 3. The chosen sub-matrices, read again; 4. their leading factors.
            with costs.phase("factors"):
                start = extract_start(
                    task, skeleton, student, source, scores, layers, spool, notify
                )
        finally:
            source.close()
        found = manifest(task, scores, layers, start)
        staged = work / "result"
        shutil.rmtree(staged, ignore_errors=True)  # a kill may have left half a file there
        staged.mkdir()
        with costs.phase("write"):
            _write_adapter(task, start, student.embedding.removesuffix(".weight"), staged)
        with costs.phase("report"):
            spectra = {name: f.singular_values for name, f in start.factors.items()}
            energy = {name: _kept(f) for name, f in start.factors.items()}
            write_report(staged / "report", found, start.heats, spectra, energy)
        record = run_record(task, source, io, costs, peak)
        texts = {
            "README.md": model_card(found, task.base_model),
            "pkt_run.json": as_json(record),
            MANIFEST: as_json(found),
        }
        publish(folder, staged, texts)
        with contextlib.suppress(PktError):  # one that is lost now has nothing left to do
            wait_for_all()
    return Extraction(folder, found, record)


def _write_adapter(task: Task, start: Start, embedding: str, staged: Path) -> None:
    every_layer = task.config.targets is None
    config = adapter_config(start.factors, task.config.rank, task.base_model, every_layer)
    named = embedding if embedding in start.factors else None
    write_adapter(staged, config, adapter_tensors(start.factors, named))
    check_adapter(staged, task.student.folder)


def _kept(factors: Factors) -> float:
    """‖BA‖_F / ‖W‖_F."""
    kept = max(factors.norm**2 - factors.residual**2, 0.0) ** 0.5
    return kept / factors.norm if factors.norm else 0.0
