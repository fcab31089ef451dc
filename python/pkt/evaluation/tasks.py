"""Benchmarks as lm-eval tasks: pkt's own task files over local documents, or lm-eval's by name.

The task files (``pkt/data/tasks/*.yaml``) hold lm-eval's keys and ask a model exactly what
lm-eval's own tasks of these names ask; only their documents come from `formats.Part`. Fixed
few-shot examples are read from the installed lm-eval (key ``examples``), without importing its
task modules: two of them call the network when they are imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import yaml

from pkt.errors import DataError, IncompatibleError, UsageError
from pkt.evaluation.files import Row
from pkt.evaluation.formats import LAYOUTS, Part
from pkt.evaluation.scoring import score_generation

OWN = ("loss", *LAYOUTS)  #: what runs on local files
CODE = ("humaneval", "mbpp")  #: what runs the model's programs
INSTALL = "pip install 'pkt-llm[eval]'"


@dataclass(frozen=True, slots=True)
class Asked:
    """One entry of --tasks."""

    label: str  #: as given: "gsm8k@8"
    name: str  #: "gsm8k"
    shots: int | None  #: of the few-shot prompt; ``None``: the task's own number


def parse_tasks(entries: Sequence[str]) -> list[Asked]:
    """Entries such as ``mmlu`` or ``mmlu@5``: name, and number of few-shot examples.

    Raises:
        UsageError: an entry twice, a number that is none, shots for ``loss``.

    """
    found: list[Asked] = []
    for entry in entries:
        match = re.fullmatch(r"([^@\s]+?)(?:@(\d+))?", entry)
        if not match:
            raise UsageError(f"--tasks {entry}: expected NAME or NAME@SHOTS", "for example gsm8k@8")
        shots = int(match[2]) if match[2] else None
        if match[1] == "loss" and shots is not None:
            raise UsageError(f"--tasks {entry}: 'loss' takes no shots")
        asked = Asked(entry, match[1], shots)
        if any(other.label == entry for other in found):
            raise UsageError(f"--tasks: '{entry}' is given twice")
        found.append(asked)
    if not found:
        raise UsageError("--tasks: expected at least one task", f"known: {', '.join(OWN)}")
    return found


def default_shots(asked: Asked) -> int:
    """Few-shot examples of an entry over local files."""
    if asked.shots is not None:
        return asked.shots
    return 0 if asked.name == "loss" else int(_task_file(asked.name)["num_fewshot"])


def require_lm_eval() -> None:
    """Raise `UsageError` unless lm-eval can be imported."""
    for module in ("datasets", "lm_eval", "rouge_score"):
        try:
            import_module(module)
        except ImportError as error:
            raise UsageError(f"benchmark tasks need lm-eval: {error}", INSTALL) from error


def local_tasks(
    asked: Asked,
    parts: Sequence[Part],
    *,
    limit: int = 0,
    seed: int = 1234,
    max_new_tokens: int | None = None,
    render: Callable[[Row], str] | None = None,
) -> dict[str, Any]:
    """lm-eval tasks over local documents, one a part, by name ("mmlu_anatomy").

    Args:
        asked: whose name is in OWN but not ``loss``.
        parts: documents, from `formats.read_benchmark`.
        limit: first so many documents of each part; 0 for all.
        seed: of the few-shot draw; lm-eval's own default is 1234.
        max_new_tokens: replaces the task's own longest generation.
        render: AlpacaFarm's prompt of an instruction.

    Raises:
        UsageError: lm-eval is missing, or the few-shot examples are.

    """
    require_lm_eval()
    config, shots = _task_file(asked.name), default_shots(asked)
    examples = config.pop("examples", None)
    description = config.pop("description", "")
    if max_new_tokens and config["output_type"] == "generate_until":
        config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    if config["output_type"] == "generate_until" and "filter_list" not in config:
        config["process_results"] = score_generation
    tasks = {}
    for part in parts:
        rows = part.test[: limit or None]
        if render:
            rows = tuple({**row, "prompt": render(row)} for row in rows)
        if not rows:
            continue
        pool: Sequence[Row] = _examples(examples) if examples else part.shots
        if shots > len(pool):
            where = f"{asked.label}, {part.name}" if part.name else asked.label
            raise UsageError(
                f"{where}: expected {shots} solved examples, found {len(pool)}",
                f"{_SHOTS.get(asked.name, 'its number is fixed')}; or ask for {asked.name}@0",
            )
        name = f"{asked.name}_{part.name}" if part.name else asked.name
        filled = description.replace("{part}", part.name.replace("_", " "))
        # A fresh copy of the file's tree for each task: lm-eval writes into what it is given.
        one = {**_copy(config), "task": name, "num_fewshot": shots, "test_split": "test"}
        if filled:
            one["description"] = filled
        if "process_results" in config:
            one["process_results"] = config["process_results"]
        fewshot = {**one.get("fewshot_config", {})}
        splits: dict[str, Sequence[Row]] = {"test": rows}
        if examples:
            one["fewshot_config"] = {**fewshot, "sampler": "first_n", "samples": list(pool)}
        elif shots:
            splits["shots"], one["fewshot_split"] = pool, "shots"
        else:
            one.pop("fewshot_config", None)
        tasks[name] = _build(one, splits, seed)
    return tasks


def lm_eval_tasks(asked: Asked, *, seed: int = 1234, max_new_tokens: int | None = None) -> Any:
    """The tasks that lm-eval knows by a name (a group's members), by their names.

    Their documents come from the hub, or from its cache where it is offline.

    Raises:
        UsageError: unknown name, or a task that runs code without a sandbox.
        DataError: its documents could not be had.

    """
    require_lm_eval()
    manager = _manager()
    if asked.name not in manager.all_tasks:
        near = [name for name in manager.all_tasks if asked.name.lower() in name.lower()][:8]
        also = f"; lm-eval also has {', '.join(near)}" if near else ""
        raise UsageError(
            f"--tasks {asked.name}: unknown task",
            f"on local files: {', '.join(OWN)}; and any name of `lm-eval ls tasks`{also}",
        )
    if asked.name.split("_")[0] in CODE:
        raise UsageError(
            f"--tasks {asked.name}: lm-eval would run its programs outside a sandbox",
            f"give --data for {' or '.join(CODE)}: pkt runs these in its own",
        )
    try:
        loaded = manager.load([asked.name])["tasks"]
    except Exception as error:  # a dataset's builder, the hub, the cache: anything may be raised
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"task '{asked.name}': lm-eval could not get its documents: {reason}",
            f"go online once, or give local files with --data (known: {', '.join(OWN)})",
        ) from error
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"--tasks {name}: lm-eval would run its programs outside a sandbox")
        shots = asked.shots if asked.shots is not None else task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots)
        if max_new_tokens and task.get_config("output_type") == "generate_until":
            longest = {"max_gen_toks": max_new_tokens}
            task.set_config(key="generation_kwargs", value=longest, update=True)
        task.set_fewshot_seed(seed=seed)
    return loaded


_SHOTS: Mapping[str, str] = {
    "gsm8k": "put train.jsonl beside test.jsonl",
    "mmlu": "put the dev files beside the test files (dev/anatomy_dev.csv)",
    "superni": "a task holds only so many positive examples",
}


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks: seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _task_file(name: str) -> dict[str, Any]:
    text = resources.files("pkt").joinpath(f"data/tasks/{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _build(config: dict[str, Any], splits: Mapping[str, Sequence[Row]], seed: int) -> Any:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    documents = DatasetDict({name: Dataset.from_list(list(rows)) for name, rows in splits.items()})
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: documents})
    task.set_fewshot_seed(seed=seed)
    return task


def _examples(source: str) -> list[Row]:
    """Worked examples of the installed lm-eval: a YAML's samples, or the list that a file returns.

    The Python file is parsed, not run: importing it would fetch a metric from the hub.
    """
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / source
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            return list(yaml.safe_load(text)["fewshot_config"]["samples"])
        functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        (listing,) = [f for f in functions if f.name == "list_fewshot_samples"]
        (returned,) = [n for n in listing.body if isinstance(n, ast.Return)]
        return list(ast.literal_eval(returned.value or ast.Constant(None)))
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise IncompatibleError(
            f"the installed lm-eval keeps no worked examples in tasks/{source}",
            "install lm-eval 0.4.13, or ask for @0",
        ) from error
