"""The commands as a user meets them: what is printed where, what is written, how it ends."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pkt as package
from commands import Inputs, Result, build_inputs, pkt, result_bytes, write_seeds
from pkt.cli import demo as demo_command
from pkt.cli.interrupts import Interruption, Interrupts
from pkt.cli.progress import Progress
from runs import with_pictures

COMMANDS = ("inspect", "extract", "align", "train", "eval", "compare", "bench", "env", "demo")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two, and a busy machine makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(
    inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result, list[object]]:
    """One whole run that several tests look at."""
    out = tmp_path_factory.mktemp("finished") / "out"
    command = ["extract", *inputs.options(), "-o", out, "--rank", 4]
    return out, pkt(*command), command


@pytest.fixture(autouse=True)
def no_table_of_the_developer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PKT_ALIASES", raising=False)
    monkeypatch.delenv("PKT_DEBUG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "pkt" / "aliases.yaml"


# Help and start


def test_help_and_inspect_load_no_torch(inputs: Inputs) -> None:
    program = f"""
import sys
import pkt
from pkt.cli import main
assert main(["--help"]) == 0
assert main(["extract", "--help"]) == 0
assert main(["inspect", "--teacher", {str(inputs.teacher)!r}, "--student", {str(inputs.student)!r},
             "--embeddings"]) == 0
assert main(["extract", "--teacher", {str(inputs.teacher)!r}]) == 2
print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pkt", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"pkt {package.__version__}\n")


def test_help_names_every_command() -> None:
    for shown in (pkt(), pkt("--help")):
        assert shown.code == 0
        assert all(f"\n  {name} " in shown.out for name in COMMANDS)
    for name in COMMANDS:
        assert pkt(name, "--help").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "fly"),
        (["extract", "--fly"], "--fly"),
        (["extract", "--rank", "0"], "--rank"),
        (["extract", "--select", "best"], "--select"),
        (["extract", "--targets", ","], "--targets"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_hint(arguments: list[str], said: str) -> None:
    ended = pkt(*arguments)
    assert ended.code == 2
    assert said in ended.error
    assert ended.hint.endswith("--help")
    assert ended.out == ""


# inspect


def test_inspect_shows_models_match_and_plan(inputs: Inputs) -> None:
    shown = pkt("inspect", "--teacher", inputs.teacher, "--student", inputs.student)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert any(line.split() == ["layers", "4", "3"] for line in lines)
    head = next(line for line in lines if line.startswith("module"))
    assert head.split("  ")[0] == "module"
    assert [word in head for word in ("teacher shape", "student shape", "action")] == [True] * 3
    q_proj = next(line for line in lines if line.startswith("self_attn.q_proj"))
    assert "48 × 48" in q_proj
    assert "32 × 32" in q_proj
    assert "plan" in lines
    assert any("at the peak" in line for line in lines)


def test_inspect_json_is_one_object(inputs: Inputs) -> None:
    shown = pkt("inspect", "--teacher", inputs.teacher, "--student", inputs.student, "--json")
    found = json.loads(shown.out)
    assert shown.code == 0
    assert set(found) == {"teacher", "student", "rows", "plan", "problems", "notes"}
    assert found["plan"]["fits"] is True
    assert found["plan"]["peak_bytes"] == sum(p["bytes"] for p in found["plan"]["parts"])
    assert found["teacher"]["layers"] == 4


def test_inspect_describes_a_teacher_alone(inputs: Inputs) -> None:
    shown = pkt("inspect", "--teacher", inputs.teacher)
    assert shown.code == 0
    assert "student" not in shown.out.splitlines()[0]


def test_inspect_refuses_what_does_not_fit_together(inputs: Inputs) -> None:
    shown = pkt("inspect", "--teacher", inputs.student, "--student", inputs.teacher)
    assert shown.code == 3
    assert "refused" in shown.out
    assert "and 7 more" in shown.error


def test_inspect_says_the_smallest_budget_and_it_fits(inputs: Inputs) -> None:
    both = ("--teacher", inputs.teacher, "--student", inputs.student)
    shown = pkt("inspect", *both, "--max-ram", "1MiB")
    assert shown.code == 4
    assert "DOES NOT FIT" in shown.out
    smallest = shown.hint.split("--max-ram ")[1]
    assert pkt("inspect", *both, "--max-ram", smallest).code == 0


def test_inspect_needs_a_teacher() -> None:
    ended = pkt("inspect")
    assert ended.code == 2
    assert "--teacher" in ended.error


# extract


def test_stdout_is_the_folder_and_nothing_else(
    finished: tuple[Path, Result, list[object]],
) -> None:
    out, ran, _ = finished
    assert ran.code == 0, ran.err
    assert ran.out == f"{out}\n"
    assert (out / "adapter_model.safetensors").is_file()
    assert (out / "report" / "index.html").is_file()
    assert not (out / ".work").exists()


def test_stderr_is_plan_then_progress_then_summary(
    finished: tuple[Path, Result, list[object]],
) -> None:
    out, ran, _ = finished
    lines = ran.err.splitlines()
    phases = [line.split()[0] for line in lines if "/" in line and " held" in line]
    assert phases == ["forward"] * 4 + ["head"] + ["backward"] * 4 + ["factors"] * 3
    first = next(i for i, line in enumerate(lines) if line.startswith("forward"))
    assert "plan" in lines[:first]
    assert any(line.split()[:1] == ["io"] for line in lines[:first])
    assert all("GB/s" in line for line in lines if line.startswith(("forward", "backward")))
    ending = "\n".join(lines[first:])
    for said in ("kept layers", "mean seed loss", "seconds", str(out / "report" / "index.html")):
        assert said in ending
    assert "Loading" not in ran.err
    assert "Warning" not in ran.err


def test_a_finished_run_says_so(finished: tuple[Path, Result, list[object]]) -> None:
    out, _, command = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = pkt(*command)
    assert (again.code, again.out) == (0, f"{out}\n")
    assert "finished already" in again.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_json_is_one_object(finished: tuple[Path, Result, list[object]]) -> None:
    out, _, command = finished
    shown = pkt(*command, "--json")
    found = json.loads(shown.out)
    assert found["output_dir"] == str(out)
    assert found["manifest"] == json.loads((out / "pkt_manifest.json").read_text())
    assert found["run"] == json.loads((out / "pkt_run.json").read_text())


def test_quiet_says_nothing_but_the_result(inputs: Inputs, tmp_path: Path) -> None:
    options = inputs.options()
    ran = pkt("extract", *options, "-o", tmp_path / "out", "--limit", 1, "--targets", "q", "-q")
    assert (ran.code, ran.out, ran.err) == (0, f"{tmp_path / 'out'}\n", "")


def test_overwrite_replaces_what_an_earlier_run_left(
    inputs: Inputs, finished: tuple[Path, Result, list[object]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = ["extract", *inputs.options(), "-o", out, "-q", "--limit", 1, "--targets", "q"]
    assert pkt(*few).code == 0
    changed = [*few, "--rank", 4]
    assert pkt(*changed).code == 1
    assert pkt(*changed, "--overwrite").code == 0
    assert json.loads((out / "pkt_manifest.json").read_text())["options"]["rank"] == 4


def test_a_dry_run_writes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    shown = pkt("extract", *inputs.options(), "-o", tmp_path / "out", "--dry-run")
    assert shown.code == 0
    assert "plan" in shown.out.splitlines()
    assert list(tmp_path.iterdir()) == []
    small = pkt("extract", *inputs.options(), "--dry-run", "--max-ram", "1MiB")
    assert small.code == 4
    assert "DOES NOT FIT" in small.out


def test_cut_seeds_are_counted(inputs: Inputs) -> None:
    shown = pkt("extract", *inputs.options(), "--dry-run", "--max-tokens", 8)
    assert "4 cut to 8 tokens" in shown.out
    whole = pkt("extract", *inputs.options(), "--dry-run", "--json")
    assert json.loads(whole.out)["seeds"]["cut"] == 0


def test_a_sample_is_shown_and_nothing_run(inputs: Inputs, tmp_path: Path) -> None:
    rows = [{"question": "is it big?", "answer": "it is"}]
    seeds = write_seeds(tmp_path / "asked.jsonl", rows)
    shown = pkt("extract", "--teacher", inputs.teacher, "--seeds", seeds, "--show-sample")
    assert shown.code == 0
    assert "asked.jsonl:1" in shown.out
    assert "⟦it is" in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["asked.jsonl"]


# Options: command line over file over preset over defaults


def options_of(*arguments: object) -> dict[str, object]:
    shown = pkt("extract", *arguments, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    found: dict[str, object] = json.loads(shown.out)["options"]
    return found


def test_the_preset_is_the_papers(inputs: Inputs) -> None:
    found = options_of(*inputs.options(), "--preset", "paper")
    assert found["embeddings"] is True
    assert found["template"] == "paper"
    assert found["rank"] == 16
    bare = options_of(*inputs.options(), "--no-embeddings", "--preset", "paper", "--rank", 2)
    assert bare["embeddings"] is False
    assert bare["rank"] == 2


def test_a_file_counts_more_than_the_preset_and_less_than_the_command_line(
    inputs: Inputs, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"teacher: {inputs.teacher}\nstudent: {inputs.student}\nseeds: {inputs.seeds}\n"
        "preset: paper\nembeddings: false\nrank: 3\nmax-tokens: 9\ntargets: [q, k]\n"
    )
    found = options_of("--config", file, "--rank", 5)
    assert found["template"] == "paper"
    assert found["embeddings"] is False
    assert found["max_tokens"] == 9
    assert found["targets"] == ["q", "k"]
    assert found["rank"] == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak: 3", "unknown option 'rnak'"),
        ("rank: many", "--rank"),
        ("select: best", "--select"),
        ("targets: 3", "--targets"),
        ("- rank", "expected a mapping"),
        ("rank: [", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    ended = pkt("extract", "--config", file)
    assert ended.code == 2
    assert str(file) in ended.error
    assert said in ended.error


# Missing options and aliases


def test_missing_options_are_named_after_the_teachers_plan(
    inputs: Inputs, no_table_of_the_developer: Path
) -> None:
    table = no_table_of_the_developer
    table.parent.mkdir(parents=True)
    table.write_text(f"70b: {inputs.teacher}\n")
    ended = pkt("extract", "--teacher", "70b")
    assert (ended.code, ended.out) == (2, "")
    assert f"70b: {inputs.teacher}" in ended.err
    assert "plan" in ended.err.splitlines()
    for option in ("--student", "--seeds", "-o"):
        assert f"\n  {option} " in ended.err
        assert option in ended.error
    assert "--teacher" not in ended.error
    words = shlex.split(ended.hint)
    assert words[:4] == ["pkt", "extract", "--teacher", "70b"]


def test_an_alias_out_of_reach_is_explained(no_table_of_the_developer: Path) -> None:
    ended = pkt("extract", "--teacher", "70b", "--student", "7b")
    assert ended.code == 2
    assert "meta-llama/Llama-2-70b-hf" in ended.err
    assert str(no_table_of_the_developer) in ended.err
    assert "\n  70b: /path/to/" in ended.err
    assert "--seeds" in ended.error
    assert "--student" not in ended.error


def test_the_users_table_comes_from_the_environment(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mine.yaml"
    table.write_text(f"big: {inputs.teacher}\n")
    monkeypatch.setenv("PKT_ALIASES", str(table))
    assert pkt("inspect", "--teacher", "big").code == 0
    found = json.loads(pkt("env", "--json").out)
    assert found["alias_file"] == str(table)
    assert found["aliases"]["big"] == str(inputs.teacher)
    assert found["aliases"]["7b"] == "meta-llama/Llama-2-7b-hf"
    monkeypatch.setenv("PKT_ALIASES", str(tmp_path / "none.yaml"))
    ended = pkt("env")
    assert ended.code == 2
    assert "none.yaml" in ended.error


def test_env_names_versions_and_host() -> None:
    found = json.loads(pkt("env", "--json").out)
    assert found["pkt"] == package.__version__
    assert {"torch", "transformers", "peft"} <= set(found["versions"])
    assert found["memory_limit_bytes"] > 0
    shown = pkt("env")
    assert shown.code == 0
    assert found["memory_limit_source"] in shown.out


# Failures that are nobody's input


def test_a_mistake_of_ours_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("q_proj")

    monkeypatch.setattr("pkt.api.inspect", broken)
    ended = pkt("inspect", "--teacher", "x")
    assert ended.code == 1
    assert "bug in pkt" in ended.error
    assert "KeyError: 'q_proj'" in ended.error
    assert "Traceback" not in ended.err
    monkeypatch.setenv("PKT_DEBUG", "1")
    assert "Traceback" in pkt("inspect", "--teacher", "x").err


def test_a_known_failure_has_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in pkt("inspect", "--teacher", "./nowhere").err
    monkeypatch.setenv("PKT_DEBUG", "1")
    ended = pkt("inspect", "--teacher", "./nowhere")
    assert ended.code == 2
    assert "Traceback" in ended.err


def test_a_reader_that_leaves_is_no_error(inputs: Inputs) -> None:
    command = [sys.executable, "-m", "pkt", "inspect", "--teacher", str(inputs.teacher)]
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        _, err = process.communicate()
    assert err == b""
    assert process.returncode == 141


def test_a_reader_of_progress_that_leaves_is_not_the_disk(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pkt", "extract", *map(str, inputs.options()), "--seeds",
               str(inputs.seeds), "-o", str(out), *SLOW]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        process.stderr.readline()
        process.stderr.close()
    assert process.returncode == 141
    assert pkt(*command[3:]).code == 0, "what was finished is kept"


# Interruption

SLOW = ["--rank", "2", "--targets", "q,v"]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inputs, dict[str, bytes]]:
    """A run of many layers and seeds, and what it makes when nothing stops it."""
    folder = tmp_path_factory.mktemp("slow")
    inputs = build_inputs(folder, layers=6, seeds=8)
    assert pkt("extract", *inputs.options(), "-o", folder / "out", *SLOW, "-q").code == 0
    return inputs, result_bytes(folder / "out")


@pytest.mark.parametrize(
    ("number", "code", "at", "spool"),
    [
        (signal.SIGINT, 130, b"forward  3/", []),
        (signal.SIGTERM, 143, b"backward 2/", ["--spool-every", "2", "--spool-dir"]),
    ],
)
def test_a_signal_keeps_finished_layers_and_the_command_continues(
    slow: tuple[Inputs, dict[str, bytes]],
    tmp_path: Path,
    number: int,
    code: int,
    at: bytes,
    spool: list[str],
) -> None:
    inputs, whole = slow
    out, scratch = tmp_path / "an out", tmp_path / "scratch"
    arguments = ["extract", *map(str, inputs.options()), "-o", str(out), *SLOW]
    arguments += [*spool, str(scratch)] if spool else []
    command = [sys.executable, "-m", "pkt", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(at):
                process.send_signal(number)
                break
        printed, said = process.communicate()
    assert process.returncode == code
    assert printed == b""
    ended = Result(process.returncode, printed.decode(), said.decode())
    assert sorted(path.name for path in out.iterdir()) == [".work"]
    counts = [int(word) for word in ended.error.split() if word.isdigit()]
    assert counts[1::2] == [6, 6]
    assert counts[0] >= 3 if number == signal.SIGINT else counts[0] == 6
    assert counts[2] == 0 if number == signal.SIGINT else counts[2] >= 2
    kept = ended.error.partition(" kept in ")[2].split(" and ")
    assert kept[0] == str(out / ".work")
    assert [Path(folder).parent for folder in kept[1:]] == ([scratch] if spool else [])
    words = shlex.split(ended.hint.removeprefix("continue with: "))
    assert words == ["pkt", *arguments]
    again = pkt(*words[1:])
    assert (again.code, again.out) == (0, f"{out}\n")
    steps = [line.split()[:2] for line in again.err.splitlines() if " held" in line]
    assert ["forward", "1/6"] not in steps
    assert result_bytes(out) == whole


def test_an_interruption_passes_where_failures_are_explained(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a tokenizer turns every `Exception` into a message about the tokenizer."""

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupted)
    ended = pkt("extract", *inputs.options(), "-o", tmp_path / "out")
    assert (ended.code, ended.error) == (143, "interrupted")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_that_is_lost_is_raised_again() -> None:
    class Loses:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupts() as interrupts:
        lost = Loses()
        del lost
        assert interrupts.received == signal.SIGINT
        with pytest.raises(Interruption):
            interrupts.check()


# demo


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    folder, here = tmp_path_factory.mktemp("demo"), Path.cwd()
    os.chdir(folder)
    try:
        with with_pictures():
            shown = pkt("demo")
        yield folder, shown
    finally:
        os.chdir(here)


@pytest.mark.slow  # CI runs the wheel's
def test_demo_shows_the_whole_job(demonstrated: tuple[Path, Result]) -> None:
    folder, shown = demonstrated
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[-1] == "pkt-demo"
    assert sum("█" in line for line in lines) == 5
    assert sum(line.startswith("  ● ") for line in lines) == 3
    assert [line.split()[1] for line in shown.err.splitlines() if line.startswith("$ pkt")] == [
        "pkt",
    ] * 5
    row = next(line for line in lines if line.startswith("| loss | loss"))
    losses = [float(cell.split("±")[0]) for cell in row.split("|")[3:8]]
    assert losses[0] == pytest.approx(1.614, abs=1e-3)  # student, adapters, teacher
    assert losses[4] == pytest.approx(1.091, abs=1e-3)
    assert all(abs(loss - losses[0]) < 0.02 for loss in losses[1:4])
    told = [line for line in lines if ": Once upon a time" in line]
    assert [line.split(":")[0].strip() for line in told] == [
        "student", "lora", "tuned", "aligned", "teacher",
    ]  # fmt: skip
    page = (folder / "pkt-demo" / "index.html").read_text(encoding="utf-8")
    pictures = list((folder / "pkt-demo").glob("*/report/*.png"))
    assert page.count("data:image/png;base64,") == len(pictures) >= 6
    assert "Once upon a time" in page
    assert (folder / "pkt-demo" / "LICENCE.md").is_file()


@pytest.mark.slow
def test_demo_again_finds_its_result(demonstrated: tuple[Path, Result]) -> None:
    again = pkt("demo", "--json")
    assert again.code == 0
    assert again.err.count("finished already") >= 3
    assert json.loads(again.out)["output_dir"] == "pkt-demo"


@pytest.mark.slow
def test_the_commands_that_demo_names_are_the_same_runs(
    demonstrated: tuple[Path, Result],
) -> None:
    _, shown = demonstrated
    for line in shown.err.splitlines():
        if line.startswith("$ pkt ") and " eval " not in line:
            again = pkt(*shlex.split(line)[2:])
            assert again.code == 0
            assert "finished already" in again.err


@pytest.mark.parametrize("kind", ["foreign", "changed", "file"])
def test_demo_touches_nothing_else(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "mine"
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        name = "thesis.tex" if kind == "foreign" else "stories_seeds.jsonl"
        (folder / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    ended = pkt("demo", "-o", folder)
    assert ended.code == 1
    assert str(folder) in ended.error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_built_in_pair_is_small() -> None:
    assert demo_command.name == "demo"
    folder = Path(package.__file__).parent / "data" / "demo"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_500_000
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(folder))
    assert len(packed.getvalue()) < 1_600_000


# Progress


def test_a_terminal_gets_bars(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    progress = Progress(1 << 30, lines.append, terminal=True)
    for phase, total in (("forward", 2), ("head", 3)):
        for done in range(1, total + 1):
            progress(phase, done, total)
    progress.close()
    drawn = capsys.readouterr().err
    assert lines == []
    assert "2/2" in drawn
    assert "3/3" in drawn
    assert "GB/s" in drawn
    assert "held" in drawn


def test_a_continued_run_counts_only_its_own_bytes() -> None:
    lines: list[str] = []
    progress = Progress(1 << 20, lines.append, terminal=False)
    progress("backward", 4, 5)
    progress("backward", 5, 5)
    assert [line.split("  ")[0] for line in lines] == ["backward 4/5 layers", "backward 5/5 layers"]
    assert "1.00 MiB" in lines[0]
    assert "2.00 MiB" in lines[1]


def test_a_strangers_texts_do_not_steer_the_terminal(inputs: Inputs, tmp_path: Path) -> None:
    """What `pkt inspect` prints of a model is one line a line, whatever its files say."""
    from safetensors.torch import load_file, save_file

    teacher, first = tmp_path / "teacher", "model-00001-of-00001.safetensors"
    shutil.copytree(inputs.teacher, teacher)
    tensors = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").unlink()
    forged = "x\x1b]0;mine\x07\nproblem: none"
    save_file({**tensors, forged: tensors["model.norm.weight"].clone()}, teacher / first)
    index = {"weight_map": dict.fromkeys(tensors, first)}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "lla\x1b[2Jma\nX"}))
    shown = pkt("inspect", "--teacher", teacher)
    assert "\x1b" not in shown.out
    assert "\x07" not in shown.out
    assert not any(line.startswith(("problem: ", "X")) for line in shown.out.splitlines())
    assert "lla\\x1b[2Jma\\nX" in shown.out + shown.err


@pytest.mark.parametrize("said", ["", "none", "-1"])
def test_what_no_launcher_says_is_no_rank(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", said)
    ended = pkt("inspect", "--teacher", "/nowhere")
    assert ended.code == 2
    assert ended.error.startswith("teacher '/nowhere'")
