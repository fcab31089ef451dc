"""The plan counts what a run holds: part by part, and how each number follows the request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pkt
from pkt.api import free_device_bytes, require_device_fit, require_fit
from pkt.errors import BudgetError, UsageError
from pkt.models import Model, open_model
from pkt.plan import make_plan
from pkt.plan.sizes import EAGER, MOST_PRODUCTS, PRODUCT_BYTES
from pkt.projections import match
from pkt.records import Plan, Room
from test_extract import build_pair, write_seeds

GIB = 1 << 30


def sparse(
    folder: Path, layers: int, hidden: int, mlp: int, heads: int, dtype: str = "BF16"
) -> Model:
    """A model of real size whose file has a header, a length and no data on the disk."""
    shapes = {"model.embed_tokens": (32000, hidden), "lm_head": (32000, hidden)}
    for i in range(layers):
        for name in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{name}_proj"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"model.layers.{i}.mlp.{name}_proj"] = (mlp, hidden)
        shapes[f"model.layers.{i}.mlp.down_proj"] = (hidden, mlp)
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + rows * columns * 2
        header[f"{name}.weight"] = {
            "dtype": dtype, "shape": [rows, columns], "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    return open_model(str(folder), {})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("plan")
    return sparse(folder / "t", 3, 4096, 11008, 32), sparse(folder / "s", 2, 2048, 5504, 16)


def planned(pair: tuple[Model, Model], budget: int = 64 * GIB, **options: Any) -> Plan:
    settings: dict[str, Any] = {"dtype": "BF16", "rank": 16, "tokens": 3200, "longest": 100,
                                "rows": 100, "shapes": 1}  # fmt: skip
    pairs, _, problems = match(*pair, None, embeddings=False)
    assert not problems
    return make_plan(*pair, pairs, budget=(budget, "--max-ram"), **{**settings, **options})


def part(plan: Plan, name: str) -> int:
    return sum(p.bytes for p in plan.parts if p.name == name)


def test_parts_sum_to_the_peak(pair: tuple[Model, Model]) -> None:
    plan = planned(pair)
    assert plan.peak_bytes == sum(p.bytes for p in plan.parts)
    assert plan.fits
    layer = sum(p.bytes for p in pair[0].checkpoint.layers[0].values())
    elements = sum(p.elements for p in pair[0].checkpoint.layers[0].values())
    assert plan.slots == pair[0].layers  # of 64 GiB, enough for all of them
    assert part(plan, "layer slots") == pytest.approx(plan.slots * layer, rel=0.02)
    assert part(plan, "scores, float32") == 4 * elements


def test_less_memory_means_one_slot_then_one_matrix(pair: tuple[Model, Model]) -> None:
    """The faster settings first; the smallest is where nothing is left to give up."""
    large = planned(pair)
    found = []
    budget = large.peak_bytes
    while True:
        plan = planned(pair, budget)
        if not plan.fits:
            break
        found.append((plan.slots, plan.scores))
        budget = plan.peak_bytes - 1
    every = list(range(pair[0].layers, 0, -1))
    assert [slots for slots, scores in found if scores == "layer"] == every
    assert found[-1] == (1, "matrix")
    assert plan.smallest_bytes >= budget
    assert plan.smallest_bytes - budget <= (1 << 20) + 1
    assert planned(pair, plan.smallest_bytes).fits
    assert not planned(pair, plan.smallest_bytes - (1 << 20)).fits


def test_layers_in_memory_at_the_turn_are_not_read_again(pair: tuple[Model, Model]) -> None:
    large = planned(pair)
    small = planned(pair, large.peak_bytes - 1)
    layer = sum(p.bytes for p in pair[0].checkpoint.layers[-1].values())
    assert small.slots == large.slots - 1
    assert small.read_bytes - large.read_bytes == layer


def test_a_matrix_at_a_time_needs_disk(pair: tuple[Model, Model]) -> None:
    large = planned(pair)
    small = planned(pair, large.smallest_bytes)
    assert small.scores == "matrix"
    assert small.spool_bytes > large.spool_bytes
    depth, width, tokens = pair[0].layers, pair[0].hidden_size, 3200
    assert large.spool_bytes == (depth + 2) * tokens * width * 2


def test_what_grows_and_what_does_not(pair: tuple[Model, Model]) -> None:
    base = planned(pair)
    more = planned(pair, tokens=6400).peak_bytes - part(planned(pair, tokens=6400), "seeds")
    assert more == base.peak_bytes - part(base, "seeds"), "more seeds cost no more than themselves"
    assert planned(pair, tokens=6400).spool_bytes > base.spool_bytes
    assert planned(pair, longest=2000).peak_bytes > base.peak_bytes
    assert planned(pair, rank=32).adapter_bytes > base.adapter_bytes
    assert planned(pair, masks=True).record_bytes > base.record_bytes == 0
    assert planned(pair, dtype="F32").peak_bytes > base.peak_bytes


def test_sums_of_every_layer_are_held_and_kept(pair: tuple[Model, Model]) -> None:
    """8 bytes for each row and column of seven matrices, a third more as base64."""
    base, sums = planned(pair), planned(pair, sums=True)
    numbers = 4 * (4096 + 4096) + 3 * (11008 + 4096)
    size = pytest.approx(3 * numbers * 8 * 4 / 3, abs=100)
    assert part(sums, "sums of every layer") == size
    assert sums.peak_bytes - base.peak_bytes == size
    assert sums.record_bytes - base.record_bytes == size


def test_crossed_rows_and_columns_read_the_columns_between(pair: tuple[Model, Model]) -> None:
    base, crossed = planned(pair).read_bytes, planned(pair, crossed=True).read_bytes
    more = 4 * 2048 * 2048 + 2 * 5504 * 2048 + 2048 * 5504  # twice the columns
    assert crossed - base == 2 * more * 2


def test_choices_of_every_layer_are_held(pair: tuple[Model, Model]) -> None:
    """Four bytes for each row and column taken of seven matrices, a third more as base64."""
    listed = 4 * (2048 + 2048) + 3 * (5504 + 2048)
    crossed = planned(pair, crossed=True)
    assert crossed.record_bytes == pytest.approx(3 * listed * 4 * 4 / 3, abs=100)
    assert part(crossed, "choices of every layer") == crossed.record_bytes


@pytest.mark.parametrize("bfloat16", [False, True])
def test_products_of_each_shape_where_onednn_keeps_them(
    bfloat16: bool, pair: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkt.plan.sizes.multiplies_bfloat16", lambda: bfloat16)
    held = part(planned(pair, shapes=10), "products of each shape")
    assert held == (10 * 3 * PRODUCT_BYTES if bfloat16 else 0)  # q to o, gate and up, down
    most = part(planned(pair, shapes=10**6), "products of each shape")
    assert most == (MOST_PRODUCTS * PRODUCT_BYTES if bfloat16 else 0)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi3", "granite",
     "granite_swa", "vaultgemma"],
)  # fmt: skip
def test_whose_attention_is_eager_is_as_transformers_says(family: str) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if family not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    assert (family in EAGER) == (not model._supports_sdpa)


def test_a_high_rank_costs_its_decomposition_and_the_adapter(tmp_path: Path) -> None:
    """Up to 4 r = n triplets of a window are all taken, in float64: then the factors bind."""
    teacher, small = (sparse(tmp_path / name, 2, 2048, 5504, 16) for name in "ts")
    low, high = planned((teacher, small)), planned((teacher, small), rank=1024)
    assert part(low, "largest window") == 0, "the sweep binds"
    elements, short = 5504 * 2048, 2048
    assert part(high, "largest window") >= 24 * elements + 8 * short * (short + 5504)
    adapter = 2 * 1024 * (4 * 4096 + 3 * (5504 + 2048)) * 4
    assert part(high, "adapter") == adapter == high.adapter_bytes


def test_depth_costs_disk_and_reading_but_no_memory(tmp_path: Path) -> None:
    """Law 4 on paper: 8 and 32 layers of one width hold the same."""
    small = sparse(tmp_path / "s", 2, 1024, 2048, 8)
    teachers = [sparse(tmp_path / f"{layers}", layers, 2048, 5504, 16) for layers in (8, 32)]
    smallest = planned((teachers[0], small)).smallest_bytes
    plans = [planned((teacher, small), smallest) for teacher in teachers]
    assert plans[0].peak_bytes == plans[1].peak_bytes <= smallest
    assert plans[0].smallest_bytes == plans[1].smallest_bytes
    assert plans[0].spool_bytes < plans[1].spool_bytes
    assert plans[0].read_bytes < plans[1].read_bytes


@pytest.mark.parametrize("embeddings", [False, True])
def test_read_and_adapter_bytes_are_those_of_the_run(embeddings: bool, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama", tied=False)
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    task = pkt.api.prepare(str(teacher), str(student), seeds, rank=4, embeddings=embeddings)
    made = pkt.api.execute(task, tmp_path / "out", io="mmap")
    norm = 48 * 4
    assert task.plan.read_bytes == pytest.approx(made.run["bytes_read"], abs=4 * norm)
    size = (made.folder / "adapter_model.safetensors").stat().st_size
    assert task.plan.adapter_bytes == pytest.approx(size, abs=20_000)  # names in the header


@pytest.mark.parametrize("select", ["top-weights", "random-weights"])
def test_single_weights_cost_whole_matrices(select: Any, tmp_path: Path) -> None:
    """Repeated kv heads are stored, and read, once."""
    teacher, student = build_pair(tmp_path, "llama", "llama", tied=False)
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    task = pkt.api.prepare(str(teacher), str(student), seeds, rank=4, select=select)
    made = pkt.api.execute(task, tmp_path / "out", io="mmap")
    assert task.plan.read_bytes == pytest.approx(made.run["bytes_read"], abs=4 * 48 * 4)


@pytest.mark.parametrize("select", ["rows-cols", "consistent"])
def test_reading_of_crossed_windows_stays_within_the_plan(select: Any, tmp_path: Path) -> None:
    """The columns before the first and after the last are not read, nor a row twice."""
    teacher, student = build_pair(tmp_path, "llama", "llama", tied=False)
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    options = {"rank": 4, "embeddings": True, "select": select}
    task = pkt.api.prepare(str(teacher), str(student), seeds, **options)
    made = pkt.api.execute(task, tmp_path / "out", io="mmap")
    norm, read = 48 * 4, made.run["bytes_read"]
    assert 0.9 * task.plan.read_bytes < read < task.plan.read_bytes + 4 * norm


SLOW_SEGMENTS = [(1, 3), (2, 2), (3, 3), (4, 2), (9, 2)]


@pytest.mark.parametrize(
    ("every", "slots"),
    [
        (1, 1),
        (2, 1),
        (3, 2),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_SEGMENTS),
    ],
)
def test_the_work_folder_stays_within_the_plan(every: int, slots: int, tmp_path: Path) -> None:
    """Disk, reading and steps are those of the run, whatever k and the slots."""
    big = {"layers": 7}
    paths = (
        *map(str, build_pair(tmp_path, "llama", "llama", big=big, tied=False)),
        write_seeds(tmp_path / "seeds.jsonl", count=40),
    )
    options: dict[str, Any] = {"rank": 4, "limit": 0, "spool_every": every}
    whole = pkt.api.prepare(*paths, **options).plan
    assert whole.slots == 7
    budget = whole.peak_bytes - (7 - slots) * part(whole, "layer slots") // 7
    task = pkt.api.prepare(*paths, **options, max_ram=str(budget))
    assert task.plan.slots == slots
    out, sizes, phases = tmp_path / "out", [], []

    def notify(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        files = [path for path in (out / ".work" / "spool").iterdir() if path.suffix == ".bin"]
        sizes.append(sum(path.stat().st_size for path in files))

    made = pkt.api.execute(task, out, notify=notify, io="mmap")
    block = task.seeds.tokens * 48 * 4
    assert task.plan.spool_bytes - 2 * block < max(sizes) + block <= task.plan.spool_bytes
    assert phases.count("again") == task.plan.recomputed_layers
    assert made.run["bytes_read"] == pytest.approx(task.plan.read_bytes, abs=7 * 48 * 4)


def room(spool: int, out: int | None = None) -> Room:
    """So much free on the disk of the spool; OUT on the same one, or with its own room."""
    shared = out is None
    return Room("OUT", spool if out is None else out, None if shared else "DIR", spool, shared)


def test_a_disk_that_is_memory_is_part_of_the_plan(tmp_path: Path) -> None:
    small = sparse(tmp_path / "s", 2, 1024, 2048, 8)
    pair = sparse(tmp_path / "t", 8, 2048, 5504, 16), small
    disk = room(1 << 50)
    on_disk, in_memory = (
        planned(pair, room=disk),
        planned(pair, room=replace(disk, spool_in_memory=True)),
    )
    assert part(in_memory, "layer inputs") == in_memory.spool_bytes > 0
    assert part(on_disk, "layer inputs") == 0
    assert in_memory.smallest_bytes > on_disk.smallest_bytes
    held = replace(disk, spool_in_memory=True, spool_held=in_memory.spool_bytes - 1000)
    assert part(planned(pair, room=held), "layer inputs") == 1000, "the rest is no longer free"
    shared = replace(disk, spool_in_memory=True, sharing=4)
    assert part(planned(pair, room=shared), "layer inputs") == in_memory.spool_bytes // 4


def test_many_seeds_take_memory_themselves(tmp_path: Path) -> None:
    pair = (sparse(tmp_path / "t", 4, 2048, 5504, 16), sparse(tmp_path / "s", 2, 1024, 2048, 8))
    few, many = planned(pair, tokens=2048), planned(pair, tokens=2048 * 10_000)
    assert part(many, "seeds") == 10_000 * part(few, "seeds")
    assert 0.8e9 < part(many, "seeds") < 1.2e9


def test_the_smallest_k_that_the_disk_has_room_for(tmp_path: Path) -> None:
    small = sparse(tmp_path / "s", 2, 1024, 2048, 8)
    pair = sparse(tmp_path / "t", 40, 2048, 5504, 16), small
    block = 3200 * 2048 * 2
    whole = planned(pair, room=room(1 << 50))
    assert whole.spool_every == 1
    assert whole.spool_bytes == 42 * block
    kept = whole.record_bytes + whole.adapter_bytes
    for every in (1, 2, 3, 4, 5):
        needed = planned(pair, every=every, room=room(1 << 50)).spool_bytes
        exact = planned(pair, room=room(needed + kept))
        assert (exact.spool_every, exact.spool_bytes) == (every, needed)
        less = planned(pair, room=room(needed + kept - 1))
        assert less.spool_every != every
        apart = planned(pair, room=room(needed, kept))  # the spool on a disk of its own
        assert apart.spool_every == every
        assert [disk.bytes for disk in apart.disks] == [needed, kept]
        assert [disk.folder for disk in apart.disks] == ["DIR", "OUT/.work"]
    half = planned(pair, every=2, room=room(1 << 50))
    assert half.recomputed_layers == 19
    assert half.flop / whole.flop == pytest.approx(1 + 19 / 160, rel=0.01)
    assert half.read_bytes > whole.read_bytes


def test_a_disk_too_small_for_any_k_is_refused_with_numbers(tmp_path: Path) -> None:
    small = sparse(tmp_path / "s", 2, 1024, 2048, 8)
    pair = sparse(tmp_path / "t", 40, 2048, 5504, 16), small
    plan = planned(pair, room=room(1 << 20))
    every, least = plan.least_spool
    assert plan.spool_every == every
    assert plan.spool_bytes == least
    assert least == min(
        planned(pair, every=k, room=room(1 << 50)).spool_bytes for k in range(1, 41)
    )  # fmt: skip
    with pytest.raises(BudgetError, match=r"its disk has 1\.00 MiB free") as caught:
        require_fit(plan)
    assert f"with --spool-every {every}: make room" in str(caught.value.hint)
    kept = plan.record_bytes + plan.adapter_bytes
    asked = planned(pair, every=1, room=room(least + kept))
    with pytest.raises(BudgetError, match=r"this run writes .* \(--spool-every 1\)") as caught:
        require_fit(asked)
    assert str(caught.value.hint).startswith(f"--spool-every {every} needs ")
    require_fit(planned(pair, room=room(least + kept)))
    with pytest.raises(BudgetError, match=r"OUT/\.work: this run writes"):
        require_fit(planned(pair, room=room(least, kept - 1)))


def test_a_device_holds_two_layers_and_their_scores_whatever_the_slots(
    pair: tuple[Model, Model],
) -> None:
    elements = sum(p.elements for p in pair[0].checkpoint.layers[0].values())
    large = planned(pair)
    small = planned(pair, large.peak_bytes - 1)
    assert large.slots > small.slots
    assert large.device_parts == small.device_parts
    parts = {part.name: part.bytes for part in large.device_parts}
    assert parts["weights"] == 2 * elements * 2
    assert parts["scores, float32"] == 4 * elements
    assert large.device_bytes == sum(parts.values())
    matrix = planned(pair, large.smallest_bytes)
    assert matrix.scores == "matrix"
    assert matrix.device_bytes < large.device_bytes
    longer = planned(pair, longest=2048, rows=2048)
    assert longer.device_bytes > large.device_bytes
    wide = {part.name: part.bytes for part in planned(pair, dtype="F32").device_parts}
    assert wide["weights"] == 2 * parts["weights"]
    assert "largest weight as stored" in wide


def test_a_device_too_small_is_refused_with_numbers(pair: tuple[Model, Model]) -> None:
    plan = planned(pair)
    require_device_fit(plan, plan.device_bytes)
    require_device_fit(plan, free_device_bytes("cpu"))
    with pytest.raises(BudgetError) as caught:
        require_device_fit(plan, plan.device_bytes - 1)
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith("--device cuda: this run holds ")
    assert "scores, float32 " in caught.value.message
    with pytest.raises(BudgetError, match=r"; 1\.00 GiB are free"):
        require_device_fit(plan, 1 << 30)


def test_inspect_plans_without_a_student_and_names_what_is_wrong(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama", small={"layers": 5})
    alone = pkt.inspect(str(teacher), max_ram="8GiB")
    assert alone.student is None
    assert alone.plan is not None
    assert alone.plan.budget_bytes == 8 * GIB
    both = pkt.inspect(str(teacher), str(student))
    assert "the student must not be deeper" in both.problems[0]
    with pytest.raises(UsageError, match="--dtype float64: expected auto"):
        pkt.inspect(str(teacher), dtype="float64")


def test_values_of_another_width_than_queries_keep_whole_matrices(
    pair: tuple[Model, Model],
) -> None:
    """Latent attention, as of MiniCPM3: torch has no fused kernel for it on a CPU."""
    teacher, student = pair
    widths = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    latent = replace(teacher, config={**teacher.config, **widths})
    plain, more = (
        part(planned((big, student), rows=2048, longest=2048), "activations of a batch")
        for big in (teacher, latent)
    )
    assert more - plain == 2048 * teacher.heads * (12 * 2048 - 2 * 2 * 512)
