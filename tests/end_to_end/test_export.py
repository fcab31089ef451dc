"""`pkt export` as a user meets it: what it prints, what it leaves, what it refuses in words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import pkt
import pkt.methods.exporting
import tiny
from commands import Result, build_inputs
from commands import pkt as command

torch.set_num_threads(1)
IDS = [[1, 17, 30, 5, 99, 64, 2, 41]]


@dataclass(frozen=True)
class Made:
    """One student and what was made for it; read only."""

    student: Path
    other: Path  #: a student of other shapes
    start: Path
    tuned: Path
    plain: Path  #: an adapter by PEFT alone
    residual: Path
    theirs: Path  #: trained on the residual base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    inputs = build_inputs(root)
    other = tiny.build("llama", root / "other", "student", vocab=128, intermediate=48)
    pkt.extract(
        str(inputs.teacher), str(inputs.student), inputs.seeds, root / "start", rank=4,
    )  # fmt: skip
    pkt.train(
        str(inputs.student), inputs.seeds, root / "tuned", init=str(root / "start"), max_steps=2,
        batch_size=2, gradient_checkpointing=False,
    )  # fmt: skip
    adapter(inputs.student, root / "plain")
    pkt.export(root / "start", "residual", root / "residual")
    adapter(root / "residual/base", root / "theirs")
    return Made(
        inputs.student, other, root / "start", root / "tuned", root / "plain", root / "residual",
        root / "theirs",
    )  # fmt: skip


def adapter(student: Path, folder: Path, **config: Any) -> Path:
    """Random factors, saved by plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(folder)
    return folder


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def edited(source: Path, folder: Path, **entries: Any) -> Path:
    path = copied(source, folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def refused(ended: Result, code: int, out: Path) -> str:
    """The one line, once it is known that nothing else was left."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert not out.exists() or [p.name for p in out.rglob("*") if p.is_file()] in ([], ["lock"])
    return ended.error


def test_a_merged_model_is_told_of_and_is_there(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command("export", "--run", made.tuned, "--to", "merged", "-o", out)
    assert (ended.code, ended.out) == (0, f"{out}\n")
    for words in ("merged: a complete model", "21 modules, rank 8", "write model.safetensors",
                  "max |Δlogit|", "at the peak"):  # fmt: skip
        assert words in ended.err
    manifest = json.loads((out / "pkt_manifest.json").read_text())
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {
        "pkt_manifest.json", "pkt_run.json",
    }  # fmt: skip
    assert manifest["check"]["compared"] == "logits"
    assert len(manifest["errors"]) == 21
    assert str(tmp_path) not in json.dumps(manifest)
    assert (out / "tokenizer.json").read_bytes() == (made.student / "tokenizer.json").read_bytes()
    run = json.loads((out / "pkt_run.json").read_text())
    assert run["bytes_written"] > (out / "model.safetensors").stat().st_size
    again = command("export", "--run", made.tuned, "--to", "merged", "-o", out)
    assert (again.code, again.out) == (0, f"{out}\n")
    assert "nothing to do" in again.err
    assert not (out / ".work").exists()


def test_the_same_export_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    for to in ("lora", "merged", "residual"):
        run = made.start if to == "residual" else made.tuned
        found = []
        for place in ("one", "two"):
            out = tmp_path / place / to
            assert command("export", "--run", run, "--to", to, "-o", out, "-q").code == 0
            found.append({
                str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"")
                for path in out.rglob("*") if path.is_file() and path.name != "pkt_run.json"
            })  # fmt: skip
        assert found[0] == found[1]


def test_a_smaller_rank_is_told_with_its_errors(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command("export", "--run", made.tuned, "--to", "lora", "--rank", 2, "-o", out)
    assert ended.code == 0
    assert "recompressed to 2" in ended.err
    assert "by recompression" in ended.err
    assert "… 9 more, at most" in ended.err
    assert "error of all" in ended.err
    listed = [line.split() for line in ended.err.splitlines() if "_proj" in line]
    sizes = [float(line[-1]) for line in listed]
    assert len(sizes) == 12
    assert sizes == sorted(sizes, reverse=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    ranks = {t.shape[0] for n, t in load_file(out / "adapter_model.safetensors").items()
             if "lora_A" in n}  # fmt: skip
    assert ranks == {2}


def test_servers_are_told_of_a_large_rank(made: Made, tmp_path: Path) -> None:
    large = adapter(made.student, tmp_path / "a", r=20, lora_alpha=20)
    ended = command("export", "--run", large, "--to", "lora", "-o", tmp_path / "o")
    assert "vLLM serves ranks up to 16 unless started with --max-lora-rank 32" in ended.err
    assert "--max-lora-rank 32" in (tmp_path / "o/README.md").read_text()
    small = command("export", "--run", made.plain, "--to", "lora", "-o", tmp_path / "p")
    assert "vLLM" not in small.err


def test_one_object_or_nothing_on_request(made: Made, tmp_path: Path) -> None:
    disable_progress_bar()  # as the environment does in a process that pkt begins
    words = ("export", "--run", made.plain, "--to", "lora", "-o", tmp_path / "o")
    ended = command(*words, "--json", "-q")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["output_dir"] == str(tmp_path / "o")
    assert found["manifest"]["rank"] == 3
    assert found["run"]["peak_anonymous_bytes"] > 0
    quiet = command(*words, "-q")
    assert (quiet.out, quiet.err) == (f"{tmp_path / 'o'}\n", "")


def test_a_dry_run_writes_nothing(made: Made, tmp_path: Path) -> None:
    words = ("export", "--run", made.plain, "--to", "merged", "--dry-run")
    ended = command(*words, "-o", tmp_path / "o")
    assert ended.code == 0
    assert "6 modules, rank 3" in ended.out
    assert not (tmp_path / "o").exists()
    assert json.loads(command(*words, "--json").out)["modules"] == 6


def test_without_memory_for_the_student_the_files_are_compared(made: Made, tmp_path: Path) -> None:
    for to, run in (("merged", made.tuned), ("lora", made.tuned), ("residual", made.start)):
        out = tmp_path / to
        ended = command("export", "--run", run, "--to", to, "-o", out, "--max-ram", "64MiB")
        assert ended.code == 0, ended.err
        check = json.loads((out / "pkt_manifest.json").read_text())["check"]
        assert check["compared"] == "files"
        assert check["difference"] <= check["bound"]


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "pkt" or name.startswith("pkt."):
            raise ImportError("pkt is not here")

sys.meta_path.insert(0, Refuse())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

student, lora, merged = sys.argv[1:]
ids = torch.tensor([%s])

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits

def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

one = logits(PeftModel.from_pretrained(plain(student), lora))
other = logits(plain(merged))
print(float((one - other).abs().max()), float((one - logits(plain(student))).abs().max()))
"""


def test_a_process_that_has_never_heard_of_pkt_loads_both(made: Made, tmp_path: Path) -> None:
    pkt.export(made.theirs, "lora", tmp_path / "lora", extracted=made.start)
    pkt.export(made.theirs, "merged", tmp_path / "merged", extracted=made.start)
    paths = [str(made.student), str(tmp_path / "lora"), str(tmp_path / "merged")]
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE % IDS[0], *paths], capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0, done.stderr
    difference, moved = map(float, done.stdout.split())
    assert difference <= 1e-4
    assert moved > 1e-2


def test_the_residual_base_says_how_to_train_and_to_come_back(made: Made) -> None:
    text = (made.residual / "README.md").read_text()
    assert "is_trainable=True" in text
    assert "pkt export --run trained --extracted start --student student --to lora" in text
    assert "float32 whatever the student's type" in text
    config = json.loads((made.residual / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.residual / "base")
    assert config["r"] == config["lora_alpha"] == 4


def test_a_residual_base_in_bfloat16_says_what_it_loses(made: Made, tmp_path: Path) -> None:
    words = ("--run", made.start, "--to", "residual", "--dtype", "bfloat16", "-o", tmp_path / "o")
    ended = command("export", *words)
    assert ended.code == 0
    assert "step 0 is the student only in float32" in ended.err
    assert "of a module's change; --dtype float32 keeps it whole" in ended.err
    assert "`--dtype float32` is exact" in (tmp_path / "o/README.md").read_text()
    stored = load_file(tmp_path / "o/base/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "o/base/config.json").read_text())["dtype"] == "bfloat16"
    manifest = json.loads((tmp_path / "o/pkt_manifest.json").read_text())
    assert min(manifest["errors"].values()) > 1e-4


def test_options_from_a_file(made: Made, tmp_path: Path) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(f"run: {made.plain}\nto: lora\nrank: 1\n")
    ended = command("export", "--config", config, "-o", tmp_path / "o", "--rank", 2)
    assert ended.code == 0
    assert json.loads((tmp_path / "o/adapter_config.json").read_text())["r"] == 2


def test_an_auto_peft_model_finds_the_residual_base(made: Made) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(made.residual / "adapter")
    student = AutoModelForCausalLM.from_pretrained(made.student, dtype=torch.float32)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        ours, wanted = (m(input_ids=ids, use_cache=False).logits for m in (model, student))
    assert float((ours - wanted).abs().max()) <= 1e-4


# What is refused, before anything is written.

Case = tuple[Callable[[Made, Path], list[object]], int, str]
CASES: dict[str, Case] = {
    "nothing asked": (lambda m, p: [], 2, "pkt export also needs --run, --to, -o"),
    "no such form": (lambda m, p: ["--run", m.plain, "--to", "gguf"], 2, "'gguf' is not one of"),
    "rank of a model": (
        lambda m, p: ["--run", m.plain, "--to", "merged", "--rank", 2], 2, "--rank: not with",
    ),
    "type of an adapter": (
        lambda m, p: ["--run", m.plain, "--to", "lora", "--dtype", "bfloat16"], 2,
        "an adapter is written in float32",
    ),
    "no folder": (
        lambda m, p: ["--run", p / "none", "--to", "lora"], 1, "expected a LoRA folder",
    ),
    "a model": (
        lambda m, p: ["--run", m.student, "--to", "lora"], 1, "found no adapter_config.json",
    ),
    "a start as lora": (
        lambda m, p: ["--run", m.start, "--to", "lora"], 3, "not a trained adapter",
    ),
    "a start merged": (
        lambda m, p: ["--run", m.start, "--to", "merged"], 3, "not a trained adapter",
    ),
    "an adapter as residual": (
        lambda m, p: ["--run", m.plain, "--to", "residual"], 3, "expected a start of pkt extract",
    ),
    "a tuned run as residual": (
        lambda m, p: ["--run", m.tuned, "--to", "residual"], 3, "found a result of 'tuning'",
    ),
    "a residual of a residual": (
        lambda m, p: ["--run", m.start, "--to", "residual", "--extracted", m.start], 2,
        "--extracted: not with --to residual",
    ),
    "a forgotten start": (
        lambda m, p: ["--run", m.theirs, "--to", "lora"], 2, "trained on a residual base",
    ),
    "a start too much": (
        lambda m, p: ["--run", m.tuned, "--to", "lora", "--extracted", m.start], 3,
        "belongs to the untouched student already",
    ),
    "no start": (
        lambda m, p: ["--run", m.theirs, "--to", "lora", "--extracted", m.plain], 3,
        "--extracted",
    ),
    "another student, by its hashes": (
        lambda m, p: ["--run", m.tuned, "--to", "merged", "--student", m.other], 3,
        "config_sha256, headers_sha256 differ",
    ),
    "another student, by its shapes": (
        lambda m, p: ["--run", m.plain, "--to", "merged", "--student", m.other], 3,
        "expected shape (32, 48) of the student, found (32, 56)",
    ),
    "a start of another student": (
        lambda m, p: ["--run", m.theirs, "--to", "lora", "--extracted", m.start, "--student",
                      m.other], 3, "another student",
    ),
    "a module that no student has": (
        lambda m, p: ["--run", renamed(m.plain, p / "a", "q_proj", "query"), "--to", "lora"], 3,
        "has no such module (and 2 more)",
    ),
    "a module that is a norm": (
        lambda m, p: ["--run", renamed(m.plain, p / "a", "self_attn.q_proj", "input_layernorm"),
                      "--to", "lora"], 3, "expected an nn.Linear, found LlamaRMSNorm",
    ),
    "no base named": (
        lambda m, p: ["--run", edited(m.plain, p / "a", base_model_name_or_path=None), "--to",
                      "lora"], 2, "names no base model",
    ),
    "a base that moved": (
        lambda m, p: ["--run", edited(m.plain, p / "a", base_model_name_or_path="/gone/s"),
                      "--to", "lora"], 2, "names its base: student '/gone/s': no such folder",
    ),
    "a student that is none": (
        lambda m, p: ["--run", m.plain, "--to", "lora", "--student", "/gone/s"], 2,
        "student '/gone/s': no such folder",
    ),
    "DoRA": (
        lambda m, p: ["--run", adapter(m.student, p / "a", use_dora=True), "--to", "lora"], 3,
        "found DoRA",
    ),
    "a trained head beside it": (
        lambda m, p: ["--run", adapter(m.student, p / "a", modules_to_save=["lm_head"]),
                      "--to", "merged"], 3, "found modules_to_save",
    ),
    "a trained embedding": (
        lambda m, p: ["--run", with_embedding(m, p / "a", 1.5), "--to", "merged"], 3,
        "was trained or resized",
    ),
    "damaged weights": (
        lambda m, p: ["--run", cut(m.plain, p / "a"), "--to", "lora"], 1, "cannot be read",
    ),
    "transposed weights": (
        lambda m, p: ["--run", gpt2(p), "--to", "merged"], 3, "transposed",
    ),
    "transposed weights, unsaid": (
        lambda m, p: ["--run", edited(gpt2(p), p / "b", fan_in_fan_out=False), "--to", "merged"],
        3, "expected an nn.Linear, found Conv1D",
    ),
    "NaN in the student": (
        lambda m, p: ["--run", m.plain, "--to", "merged", "--student", poisoned(m, p / "s")], 1,
        "is NaN or infinite in F32",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of PEFT, asked for the unusual
@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(made: Made, tmp_path: Path, case: str) -> None:
    words, code, text = CASES[case]
    out = tmp_path / "out"
    given = words(made, tmp_path)
    line = refused(command("export", *given, *(["-o", out] if given else [])), code, out)
    assert text in line
    assert "bug in pkt" not in line


def renamed(source: Path, folder: Path, old: str, new: str) -> Path:
    path = copied(source, folder) / "adapter_model.safetensors"
    save_file({name.replace(old, new): t for name, t in load_file(path).items()}, path)
    return folder


def cut(source: Path, folder: Path) -> Path:
    path = copied(source, folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return folder


def with_embedding(made: Made, folder: Path, factor: float) -> Path:
    """An adapter beside which PEFT saved the whole embedding."""
    path = copied(made.plain, folder) / "adapter_model.safetensors"
    embedding = load_file(made.student / "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(path), name: embedding * factor}, path)
    return folder


def gpt2(folder: Path) -> Path:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    return adapter(folder / "gpt2", folder / "adapter", **targets)


def poisoned(made: Made, folder: Path) -> Path:
    path = copied(made.student, folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


MASK = "model.layers.0.self_attn.masked_bias"


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_a_mask_that_no_model_is_loaded_from_is_copied(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    """−10⁹ is infinite in float16; GPT-NeoX's class says that it passes such names over."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(
        LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ["attn.masked_bias"], raising=False
    )
    path = copied(made.student, tmp_path / "s") / "model.safetensors"
    masks = {MASK: torch.tensor(-1e9), MASK.replace("0", "1"): torch.tensor(float("-inf"))}
    save_file({**load_file(path), **masks}, path, {"format": "pt"})
    words = ["--run", made.plain, "--student", tmp_path / "s", "--to", "merged"]
    words += ["--dtype", dtype] if dtype else []
    ended = command("export", *words, "-o", tmp_path / "o")
    assert ended.code == 0, ended.err
    written = load_file(tmp_path / "o/model.safetensors")
    assert all(torch.equal(written[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("inside", [".", "additional_chat_templates"])
def test_a_link_out_of_the_student_is_not_published(
    made: Made, tmp_path: Path, inside: str
) -> None:
    student, secret = copied(made.student, tmp_path / "s"), tmp_path / "secret"
    secret.write_text("mine")
    (student / inside).mkdir(exist_ok=True)
    (student / inside / "NOTICE.txt").symlink_to(secret)
    (student / "theirs.txt").symlink_to("config.json")  # stays inside
    words = ("export", "--run", made.plain, "--student", student, "--to", "merged")
    line = refused(command(*words, "-o", tmp_path / "o"), 1, tmp_path / "o")
    assert f"{student / inside / 'NOTICE.txt'}: expected a file of the model" in line
    assert str(secret) in line
    (student / inside / "NOTICE.txt").unlink()
    assert command(*words, "-o", tmp_path / "o").code == 0
    assert (tmp_path / "o/theirs.txt").is_file()


@pytest.mark.parametrize(
    ("metadata", "code"), [({"mine": [1]}, 0), ({}, 0), (["x"], 1), ("x", 1), (3, 1), (None, 1)]
)
def test_an_index_says_what_it_likes_in_its_metadata(
    made: Made, tmp_path: Path, metadata: Any, code: int
) -> None:
    """An object, as transformers needs it; else it is refused before the weights are written."""
    student, name = copied(made.student, tmp_path / "s"), "model-00001-of-00001.safetensors"
    tensors = load_file(student / "model.safetensors")
    (student / "model.safetensors").rename(student / name)
    index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors, name)}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ("--run", made.plain, "--student", student, "--to", "merged", "-o", tmp_path / "o")
    ended = command("export", *words)
    if code:
        assert "metadata: expected an object, found" in refused(ended, code, tmp_path / "o")
        return
    assert ended.code == 0, ended.err
    written = json.loads((tmp_path / "o/model.safetensors.index.json").read_text())
    assert written["metadata"].items() >= metadata.items()
    assert written["weight_map"] == dict.fromkeys(sorted(tensors), name)
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_the_single_file_is_what_everyone_reads(made: Made, tmp_path: Path) -> None:
    """An index of an earlier save lies beside it: transformers loads the file, and so does pkt."""
    student = copied(made.student, tmp_path / "s")
    tensors = load_file(student / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, student / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ("--run", made.plain, "--student", student, "--to", "merged", "-o", tmp_path / "o")
    ended = command("export", *words)
    assert ended.code == 0, ended.err  # its own check loads what was written beside the student
    name = "model.norm.weight"
    assert torch.equal(load_file(tmp_path / "o/model.safetensors")[name], tensors[name])


def test_an_embedding_saved_along_as_it_was_is_no_obstacle(made: Made, tmp_path: Path) -> None:
    run = with_embedding(made, tmp_path / "a", 1.0)
    assert command("export", "--run", run, "--to", "merged", "-o", tmp_path / "o").code == 0


def test_an_occupied_folder_is_refused_and_pkts_own_is_replaced(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", "--run", made.tuned, "--to", "merged", "-o", out)
    assert command(*words).code == 0
    other = command("export", "--run", made.tuned, "--to", "lora", "-o", out)
    assert other.code == 1
    assert "expected an empty folder" in other.error
    assert "--overwrite" in other.hint
    replaced = command("export", "--run", made.tuned, "--to", "lora", "-o", out, "--overwrite")
    assert replaced.code == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pkt_manifest.json",
        "pkt_run.json",
    }  # fmt: skip
    (out / "mine.txt").write_text("mine")
    ended = command(*words, "--overwrite")
    assert ended.code == 1
    assert "mine.txt" in ended.error


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ("export", "--run", made.tuned, "--to", "merged", "-o", out)
    copy = pkt.methods.exporting.copy_rest

    def interrupt(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        copy(*arguments)

    monkeypatch.setattr(pkt.methods.exporting, "copy_rest", interrupt)
    ended = command(*words)
    assert ended.code == 130
    assert "removed again" in ended.error
    assert not any(path.suffix in (".safetensors", ".part") for path in out.rglob("*"))
    monkeypatch.undo()
    assert command("export", "--run", made.tuned, "--to", "lora", "-o", out).code == 0


# A disk that is too small

SCRIPT = (
    'mount -t tmpfs -o size={size}k none {place} || exit 99; "$@"; c=$?; ls -R {place}; exit $c'
)


def on_small_disk(place: Path, kilobytes: int, *words: object) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(size=kilobytes, place=place)
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    run = [*isolated, sys.executable, "-m", "pkt", "export", *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("to", "spare", "code", "text"),
    [
        ("merged", -8, 4, "its disk has"),
        ("merged", 4, 1, "the disk is full; what was written is removed again"),
        ("lora", None, 1, "the disk is full; what was written is removed again"),
    ],
)
def test_a_small_disk(
    made: Made, tmp_path: Path, to: str, spare: int | None, code: int, text: str
) -> None:
    model = (made.student / "model.safetensors").stat().st_size // 1024
    size = 20 if spare is None else (model // 4 * 4) + spare
    place = tmp_path / "place"
    place.mkdir()
    words = ("--run", made.tuned, "--to", to, "-o", place / "out")
    ended = on_small_disk(place, size, *words)
    if ended.returncode in (99, 1) and "mount" in ended.stderr + ended.stdout:
        pytest.skip("no file system of its own to be had here")
    assert ended.returncode == code, ended.stderr
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ".safetensors" not in ended.stdout
