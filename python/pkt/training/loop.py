"""The steps themselves, by transformers' Trainer; what a resumed run ends with is the same.

Bit-equal on the CPU, whether a run is interrupted or not: the order of the examples follows from
the seed, and a checkpoint holds the adapter, the optimizer, the schedule and the state of every
random generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from pkt.errors import DivergenceError, OutputError, PktError, UsageError
from pkt.processes import any_process, sum_over_processes, wait_for_all
from pkt.records import Sample
from pkt.training.activations import Activations, Readout, watching
from pkt.training.batches import COLUMNS, EXAMPLES, IGNORED, Collate, Examples
from pkt.training.checkpoints import mark_complete, newest_complete, step_of
from pkt.training.injection import ADAPTER
from pkt.training.objective import Columns, Objective, Said, Totals
from pkt.training.stages import Stages, require_stages, train_only

Metrics = Mapping[str, float]
Notify = Callable[[int, int, Metrics], None]
HeldOut = Callable[[Any], float]

PARTS = ("layer_loss", "output_loss")
_SECONDS_BETWEEN_CHECKPOINTS = 300.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train; the defaults are arXiv 2310.11451's."""

    lr: float = 3e-4
    lr_ratio: float = 1.0  #: learning rate of B over that of A (LoRA+, arXiv 2402.12354)
    epochs: float = 3.0
    max_steps: int = -1  #: -1: as many as the epochs have
    batch_size: int = 64  #: examples a step, over all processes
    micro_batch: int = 4  #: of them at once in one process
    warmup: float = 0.03  #: share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  #: larger gradients of a step are scaled down to it
    gradient_checkpointing: bool = True
    autocast: bool = False  #: transformers' bf16 mixed precision
    eval_steps: int = 0  #: 0: at the end of every epoch
    seed: int = 0


def fit(
    model: Any,
    samples: Sequence[Sample],
    schedule: Schedule,
    folder: Path,
    *,
    objective: Objective | None = None,
    held_out: HeldOut | None = None,
    notify: Notify = lambda step, steps, metrics: None,
    stop: Callable[[], bool] = lambda: False,
    save_steps: int = 0,
) -> list[dict[str, float]]:
    """Train the factors of ``model`` in place; linear decay after a linear warm-up, AdamW.

    Args:
        model: what `inject` returned, on its device.
        samples: the training examples.
        schedule: how long and how fast.
        folder: of this run's checkpoints; the newest whole one is continued.
        objective: what is made small; ``None``: the labels' cross-entropy, by the model itself.
        held_out: mean loss of the model on data it does not learn from, in nats a token.
        notify: told of (step, steps in all, metrics) after each step and each evaluation.
        stop: asked after every step; if true in any process, a checkpoint is written and
            `KeyboardInterrupt` raised in all.
        save_steps: steps between checkpoints; 0: one about every five minutes.

    Returns:
        metrics by step: ``loss`` (nats a token, mean over the step's answer tokens; or what the
        objective makes of it, then with its parts ``layer_loss`` and ``output_loss``, and with
        ``layer``, the frontier), ``grad_norm``, ``learning_rate``, and ``eval_loss`` where it was
        measured.

    Raises:
        DivergenceError: the loss is NaN or infinite.
        IncompatibleError: the model lacks a place whose activations the objective needs.
        OutputError: a checkpoint cannot be written.
        PktError: no parameter asks for gradients.
        UsageError: layers cannot be trained one after another in so few steps or by several
            processes.

    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PktError("training: no parameter asks for gradients: nothing would be trained")
    set_seed(schedule.seed)
    arguments = _arguments(schedule, len(samples), folder, model.device)
    epoch = math.ceil(len(samples) / schedule.batch_size)
    watch = _Watch(notify, stop, save_steps, (schedule.eval_steps or epoch) if held_out else 0)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=Examples(samples),
        data_collator=Collate(objective),
        callbacks=[watch],
    )
    trainer.held_out, trainer.lr_ratio = held_out, schedule.lr_ratio
    if objective:
        steps = steps_in_all(len(samples), schedule)
        require_stages(objective.stages, steps, arguments.world_size)
        stages = Stages(objective.stages, steps, schedule.warmup) if objective.stages else None
        trainer.learn(objective.ready(model, samples), stages)
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_complete(folder)
    if checkpoint and step_of(checkpoint) >= steps_in_all(len(samples), schedule):
        trainer.restore(checkpoint)  # of a run that ended here: the Trainer would add a step
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # mixed precision ends here
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    kept = ("loss", *PARTS, "layer", "grad_norm", "learning_rate", "eval_loss")
    return [
        {"step": entry["step"], "epoch": entry["epoch"]} | {k: entry[k] for k in kept if k in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def steps_in_all(examples: int, schedule: Schedule) -> int:
    """Steps that a run of ``examples`` training examples takes."""
    if schedule.max_steps > 0:
        return schedule.max_steps
    return math.ceil(math.ceil(examples / schedule.batch_size) * schedule.epochs)


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """The Trainer, with our losses, B's own learning rate, and adapters alone on disk."""

    held_out: HeldOut | None
    lr_ratio: float
    control: Any
    optimizer: Any
    compute_loss_func: Any
    lr_scheduler: Any

    _objective: Objective | None = None
    _stages: Stages | None = None
    _readout: Readout | None = None
    _columns: Columns
    _totals: Totals
    _seen: Activations
    _frontier: int | None = None
    _parts: dict[str, torch.Tensor]

    def learn(self, objective: Objective, stages: Stages | None = None) -> None:
        """Make ``objective`` small instead of the model's own loss."""
        self._objective, self._stages, self._parts = objective, stages, {}
        if objective.reads_out:
            self._readout = Readout(self.model)

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
            counted = labels[:, 1:] != IGNORED
            said = Said(
                logits=outputs.logits[:, :-1][counted],
                tokens=labels[:, 1:][counted],
                columns=self._columns,
                examples=self._columns[EXAMPLES].tolist(),
                totals=self._totals,
                frontier=self._frontier,
                activation=lambda view: self._seen.of(view, counted),
                readout=self._readout,
            )
            parts = objective.loss(said)
            for name, part in parts.items():
                held = self._parts.get(f"{name}_loss", 0.0)
                self._parts[f"{name}_loss"] = held + part.detach().double()
            shares: torch.Tensor = sum(parts.values())  # type: ignore[assignment]
            return shares

        self.compute_loss_func = loss

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        """Also: what the step counts, over all its micro-batches and processes."""
        batches, tokens = super().get_batch_samples(*given, **named)
        if self._objective:
            examples = [n for batch in batches for n in batch[COLUMNS][EXAMPLES].tolist()]
            rows = [self._objective.rows(example) for example in examples]
            counts = [float(sum(rows)), float(sum(count >= 2 for count in rows))]
            self._totals = Totals(tokens, *sum_over_processes(counts, self.args.device))
        return batches, tokens

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        if self._objective is None:
            return super().compute_loss(model, inputs, *given, **named)
        self._columns = inputs.pop(COLUMNS)  # no business of the model's
        if self._stages:
            frontier = self._stages.frontier(self.state.global_step)
            if frontier != self._frontier:
                train_only(self.model, frontier)
                self._frontier = frontier
        with watching(self.model, self._objective.views(self._frontier)) as self._seen:
            found = super().compute_loss(model, inputs, *given, **named)
        del self._seen  # the graph of what was seen goes with the loss
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self._stages and self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, self._stages.rate
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        if "loss" in logs and self._objective and self._objective.views(None):
            names = list(self._parts)
            sums = [float(part) for part in self._parts.values()]
            shared = sum_over_processes(sums, self.args.device)
            logs |= dict(zip(names, shared, strict=True))
            if self._frontier is not None:
                logs["layer"] = self._frontier
        if "loss" in logs:
            self._parts = {}
        super().log(logs, *given, **named)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        assert self.held_out is not None
        metrics = {"eval_loss": self.held_out(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.lr_ratio != 1.0:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            second = [p for n, p in named if "lora_B" in n or "lora_embedding_B" in n]
            first = [p for n, p in named if "lora_A" in n or "lora_embedding_A" in n]
            options["weight_decay"] = self.args.weight_decay
            groups = [
                {"params": first},
                {"params": second, "lr": self.args.learning_rate * self.lr_ratio},
            ]
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError
            reason = " ".join(str(error).split())[:160]
            raise OutputError(
                f"{self.args.output_dir}: a checkpoint cannot be written: {reason}",
                "make room, then run the same command again: it continues from the one before",
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The Trainer's own would add whole base embeddings where these are adapted.
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def restore(self, checkpoint: Path) -> None:
        """Take factors and state of the last step from ``checkpoint``."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(f"{resume_from_checkpoint}/adapter_model.safetensors")
        result = set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)
        missing = [key for key in result.missing_keys if "lora_" in key]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Progress, stopping, and when to keep a checkpoint."""

    def __init__(
        self, notify: Notify, stop: Callable[[], bool], save_steps: int, eval_steps: int
    ) -> None:
        self._notify, self._stop = notify, stop
        self._save_steps, self._eval_steps = save_steps, eval_steps
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise DivergenceError(
                    f"training: {name.replace('_', ' ')} is {logs[name]} at step "
                    f"{state.global_step} of {state.max_steps}",
                    "lower --lr, or compute in --dtype float32",
                )
        if "loss" in logs or "eval_loss" in logs:
            self._notify(state.global_step, state.max_steps, logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        stopping = any_process(self._stop(), args.device)
        control.should_training_stop |= stopping
        if self._eval_steps:  # before a checkpoint of this step, which then holds its result
            last = state.global_step >= state.max_steps
            control.should_evaluate = last or state.global_step % self._eval_steps == 0
        if self._save_steps:
            due = state.global_step % self._save_steps == 0
        else:
            elapsed = time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS
            due = any_process(elapsed, args.device)
        control.should_save |= stopping or due
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_all()  # each process writes the state of its own generators
        if args.should_save:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._saved = time.monotonic()


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The two arguments under the names that this transformers has for them."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    return {
        f"{name}_checkpointing": wanted,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


def _arguments(
    schedule: Schedule, examples: int, folder: Path, device: torch.device
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        learning_rate=schedule.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(schedule.warmup * steps_in_all(examples, schedule)),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.max_steps,
        **_checkpointing(schedule.gradient_checkpointing),
        bf16=schedule.autocast,
        seed=schedule.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    if arguments.world_size == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several devices are for several processes, not for DataParallel
    # How a step is divided follows from the number of processes, which the arguments know.
    share, left = divmod(schedule.batch_size, arguments.world_size)
    if left or not share:
        raise UsageError(
            f"--batch-size {schedule.batch_size}: expected a multiple of the "
            f"{arguments.world_size} processes"
        )
    micro = max(size for size in range(1, schedule.micro_batch + 1) if share % size == 0)
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments
