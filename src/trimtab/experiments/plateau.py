"""Validation scores while a run trains, and the schedule that ends by them.

    rate    rises over the warm-up    stays                                          falls linearly to 0
    scores                            better  better  equal  worse  (no rise for `patience` of them,
                                                                     and for `patience_share` of the steps to the best)
    steps   0 ....................................................| start ............ end, a quarter more

This is the constant rate with a cool-down of warmup-stable-decay schedules (Haegele et al., Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations, NeurIPS 2024, section 3), which needs no number of steps
beforehand. Here the cool-down begins when the validation score has stopped rising.

Everything that is decided follows from the scores so far, which the trainer keeps in its history and so in checkpoints:
a resumed training decides from them anew, and finds the same.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from trimtab import processes
from trimtab.data.images import encoded
from trimtab.experiments.schema import RecipeError, TrainingSpec
from trimtab.randomness import drawn_aside

PREFIX = "eval_"  # before the metrics of an evaluation, in a trainer's history and for services

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class Cooldown(NamedTuple):
    """The end of a training by `schedule: plateau`.

    Attributes:
        start: after so many steps the rate begins to fall.
        steps: so many steps it falls.
        plateau: the score had stopped rising; False: it had not, but most of the steps were over.
    """

    start: int
    steps: int
    plateau: bool

    @property
    def end(self) -> int:
        return self.start + self.steps


def latest(spec: TrainingSpec) -> int:
    """After how many steps the cool-down begins at the latest: the last evaluation that leaves it a fifth of `steps`,
    which is a quarter of what went before, and one interval between evaluations."""
    assert spec.evaluate_every is not None
    return spec.latest_cooldown // spec.evaluate_every * spec.evaluate_every


def cooldown(scores: Sequence[tuple[int, float]], spec: TrainingSpec) -> Cooldown | None:
    """Where the cool-down begins; None as long as it does not.

    Args:
        scores: step and score of each evaluation, in order. Only a score greater than all before it is a rise.
        spec: of `schedule: plateau`.

    Raises:
        RecipeError: if a score is not a finite number: it would look like one that does not rise.
    """
    assert spec.evaluate_every is not None and spec.patience is not None
    best, came, since = -math.inf, 0, 0
    for step, score in scores:
        if not math.isfinite(score):
            raise RecipeError(
                f"training.schedule: plateau needs finite validation scores, found {score} after {step} steps: give "
                "data.validation rows that the task can score, or take 'schedule: cosine'"
            )
        best, came, since = (score, step, 0) if score > best else (best, came, since + 1)
        over = since >= spec.patience and step - came >= spec.patience_share * came
        if over or step >= latest(spec):
            return Cooldown(step, max(step // 4, spec.evaluate_every), over)
    return None


def warmup_steps(spec: TrainingSpec, steps: int) -> int:
    """Steps of the warm-up: a share of all steps; under `plateau`, where their number is not known, of those that the
    earliest plateau takes after the first evaluation."""
    if spec.schedule != "plateau":
        return int(spec.warmup * steps)
    assert spec.evaluate_every is not None and spec.patience is not None
    return int(spec.warmup * spec.evaluate_every * spec.patience)


def of_fixed_length(spec: TrainingSpec) -> TrainingSpec:
    """As a search trains, whose number of steps is given: without evaluations, and with a rate that falls linearly
    where the recipe waits for a plateau."""
    if spec.schedule == "plateau":
        spec = replace(spec, schedule="linear", patience=None, patience_share=0.0)
    return replace(spec, evaluate_every=None, load_best_model_at_end=False)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What draws random numbers in here draws the same each time, and none of those that come after."""
    python, numpy = random.getstate(), np.random.get_state()
    with drawn_aside(seed=0):
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Judge(TrainerCallback):
    """Evaluates while a run trains, and keeps what came of it.

    Args:
        spec: how often, and whether training ends by it.
        measure: gives all metrics of the validation rows; several processes call it together.
        primary: which of them is the score.
        rows: the validation rows.

    Attributes:
        scores: `step` and all metrics of each evaluation.
        cooldown: the end of a training by `schedule: plateau`, once it is known.
        steps: that were taken.
    """

    def __init__(self, spec: TrainingSpec, measure: Callable[[], dict[str, float]], primary: str, rows: Any):
        self.spec, self.measure, self.primary, self.rows = spec, measure, primary, rows
        self.scores: list[dict[str, float]] = []
        self.cooldown: Cooldown | None = None
        self.steps = 0

    def factor(self, step: int) -> float:
        """Factor of the learning rate under `plateau`, at a step from 0."""
        warmup = warmup_steps(self.spec, self.spec.steps)
        if step < warmup:
            return step / warmup
        if self.cooldown is None or step < self.cooldown.start:
            return 1.0
        return max(0.0, 1 - (step - self.cooldown.start) / self.cooldown.steps)

    def key(self) -> dict[str, Any]:
        """What else a checkpoint belongs to, where scores decide."""
        from trimtab.experiments.cached import table_print

        return {"validation": table_print(encoded(self.rows)), "evaluation_batch": self.spec.evaluation_batch}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._settle(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step

    def _settle(self, state: Any) -> None:
        """Decide from all scores so far, which are in the trainer's history."""
        self.scores = [{"step": e["step"], **{k.removeprefix(PREFIX): v for k, v in e.items() if k.startswith(PREFIX)}}
                       for e in state.log_history if PREFIX + self.primary in e]  # fmt: skip
        if self.spec.schedule == "plateau":
            self.cooldown = cooldown([(int(s["step"]), s[self.primary]) for s in self.scores], self.spec)
            if self.cooldown is not None:
                state.max_steps = self.cooldown.end  # by which the trainer ends, and evaluates and saves there

    def best(self) -> int:
        """The step of the best score, the first of equal ones."""
        values = [s[self.primary] if math.isfinite(s[self.primary]) else -math.inf for s in self.scores]
        return int(self.scores[values.index(max(values))]["step"])

    def told(self) -> dict[str, Any]:
        """What a run's metrics.json says of it."""
        out: dict[str, Any] = {"best_step": self.best(), "scores": self.scores}
        if self.spec.load_best_model_at_end:
            out["kept_step"] = self.best()
        if self.cooldown is not None:
            out |= {"plateau": self.cooldown.plateau, "cooldown_start": self.cooldown.start}
        return out

    def sentence(self) -> str:
        """For a person."""
        kept = ", from where the weights were kept" if self.spec.load_best_model_at_end else ""
        best = f"the best validation {self.primary} came after {self.best()} of {self.steps} steps{kept}"
        if self.cooldown is None:
            return best
        end = f"the rate fell from step {self.cooldown.start} on"
        if self.cooldown.plateau:
            return f"{best}; {end}, when the score had stopped rising"
        return f"{best}; {end}, though the score still rose: more `training.steps` may raise it"


def check(spec: TrainingSpec, judge: Judge | None) -> None:
    """RecipeError if nobody would see the scores that decide in a training."""
    if judge is None and spec.schedule == "plateau":
        raise RecipeError("training.schedule: plateau: nothing evaluates in this training: pass `judge`, or take a "
                          "schedule of fixed length, such as cosine")  # fmt: skip
    if judge is None and spec.load_best_model_at_end:
        raise RecipeError("training.load_best_model_at_end: nothing evaluates in this training: pass `judge`, or leave "
                          "it out")  # fmt: skip


class Judged(_Base):
    """Part of a `Trainer` whose evaluations are a `Judge`'s."""

    judge: Judge | None = None
    since: float

    def judged_by(self, judge: Judge | None) -> None:
        """Let somebody evaluate in training, before anything else hears of a step; None: nobody does."""
        if judge is not None:
            self.judge, self.eval_dataset = judge, judge.rows
            self.args.eval_strategy, self.args.eval_steps = IntervalStrategy.STEPS, judge.spec.evaluate_every
            self.callback_handler.callbacks.insert(0, judge)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, of the task's own metrics; training goes on as if there had been none."""
        assert self.judge is not None
        started = time.perf_counter()
        with undisturbed():
            metrics = processes.everywhere(self.judge.measure())[0]  # all decide alike
        self.since += time.perf_counter() - started  # no time in which the model waited or trained
        self.log({PREFIX + name: float(value) for name, value in metrics.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
