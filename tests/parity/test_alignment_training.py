"""SEMALIGN's objectives against whole models in memory, with hooks and matrices of their own.

Law: losses and gradients of v1, v2, acl and hidden-mse are those of the formulas within 1e-5
relative in float32, however a step is divided, with layers recomputed or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from pkt.api import prepare_training
from pkt.methods.tuning.model import load_student
from pkt.records import LayerPair, LowRank, SampleSet
from pkt.training import ALIGNMENTS, Schedule, fit, inject, trained_factors
from supervised import Remembered
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
FAMILIES = ["llama", "qwen2", "gemma3", "gpt_neox"]
TOP_K = 7
INTERFACES = {"v1": ["mlp", "attn", "block", "hidden"], "v2": ["span"], "acl": ["hidden"],
              "hidden-mse": ["hidden"]}  # fmt: skip
# The student has 3 layers, the teacher 4. In v2 and acl the first layer is the frontier of step 1.
PAIRINGS = {
    "v1": [((2, 2), (4, 3))],
    "v2": [((1, 1), (2, 2), (4, 3)), ((2, 2), (4, 3)), ((4, 3),)],
    "acl": [((1, 1), (2, 2), (4, 3)), ((2, 2), (4, 3)), ((4, 3),)],
    "hidden-mse": [((2, 2), (4, 3))],
}
CASES = [
    (objective, interface, pairs)
    for objective in PAIRINGS
    for interface in INTERFACES[objective]
    for pairs in PAIRINGS[objective]
]


@dataclass
class Pair:
    student: Path
    teacher: Any  #: float64, whole
    ours: Any
    samples: SampleSet
    vocabulary: int


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    teacher, student = build_pair(folder, request.param, request.param)
    data = write_seeds(folder / "data.jsonl", count=6)
    samples = prepare_training(str(student), data, template="none").samples
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).requires_grad_(False)
        for path in (teacher, student)
    ]
    return Pair(student, models[0].eval(), models[1].eval(), samples, 128)


# What pkt is held against: nothing of pkt's below.


def stack(model: Any) -> Any:
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers


def final_norm(model: Any) -> Any:
    return model.gpt_neox.final_layer_norm if hasattr(model, "gpt_neox") else model.model.norm


def adder(layer: Any, which: str, family: str) -> Any:
    """The module whose output is added to the residual stream."""
    if family.startswith("gemma3"):
        return (
            layer.post_feedforward_layernorm if which == "mlp" else layer.post_attention_layernorm
        )
    if which == "mlp":
        return layer.mlp
    return layer.attention if family == "gpt_neox" else layer.self_attn


def run(model: Any, tokens: Any) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
    """Logits (T, V) and, by (place, layer from 1), activations (T, D)."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []

    def keep(key: tuple[str, int]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[key] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    for number, layer in enumerate(stack(model), 1):
        handles.append(layer.register_forward_hook(keep(("hidden", number))))
        for which in ("mlp", "attn"):
            module = adder(layer, which, model.config.model_type)
            handles.append(module.register_forward_hook(keep((which, number))))
    out = model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    found["hidden", 0] = out.hidden_states[0][0]
    for number in range(1, len(stack(model)) + 1):
        found["block", number] = found["hidden", number] - found["hidden", number - 1]
    return out.logits[0], found


def predicting(sample: Any) -> torch.Tensor:
    return torch.tensor(sample.loss_mask).nonzero()[:, 0] - 1


def folded(model: Any) -> torch.Tensor:
    """The head (V, D) with the final norm's weight in it."""
    norm = final_norm(model)
    gamma = norm.weight + 1 if model.config.model_type.startswith("gemma") else norm.weight
    head = model.get_output_embeddings().weight * gamma
    if isinstance(norm, nn.LayerNorm):
        head = head - head.mean(1, keepdim=True)
    return head


def mapping(pair: Pair, objective: str) -> torch.Tensor:
    """(D_S, D_T) from the whole matrices of bases, one column a token."""
    bases = [torch.linalg.pinv(folded(model)) for model in (pair.ours, pair.teacher)]
    if objective == "v1":
        unit = [base / base.norm(dim=0) for base in bases]
        return unit[0] @ unit[1].T
    return bases[0] @ folded(pair.teacher)


def supervision(pair: Pair, objective: str, interface: str, pairs: Any) -> Remembered:
    mapped, before = mapping(pair, objective), {k: t for t, k in pairs}
    held: dict[int, list[torch.Tensor]] = {k: [] for _, k in pairs}
    logits, answers = [], []
    for sample in pair.samples.samples:
        said, seen = run(pair.teacher, sample.tokens)
        at = predicting(sample)
        answers.append(len(at))
        logits.append(said[at].float())
        for t, k in pairs:
            if interface == "span":
                below = before.get(k - 1, max(0, t - 1))
                state = seen["hidden", t] - seen["hidden", below]
            else:
                state = seen[interface, t]
            held[k].append((state[at] @ mapped.T).float())
    listed = tuple(LayerPair(*each) for each in pairs)
    return Remembered(listed, answers, held, logits, interface, "dual", TOP_K)


class Adapted(nn.Module):
    def __init__(self, linear: nn.Linear, half: LowRank) -> None:
        super().__init__()
        self.base = linear
        self.a, self.b = nn.Parameter(half.a.double()), nn.Parameter(half.b.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def kl(pair: Pair, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Σ over rows, k + 1 bins from whole distributions."""
    p, q = teacher.double().softmax(-1), student.softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(p)):
        top = p[row].argsort(descending=True, stable=True)
        inside, outside = top[:TOP_K], top[TOP_K:]
        a, b = p[row, outside].sum(), q[row, outside].sum()
        total = total + (p[row, inside] * (p[row, inside] / q[row, inside]).log()).sum()
        total = total + a * (a / b).log()
    return total


def cka_loss(r: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    n = len(r)
    j = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k, kk = j @ r @ r.T @ j, j @ wanted @ wanted.T @ j
    return 1 - (k * kk).sum() / (k.norm() * kk.norm())


def variance(z: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Σ over rows of ½ dᵀ (diag p − p pᵀ) d with whole matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(z, wanted, strict=True):
        p = other.softmax(-1)
        d = one - other
        total = total + d @ (torch.diag(p) - torch.outer(p, p)) @ d / 2
    return total


def by_hand(
    pair: Pair, objective: str, interface: str, targets: Remembered, halves: dict[str, LowRank],
    output: str, beta: float,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:  # fmt: skip
    """The parts of the loss over all samples, and its gradient, in float64."""
    model = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float64)
    model.requires_grad_(False).eval()
    adapted = {}
    for name, half in halves.items():
        parent, _, leaf = name.rpartition(".")
        adapted[name] = Adapted(model.get_submodule(name), half)
        setattr(model.get_submodule(parent), leaf, adapted[name])
    layers = [pair.student for pair in targets.pairs]
    frontier = layers if objective in ("v1", "hidden-mse") else layers[:1]
    place = "block" if interface == "span" else interface
    tokens = sum(targets.answers)
    layer_loss = torch.zeros((), dtype=torch.float64)
    output_loss = torch.zeros((), dtype=torch.float64)
    sizes = {k: [0.0, 0.0] for k in layers}
    if objective == "hidden-mse":  # of the student as it was
        for number, sample in enumerate(pair.samples.samples):
            seen = run_without(model, adapted, sample)
            for k in layers:
                sizes[k][0] += float(seen["hidden", k][predicting(sample)].square().sum()) / tokens
                sizes[k][1] += float(targets.held[k][number].double().square().sum()) / tokens
    several = sum(count >= 2 for count in targets.answers)
    for number, sample in enumerate(pair.samples.samples):
        logits, seen = run(model, sample.tokens)
        at = predicting(sample)
        z, ids = logits[at], torch.tensor(sample.tokens)[at + 1]
        for k in frontier:
            h, t = seen[place, k][at], targets.held[k][number].double()
            if objective == "v1":
                cos = (h * t).sum(-1) / (h.norm(dim=-1) * t.norm(dim=-1))
                layer_loss = layer_loss + (1 - cos).sum() / tokens / len(frontier)
            elif objective == "v2" and len(h) >= 2:
                layer_loss = layer_loss + cka_loss(h, t) / several
            elif objective == "acl" and k < 3:
                head, norm = model.get_output_embeddings(), final_norm(model)
                layer_loss = layer_loss + variance(head(norm(h)), head(norm(t))) / tokens
            elif objective == "hidden-mse":
                own, their = sizes[k]
                scaled = (own / their) ** 0.5 * t
                layer_loss = layer_loss + (h - scaled).square().sum() / own / tokens / len(frontier)
        if objective == "acl":
            if frontier == [3]:
                output_loss = output_loss + kl(pair, targets.logits[number], z) / tokens
        elif objective == "v2" or output == "kl":
            output_loss = output_loss + beta * kl(pair, targets.logits[number], z) / tokens
        elif output == "ce":
            output_loss = output_loss + F.cross_entropy(z, ids, reduction="sum") / tokens
        else:
            onehot = F.one_hot(ids, z.shape[1]).double()
            output_loss = output_loss + (1 - F.cosine_similarity(z, onehot, -1)).sum() / tokens
    (layer_loss + output_loss).backward()
    gradients = {}
    for name, layer in adapted.items():
        trained = objective in ("v1", "hidden-mse") or f".{frontier[0] - 1}." in name
        for part in ("a", "b"):
            grad = getattr(layer, part).grad
            if trained and grad is not None:
                gradients[f"{name}.{part}"] = grad
    return {"layer": layer_loss.item(), "output": output_loss.item()}, gradients


def run_without(model: Any, adapted: dict[str, Adapted], sample: Any) -> Any:
    """Activations at step 0, where a start has no effect: here the very halves that it has."""
    with torch.no_grad():
        return run(model, sample.tokens)[1]


# What pkt does.


def halves_of(pair: Pair, layers: list[int]) -> dict[str, LowRank]:
    """LoRA factors that are not zero, on every linear module of these layers but gate and q."""
    draw = torch.Generator().manual_seed(5)
    found = {}
    for name, module in pair.ours.named_modules():
        parts = name.split(".")
        if not isinstance(module, nn.Linear) or not any(part.isdigit() for part in parts):
            continue
        number = int(next(part for part in parts if part.isdigit())) + 1
        if number in layers and parts[-1] not in ("gate_proj", "q_proj", "k_proj"):
            rows, columns = module.weight.shape
            found[name] = LowRank(
                0.1 * torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
                / columns**0.5,
            )  # fmt: skip
    return found


def by_pkt(
    pair: Pair, folder: Path, objective: str, interface: str, targets: Remembered,
    halves: dict[str, LowRank], output: str = "cosine", beta: float = 1.0, micro: int = 2,
    checkpointing: bool = False,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:  # fmt: skip
    """The first step of a run whose batch is all samples: its parts and gradients."""
    model = inject(load_student(pair.student, torch.float32, torch.device("cpu")), halves, None)
    gradients: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is not None and not stepped:
                gradients[name] = parameter.grad.clone()

        return hook

    stepped: list[int] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep(name))
    made = ALIGNMENTS[objective](targets, interface, 3, pair.vocabulary, output, beta)
    steps = max(1, len(made.stages))
    schedule = Schedule(
        batch_size=6, micro_batch=micro, max_steps=steps, warmup=0.0, lr=1e-3,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    metrics = fit(
        model, pair.samples.samples, schedule, folder, objective=made,
        notify=lambda step, steps, found: stepped.append(step),
    )  # fmt: skip
    row = metrics[0]
    parts = {name: row.get(f"{name}_loss", 0.0) for name in ("layer", "output")}
    assert row["loss"] == pytest.approx(sum(parts.values()), rel=1e-6)
    renamed = {}
    for name, grad in gradients.items():
        module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        renamed[f"{module}.{rest[0].lower()}"] = grad
    return parts, renamed


def same(found: Any, wanted: Any) -> None:
    for name, value in wanted[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert found[1].keys() == wanted[1].keys()
    whole = sum(float(grad.square().sum()) for grad in wanted[1].values()) ** 0.5
    assert whole > 1e-4
    for name, grad in wanted[1].items():
        error = float((found[1][name].double() - grad).norm())
        assert error <= 1e-5 * float(grad.norm()) + 1e-6 * whole, name


@pytest.mark.parametrize(("objective", "interface", "pairs"), CASES)
def test_against_whole_models(
    pair: Pair, objective: str, interface: str, pairs: Any, tmp_path: Path
) -> None:
    targets = supervision(pair, objective, interface, pairs)
    halves = halves_of(pair, [k for _, k in pairs])
    wanted = by_hand(pair, objective, interface, targets, halves, "cosine", 1.0)
    same(by_pkt(pair, tmp_path, objective, interface, targets, halves), wanted)


@pytest.mark.parametrize(
    ("objective", "output", "beta"),
    [("v1", "ce", 1.0), ("v1", "kl", 0.5), ("hidden-mse", "kl", 1.0), ("hidden-mse", "ce", 1.0),
     ("v2", "cosine", 3.0), ("v2", "cosine", 0.0)],
)  # fmt: skip
def test_what_stands_beside_the_layer_loss(
    pair: Pair, objective: str, output: str, beta: float, tmp_path: Path
) -> None:
    pairs, interface = ((2, 2), (4, 3)), INTERFACES[objective][-1]
    targets = supervision(pair, objective, interface, pairs)
    halves = halves_of(pair, [2, 3])
    wanted = by_hand(pair, objective, interface, targets, halves, output, beta)
    same(by_pkt(pair, tmp_path, objective, interface, targets, halves, output, beta), wanted)


@pytest.mark.parametrize(
    "objective",
    ["v1", "acl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v2", "hidden-mse"))],
)
def test_how_a_step_is_divided_changes_nothing(pair: Pair, objective: str, tmp_path: Path) -> None:
    pairs, interface = ((2, 2), (4, 3)), INTERFACES[objective][0]
    targets = supervision(pair, objective, interface, pairs)
    halves = halves_of(pair, [2, 3])
    made = [
        by_pkt(
            pair, tmp_path / f"{micro}{again}", objective, interface, targets, halves,
            micro=micro, checkpointing=again,
        )
        for micro, again in ((6, False), (1, False), (3, True), (2, True))
    ]  # fmt: skip
    for other in made[1:]:
        same(other, made[0])


def test_tokens_without_a_state_count_in_the_output_alone(pair: Pair, tmp_path: Path) -> None:
    """As between two tokenizers: some answer tokens, in one example none, have a target."""
    whole = supervision(pair, "v1", "hidden", ((2, 2),))
    kept = [torch.arange(0, count, 2) for count in whole.answers]
    kept[1] = torch.arange(0)
    some = replace(
        whole, kept=kept, held={2: [s[k] for s, k in zip(whole.held[2], kept, strict=True)]}
    )
    halves = halves_of(pair, [2])
    parts, gradients = by_pkt(pair, tmp_path, "v1", "hidden", some, halves, "ce", micro=1)
    distances = []
    model = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, half in halves.items():
            model.get_submodule(name).weight += half.b.double() @ half.a.double()
    for number, sample in enumerate(pair.samples.samples):
        h = run(model, sample.tokens)[1]["hidden", 2][predicting(sample)][kept[number]]
        distances.append(1 - F.cosine_similarity(h, some.held[2][number].double(), dim=-1))
    assert parts["layer"] == pytest.approx(torch.cat(distances).mean().item(), rel=1e-5)
    wanted = by_hand(pair, "v1", "hidden", whole, halves, "ce", 1.0)[0]
    assert parts["output"] == pytest.approx(wanted["output"], rel=1e-5)
    assert gradients


def test_a_student_that_is_its_teacher_has_nothing_to_learn_in_its_layers(
    pair: Pair, tmp_path: Path
) -> None:
    """S = T: `dual` is the identity, so v1 on hidden states begins at 0; `cosine` does not.

    Behind a LayerNorm, which takes the mean away, it is so of states less their mean.
    """
    twin = replace(pair, teacher=pair.ours)
    halves = {
        name: LowRank(torch.zeros_like(half.b), half.a)
        for name, half in halves_of(pair, [1, 3]).items()
    }
    losses = []
    for name in ("hidden-mse", "v1"):  # whose targets are mapped by `dual` and by `cosine`
        targets = supervision(twin, name, "hidden", ((1, 1), (3, 3)))
        folder = tmp_path / name
        losses.append(by_pkt(twin, folder, "v1", "hidden", targets, halves)[0]["layer"])
    centred = pair.ours.config.model_type == "gpt_neox"
    assert abs(losses[0]) < (0.05 if centred else 1e-6)
    assert losses[1] > max(1e-3, 2 * losses[0])


@pytest.mark.parametrize("objective", ["v2", "acl"])
def test_only_the_frontier_moves(pair: Pair, objective: str, tmp_path: Path) -> None:
    interface = INTERFACES[objective][0]
    targets = supervision(pair, objective, interface, ((1, 1), (2, 2), (4, 3)))
    model = inject(
        load_student(pair.student, torch.float32, torch.device("cpu")),
        halves_of(pair, [1, 2, 3]), None,
    )  # fmt: skip
    seen = [trained_factors(model)]
    schedule = Schedule(batch_size=3, micro_batch=3, max_steps=7, lr=1e-2)
    metrics = fit(
        model, pair.samples.samples, schedule, tmp_path,
        objective=ALIGNMENTS[objective](targets, interface, 3, pair.vocabulary),
        notify=lambda step, steps, found: seen.append(trained_factors(model)),
    )  # fmt: skip
    assert [row["layer"] for row in metrics] == [1, 1, 2, 2, 3, 3, 3]
    for before, after, row in zip(seen, seen[1:], metrics, strict=False):
        for name, half in after.items():
            moved = not torch.equal(half.b, before[name].b)
            assert moved == (f".{int(row['layer']) - 1}." in name), (name, row)


def test_every_paired_layer_moves_at_once_in_v1(pair: Pair, tmp_path: Path) -> None:
    targets = supervision(pair, "v1", "mlp", ((2, 2), (4, 3)))
    halves = halves_of(pair, [2, 3])
    model = inject(load_student(pair.student, torch.float32, torch.device("cpu")), halves, None)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    schedule = Schedule(batch_size=6, micro_batch=6, max_steps=1, warmup=0.0, lr=1e-2)
    objective = ALIGNMENTS["v1"](targets, "mlp", 3, pair.vocabulary)
    metrics = fit(model, pair.samples.samples, schedule, tmp_path, objective=objective)
    assert 0 <= metrics[0]["layer_loss"] <= 2
    assert 0 <= metrics[0]["output_loss"] <= 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
