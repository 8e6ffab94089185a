"""Training on `transformers.Trainer`, and evaluation.

The trainer brings Accelerate, mixed precision, gradient accumulation, logging and resuming; methods act on it through
callbacks. What is added here: parameter groups with a learning rate of their own for the head, and progress.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trimtab import processes, progress
from trimtab.anatomy import Anatomy
from trimtab.data import draws
from trimtab.data.images import encoded
from trimtab.data.streams import numbered, order_of
from trimtab.divided import divided, norms
from trimtab.experiments import many, plateau, sharded
from trimtab.experiments.collation import table_print
from trimtab.experiments.failures import check_finite
from trimtab.experiments.feeding import AHEAD, Fed, Feed, Order, Places, workers_for
from trimtab.experiments.keeping import Best
from trimtab.experiments.plateau import Judge, Judged, of_fixed_length, warmup_steps
from trimtab.experiments.resuming import Resumable
from trimtab.experiments.schema import TrainingSpec
from trimtab.experiments.watching import Told, tensorboard_in
from trimtab.methods.fitting import evaluating
from trimtab.precision import half_of
from trimtab.tasks.base import TaskModel


class _Trainer(Judged, Resumable, Fed, Trainer):
    """Trainer with the recipe's parameter groups. Matrices decay; biases, norms and scalars do not."""

    model: Any

    def __init__(self, *args: Any, spec: TrainingSpec, rates: Mapping[str, float], feed: Feed, **kwargs: Any):
        self.spec, self.rates, self.feed = spec, rates, feed
        self.waited, self.since = 0.0, time.perf_counter()
        super().__init__(*args, **kwargs)
        # A task's loss is a mean already. Trainer takes any forward(**inputs) for one that divides by the number of
        # labels of all accumulated batches, gives it that number and then does not divide by the number of batches.
        self.model_accepts_loss_kwargs = False

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; what reaches over the batch reaches over the parts of all processes."""
        self.last = dict(args[1])
        with divided():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; Accelerate brings mixed precision into models that it wraps, not into sharded ones."""
        with self.accelerator.autocast() if self.spec.shard else nullcontext():
            return super().compute_loss(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, timed: the model waits while rows are read, decoded and collated."""
        started = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.waited += time.perf_counter() - started

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the share of the time since the last log in which the model waited for data."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["waiting"] = round(self.waited / max(now - self.since, 1e-9), 4)
            self.waited, self.since = 0.0, now
            check_finite(logs, self.state.global_step, self.model, self._prepare_inputs(self.last),
                         self.accelerator.autocast(), _precision(self.args))  # fmt: skip
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    factor = self.spec.head_multiplier if name.startswith("head.") else 1.0
                    key = (factor * self.rates.get(name, 1.0), parameter.ndim > 1)
                    groups.setdefault(key, []).append(parameter)
            rate = self.spec.learning_rate
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": rate * factor,
                        "weight_decay": self.spec.weight_decay if decays else 0.0,
                    }
                    for (factor, decays), parameters in groups.items()
                ],
                betas=(0.9, self.spec.beta2),
                fused=True,  # a third of the time of the plain loop, which is felt where steps come from a cache
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers' schedules, and two that it does not have: with drops, and until the score stops rising."""
        if self.spec.schedule in ("step", "plateau") and self.lr_scheduler is None:
            course: Callable[[int], float] = partial(
                falling, steps=num_training_steps, warmup=self.args.warmup_steps, drops=self.spec.drops
            )
            if self.spec.schedule == "plateau":
                assert self.judge is not None
                course = self.judge.factor
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), course)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A safetensors file holds a tied tensor once; the trainer reads it back without asking for the other name.
        once = {n for n, _ in self.model.named_parameters()} | {n for n, _ in self.model.named_buffers()}
        whole = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in whole.items() if name in once})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: what the file lacks are the other names of tied tensors; the same model wrote it."""


def _precision(args: TrainingArguments) -> str:
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


def falling(step: int, steps: int, warmup: float, drops: Sequence[float]) -> float:
    """Factor of the learning rate at a step: it rises over `warmup` steps, then falls to a tenth at each share of the
    steps in `drops` (VSE-infinity: after 15 of 25 epochs; MDETR: after 5 of 10)."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.1 ** sum(step >= round(share * steps) for share in drops)


def fit(
    model: TaskModel,
    table: Any,
    spec: TrainingSpec,
    seed: int,
    callbacks: list[TrainerCallback] | None = None,
    title: str = "training",
    steps: int | None = None,
    checkpoints: Path | None = None,
    rates: Mapping[str, float] | None = None,
    cache: Any = None,
    reports: Path | None = None,
    judge: Judge | None = None,
    made_of: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train what requires gradients and return the logged history.

    Args:
        model: a model with its task; frozen parts stay as they are.
        table: rows of the task's schema.
        spec: steps, batch size, learning rate and so on.
        seed: of the order of rows, of dropout and of drawn captions.
        callbacks: of the methods.
        title: shown by the progress bar.
        steps: instead of the recipe's number.
        checkpoints: folder for checkpoints when `spec.save_every` is set; training resumes from the last one there.
        rates: factors of the learning rate by parameter name, beside the head's; 1 for what is not named.
        cache: a filled `ActivationCache` of the table, from which `model`, a `CachedModel`, trains.
        reports: the run's folder: its numbers go to `spec.report_to` as well, TensorBoard's into `tensorboard/` there;
            None hands them to nobody.
        judge: evaluates every `spec.evaluate_every` steps and at the end, and decides under `schedule: plateau` and
            which weights are the best.
        made_of: what the model was made of, plain JSON by name: a checkpoint of another one is not taken up.

    Raises:
        RecipeError: if there is no judge and one must decide.

    Returns:
        One dict a logged step: `step`, `loss`, `learning_rate`, `grad_norm`, and `waiting`, the share of the time since
        the last one in which the model waited for data.
    """
    keep_freed_memory()
    steps = spec.steps if steps is None else steps
    if steps == 0:
        return []
    sharded.check(spec)
    plateau.check(spec, judge)
    table = numbered(table, spec.buffer)
    told = Told(title)
    with tempfile.TemporaryDirectory() as scratch, tensorboard_in(reports), contextlib.closing(told):
        saving = bool(spec.save_every and checkpoints)
        feed = Feed(model, table, spec, cache)
        many.check(spec.batch_size, feed.rows, "training")
        feed.workers = workers_for(spec.workers, steps, spec.batch_size * feed.bytes_a_row)
        args = _arguments(spec, steps, seed, checkpoints if saving and checkpoints else Path(scratch), saving, feed)
        if reports is not None:
            args.report_to, args.run_name = list(spec.report_to), title
        trainer = _Trainer(
            model=model,
            args=args,
            spec=spec,
            rates=rates or {},
            feed=feed,
            train_dataset=Places(Order(feed.rows, seed, feed.order)),
            data_collator=feed,
            callbacks=[*(callbacks or []), told],
        )
        trainer.made_of = made_of
        trainer.judged_by(judge)
        if judge is not None and spec.load_best_model_at_end:
            best = Best(judge, model, Path(str(args.output_dir)), saving)
            trainer.callback_handler.callbacks.insert(1, best)  # behind the judge, who has the scores
        trainer.remove_callback(PrinterCallback)  # it prints every log; progress shows the last
        with sharded.sharded(model, spec), norms(model):
            if spec.shard and processes.world()[1] > 1:  # torch divides the model, Accelerate shall not copy it
                trainer.accelerator.prepare_model = lambda model, **_: model
            try:
                trainer.train(resume_from_checkpoint=trainer.last_checkpoint(table) if saving else None)
            finally:  # Accelerate leaves mixed precision in the model, which is counted and used in its own hereafter
                for name in ("forward", "_original_forward"):
                    vars(model).pop(name, None)
    model.zero_grad(set_to_none=True)
    keep = ("step", "loss", "learning_rate", "grad_norm", "waiting")
    return [{k: float(e[k]) for k in keep if k in e} for e in trainer.state.log_history if "loss" in e]


def _arguments(spec: TrainingSpec, steps: int, seed: int, folder: Path, saving: bool, feed: Feed) -> TrainingArguments:
    """The recipe's training in transformers' words; with `saving`, checkpoints go to the folder. Of tasks whose samples
    are made from other rows the first of several processes makes whole batches and hands out their parts."""
    rows = many.part(spec.batch_size)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size if feed.together else rows,
        accelerator_config={"split_batches": feed.together, "dispatch_batches": feed.together},
        ddp_broadcast_buffers=False,  # they are the same in all processes
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant_with_warmup" if spec.schedule in ("step", "plateau") else spec.schedule,
        warmup_steps=warmup_steps(spec, steps),
        max_grad_norm=spec.clip,
        bf16=half_of(spec.precision) == torch.bfloat16,
        fp16=half_of(spec.precision) == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=min(spec.log_every, max(1, steps // 10)),
        logging_nan_inf_filter=False,
        save_strategy="steps" if saving else "no",
        save_steps=spec.save_every or 1,
        remove_unused_columns=False,
        dataloader_drop_last=feed.rows >= spec.batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=feed.workers,
        dataloader_persistent_workers=feed.workers > 0,
        dataloader_prefetch_factor=AHEAD if feed.workers else None,
        dataloader_multiprocessing_context="fork" if feed.workers else None,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        data_seed=seed,
    )
    args._n_gpu = min(args.n_gpu, 1)  # with more than one, Trainer would copy the model and multiply the batch
    return args


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees, instead of returning it to the system and faulting it in again.

    On a CPU every step allocates the same hundreds of megabytes, and faulting their pages in again takes much of its
    time. Elsewhere than on glibc it does nothing.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, (1 << 31) - 1
        library.mallopt(m_mmap_threshold, largest)
        library.mallopt(m_trim_threshold, largest)


def batches(
    model: TaskModel, table: Any, size: int, train: bool, seed: int | None = None
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    """Rows and collated batches on the model's device: once in order, or endlessly shuffled when a seed is given."""
    table = encoded(table)
    device = next(model.parameters()).device
    for epoch in itertools.count():
        order = range(len(table)) if seed is None else order_of(table, seed, epoch)
        for start in range(0, len(table), size):
            numbers = order[start : start + size]
            if seed is not None and len(numbers) < min(size, len(table)):
                continue
            rows = [draws.placed(table[i], draws.Place(seed or 0, epoch, i)) for i in numbers]
            batch = model.task.collate(model.backbone, rows, train)
            yield rows, {k: v.to(device) for k, v in batch.items()}
        if seed is None:
            return


@torch.inference_mode()
def evaluate(model: TaskModel, table: Any, size: int = 64) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over a table, and one prediction record a row. Several processes divide the batches among them."""
    rows, device = encoded(table), next(model.parameters()).device
    starts = range(0, len(rows), size)
    mine: list[list[dict[str, Any]]] = []
    with evaluating(model):
        with progress.progress("evaluation", len(rows), "row") as job:
            for start in (starts[number] for number in processes.shared(len(starts))):
                some = [rows[i] for i in range(start, min(start + size, len(rows)))]
                batch = model.task.collate(model.backbone, some, False)
                mine.append(model.predict({k: v.to(device) for k, v in batch.items()}))
                job.update(min(start + size, len(rows)))
        records = [record for batch in processes.in_turn(mine, len(starts)) for record in batch]
        records = model.task.finish(model.backbone, model.head, records)
        return model.task.score(model.backbone, model.head, records, table), records


class TrainingSession:
    """What methods get while they prepare: see `trimtab.methods.Session`."""

    def __init__(self, model: TaskModel, train: Any, validation: Any, spec: TrainingSpec, seed: int, title: str,
                 folder: Path | None = None):  # fmt: skip
        self.with_task = model
        self.anatomy: Anatomy = model.backbone.anatomy
        self.spec = spec
        self.seed = seed
        self._tables = {"train": train, "validation": validation}
        self._title = title
        self.folder = folder

    @property
    def plain(self) -> nn.Module:
        return self.plain_in(self.with_task)

    def plain_in(self, model: Any) -> nn.Module:
        return model.backbone.model

    def example(self) -> dict[str, Tensor]:
        """A batch of one sample (or of as few as the task can do with) of random inputs, on the model's device."""
        device = next(self.with_task.parameters()).device
        return {k: v.to(device) for k, v in self.with_task.example(self.with_task.task.least).items()}

    def made_of(self) -> list[Any]:
        """The task with its plain settings, and hashes of the tables."""
        task = self.with_task.task
        plain = {k: v for k, v in vars(task).items() if isinstance(v, (str, int, float, list, tuple, type(None)))}
        return [task.name, plain, *(table_print(encoded(table)) for table in self._tables.values())]

    def rows(self, split: Literal["train", "validation"]) -> int:
        """How many rows a split has: endless batches begin again after them."""
        return len(self._tables[split])

    def loss(self, with_task: TaskModel, batch: dict[str, Tensor]) -> Tensor:
        return with_task(**batch)["loss"]

    def batches(self, split: Literal["train", "validation"], size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """See `Session`. With several processes each gets its part of a validation batch, one after another in the
        order of rows: what is averaged over processes is then what one process finds on the whole batch. Training
        batches are the same everywhere and whole, so that statistics taken from them are.

        Raises:
            ValueError: if the validation split has fewer rows than a batch, or the processes do not divide a batch.
        """
        table, size = self._tables[split], size or self.spec.batch_size
        if split == "validation" and len(table) < size:
            raise ValueError(
                f"the validation split has {len(table)} rows, but a batch of it takes {size}: give "
                f"`data.validation` at least {size} rows, or lower training.batch_size (or the method's `rows`)"
            )
        found = (batch for _, batch in batches(self.with_task, table, size, train=True, seed=self.seed))
        rank, world = processes.world()
        if split == "train" or world == 1:
            return found
        rows = many.part(size, "a validation batch (training.batch_size, or the method's `rows`)")
        return ({k: v[rank * rows : (rank + 1) * rows] for k, v in batch.items()} for batch in found)

    def fit(self, model: TaskModel, steps: int, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
        checkpoints = None if self.folder is None else self.folder / "search"
        spec = replace(of_fixed_length(self.spec), shard=False)  # plans are compared in between, with whole weights
        return fit(model, self._tables["train"], spec, self.seed, callbacks, f"{self._title}: search", steps,
                   checkpoints)  # fmt: skip
