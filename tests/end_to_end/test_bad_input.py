"""Every bad input ends in its exit code and one clear line, with nothing outside OUT/.work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from commands import Inputs, Result, build_inputs, pkt, result_bytes, write_seeds


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "result" / "out"


def extract(inputs: Inputs, out: Path, *more: object, **replaced: object) -> Result:
    return pkt("extract", *inputs.options(**replaced), "-o", out, "--rank", 2, *more)


def refused(ended: Result, code: int, out: Path, *, started: bool = False) -> str:
    """The error line, after what holds for every failure has been checked.

    Without ``started`` the run was refused before OUT existed; with it, OUT holds only .work.
    """
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert "bug in pkt" not in ended.err
    if started:
        assert [path.name for path in out.iterdir()] == [".work"]
    else:
        assert not out.exists()
    return ended.error


def copy_of(model: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A model folder with another config.json."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def with_weights(model: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model folder with other weights."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


# 3: models that do not fit together


def test_a_teacher_narrower_than_the_student(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    wide = tiny.build("llama", tmp_path / "wide", "teacher", vocab=128, layers=3)
    ended = extract(inputs, out, teacher=inputs.student, student=wide)
    line = refused(ended, 3, out)
    assert "mlp.down_proj" in line
    assert "(32, 56)" in line
    assert "(48, 80)" in line
    assert "and 6 more" in line
    table = [row for row in ended.err.splitlines() if "refused: teacher is smaller" in row]
    assert len(table) == 7


def test_a_teacher_shallower_than_the_student(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    deep = tiny.build("llama", tmp_path / "deep", "student", vocab=128, layers=5)
    line = refused(extract(inputs, out, student=deep), 3, out)
    assert "the teacher has 4, the student 5" in line


def test_other_vocabulary_rows_with_embeddings(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    other = tiny.build("llama", tmp_path / "other", "student", vocab=136)
    tiny.write_tokenizer(other, 136)
    line = refused(extract(inputs, out, "--embeddings", student=other), 3, out)
    assert "vocabulary of the teacher 128, of the student 136" in line


def test_other_tokens_in_equally_many_rows(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    other = tiny.build("llama", tmp_path / "other", "student", vocab=128)
    tiny.write_tokenizer(other, 128, chat_template=tiny.CHATML)
    line = refused(extract(inputs, out, "--embeddings", student=other), 3, out)
    assert "entries of the two tokenizers differ" in line


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_local_experts": 8, "model_type": "mixtral"}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq)"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "decoder-only"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "decoder-only"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_of_another_kind(
    inputs: Inputs, out: Path, tmp_path: Path, entries: dict[str, Any], said: str, role: str
) -> None:
    model = copy_of(getattr(inputs, role), tmp_path / "model", lambda c: c.update(entries))
    line = refused(extract(inputs, out, **{role: model}), 3, out)
    assert said in line
    assert f"{role} {model}" in line


def test_integer_weights(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    """As of a late layer: said before anything is read."""
    name = "model.layers.3.self_attn.q_proj.weight"
    for weight, kind in ((name, torch.int8), ("model.norm.weight", torch.int64)):
        model = with_weights(
            inputs.teacher,
            tmp_path / str(kind),
            lambda w, n=weight, k=kind: w.update({n: w[n].to(k)}),
        )
        line = refused(extract(inputs, out, teacher=model), 3, out)
        assert f"tensor '{weight}'" in line
        assert "expected floating-point weights, found I" in line


def test_a_family_that_counts_its_layers_otherwise(
    inputs: Inputs, out: Path, tmp_path: Path
) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["num_layers"] = config.pop("num_hidden_layers")

    model = copy_of(inputs.teacher, tmp_path / "model", rename)
    assert "how many layers" in refused(extract(inputs, out, teacher=model), 3, out)


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "eager", "return_dict": False, "output_attentions": False},
    ],
)
def test_how_a_stranger_ran_the_teacher_is_not_how_it_is_swept(
    inputs: Inputs, out: Path, tmp_path: Path, entries: dict[str, Any]
) -> None:
    model = copy_of(inputs.teacher, tmp_path / "model", lambda c: c.update(entries))
    assert extract(inputs, out, teacher=model).code == 0
    plain = tmp_path / "plain"
    assert extract(inputs, plain).code == 0
    ours, theirs = ((place / "adapter_model.safetensors").read_bytes() for place in (out, plain))
    assert ours == theirs


# 1: checkpoints


def test_a_pickled_checkpoint(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    model = tmp_path / "pickled"
    shutil.copytree(inputs.teacher, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused(extract(inputs, out, teacher=model), 1, out)
    assert "pytorch_model.bin" in line
    assert "save_pretrained" in line


def test_a_truncated_shard(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "short", "teacher", vocab=128, shards=3)
    tiny.write_tokenizer(model, 128)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    assert shard.name in refused(extract(inputs, out, teacher=model), 1, out)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_not_a_number(
    inputs: Inputs, out: Path, tmp_path: Path, name: str
) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[7] = float("nan")

    model = with_weights(inputs.teacher, tmp_path / "nan", damage)
    line = refused(extract(inputs, out, teacher=model), 1, out, started=True)
    assert f"'{name}'" in line
    assert "model.safetensors" in line
    assert "nan" in line


def test_a_loss_that_is_not_a_number(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] = 1000
        weights["lm_head.weight"][7] = 0
        weights["lm_head.weight"][7, 0] = 3e38

    model = with_weights(inputs.teacher, tmp_path / "huge", enlarge)
    line = refused(extract(inputs, out, teacher=model), 1, out, started=True)
    assert "seeds.jsonl:1" in line
    assert "loss" in line


# 5: seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found no row"),
        ("\n \n", "found no row"),
        ('{"text": "big dog"}\n{"text": \n', "seeds.jsonl:2: not valid JSON"),
        ('{"text": "big dog"}\n\n[1]\n', "seeds.jsonl:3: expected a JSON object"),
        ('{"body": "big dog"}\n', "seeds.jsonl:1: unknown columns"),
        ('{"prompt": "big dog", "completion": ""}\n', "seeds.jsonl:1: its answer is empty"),
        ('{"question": "big big big big dog", "answer": "kid"}\n', "seeds.jsonl:1: cut to 8"),
    ],
)
def test_seeds_that_cannot_be_used(
    inputs: Inputs, out: Path, tmp_path: Path, text: str, said: str
) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(text)
    line = refused(extract(inputs, out, "--max-tokens", 8, seeds=seeds), 5, out)
    assert said in line
    assert str(seeds) in line


@pytest.mark.parametrize("where", ["question", "answer"])
def test_a_token_that_the_model_was_not_given(
    inputs: Inputs, out: Path, tmp_path: Path, where: str
) -> None:
    """Its tokenizer was extended and the model not resized."""
    from transformers import AutoTokenizer

    model = shutil.copytree(inputs.teacher, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|added|>"])
    tokenizer.save_pretrained(model)
    row = {"question": "a b", "answer": "c d"}
    rows = [row, {**row, where: "a <|added|> b"}]
    seeds = write_seeds(tmp_path / "seeds.jsonl", rows)
    ended = extract(inputs, out, teacher=model, seeds=seeds)
    line = refused(ended, 5, out)
    assert f"{seeds}:2: token 128 ('<|added|>')" in line
    assert "128 rows" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: [1]", "rank: expected one value"),
        ("rank: .inf", "rank: expected one value"),
        ("output_dir: 7", "output-dir: expected one value"),
        ("spool_every: [3]", "expected one number"),
        ("json: [1]", "json: expected true or false"),
        ("limit: {a: 1}", "limit: expected one value"),
        ("overwrite: 7", "overwrite: expected true or false"),
        ("embeddings: [1]", "embeddings: expected true or false"),
    ],
)
def test_a_config_of_strange_values(
    inputs: Inputs, out: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    line = refused(
        pkt("extract", *inputs.options(), "-o", out, "--config", tmp_path / "c.yaml"), 2, out
    )
    assert said in line


def test_seeds_without_a_token_to_predict(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(inputs.teacher, teacher)
    tiny.write_tokenizer(teacher, 128, bos=False)
    seeds = write_seeds(tmp_path / "one.jsonl", [{"text": "a"}])
    line = refused(extract(inputs, out, teacher=teacher, seeds=seeds), 5, out)
    assert "one.jsonl:1: no token to predict" in line


def test_seeds_that_are_not_there(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    line = refused(extract(inputs, out, seeds=tmp_path / "none.jsonl"), 5, out)
    assert "none.jsonl" in line


# 2 and 1: names and output folders


def test_a_model_that_is_not_there(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    line = refused(extract(inputs, out, teacher=tmp_path / "none"), 2, out)
    assert str(tmp_path / "none") in line


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_output_folder_that_holds_something_else(
    inputs: Inputs, out: Path, options: list[str]
) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("mine")
    ended = extract(inputs, out, *options)
    assert ended.code == 1
    assert "thesis.tex" in ended.error
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_users_own_files_are_not_pkts_by_their_names(inputs: Inputs, out: Path) -> None:
    (out / "report").mkdir(parents=True)
    for name in ("README.md", "report/thesis.tex"):
        (out / name).write_text("mine")
    for options in ([], ["--overwrite"]):
        ended = extract(inputs, out, *options)
        assert ended.code == 1
        assert "README.md" in ended.error
        assert "--overwrite" not in ended.hint
    assert (out / "report" / "thesis.tex").read_text() == "mine"
    assert (out / "README.md").read_text() == "mine"


def test_a_link_in_place_of_the_work_folder(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    out.mkdir(parents=True)
    (tmp_path / "large").mkdir()
    (out / ".work").symlink_to(tmp_path / "large")
    ended = extract(inputs, out)
    assert ended.code == 1
    assert "found a link" in ended.error
    assert "--spool-dir" in ended.hint


def test_killed_while_it_replaces_what_a_manifest_names(
    inputs: Inputs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an export that is replaced: what only its manifest says is pkt's stays pkt's."""
    out.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", "README.md"):
        (out / name).write_bytes(b"theirs")
    (out / "pkt_manifest.json").write_text(
        json.dumps({"method": "exporting", "files": ["a.safetensors", "b.safetensors"]})
    )
    unlink = Path.unlink

    def stop(path: Path, *more: Any, **options: Any) -> None:
        if path.name == "b.safetensors":
            raise KeyboardInterrupt
        unlink(path, *more, **options)

    monkeypatch.setattr(Path, "unlink", stop)
    assert extract(inputs, out, "--overwrite").code == 130
    monkeypatch.undo()
    assert (out / "b.safetensors").exists()
    assert not (out / "pkt_manifest.json").exists()
    assert extract(inputs, out).code == 1
    assert extract(inputs, out, "--overwrite").code == 0
    assert not list(out.glob("?.safetensors"))


def test_an_output_folder_of_another_run(inputs: Inputs, out: Path) -> None:
    few = ("--limit", 1, "--targets", "q")
    assert extract(inputs, out, *few).code == 0
    before = result_bytes(out)
    ended = extract(inputs, out, *few, "--seed", 1)
    assert ended.code == 1
    assert "--overwrite" in ended.hint
    assert result_bytes(out) == before


def test_an_unfinished_run_with_other_inputs(inputs: Inputs, out: Path, tmp_path: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.3.mlp.up_proj.weight"][0, 0] = float("inf")

    model = with_weights(inputs.teacher, tmp_path / "inf", damage)
    refused(extract(inputs, out, teacher=model), 1, out, started=True)
    line = refused(extract(inputs, out, "--seed", 1, teacher=model), 1, out, started=True)
    assert "options.seed" in line


def test_a_file_in_place_of_the_output_folder(inputs: Inputs, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    ended = extract(inputs, out)
    assert ended.code == 1
    assert str(out) in ended.error
    assert out.read_text() == "mine"


def test_an_output_folder_that_cannot_be_made(inputs: Inputs) -> None:
    out = Path("/proc/pkt/out")
    assert str(out) in refused(extract(inputs, out), 1, out)


def test_a_read_only_output_folder(inputs: Inputs, tmp_path: Path) -> None:
    """As root too: a file system mounted read-only where the host lets us, else by mode."""
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    out.mkdir()
    if isolated(place, "true", "ro").returncode:
        out.chmod(0o555)
        ended = from_process(plain(extract_words(inputs, out)))
    else:
        ended = from_process(
            isolated(place, "mkdir -p {place}/out", "ro", extract_words(inputs, out))
        )
    assert ended.code == 1
    assert str(out) in ended.error
    assert "bug in pkt" not in ended.err


# 1: a full disk


def extract_words(inputs: Inputs, out: Path) -> list[str]:
    words = [*inputs.options(), "-o", out, "--rank", 2, "--limit", 0]
    return [sys.executable, "-m", "pkt", "extract", *map(str, words)]


def plain(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def from_process(done: subprocess.CompletedProcess[str]) -> Result:
    return Result(done.returncode, done.stdout, done.stderr)


def isolated(
    place: Path, before: str, option: str, command: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run where ``place`` is a small file system of its own; 1 where the host does not let us.

    ``option`` is rw, ro, or full: others fill it as soon as the run has kept a layer's inputs.
    """
    script = (
        f"mount -t tmpfs -o size=4m none {place} && {before.format(place=place)} && "
        f"{{ [ {option} != ro ] || mount -o remount,ro {place}; }} || exit 1; "
        f'"$@" & run=$!; while [ {option} = full ] && kill -0 $run 2>/dev/null; do '
        f"[ ! -e {place}/out/.work/spool/input-00001.bin ] && [ ! -e {place}/others ] || "
        f"dd if=/dev/zero bs=4k of={place}/others oflag=append conv=notrunc 2>/dev/null; "
        f"sleep 0.05; done; wait $run; code=$?; rm -f {place}/others; "
        f'find {place} -type f -size +0 -not -path "*/.work/*" >&2; exit $code'
    )
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    return plain([*words, *(command or ["true"])])


def test_a_full_disk_and_then_room(inputs: Inputs, tmp_path: Path) -> None:
    """ENOSPC on a small file system; where none can be mounted, EFBIG of a limited process."""
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    texts = [{"text": "big dog and kid " * 12} for _ in range(24)]
    long = Inputs(inputs.teacher, inputs.student, write_seeds(tmp_path / "long.jsonl", texts))
    command = extract_words(long, out)
    if isolated(place, "true", "rw").returncode == 0:
        ended = from_process(isolated(place, "true", "full", command))
        assert "the disk is full" in ended.error
        assert "run the same command again" in ended.hint
    else:
        ended = from_process(plain(["sh", "-c", 'ulimit -f 200; "$@"', "sh", *command]))
        assert "cannot write" in ended.error
        assert [path.name for path in out.iterdir()] == [".work"]
    assert ended.code == 1
    assert ended.out == ""
    assert str(out / ".work") in ended.error
    left = [line for line in ended.err.splitlines() if line.startswith(f"{place}/")]
    assert left == []


# 4: does not fit


def test_a_budget_that_is_too_small(inputs: Inputs, out: Path) -> None:
    ended = extract(inputs, out, "--max-ram", "100MiB")
    assert "--max-ram 100MiB" in refused(ended, 4, out)
    assert not any(line.startswith("forward") for line in ended.err.splitlines())
    smallest = re.search(r"--max-ram (\d+MiB)", ended.hint)
    assert smallest is not None
    few = ("--limit", 1, "--targets", "q")
    less = extract(inputs, out, *few, "--max-ram", f"{int(smallest[1][:-3]) - 1}MiB")
    refused(less, 4, out)
    assert extract(inputs, out, *few, "--max-ram", smallest[1]).code == 0


def test_a_size_that_is_none(inputs: Inputs, out: Path) -> None:
    line = refused(extract(inputs, out, "--max-ram", "lots"), 2, out)
    assert "lots" in line
