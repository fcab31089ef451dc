"""``--select consistent`` against index sets found by loops over scores of full autograd.

What is cut out must be a transformer: residual channels, heads and neurons match across matrices,
and a model that was planted in a larger one comes back whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pkt
import reference
import runs
from test_extract import RANK, build_pair, compare_factors, write_seeds

torch.set_num_threads(1)
ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "dense": "o", "gate_proj": "gate",
    "up_proj": "up", "dense_h_to_4h": "up", "down_proj": "down", "dense_4h_to_h": "down",
}  # fmt: skip
READERS = ("q", "k", "v", "gate", "up")
DEEP = {"heads": 12, "kv_heads": 4, "hidden": 48, "head_dim": 8}
FLAT = {"heads": 4, "kv_heads": 2, "hidden": 32, "head_dim": 8}
GROUPED = {"heads": 8, "kv_heads": 2, "hidden": 64}
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fewer groups, fewer heads in each": ("llama", DEEP, FLAT),
    "as many groups, fewer heads": ("llama", GROUPED, FLAT),
    "kv heads repeated to single heads": (
        "llama", GROUPED, {"heads": 4, "kv_heads": 4, "hidden": 32},
    ),
    "groups split in two": ("llama", GROUPED, {"heads": 6, "kv_heads": 3, "hidden": 48}),
    "k as large as the student's, and yet repeated": (
        "llama", {**GROUPED, "head_dim": 16},
        {"heads": 4, "kv_heads": 4, "hidden": 32, "head_dim": 8},
    ),
    "query heads of their own": ("llama", {"heads": 6, "kv_heads": 6}, {"heads": 4, "kv_heads": 4}),
    "fewer and shorter heads in each group": ("llama", {**DEEP, "head_dim": 16}, FLAT),
    "shorter heads": ("qwen3", {"head_dim": 16}, {"head_dim": 8}),
    "soft caps, shorter heads": ("gemma2", {"head_dim": 12}, {"head_dim": 8}),
    "fused rows": ("phi3", {"heads": 6, "kv_heads": 3}, {"heads": 4, "kv_heads": 2}),
    "fused blocks": ("gpt_neox", {}, {}),
    "fused blocks, half of a head turns": ("gpt_neox", {"hidden": 96}, {"heads": 4}),
}  # fmt: skip


def extract(folder: Path, *, out: str = "out", **options: Any) -> pkt.records.Extraction:
    seeds = write_seeds(folder / "seeds.jsonl")
    options = {"rank": RANK, "dtype": "float32", "select": "consistent", **options}
    paths = str(folder / "teacher"), str(folder / "student")
    return pkt.extract(*paths, seeds, folder / out, **options)


class Heads:
    """Head counts of a configuration, and how many leading dims of a head turn."""

    def __init__(self, config: Any) -> None:
        self.query, self.kv, self.dim = reference.head_counts(config)
        share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        self.turning = int(self.dim * share)
        self.size = self.query // self.kv


def best(scores: dict[int, float], count: int) -> list[int]:
    """Taken out one by one: the highest, of equal ones the lowest index; then sorted."""
    left, taken = dict(scores), []
    for _ in range(count):
        top = max(left.values())
        taken.append(min(index for index, score in left.items() if score == top))
        del left[taken[-1]]
    return sorted(taken)


def splits_of(theirs: Heads, ours: Heads) -> int:
    """Most repeats of a kv head that leave its groups with the query heads that are needed."""
    if ours.kv <= theirs.kv:
        return 1
    return max(n for n in range(1, theirs.size + 1)
               if theirs.size % n == 0 and theirs.size // n >= ours.size)  # fmt: skip


def by_role(parts: dict[str, Any]) -> dict[str, Any]:
    return {ROLES[name.rsplit(".", 1)[-1]]: part for name, part in parts.items()}


class Wanted:
    """The index sets of a pair, by loops over scores that autograd gave, and what they cut out."""

    def __init__(
        self, folder: Path, made: pkt.records.Extraction, targets: tuple[str, ...] = tuple(READERS)
    ) -> None:
        options = {"rank": RANK, "dtype": "float32"}
        paths = str(folder / "teacher"), str(folder / "student")
        task = pkt.api.prepare(*paths, folder / "seeds.jsonl", **options)
        tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
        self.teacher, self.student = (reference.load(path) for path in paths)
        _, self.scores = reference.losses_and_scores(self.teacher, tokens)
        self.theirs, self.ours = Heads(self.teacher.config), Heads(self.student.config)
        self.splits = splits_of(self.theirs, self.ours)
        prefix = reference.layers_prefix(self.teacher)
        depth = self.teacher.config.num_hidden_layers
        count = self.student.config.num_hidden_layers
        totals = reference.layer_scores(self.scores, prefix, depth)
        self.kept = reference.pick_layers(totals, count)
        self.layers = []
        for layer in self.kept:
            parts = by_role(reference.logical_parts(self.teacher, f"{prefix}{layer}.", self.scores))
            for role in "kv":
                weight, score = parts[role]
                parts[role] = tuple(
                    reference.expand_kv(tensor, self.theirs.dim, self.splits, share=share)
                    for tensor, share in ((weight, False), (score, True))
                )
            self.layers.append({role: part for role, part in parts.items() if role in targets})
        channels = {
            c: sum(
                float(score[:, c].sum() if role in READERS else score[c].sum())
                for parts in self.layers for role, (_, score) in parts.items()
            )
            for c in range(self.teacher.config.hidden_size)
        }  # fmt: skip
        self.residual = best(channels, self.student.config.hidden_size)
        self.inner = [self.within(parts) for parts in self.layers]

    def within(self, parts: dict[str, Any]) -> dict[str, list[int]]:
        """Rows (of o and down: columns) of each role in one layer."""
        scores = {role: score if role in READERS else score.T for role, (_, score) in parts.items()}
        rows = {role: [float(row.sum()) for row in score] for role, score in scores.items()}
        found: dict[str, list[int]] = {}
        ffn = [role for role in ("gate", "up", "down") if role in rows]
        if ffn:
            width = len(rows[ffn[0]])
            sums = {n: sum(rows[role][n] for role in ffn) for n in range(width)}
            found |= dict.fromkeys(ffn, best(sums, self.student.config.intermediate_size))
        dim, size = self.theirs.dim, self.theirs.size // self.splits

        def at(role: str, head: int, d: int) -> float:
            return rows[role][head * dim + d] if role in rows else 0.0

        def of_head(role: str, head: int) -> float:
            return sum(at(role, head, d) for d in range(dim))

        groups = {
            g: of_head("k", g) + of_head("v", g)
            + sum(of_head(role, g * size + h) for h in range(size) for role in "qo")
            for g in range(self.theirs.kv * self.splits)
        }  # fmt: skip
        chosen: dict[str, list[int]] = {role: [] for role in "qkvo" if role in rows}
        for g in best(groups, self.ours.kv):
            members = range(g * size, (g + 1) * size)
            heads = best({h: of_head("q", h) + of_head("o", h) for h in members}, self.ours.size)
            turned = {d: at("k", g, d) + sum(at("q", h, d) for h in heads) for d in range(dim)}
            valued = {d: at("v", g, d) + sum(at("o", h, d) for h in heads) for d in range(dim)}
            dims = {"q": self.turning(turned), "v": best(valued, self.ours.dim)}
            dims |= {"k": dims["q"], "o": dims["v"]}
            for role, list_ in chosen.items():
                for head in [g] if role in "kv" else heads:
                    list_ += [head * dim + d for d in dims[role]]
        return found | chosen

    def turning(self, scores: dict[int, float]) -> list[int]:
        if self.theirs.dim == self.ours.dim:
            return list(range(self.theirs.dim))
        half = self.theirs.turning // 2
        pairs = best({i: scores[i] + scores[i + half] for i in range(half)}, self.ours.turning // 2)
        still = {d: score for d, score in scores.items() if d >= 2 * half}
        rest = best(still, self.ours.dim - self.ours.turning)
        return pairs + [i + half for i in pairs] + rest

    def at(self, layer: int, role: str) -> tuple[list[int], list[int]]:
        inner = self.inner[layer][role]
        return (inner, self.residual) if role in READERS else (self.residual, inner)


def role_of(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    return leaf.partition("#")[2] or ROLES[leaf]


def check(folder: Path, made: pkt.records.Extraction, wanted: Wanted) -> None:
    """Every index, every score's bounds, every factor."""
    manifest = made.manifest
    assert manifest["layers"] == wanted.kept
    assert manifest["consistent"]["residual"] == wanted.residual
    prefix = reference.layers_prefix(wanted.student)
    tensors = load_file(made.folder / "adapter_model.safetensors")
    seen = set()
    for layer, parts in enumerate(wanted.layers):
        cut = {}
        for key in (k for k in manifest["windows"] if k.startswith(f"{prefix}{layer}.")):
            window, role = manifest["windows"][key], role_of(key)
            weight, score = parts[role]
            rows, cols = wanted.at(layer, role)
            assert window["rows"] == rows, key
            assert window["cols"] == cols, key
            assert window["kv_repeat"] == (wanted.splits if role in "kv" else 1), key
            bound = min(float(score[rows].sum()), float(score[:, cols].sum()))
            assert window["score"] == pytest.approx(bound, rel=1e-4), key
            assert float(score[rows][:, cols].sum()) <= window["score"] * 1.0001, key
            cut[role] = weight[rows][:, cols]
            seen.add(key)
        base = f"{prefix}{layer}."
        for suffix, linear in reference.linears(wanted.student, base):
            kind = (wanted.student.config.model_type, wanted.student.config, suffix)
            names = reference.split_fused(*kind, linear.weight.detach())
            picked = {n: cut.get(ROLES[n.rsplit(".", 1)[-1]]) for n in names}
            if all(part is not None for part in picked.values()):
                stacked = reference.stack_fused(*kind, picked)
                module = {"weight": stacked, "factors": reference.factors(stacked, RANK)}
                compare_factors(f"{base}{suffix}", module, tensors)
    outside = {k for k in manifest["windows"] if not k.startswith(prefix)}
    assert seen | outside == set(manifest["windows"])
    assert len(seen) == sum(len(parts) for parts in wanted.layers)


@pytest.mark.parametrize("name", PAIRS)
def test_index_sets_equal_loops_over_full_autograd(name: str, tmp_path: Path) -> None:
    family, big, small = PAIRS[name]
    build_pair(tmp_path, family, family, big=big, small=small)
    made = extract(tmp_path)
    wanted = Wanted(tmp_path, made, targets=tuple(ROLES.values()))
    check(tmp_path, made, wanted)
    check_coherence(made, wanted)


def check_coherence(made: pkt.records.Extraction, wanted: Wanted) -> None:
    """From the manifest alone: the cut-out matrices fit together as those of one transformer."""
    windows, sets = made.manifest["windows"], made.manifest["consistent"]
    theirs, ours = wanted.theirs, wanted.ours
    depth = len(made.manifest["layers"])
    for layer in range(depth):
        of = {role_of(k): w for k, w in windows.items() if f"layers.{layer}." in k}
        streams = [w["cols"] if role in READERS else w["rows"] for role, w in of.items()]
        assert all(stream == sets["residual"] for stream in streams)
        neurons = [of[r]["rows"] for r in ("gate", "up") if r in of] + [of["down"]["cols"]]
        assert all(each == sets["neurons"][layer] for each in neurons)

        def heads(indices: list[int]) -> list[tuple[int, list[int]]]:
            """Runs of the student's head size: the teacher's head, and the dims taken of it."""
            runs_ = [indices[i : i + ours.dim] for i in range(0, len(indices), ours.dim)]
            for run in runs_:
                assert len({index // theirs.dim for index in run}) == 1, "a head is cut in two"
            return [(run[0] // theirs.dim, [i % theirs.dim for i in run]) for run in runs_]

        q, k, v = (heads(of[role]["rows"]) for role in "qkv")
        o = heads(of["o"]["cols"])
        assert [head for head, _ in q] == [head for head, _ in o] == sets["heads"][layer]
        assert [head for head, _ in k] == [head for head, _ in v] == sets["kv_groups"][layer]
        size = theirs.size // wanted.splits
        for place, (head, dims) in enumerate(q):
            group = place // ours.size  # the kv head that this query head will read
            assert head // size == k[group][0]
            assert dims == k[group][1]
            assert o[place][1] == v[group][1]
            half = ours.turning // 2
            pairs = zip(dims[:half], dims[half : 2 * half], strict=True)
            assert all(b - a == theirs.turning // 2 for a, b in pairs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embedding_and_head_take_the_channels_of_the_layers(
    family: str, tied: bool, tmp_path: Path
) -> None:
    build_pair(tmp_path, family, family, tied=tied)
    made = extract(tmp_path, embeddings=True)
    wanted = Wanted(tmp_path, made, targets=tuple(ROLES.values()))
    check(tmp_path, made, wanted)
    tensors = load_file(made.folder / "adapter_model.safetensors")
    score_of = {id(p): wanted.scores[name] for name, p in wanted.teacher.named_parameters()}
    for name, getter in (
        ("model.embed_tokens", "get_input_embeddings"), ("lm_head", "get_output_embeddings"),
    ):  # fmt: skip
        weight = getattr(wanted.teacher, getter)().weight
        window = made.manifest["windows"][name]
        assert window["rows"] == [0, 128]
        assert window["cols"] == wanted.residual
        total = float(score_of[id(weight)][:, wanted.residual].sum())
        assert window["score"] == pytest.approx(total, rel=1e-4)
        cut = weight.detach()[:, wanted.residual]
        turned = cut.T if name.endswith("embed_tokens") else cut
        module = {"weight": cut, "factors": reference.factors(turned, RANK)}
        compare_factors(name, module, tensors)


@pytest.mark.parametrize("targets", [("q", "v"), ("o", "down"), ("k",), ("gate", "up", "down")])
def test_what_is_not_wanted_has_no_vote(targets: tuple[str, ...], tmp_path: Path) -> None:
    build_pair(tmp_path, "llama", "llama", big=DEEP, small=FLAT)
    made = extract(tmp_path, targets=targets)
    check(tmp_path, made, Wanted(tmp_path, made, targets))
    sets = made.manifest["consistent"]
    assert any(sets["heads"]) == bool({"q", "o"} & {*targets})
    assert any(sets["kv_groups"]) == bool({*"qkvo"} & {*targets})
    assert any(sets["neurons"]) == bool({"gate", "up", "down"} & {*targets})


@pytest.mark.parametrize("dim", [8, 12])
def test_a_model_planted_in_a_larger_one_comes_back(dim: int, tmp_path: Path) -> None:
    """Every other channel, head, neuron and layer of the teacher is zero."""
    big = {**DEEP, "head_dim": dim, "hidden": 48, "layers": 5}
    build_pair(tmp_path, "llama", "llama", big=big, small=FLAT, tied=False)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    places = plant(small, large, layers=[0, 2, 4], dim=dim)
    large.save_pretrained(tmp_path / "teacher")
    if dim == 8:  # heads of another length turn at other speeds
        ids = torch.arange(4, 40)[None]
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-4)
    made = extract(tmp_path, embeddings=True, rank=56)
    assert made.manifest["layers"] == [0, 2, 4]
    assert made.manifest["consistent"]["residual"] == places
    theirs, ours = large.state_dict(), small.state_dict()
    tensors = load_file(made.folder / "adapter_model.safetensors")
    for name, window in made.manifest["windows"].items():
        source = theirs[f"{window['teacher']}.weight"]
        rows = slice(*window["rows"]) if ".layers." not in name else window["rows"]
        assert torch.equal(source[rows][:, window["cols"]], ours[f"{name}.weight"]), name
        kind = "embedding_" if name.endswith("embed_tokens") else ""
        a, b = (tensors[f"base_model.model.{name}.lora_{kind}{f}{'' if kind else '.weight'}"]
                for f in "AB")  # fmt: skip
        product = (b @ a).T if kind else b @ a
        torch.testing.assert_close(product, ours[f"{name}.weight"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def plant(small: Any, large: Any, layers: list[int], dim: int) -> list[int]:
    """Write ``small`` into ``large`` at drawn places, zero elsewhere; returns its channels.

    The mean square over 48 channels, 16 of them zero, is that over 32 times 32/48: the norms make
    up for it.
    """
    draw = torch.Generator().manual_seed(0)

    def some(count: int, of: int) -> list[int]:
        return sorted(torch.randperm(of, generator=draw)[:count].tolist())

    def put(name: str, into: str, rows: list[int], cols: list[int]) -> None:
        target = large.get_parameter(into)
        target.zero_()
        target[torch.tensor(rows)[:, None], torch.tensor(cols)] = small.get_parameter(name)

    def norm(name: str, into: str) -> None:
        large.get_parameter(into)[residual] = small.get_parameter(name) * (32 / 48) ** 0.5

    for parameter in large.parameters():
        if parameter.ndim == 2:
            parameter.zero_()
    residual, vocabulary = some(32, 48), list(range(128))
    put("model.embed_tokens.weight", "model.embed_tokens.weight", vocabulary, residual)
    put("lm_head.weight", "lm_head.weight", vocabulary, residual)
    norm("model.norm.weight", "model.norm.weight")
    for index, layer in enumerate(layers):
        groups = some(2, 4)
        heads = [3 * g + h for g in groups for h in some(2, 3)]
        pairs = [some(4, dim // 2) for _ in groups]
        turned = [[*p, *(i + dim // 2 for i in p)] for p in pairs]
        valued = [some(8, dim) for _ in groups]
        neurons = some(56, 80)
        at = {
            "self_attn.q_proj": [h * dim + d for i, h in enumerate(heads) for d in turned[i // 2]],
            "self_attn.k_proj": [g * dim + d for i, g in enumerate(groups) for d in turned[i]],
            "self_attn.v_proj": [g * dim + d for i, g in enumerate(groups) for d in valued[i]],
            "self_attn.o_proj": [h * dim + d for i, h in enumerate(heads) for d in valued[i // 2]],
            "mlp.gate_proj": neurons, "mlp.up_proj": neurons, "mlp.down_proj": neurons,
        }  # fmt: skip
        for suffix, inner in at.items():
            sides = (residual, inner) if suffix.endswith(("o_proj", "down_proj")) else (
                inner, residual
            )  # fmt: skip
            names = f"model.layers.{index}.{suffix}.weight", f"model.layers.{layer}.{suffix}.weight"
            put(*names, *sides)
        for suffix in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            norm(f"model.layers.{index}.{suffix}", f"model.layers.{layer}.{suffix}")
    return residual


@pytest.mark.parametrize(
    ("step", "damaged", "left"),
    [
        (("backward", 2), None, [3, 4]),
        (("backward", 3), "layer-00002.json", [2, 3, 4]),
        (("ends", 3), None, []),
        (("factors", 2), None, []),
        (("factors", 2), "layer-00000.json", [4]),
    ],
)
def test_records_survive_and_damaged_ones_are_made_again(
    step: tuple[str, int], damaged: str | None, left: list[int], tmp_path: Path
) -> None:
    """Ctrl-C after a step: the sums in the layers' records lead to the same bytes.

    What lies above a damaged record is gone back through, but not scored again.
    """
    build_pair(tmp_path, "llama", "llama", tied=False)
    whole = extract(tmp_path, out="whole", embeddings=True)

    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, embeddings=True, notify=stop)
    if damaged:
        record = tmp_path / "out" / ".work" / "spool" / damaged
        text = record.read_text()
        at = text.index('"rows": "') + 20
        record.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    seen: list[tuple[str, int]] = []
    again = extract(tmp_path, embeddings=True, notify=lambda phase, at, _: seen.append((phase, at)))
    assert runs.contents(again.folder) == runs.contents(whole.folder)
    assert [done for phase, done in seen if phase == "backward"] == left
