"""One candidate that is tried: what is kept of it, and who watches while it trains."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from trimtab.budgets.prices import Costs
from trimtab.budgets.space import Candidate
from trimtab.experiments import training
from trimtab.files import replace_file
from trimtab.methods.adapted import handle_of
from trimtab.methods.saved import Saved
from trimtab.tasks.base import TaskModel


@dataclass
class Trial:
    """A candidate that was tried.

    Attributes:
        status: `whole`: trained to the end; `stopped` at a rung; `over` the budget when it was counted or measured by
            itself, and so not trained; `cut` since the time was over, to be tried again; `failed`.
        scores: validation score after so many steps.
        test: score on the test rows, of trials that were trained to the end; nothing is chosen by it.
        steps: training steps that were paid.
        budget: under which it was tried, as it was asked for.
        start: number of the trial from whose tuned weights it started (see `warmed`); None for a cold start.
        reason: why it failed, or by how much it is over.
    """

    number: int
    candidate: Candidate
    costs: Costs
    status: Literal["whole", "stopped", "over", "cut", "failed"] = "failed"
    scores: dict[int, float] = field(default_factory=dict)
    test: float | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""
    budget: str = ""
    start: int | None = None

    @property
    def score(self) -> float:
        """The last validation score; -inf before the first."""
        return self.scores[max(self.scores)] if self.scores else -math.inf

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Trial:
        """What `write` wrote."""
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw["candidate"] = Candidate(**raw["candidate"])
        raw["scores"] = {int(k): v for k, v in raw["scores"].items()}
        return cls(**raw)


class Stopped(Exception):
    """A trial is not among the best of its rung."""


class Over(Exception):
    """What was measured is over the budget."""


class NoTime(Exception):
    """A training would not come to its end in time."""


class Clock(TrainerCallback):
    """Ends a training, at a rung, that would not come to its end in time.

    Args:
        rungs: steps at which it looks; the last is the end.
        until: on the clock of `time.monotonic`; None never ends one.
    """

    def __init__(self, rungs: Sequence[int], until: float | None):
        self.rungs, self.until, self.begun = rungs, until, time.monotonic()
        self.judging: list[float] = []  # seconds of each validation

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if self.until is None or step not in self.rungs or step >= self.rungs[-1]:
            return
        now = time.monotonic()
        judging = sum(self.judging)
        left = (now - self.begun - judging) / (step - self.first) * (self.rungs[-1] - step)
        if self.judging:
            left += judging / len(self.judging) * sum(rung > step for rung in self.rungs)
        if now + left > self.until:
            raise NoTime(f"it would have taken about {now - self.begun + left:.0f} s")


class Watch(Clock):
    """Judges a run at its rungs, on validation rows; `judge` is told which rung it is."""

    def __init__(self, trial: Trial, rungs: list[int], until: float | None, judge: Callable[[int, float], bool],
                 model: TaskModel, rows: Any, batch: int):  # fmt: skip
        super().__init__(rungs, until)
        self.trial, self.judge = trial, judge
        self.model, self.rows, self.batch = model, rows, batch

    def on_step_end(self, args, state, control, **kwargs):
        self._look(state.global_step)
        super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self._look(state.global_step)  # of a training that went on from its last checkpoint, without a step

    def _look(self, step: int) -> None:
        self.trial.steps = max(self.trial.steps, step)
        if step not in self.rungs or step in self.trial.scores:
            return
        begun = time.monotonic()
        metrics, _ = training.evaluate(self.model, self.rows, self.batch)
        self.judging.append(time.monotonic() - begun)
        score = self.trial.scores[step] = float(metrics[self.model.task.primary])
        if self.judge(step, score) and step < self.rungs[-1]:
            raise Stopped


def tested(folder: Path) -> float:
    """The score of a run on its test rows."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return float(metrics["test"][metrics["primary"]])


def donors(done: Sequence[Trial], candidate: Candidate) -> list[Trial]:
    """Trials from whose tuned weights a candidate may start, the nearest first: trained to the end, tuned alike, and
    neither sparser nor shorter."""
    found = [t for t in done if t.status == "whole" and t.candidate.tune == candidate.tune and t.candidate != candidate
             and t.candidate.sparsity <= candidate.sparsity and t.candidate.skip <= candidate.skip]  # fmt: skip
    return sorted(found, key=lambda t: (candidate.skip - t.candidate.skip, candidate.sparsity - t.candidate.sparsity,
                                        -t.score))  # fmt: skip


def warmed(model: TaskModel, folder: Path) -> bool:
    """Start a model from what another run learned. False, and nothing is changed, unless that run has all that is
    learned here, in the same shapes (what is learned of blocks that went is left)."""
    fit = handle_of(model.backbone.model)
    assert fit is not None
    theirs, own = Saved.read(folder).learned, fit.current()
    if any(name not in theirs or theirs[name].shape != tensor.shape for name, tensor in own.items()):
        return False
    fit.copy({name: theirs[name] for name in own}, str(folder))
    if fit.masks is not None:
        fit.masks.enforce(fit.model)
    return True
