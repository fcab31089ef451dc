"""The forecast of one extraction: its work from headers, its pace measured, and both together."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pkt import api
from pkt.api.fitting import kept_records
from pkt.bench.forecast import Forecast, Pace, Work, forecast, limit_seconds
from pkt.bench.kernels import COPIED, SQUARE, copy_bandwidth, matmul
from pkt.bench.reading import ReadRates, bench_read, temporary_file, temporary_folder
from pkt.bench.rehearsal import Notify, rehearse, rehearse_factors
from pkt.checkpoint import DTYPE_BYTES
from pkt.config import MIB
from pkt.disk import on_disk
from pkt.host import memory_limit
from pkt.methods.seeking.task import DTYPES, Task
from pkt.records import IoMode, Reading, Sample, SampleSet
from pkt.schedule import peak_boundaries

ROUNDS = 3  # stretches for each way to read
FILE_BYTES = 512 * MIB  # of the file that is read where the teacher's hold nothing


@dataclass(frozen=True, slots=True)
class Prediction:
    """A forecast, and all that it was made of."""

    forecast: Forecast
    work: Work
    pace: Pace
    reading: Reading
    rates: ReadRates
    own_file: bool  #: a temporary file was read: the teacher's hold nothing but holes
    sampled_tokens: int  #: that were swept to measure
    teraflops: float  #: of a large square product in the type computed in
    copy_gigabytes_per_second: float
    limit_seconds: float  #: see `pkt.bench.forecast.limit_seconds`


def assumed_seeds(count: int, tokens: int, vocabulary: int) -> SampleSet:
    """``count`` seeds of ``tokens`` tokens whose loss counts all but the first."""
    ids = tuple(at % vocabulary for at in range(tokens))
    mask = tuple(at > 0 for at in range(tokens))
    samples = tuple(Sample(f"assumed seed {at + 1}", ids, mask) for at in range(count))
    return SampleSet(samples, sha256="", template="none")


def predict(
    task: Task,
    *,
    io: IoMode = "auto",
    folder: Path | None = None,
    notify: Notify = lambda phase, done, total: None,
) -> Prediction:
    """Measure this host with ``task``'s shapes and say how long it will take, from a cold start.

    The teacher's weights are read only to measure the disk; headers alone do as well.

    Args:
        task: prepared inputs.
        io: how the run will read.
        folder: for temporary files; ``None``: as `temporary_folder` says.
        notify: told of (phase, steps done, steps in all).

    Raises:
        BudgetError: the run does not fit; measuring takes the memory that it does.
        OutputError: temporary files cannot be written.

    """
    api.require_fit(task.plan)
    files = task.teacher.checkpoint.files
    own_file = not any(on_disk(task.teacher.checkpoint))
    place = folder or temporary_folder()
    reading = api.reading(task, io)
    with ExitStack() as stack:
        if own_file:
            files = tuple(stack.enter_context(temporary_file(place, FILE_BYTES)))
        rates = bench_read(files, ROUNDS)
        notify("disk", 1, 1)
    read_so = {name: rate for name, rate in rates.rates.items() if rate.bytes}  # a slow disk: few
    rate = read_so.get(reading.mode) or read_so.get("buffered") or read_so["raw buffered"]
    with tempfile.TemporaryDirectory(prefix="pkt-bench-", dir=place) as name:
        layers = rehearse(task, Path(name), notify)
    factors = rehearse_factors(task, reading.mode, notify)
    read = rate.gigabytes_per_second * 1e9
    pace = Pace(
        forward=layers.forward,
        backward=layers.backward,
        head=layers.head,
        ends=layers.ends,
        factors=factors.seconds,
        read=read,
        windows=factors.window_bytes / factors.window_seconds if factors.window_bytes else read,
        reading_work=rate.processor_seconds / rate.bytes / len(os.sched_getaffinity(0)),
    )
    work = work_of(task, reading.mode, memory_limit()[0])
    pieces = task.teacher.checkpoint.layers[0].values()
    square = max(max(piece.shape) for piece in pieces if len(piece.shape) == 2)
    teraflops = matmul(DTYPES[task.config.dtype], min(SQUARE, square)).teraflops
    copied = copy_bandwidth(min(COPIED, 8 * work.layer_bytes))
    notify("rates", 1, 1)
    limit = limit_seconds(work, rates.best_raw * 1e9, teraflops * 1e12, copied * 1e9)
    return Prediction(
        forecast(work, pace), work, pace, reading, rates, own_file, layers.sampled_tokens,
        teraflops, copied, limit,
    )  # fmt: skip


def work_of(task: Task, mode: str, available_bytes: int) -> Work:
    """What ``task`` has to do, when ``available_bytes`` of memory may be used in all."""
    teacher, plan, seeds = task.teacher, task.plan, task.seeds
    layers = teacher.checkpoint.layers
    sizes = [sum(piece.bytes for piece in layer.values()) for layer in layers]
    head = teacher.head or teacher.embedding
    boundary = seeds.tokens * teacher.hidden_size * DTYPE_BYTES[task.config.dtype]
    kept = peak_boundaries(len(layers), plan.spool_every, task.config.embeddings)
    cache = max(0, available_bytes - plan.peak_bytes)
    cached = 0 if mode == "direct" else min(cache, sum(sizes[: -plan.slots]))
    return Work(
        layers=len(layers),
        layer_bytes=sum(sizes) // len(layers),
        layer_parameters=max(sum(piece.elements for piece in layer.values()) for layer in layers),
        slots=plan.slots,
        seeds=len(seeds.samples),
        tokens=seeds.tokens,
        loss_tokens=seeds.loss_tokens,
        head_parameters=head.elements,
        ends_bytes=head.bytes + teacher.embedding.bytes,
        ends_reads=2 if task.config.embeddings else 1,
        window_bytes=_window_bytes(task),
        boundary_bytes=boundary,
        boundaries_cached=kept * boundary <= cache,
        cached_bytes=cached,
        every=plan.spool_every,
        segment_cached=mode != "direct" and plan.spool_every * max(sizes) <= cache,
    )


def _window_bytes(task: Task) -> int:
    """Of the matrices' parts that are read again: of layers, and of embedding and head."""
    teacher, student = task.teacher, task.student
    kept = kept_records(task.config.select)
    total = 0
    for pair in task.pairs:
        piece = teacher.checkpoint.layers[0][f"{pair.teacher.module}.weight"]
        elements = pair.read_elements(crossed=kept["crossed"], masks=kept["masks"])
        total += elements * DTYPE_BYTES[piece.dtype]
    total *= student.layers
    if task.config.embeddings:
        vocabulary, width = student.embedding.shape
        width = teacher.hidden_size if kept["sums"] else width  # with the channels between
        for piece in (teacher.embedding, teacher.head or teacher.embedding):
            total += vocabulary * width * DTYPE_BYTES[piece.dtype]
    return total
