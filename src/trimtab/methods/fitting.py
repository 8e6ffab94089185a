"""Training a model of one's own for a few steps, as a search does: a small loop, or a `Trainer` made again."""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from trimtab.methods.session import BatchSession

from trimtab.methods.modes import drop_again, frozen_in_evaluation, modes_kept
from trimtab.progress import progress

log = logging.getLogger(__name__)


@contextmanager
def evaluating(model: nn.Module, train: bool = False) -> Iterator[None]:
    """The model in evaluation mode (or training mode), and afterwards every module as it was."""
    with modes_kept(model):
        model.train(train)
        yield


class Loop:
    """A small training loop: AdamW, a linear rate after 10 % warm-up, gradients clipped at the norm 1.

    It calls transformers' callbacks as `Trainer` does, with None for its arguments.
    """

    def __init__(self, session: BatchSession, with_task: Any, steps: int, callbacks: list[TrainerCallback]):
        from transformers import TrainerControl, TrainerState, get_linear_schedule_with_warmup

        self.session, self.model, self.steps, self.callbacks = session, with_task, steps, callbacks
        self.state, self.control = TrainerState(max_steps=steps), TrainerControl()
        self.trained = [p for p in with_task.parameters() if p.requires_grad]
        self.tools: dict[str, Any] = {"model": with_task}
        if self.trained:
            groups = [
                {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": session.spec.weight_decay},
                {"params": [p for p in self.trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=session.spec.learning_rate)
            schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
            self.tools |= {"optimizer": optimizer, "lr_scheduler": schedule}

    def tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            changed = getattr(callback, event)(None, self.state, self.control, **self.tools, **more)
            self.control = changed or self.control

    def run(self) -> list[dict[str, float]]:
        if self.steps == 0:
            return []
        every, history = max(1, self.steps // 10), []
        batches = self.session.batches("train") if self.trained else iter(())
        with evaluating(self.model, train=True), progress("search", self.steps) as job:
            frozen_in_evaluation(self.model)
            self.tell("on_train_begin")
            while self.state.global_step < self.steps and not self.control.should_training_stop:
                self.tell("on_step_begin")
                logged = self.step(next(batches)) if self.trained else {}
                self.state.global_step += 1
                self.tell("on_step_end")
                job.update(self.state.global_step, **{k: logged[k] for k in ("loss",) if k in logged})
                if logged and self.state.global_step % every == 0:
                    history.append({"step": self.state.global_step, **logged})
                    log.info("step %d of %d: %s", self.state.global_step, self.steps, logged)
                    self.tell("on_log", logs=dict(logged))
            self.tell("on_train_end")
        drop_again(self.model)
        return history

    def step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step."""
        optimizer, schedule = self.tools["optimizer"], self.tools["lr_scheduler"]
        with torch.enable_grad():
            loss = self.session.loss(self.model, batch)
        number = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise ValueError(
                f"the training loss is {number} at step {self.state.global_step + 1} of {self.steps}: lower "
                "`learning_rate`, or train in full precision"
            )
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.trained, 1.0))
        self.tell("on_pre_optimizer_step")
        optimizer.step()
        self.tell("on_optimizer_step")
        rate = optimizer.param_groups[0]["lr"]
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": number, "learning_rate": rate, "grad_norm": norm}


WAY_OUT = "pass a function `trainer(with_task, steps, callbacks)` that makes one and trains"


def _own_arguments(trainer: Any) -> dict[str, Any]:
    """Arguments by name that its class and the classes to which it hands `**kwargs` have and `transformers.Trainer` has
    not, each as the attribute of its name.

    Raises:
        ValueError: if the trainer has no attribute of that name, or of one of `Trainer`'s own: what was given is not
            known.
    """
    from transformers import Trainer

    usual, own = inspect.signature(Trainer).parameters, []
    for cls in type(trainer).__mro__[: type(trainer).__mro__.index(Trainer)]:
        if "__init__" in vars(cls):
            named = inspect.signature(cls).parameters.values()
            own += [p.name for p in named if p.name not in usual and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if not any(p.kind == p.VAR_KEYWORD for p in named):
                break
    if unknown := [n for n in own if n not in vars(trainer) or hasattr(Trainer, n) or n in _set_by(Trainer)]:
        raise ValueError(
            f"trainer: what was given to {type(trainer).__name__} as `{unknown[0]}` is not known: keep it as an "
            f"attribute of that name, which is none of Trainer's own, or {WAY_OUT}"
        )
    return {name: vars(trainer)[name] for name in own}


def _set_by(cls: type) -> tuple[str, ...]:
    """Names of what its `__init__` reads and sets."""
    return cls.__init__.__code__.co_names  # type: ignore[misc]


def _check_same(other: Any, trainer: Any) -> None:
    """ValueError unless a trainer that was made again has the numbers, words and switches of the first."""
    from transformers import Trainer

    for name, was in vars(trainer).items():
        now = vars(other).get(name)
        plain = isinstance(was, (int, float, str)) and not name.startswith("_") and name not in _set_by(Trainer)
        if plain and now != was:
            raise ValueError(
                f"trainer: a {type(trainer).__name__} that is made again has {name} {now!r}, the first has {was!r}: "
                f"{WAY_OUT}"
            )


def again(trainer: Any, with_task: Any, steps: int, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
    """Train another model as a `transformers.Trainer` would train its own; nothing is saved or reported.

    A subclass is made again with its own arguments, which it keeps as attributes of their names.

    Raises:
        ValueError: if it is no trainer, or it is not known how to make one like it.
    """
    from transformers.trainer_callback import PrinterCallback

    if not hasattr(trainer, "train_dataset") or not hasattr(trainer, "args"):
        raise ValueError(
            f"trainer: expected a function `trainer(with_task, steps, callbacks)` or a transformers.Trainer, found "
            f"{type(trainer).__name__}"
        )
    if trainer.optimizer is not None:
        raise ValueError("trainer: it has an optimizer, which moves its own model's weights: give it "
                         f"`optimizer_cls_and_kwargs` in place of `optimizers`, or {WAY_OUT}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        args = copy.copy(trainer.args)
        changes = {"output_dir": scratch, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no",
                   "load_best_model_at_end": False, "report_to": [], "push_to_hub": False}  # fmt: skip
        for name, value in changes.items():
            setattr(args, name, value)
        names = ("data_collator", "processing_class", "compute_loss_func", "optimizer_cls_and_kwargs")
        usual = {n: getattr(trainer, n, None) for n in names}
        kept = {n: v for n, v in usual.items() if v is not None} | _own_arguments(trainer)
        try:
            other = type(trainer)(model=with_task, args=args, train_dataset=trainer.train_dataset, callbacks=callbacks,
                                  **kept)  # fmt: skip
        except TypeError as error:
            raise ValueError(
                f"trainer: a {type(trainer).__name__} cannot be made again for another model ({error}); {WAY_OUT}"
            ) from error
        _check_same(other, trainer)
        other.remove_callback(PrinterCallback)  # it prints every log
        other.train()
    with_task.zero_grad(set_to_none=True)
    keep = ("step", "loss", "learning_rate", "grad_norm")
    return [{k: float(e[k]) for k in keep if k in e} for e in other.state.log_history if "loss" in e]
