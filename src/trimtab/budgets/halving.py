"""The search: successive halving over the validation score, on Optuna.

    first    of each way to tune that the budget allows, the candidate that changes the model least
    then     what Optuna's sampler (TPE) expects most of, among candidates that fit the budget
    rungs    a trial is judged after 1/9, 1/3 and all of its steps; one that is not among the best third of those that
             came so far stops (asynchronous successive halving, Li et al. 2020, as Optuna's pruner does it)

Every trial is a run with a folder of its own. The budget is proved before it trains: its costs are counted for the very
blocks that it skips, and what can only be measured is measured on the assembled model.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from trimtab.budgets.limits import Budget, BudgetError, shown
from trimtab.budgets.prices import Costs, Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import Candidate, Space
from trimtab.counting import latency
from trimtab.experiments import training
from trimtab.experiments.run import run
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.methods.adapted import handle_of
from trimtab.tasks.base import TaskModel

ASKS = 60  # questions to the sampler that lead to nothing new, after which one is drawn


@dataclass
class Trial:
    """A candidate that was tried.

    Attributes:
        status: `whole`: trained to the end; `stopped` at a rung; `over` the budget when it was counted or measured by
            itself, and so not trained; `failed`.
        scores: validation score after so many steps.
        test: score on the test rows, of trials that were trained to the end; nothing is chosen by it.
        steps: training steps that were paid.
        reason: why it failed, or by how much it is over.
    """

    number: int
    candidate: Candidate
    costs: Costs
    status: Literal["whole", "stopped", "over", "failed"] = "failed"
    scores: dict[int, float] = field(default_factory=dict)
    test: float | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""

    @property
    def score(self) -> float:
        """The last validation score; -inf before the first."""
        return self.scores[max(self.scores)] if self.scores else -math.inf


class Stopped(Exception):
    """A trial is not among the best of its rung."""


class Over(Exception):
    """What was measured is over the budget."""


class Watch(TrainerCallback):
    """Judges a run at its rungs, on validation rows."""

    def __init__(self, trial: Trial, rungs: list[int], judge: Callable[[int, float], bool], model: TaskModel,
                 rows: Any, batch: int):  # fmt: skip
        self.trial, self.rungs, self.judge = trial, rungs, judge
        self.model, self.rows, self.batch = model, rows, batch

    def on_step_end(self, args, state, control, **kwargs):
        self.trial.steps = max(self.trial.steps, state.global_step)
        if state.global_step in self.rungs and state.global_step not in self.trial.scores:
            metrics, _ = training.evaluate(self.model, self.rows, self.batch)
            score = self.trial.scores[state.global_step] = float(metrics[self.model.task.primary])
            if self.judge(state.global_step, score) and state.global_step < self.rungs[-1]:
                raise Stopped


@dataclass
class Search:
    """A search under way; everything it learns is in `folder`, so that an interrupted one goes on.

    Args:
        recipe: without methods.
        trials: most candidates to try.
        seconds: after which no trial begins.
        tell: is given a line for a person.
    """

    recipe: Recipe
    space: Space
    budget: Budget
    prices: Prices
    shared: Shared
    folder: Path
    trials: int = 24
    seconds: float | None = None
    tell: Callable[[str], None] = print

    def __post_init__(self) -> None:
        steps = self.recipe.training.steps
        self.rungs = sorted({max(1, steps // 9), max(1, steps // 3), steps})
        self.done: list[Trial] = []
        self.fitting = [c for c in self.space if (p := self.prices(c)) is not None and not self.budget.over(p)]

    # --- what is tried ---

    def portfolio(self) -> list[Candidate]:
        """Of each way to tune the candidate that changes the model least, pruning before skipping."""
        first: dict[str, Candidate] = {}
        for c in sorted(self.fitting, key=lambda c: (c.skip, c.sparsity)):
            first.setdefault(c.tune, c)
        return sorted(first.values(), key=lambda c: (c.skip, c.sparsity))

    def go(self) -> list[Trial]:
        """Try candidates until there are enough, or the time is over; all trials, those of before an interruption too.

        Raises:
            BudgetError: if all trials failed (with the commonest reason), or the time does not suffice for one.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ImportError("the search of `trimtab fit` needs optuna: pip install 'trimtab[fit]'") from error

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        portfolio = self.portfolio()
        study = optuna.create_study(
            study_name="fit", direction="maximize", load_if_exists=True,
            storage=JournalStorage(JournalFileBackend(str(self.folder / "search.log"))),
            sampler=optuna.samplers.TPESampler(seed=self.recipe.seed, n_startup_trials=len(portfolio)),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=self.rungs[0], reduction_factor=3),
        )  # fmt: skip
        started = time.monotonic()
        self._take_up(study)
        if not study.trials:
            for c in portfolio:
                study.enqueue_trial(self._names(c))
        while len(self.done) < self.trials:
            if not self._has_time(started):
                break
            asked, candidate = self._next(study)
            if candidate is None:
                break  # every candidate was tried
            self._try(study, asked, candidate)
        self._check()
        return self.done

    def _names(self, c: Candidate) -> dict[str, Any]:
        return {"tune": c.tune, "skip": c.skip, "sparsity": c.sparsity, "multiple": c.multiple}

    def _next(self, study: Any) -> tuple[Any, Candidate | None]:
        """The next candidate that fits the budget and was not tried: the sampler's, or one drawn."""
        from optuna.trial import TrialState

        tried = {t.candidate for t in self.done}
        fitting = set(self.fitting)
        s = self.space
        for _ in range(ASKS):
            trial = study.ask()
            candidate = Candidate(
                trial.suggest_categorical("sparsity", [0.0, *s.sparsities]),
                trial.suggest_categorical("skip", [0, *s.skips]),
                trial.suggest_categorical("tune", list(s.tunes)),
                trial.suggest_categorical("multiple", list(s.multiples)),
            )
            if candidate not in tried and replace(candidate, multiple=1.0) in fitting:
                return trial, candidate
            study.tell(trial, state=TrialState.FAIL)
        left = [x for c in self.fitting for m in s.multiples if (x := replace(c, multiple=m)) not in tried]
        if not left:
            return None, None
        study.enqueue_trial(self._names(left[len(tried) % len(left)]))
        return self._next(study)

    def _take_up(self, study: Any) -> None:
        """The trials of before an interruption; one that was cut off is tried again."""
        from optuna.trial import TrialState

        for file in sorted(self.folder.glob("trials/*/trial.json")):
            raw = json.loads(file.read_text())
            raw["candidate"] = Candidate(**raw["candidate"])
            raw["scores"] = {int(k): v for k, v in raw["scores"].items()}
            self.done.append(Trial(**raw))
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)

    # --- a trial ---

    def recipe_of(self, candidate: Candidate, shared: bool = True) -> Recipe:
        """The candidate as a recipe.

        Args:
            shared: with the masks that are in the folder; otherwise it needs nothing but the data.
        """
        tune = self.space.tunes[candidate.tune]
        plans, masks = self.shared.plans, self.shared.masks if shared else None
        t = self.recipe.training
        spec = replace(t, learning_rate=tune.rate * candidate.multiple, head_multiplier=tune.head,
                       cache=t.cache if tune.cached else None)  # fmt: skip
        methods = tuple(self.space.methods(candidate, plans, masks))
        return replace(self.recipe, methods=methods, training=spec, variant=str(candidate))

    def _try(self, study: Any, asked: Any, candidate: Candidate) -> None:
        from optuna.trial import TrialState

        trial = Trial(len(self.done), candidate, self.prices(candidate) or {})

        def judge(step: int, score: float) -> bool:
            asked.report(score, step)
            return asked.should_prune()

        self.carry_out(trial, judge)
        states = {"whole": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        study.tell(asked, trial.score if trial.status == "whole" else None,
                   state=states.get(trial.status, TrialState.FAIL))  # fmt: skip
        self.done.append(trial)
        where = f"{100 * trial.score:.1f} %" if trial.scores else trial.reason
        self.tell(f"[{len(self.done)}/{self.trials}] {candidate}: {trial.status} after {trial.steps} steps, {where}")

    def carry_out(self, trial: Trial, judge: Callable[[int, float], bool]) -> None:
        """Train a candidate in its folder, as far as `judge(step, score)` does not say that it should stop."""
        folder = self.folder / "trials" / f"{trial.number:03d}"
        started = time.monotonic()
        recipe = self.recipe_of(trial.candidate)

        def watch(model: TaskModel, validation: Any) -> TrainerCallback:
            trial.costs |= self._measured(model, recipe)
            if over := self.budget.over(trial.costs):
                raise Over(_excess(over))
            return Watch(trial, self.rungs, judge, model, validation, recipe.training.evaluation_batch)

        try:
            trial.costs |= self.prices.exact(trial.candidate, self._counted(trial.candidate))
            if over := self.budget.over(trial.costs):
                raise Over(_excess(over))
            run(recipe, folder, measure_costs=False, watch=watch)
            trial.status, trial.test = "whole", tested(folder)
        except Stopped:
            trial.status = "stopped"
        except Over as error:
            trial.status, trial.reason = "over", str(error)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            trial.status, trial.reason = "failed", " ".join(str(error).split())[:500]
        trial.seconds = round(time.monotonic() - started, 2)
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / "trial.json") as partial:
            partial.write_text(json.dumps(asdict(trial), indent=1) + "\n", encoding="utf-8")

    def _counted(self, candidate: Candidate) -> list[dict[str, Any]]:
        """The methods by which it is counted: its plan by name; masks only by their number."""
        return self.space.methods(candidate, self.shared.plans)

    def _measured(self, model: TaskModel, recipe: Recipe) -> Costs:
        """What only the assembled model can tell: how many of its numbers the masks leave, and what the budget wants
        measured on this device."""
        keys = {axis.key for axis in self.budget.axes if axis.measured}
        device = next(model.parameters()).device
        found: Costs = {}
        fit = handle_of(model.backbone.model)
        if fit is not None and fit.masks is not None:  # blocks that went took more or fewer zeros with them
            gone = fit.masks.prunable - fit.masks.kept
            found["nonzero_params"] = sum(p.numel() for p in model.parameters()) - gone
        if "latency_ms" in keys:
            least = model.task.least
            one = {k: v.to(device) for k, v in model.example(least).items()}
            was = model.training
            model.eval()
            found["latency_ms"] = latency(lambda: model(**one))["median"] / least
            model.train(was)
        if "training_seconds" in keys:
            found["training_seconds"] = recipe.training.steps * _step_seconds(model, recipe.training.batch_size)
        return found

    # --- time, and the end ---

    def _has_time(self, started: float) -> bool:
        """Whether another trial may begin: there is time for one to the end, if all go on as those before."""
        if self.seconds is None or not self.done:
            return True
        whole = [t.seconds for t in self.done if t.status == "whole"]
        used = time.monotonic() - started
        if not whole and used > self.seconds:
            self._check()  # says what went wrong, if all failed
            return False
        return used + (max(whole) if whole else 0) <= self.seconds

    def _check(self) -> None:
        if any(t.status == "whole" for t in self.done):
            return
        reasons = Counter(t.reason for t in self.done if t.status in ("failed", "over"))
        if reasons:
            reason, number = reasons.most_common(1)[0]
            raise BudgetError(f"none of {len(self.done)} trials came to its end; {number} because: {reason}")
        raise BudgetError(
            f"the time did not suffice for one trial to its end: one takes about {self._pace():.0f} s; give more time, "
            "or lower training.steps"
        )

    def _pace(self) -> float:
        """Seconds of a trial to its end, from what was paid for those that stopped."""
        paces = [t.seconds / t.steps for t in self.done if t.steps]
        return max(paces, default=0.0) * self.rungs[-1]

    @property
    def best(self) -> Trial:
        """The trial of the highest validation score among those that were trained to the end."""
        return max((t for t in self.done if t.status == "whole"), key=lambda t: (t.score, -t.number))

    @property
    def paid(self) -> int:
        """Training steps paid in all, the search of plans included."""
        return sum(t.steps for t in self.done) + self.shared.steps

    @property
    def grid(self) -> int:
        """Training steps of every candidate that fits, at every learning rate, trained to the end."""
        return len(self.fitting) * len(self.space.multiples) * self.rungs[-1]


def tested(folder: Path) -> float:
    """The score of a run on its test rows."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return float(metrics["test"][metrics["primary"]])


def _excess(over: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} % over" for name, share in over.items())


def _step_seconds(model: TaskModel, batch_size: int, repeats: int = 3) -> float:
    """Seconds of a training step without its optimiser: the median of a few, after one that does not count."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in model.example(batch_size).items()}
    times: list[float] = []
    was = model.training
    model.train()
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        loss = model(**batch)["loss"]
        if loss.requires_grad:
            loss.backward()
        times.append(time.perf_counter() - begin)
    model.zero_grad(set_to_none=True)
    model.train(was)
    return sorted(times[1:])[repeats // 2]


def nearest(prices: Prices, budget: Budget, space: Space) -> Iterator[str]:
    """For a budget that nothing meets: on each axis the least possible, and the candidate that comes nearest in all."""
    known = [(c, p) for c in space if (p := prices(c)) is not None]
    for axis in budget.axes:
        some = [(p[axis.key], c) for c, p in known if p.get(axis.key) is not None]
        if not some:
            yield f"{axis.name}: no candidate has it"
            continue
        value, c = min(some, key=lambda x: x[0])
        if value > budget.most[axis.name]:
            yield f"{axis.name}: the least possible is {shown(float(value), axis.kind)} ({c})"
    if known:
        c, p = min(known, key=lambda x: max(budget.over(x[1]).values(), default=0.0))
        yield f"nearest on all axes: {c} with {budget.told(p)}"
