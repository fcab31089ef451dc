"""Law 1 for pairs that differ: grouped queries, fused modules, families, shapes, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import pkt
import reference
import tiny
from pkt.errors import IncompatibleError, UsageError
from test_extract import RANK, build_pair, compare, run_both, write_seeds

torch.set_num_threads(1)
GROUPED = {"heads": 8, "kv_heads": 2, "hidden": 64}  # 16 rows of k and v, expanded to 64
UNGROUPED = {"heads": 4, "kv_heads": 4, "hidden": 32}


def extract(folder: Path, teacher: Path, student: Path, **options: Any) -> pkt.records.Extraction:
    seeds = write_seeds(folder / "seeds.jsonl")
    options = {"rank": RANK, "dtype": "float32", **options}
    return pkt.extract(str(teacher), str(student), seeds, folder / "out", **options)


@pytest.mark.parametrize("select", ["window", "rows-cols", "top-weights"])
def test_grouped_heads_are_expanded_where_the_student_has_more_rows(
    select: str, tmp_path: Path
) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama", big=GROUPED, small=UNGROUPED)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", select=select)
    compare(made, wanted)
    repeats = {k.rsplit(".", 1)[-1]: w["kv_repeat"] for k, w in made.manifest["windows"].items()}
    assert {name for name, repeat in repeats.items() if repeat > 1} == {"k_proj", "v_proj"}
    assert repeats["k_proj"] == 4
    if select == "window":
        for name, window in made.manifest["windows"].items():
            if name.endswith(("k_proj", "v_proj")):
                start, stop = window["rows"]
                assert stop - start == 32, "more rows than the teacher stores"
                assert 0 <= start <= 64 - 32


def test_grouped_heads_stay_where_the_student_fits(tmp_path: Path) -> None:
    """Only when the student's k has more rows; here both have 16."""
    small = {"heads": 4, "kv_heads": 2, "hidden": 32}
    teacher, student = build_pair(tmp_path, "llama", "llama", big=GROUPED, small=small)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)
    assert {window["kv_repeat"] for window in made.manifest["windows"].values()} == {1}


def test_still_too_small_after_expansion_is_refused_by_name(tmp_path: Path) -> None:
    big = {"heads": 4, "kv_heads": 2, "hidden": 48, "head_dim": 4}
    teacher, student = build_pair(tmp_path, "llama", "llama", big=big, small=UNGROUPED)
    with pytest.raises(IncompatibleError) as caught:
        extract(tmp_path, teacher, student)
    assert "self_attn.k_proj: teacher shape (16, 48), student shape (32, 32)" in str(caught.value)


CROSS = {
    "phi3-llama": ("phi3", "llama", {}, {}),
    "phi3-llama-expanded": ("phi3", "llama", GROUPED, UNGROUPED),
    "llama-phi3": ("llama", "phi3", {}, {}),
    "llama-phi3-expanded": ("llama", "phi3", GROUPED, UNGROUPED),
    "mistral-llama": ("mistral", "llama", {}, {}),
    "qwen2-llama": ("qwen2", "llama", {}, {}),
    "llama-qwen2": ("llama", "qwen2", {}, {}),
    "qwen3-llama": ("qwen3", "llama", {}, {}),  # heads of 12 rows in the teacher, of 8 here
    "gemma2-llama": ("gemma2", "llama", {}, {}),
}


@pytest.mark.parametrize("pair", CROSS)
def test_families_meet_by_the_roles_of_their_modules(pair: str, tmp_path: Path) -> None:
    teacher_family, student_family, big, small = CROSS[pair]
    teacher, student = build_pair(tmp_path, teacher_family, student_family, big=big, small=small)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)
    expanded = {w["kv_repeat"] for w in made.manifest["windows"].values()} == {1, 4}
    assert expanded is pair.endswith("expanded")


def store(folder: Path, model_type: str, seed: int, **entries: Any) -> Path:
    """A tiny random checkpoint of a family that `tiny` does not list."""
    config = AutoConfig.for_model(
        model_type, vocab_size=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        max_position_embeddings=64, **entries,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    tiny.randomize(model, seed)
    model.to(torch.float32).config.dtype = torch.float32
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, 128)
    return folder


GROUP = {"num_key_value_heads": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": None},  # positions are learned and outside
    "phi": {},  # a part of each head is rotated; parallel branches
    "cohere2": GROUP,  # logits are scaled
    "granite": GROUP,  # so are embeddings, residuals and attention
    "starcoder2": GROUP,
    "lfm2": GROUP,
}


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_nothing_here_was_written_for(family: str, tmp_path: Path) -> None:
    shapes = (
        {"hidden_size": 64, "num_hidden_layers": 3},
        {"hidden_size": 32, "num_hidden_layers": 2},
    )
    teacher, student = (
        store(
            tmp_path / f"{index}", family, index, num_attention_heads=4,
            intermediate_size=2 * shape["hidden_size"], **{**shape, **OTHERS[family]},
        )
        for index, shape in enumerate(shapes)
    )  # fmt: skip
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)


def test_fused_layouts_that_are_not_known_are_refused(tmp_path: Path) -> None:
    """One window over q, k and v together would be no window of any of them."""
    shapes = (
        {"hidden_size": 64, "num_hidden_layers": 3},
        {"hidden_size": 32, "num_hidden_layers": 2},
    )
    teacher, student = (
        store(tmp_path / f"{index}", "gpt_bigcode", index, num_attention_heads=4, **shape)
        for index, shape in enumerate(shapes)
    )
    with pytest.raises(IncompatibleError, match=r"attn\.c_attn fuses several projections"):
        extract(tmp_path, teacher, student)


def test_projections_that_are_no_linear_modules_are_refused(tmp_path: Path) -> None:
    """GPT-2 stores them turned (Conv1D): nothing may be cut from them, nor any weight be read."""
    sizes = ((48, 3), (32, 2))
    teacher, student = (
        store(tmp_path / f"{i}", "gpt2", i, n_embd=width, n_layer=layers, n_head=4)
        for i, (width, layers) in enumerate(sizes)
    )
    with pytest.raises(IncompatibleError, match="gpt2"):
        extract(tmp_path, teacher, student)
    assert not list(tmp_path.glob("out/.work/spool/*"))


def test_a_role_that_the_teacher_lacks_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "gpt_neox", "llama")
    with pytest.raises(IncompatibleError, match=r"mlp\.gate_proj.*no gate projection") as caught:
        extract(tmp_path, teacher, student)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_other_targets_of_such_a_pair_work(tmp_path: Path) -> None:
    """GPT-NeoX stores q, k and v of a head side by side: the windows are those of the parts."""
    teacher, student = build_pair(tmp_path, "gpt_neox", "llama", small={"kv_heads": 4})
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    targets = ("q", "k", "v", "o", "up", "down")
    task = pkt.api.prepare(
        str(teacher), str(student), seeds, rank=RANK, dtype="float32", targets=targets
    )
    made = pkt.api.execute(task, tmp_path / "out")
    tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
    model = reference.load(teacher)
    _, scores = reference.losses_and_scores(model, tokens)
    theirs = {
        "q_proj": "attention.q_proj", "k_proj": "attention.k_proj", "v_proj": "attention.v_proj",
        "o_proj": "attention.dense", "up_proj": "mlp.dense_h_to_4h",
        "down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert len(made.manifest["windows"]) == 6 * 3
    for name, window in made.manifest["windows"].items():
        layer = made.manifest["layers"][int(name.split(".")[2])]
        parts = reference.logical_parts(model, f"gpt_neox.layers.{layer}.", scores)
        weight, score = parts[theirs[name.rsplit(".", 1)[-1]]]
        height, width = (stop - start for start, stop in (window["rows"], window["cols"]))
        row, column, total = reference.best_window(score, height, width)
        assert (window["rows"][0], window["cols"][0]) == (row, column)
        assert window["score"] == pytest.approx(total, rel=1e-4)
        best = reference.factors(weight[row : row + height, column : column + width], RANK)
        product = (
            tensors[f"base_model.model.{name}.lora_B.weight"].double()
            @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
        )
        torch.testing.assert_close(product, best.b @ best.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (("q", "down"), {"q_proj", "down_proj"}),
        (("o_proj",), {"o_proj"}),
        (("self_attn.k_proj", "gate"), {"k_proj", "gate_proj"}),
    ],
)
def test_targets_are_a_part_of_the_whole(
    targets: tuple[str, ...], leaves: set[str], tmp_path: Path
) -> None:
    """The same windows and factors as without the option, and no others."""
    teacher, student = build_pair(tmp_path, "llama", "llama")
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", targets=targets)
    modules = {n: m for n, m in wanted["modules"].items() if n.rsplit(".", 1)[-1] in leaves}
    compare(made, {**wanted, "modules": modules})


def test_a_target_that_is_none_names_what_there_is(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    with pytest.raises(UsageError, match="no module 'query'") as caught:
        extract(tmp_path, teacher, student, targets=("query",))
    assert caught.value.hint == "known: down, gate, k, o, q, up, v"


@pytest.mark.parametrize("targets", [("q",), ("v",), ("q", "k")], ids="".join)
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_a_target_that_is_a_part_of_a_fused_module(
    family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Rows of the module's other parts get nothing: BA is zero there, and right elsewhere."""
    teacher, student = build_pair(tmp_path, family, family)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", targets=targets)
    assert {key.rsplit("#", 1)[-1] for key in made.manifest["windows"]} == set(targets)
    tensors = load_file(made.folder / "adapter_model.safetensors")
    config = AutoConfig.from_pretrained(student)
    for key, b in tensors.items():
        if not key.endswith("lora_B.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        a = tensors[key.replace("lora_B", "lora_A")]
        kind = (config.model_type, config, name.split(".", 3)[3])
        empty = torch.zeros_like(wanted["modules"][name]["weight"])
        want = {
            part: pick.weight if part.rsplit(".", 1)[-1][0] in targets else torch.zeros_like(zero)
            for (part, pick), zero in zip(
                wanted["modules"][name]["parts"].items(),
                reference.split_fused(*kind, empty).values(),
                strict=True,
            )
        }
        best = reference.factors(reference.stack_fused(*kind, want), RANK)
        torch.testing.assert_close(b.double() @ a.double(), best.b @ best.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("select", ["window", "rows-cols"])
def test_balanced_split_equals_full_autograd(select: str, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    made, wanted, _ = run_both(
        tmp_path, teacher, student, dtype="float32", split="balanced", select=select
    )
    compare(made, wanted)
    tensors = load_file(made.folder / "adapter_model.safetensors")
    for name in wanted["modules"]:
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_rank_above_the_shorter_side_gets_a_pattern(family: str, tmp_path: Path) -> None:
    small = {"hidden": 32, "heads": 4, "kv_heads": 1, "intermediate": 24}
    teacher, student = build_pair(tmp_path, family, family, small=small)
    rank = 28
    made = extract(tmp_path, teacher, student, rank=rank)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == min(rank, a.shape[1], b.shape[0]), name
            assert float(a.norm(dim=1).min()) > 1e-6, "a zero-padded factor would never train"
            found[name] = a.shape[0]
    smaller = {name: size for name, size in found.items() if size < rank}
    assert config["rank_pattern"] == smaller
    assert config["alpha_pattern"] == smaller
    assert smaller


def test_equal_shapes_take_whole_matrices_and_every_layer(tmp_path: Path) -> None:
    shape = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 56}
    teacher, student = build_pair(tmp_path, "llama", "llama", big=shape, small=shape)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)
    assert made.manifest["layers"] == [0, 1, 2]
    stored = load_file(teacher / "model.safetensors")
    for name, window in made.manifest["windows"].items():
        assert window["teacher"] == name
        shape_of = list(stored[f"{name}.weight"].shape)
        assert [window["rows"], window["cols"]] == [[0, shape_of[0]], [0, shape_of[1]]]
        assert window["kv_repeat"] == 1
