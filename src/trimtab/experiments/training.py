"""Training on `transformers.Trainer`, and evaluation.

The trainer brings Accelerate, mixed precision, gradient accumulation, logging and resuming; methods act on it through
callbacks. What is added here: parameter groups with a learning rate of their own for the head, and one progress bar.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trimtab.anatomy import Anatomy
from trimtab.data.augment import Augmentation
from trimtab.data.images import encoded
from trimtab.experiments.schema import TrainingSpec
from trimtab.precision import native_bf16
from trimtab.tasks.base import TaskModel


class _Trainer(Trainer):
    """Trainer with the recipe's parameter groups. Matrices decay; biases, norms and scalars do not."""

    model: Any

    def __init__(self, *args: Any, spec: TrainingSpec, rates: Mapping[str, float], **kwargs: Any):
        self.spec, self.rates = spec, rates
        self.waited, self.since = 0.0, time.perf_counter()
        super().__init__(*args, **kwargs)

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
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers' schedules, and the one with drops, which it does not have."""
        if self.spec.schedule == "step" and self.lr_scheduler is None:
            chosen = optimizer or self.create_optimizer()
            course = partial(falling, steps=num_training_steps, warmup=self.args.warmup_steps, drops=self.spec.drops)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, course)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # A safetensors file holds a tied tensor once; the trainer reads it back without asking for the other name.
        once = {n for n, _ in self.model.named_parameters()} | {n for n, _ in self.model.named_buffers()}
        whole = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in whole.items() if name in once})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: what the file lacks are the other names of tied tensors; the same model wrote it."""


def falling(step: int, steps: int, warmup: float, drops: Sequence[float]) -> float:
    """Factor of the learning rate at a step: it rises over `warmup` steps, then falls to a tenth at each share of the
    steps in `drops` (VSE-infinity: after 15 of 25 epochs; MDETR: after 5 of 10)."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.1 ** sum(step >= round(share * steps) for share in drops)


class _Progress(TrainerCallback):
    """One rich progress bar with the running loss."""

    def __init__(self, title: str):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("loss {task.fields[loss]}"), transient=True)
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar.start()
        self.job = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.job, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.update(self.job, loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


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

    Returns:
        One dict a logged step: `step`, `loss`, `learning_rate`, `grad_norm`, and `waiting`, the share of the time since
        the last one in which the model waited for data.
    """
    keep_freed_memory()
    steps = spec.steps if steps is None else steps
    if steps == 0:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        saving = bool(spec.save_every and checkpoints)
        args = _arguments(spec, steps, seed, checkpoints if saving and checkpoints else Path(scratch), saving, table)
        trainer = _Trainer(
            model=model,
            args=args,
            spec=spec,
            rates=rates or {},
            train_dataset=_Rows(table) if cache is None else range(len(cache) * cache.views),
            data_collator=cache.batch if cache else partial(_collate, model, spec.augmentation),
            callbacks=[*(callbacks or []), _Progress(title)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log; the progress bar shows the last
        last = saving and any(Path(str(args.output_dir)).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=bool(last))
    model.zero_grad(set_to_none=True)
    keep = ("step", "loss", "learning_rate", "grad_norm", "waiting")
    return [{k: float(e[k]) for k in keep if k in e} for e in trainer.state.log_history if "loss" in e]


def _arguments(spec: TrainingSpec, steps: int, seed: int, folder: Path, saving: bool, table: Any) -> TrainingArguments:
    """The recipe's training in transformers' words; with `saving`, checkpoints go to the folder."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant_with_warmup" if spec.schedule == "step" else spec.schedule,
        warmup_steps=int(spec.warmup * steps),
        max_grad_norm=spec.clip,
        bf16=spec.precision == "bf16" or (spec.precision == "auto" and native_bf16()),
        fp16=spec.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=min(spec.log_every, max(1, steps // 10)),
        logging_nan_inf_filter=False,
        save_strategy="steps" if saving else "no",
        save_steps=spec.save_every or 1,
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_drop_last=len(table) >= spec.batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=spec.workers,
        dataloader_persistent_workers=spec.workers > 0,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        data_seed=seed,
    )


def _collate(model: TaskModel, augmentation: Augmentation, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return model.task.collate(model.backbone, augmentation(rows), True)


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


class _Rows(torch.utils.data.Dataset):
    """A table as the trainer wants it, with images left encoded: the task decodes them and names a bad one."""

    def __init__(self, table: Any):
        self.table = encoded(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[index]


def batches(
    model: TaskModel, table: Any, size: int, train: bool, seed: int | None = None
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    """Rows and collated batches on the model's device: once in order, or endlessly shuffled when a seed is given."""
    table = encoded(table)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    while True:
        order = torch.randperm(len(table), generator=generator).tolist() if generator else range(len(table))
        for start in range(0, len(table), size):
            rows = [table[i] for i in order[start : start + size]]
            if generator and len(rows) < min(size, len(table)):
                continue
            batch = model.task.collate(model.backbone, rows, train)
            yield rows, {k: v.to(device) for k, v in batch.items()}
        if generator is None:
            return


@torch.inference_mode()
def evaluate(model: TaskModel, table: Any, size: int = 64) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over a table, and one prediction record a row."""
    was = model.training
    model.eval()
    records: list[dict[str, Any]] = []
    for _, batch in batches(model, table, size, train=False):
        records += model.predict(batch)
    records = model.task.finish(model.backbone, model.head, records)
    metrics = model.task.score(model.backbone, model.head, records, table)
    model.train(was)
    return metrics, records


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

    def rows(self, split: Literal["train", "validation"]) -> int:
        """How many rows a split has: endless batches begin again after them."""
        return len(self._tables[split])

    def loss(self, with_task: TaskModel, batch: dict[str, Tensor]) -> Tensor:
        return with_task(**batch)["loss"]

    def batches(self, split: Literal["train", "validation"], size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """See `Session`. With several processes each gets its part of a larger validation batch, one after another in
        the order of rows: what is averaged over processes is then what one process finds on the whole batch. Training
        batches are the same everywhere, so that statistics taken from them are.

        Raises:
            ValueError: if the validation split has fewer rows than a batch.
        """
        table, size = self._tables[split], size or self.spec.batch_size
        world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
        parts = world if split == "validation" else 1
        if split == "validation" and len(table) < size * parts:
            raise ValueError(
                f"the validation split has {len(table)} rows, but a batch of it takes {size * parts}: give "
                f"`data.validation` at least {size * parts} rows, or lower training.batch_size (or the method's `rows`)"
            )
        found = (batch for _, batch in batches(self.with_task, table, size * parts, train=True, seed=self.seed))
        if parts == 1:
            return found
        return ({k: v[rank * size : (rank + 1) * size] for k, v in batch.items()} for batch in found)

    def fit(self, model: TaskModel, steps: int, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
        checkpoints = None if self.folder is None else self.folder / "search"
        return fit(model, self._tables["train"], self.spec, self.seed, callbacks, f"{self._title}: search", steps,
                   checkpoints)  # fmt: skip
