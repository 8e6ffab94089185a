"""The search: successive halving over the validation score, on Optuna.

    first    of each way to tune that the budget allows, the candidate that changes the model least
    then     what Optuna's sampler (TPE) expects most of, among candidates that fit the budget
    rungs    a trial is judged after 1/9, 1/3 and all of its steps; one that is not among the best third of those that
             came so far stops (asynchronous successive halving, Li et al. 2020, as Optuna's pruner does it); the first
             of each way to tune is not judged before the second rung

Every trial is a run with a folder of its own. The budget is proved before it trains: its costs are counted for the very
blocks that it skips, and what can only be measured is measured on the assembled model.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trimtab.budgets.limits import Budget, BudgetError, shown
from trimtab.budgets.measured import measure
from trimtab.budgets.prices import Costs, Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import Candidate, Space
from trimtab.budgets.trial import NoTime, Over, Stopped, Trial, Watch, donors, tested, warmed
from trimtab.experiments.run import run
from trimtab.experiments.schema import Recipe
from trimtab.methods.adapted import handle_of
from trimtab.tasks.base import TaskModel

ASKS = 60  # questions to the sampler that lead to nothing new, after which one is drawn


@dataclass
class Search:
    """A search under way; everything it learns is in `folder`, so that an interrupted one goes on.

    Args:
        recipe: without methods.
        trials: most candidates to try.
        until: on the clock of `time.monotonic`; a trial that would not come to its end by then ends at a rung.
        tell: is given a line for a person.
        warm: start a candidate from the tuned weights of one that was trained to its end and differs in nothing but
            the budget's levers and the learning rate, and train it for a third of the steps. Scores of such trials only
            choose: the best candidate is trained from a cold start in the end.
    """

    recipe: Recipe
    space: Space
    budget: Budget
    prices: Prices
    shared: Shared
    folder: Path
    trials: int = 24
    until: float | None = None
    tell: Callable[[str], None] = print
    warm: bool = False

    def __post_init__(self) -> None:
        steps = self.recipe.training.steps
        self.rungs = sorted({max(1, steps // 9), max(1, steps // 3), steps})
        self.done: list[Trial] = []
        self._left: list[tuple[Any, Candidate]] = []
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
            raise ImportError(
                "the search of `trimtab fit` needs optuna: pip install -e '.[fit]' in trimtab's folder"
            ) from error

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=self._asked, direction="maximize", load_if_exists=True,
            storage=JournalStorage(JournalFileBackend(str(self.folder / "search.log"))),
            sampler=optuna.samplers.TPESampler(seed=self.recipe.seed, n_startup_trials=len(self.portfolio())),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=self.rungs[0], reduction_factor=3),
        )  # fmt: skip
        self._take_up(study)
        while sum(self.tried(t) for t in self.done) < self.trials and self.has_time():
            asked, candidate = self._next(study)
            if candidate is None:
                break  # every candidate was tried
            if self._try(study, asked, candidate).status == "cut":
                break
        self._confirm()
        self._check()
        return self.done

    @property
    def _asked(self) -> str:
        """The budget with all digits: two that print alike are two."""
        return ", ".join(
            f"{x.axis.name} <= {x.value or f'{x.share} of {x.base or x.axis.base}'}" for x in self.budget.limits
        )

    def tried(self, trial: Trial) -> bool:
        """Whether a trial tells all about its candidate under this budget: one of this budget that had its time, or one
        of another budget in this folder that was trained to its end and is known to keep to this one."""
        return trial.status != "cut" and (trial.budget == self._asked or self._kept(trial))

    def _kept(self, trial: Trial) -> bool:
        return trial.status == "whole" and self.budget.kept(trial.costs) is True

    def _next(self, study: Any) -> tuple[Any, Candidate | None]:
        """The next candidate that fits the budget and was not tried: the sampler's, or one drawn."""
        from optuna.trial import TrialState

        if self._left:
            return self._left.pop(0)
        tried = {t.candidate for t in self.done if self.tried(t)}
        fitting = set(self.fitting)
        for _ in range(ASKS):
            trial = study.ask(self._choices())
            candidate = Candidate(**trial.params)
            if candidate not in tried and replace(candidate, multiple=1.0) in fitting:
                return trial, candidate
            study.tell(trial, state=TrialState.FAIL)
        left = [x for c in self.fitting for m in self.space.multiples if (x := replace(c, multiple=m)) not in tried]
        if not left:
            return None, None
        study.enqueue_trial(asdict(left[len(tried) % len(left)]))
        return self._next(study)

    def _take_up(self, study: Any) -> None:
        """The trials of before an interruption, or of another budget; one that was under way is the first to go on."""
        import optuna
        from optuna.trial import TrialState

        self.done = [Trial.read(file) for file in sorted(self.folder.glob("trials/*/trial.json"))]
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if trial.params.keys() == Candidate.__dataclass_fields__.keys():
                self._left.append((optuna.trial.Trial(study, trial._trial_id), Candidate(**trial.params)))
            else:  # the kill came while it was drawn
                study.tell(trial.number, state=TrialState.FAIL)
        if study.trials:
            return
        for known in filter(self._kept, self.done):
            study.add_trial(optuna.create_trial(params=asdict(known.candidate), distributions=self._choices(),
                                                value=known.score, intermediate_values=known.scores))  # fmt: skip
        for c in self.portfolio():
            study.enqueue_trial(asdict(c))

    def _choices(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution

        s = self.space
        choices: dict[str, list[Any]] = {"sparsity": [0.0, *s.sparsities], "skip": [0, *s.skips], "tune": list(s.tunes),
                   "multiple": list(s.multiples)}  # fmt: skip
        return {name: CategoricalDistribution(these) for name, these in choices.items()}

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

    def _try(self, study: Any, asked: Any, candidate: Candidate) -> Trial:
        from optuna.trial import TrialState

        trial = Trial(len(self.done), candidate, self.prices(candidate) or {}, budget=self._asked)

        if self.warm and (known := donors(self.done, candidate)):
            trial.start = known[0].number

        first = self.portfolio() if len(self.rungs) > 2 else []

        def judge(step: int, score: float) -> bool:
            asked.report(score, step if trial.start is None else self.rungs[-1])
            # Ways to tune learn at different paces: after a ninth of the steps none of them is given up as a whole.
            return asked.should_prune() and not (candidate in first and step < self.rungs[-2])

        self.carry_out(trial, judge)
        self.done.append(trial)
        if trial.status == "cut":  # stays under way for Optuna, and so is tried again when the search goes on
            return trial
        states = {"whole": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        study.tell(asked, trial.score if trial.status == "whole" else None,
                   state=states.get(trial.status, TrialState.FAIL))  # fmt: skip
        name = f"[{len(self.done)}/{self.trials}] {candidate}{_warm(trial)}"
        self.tell(f"{name}: {trial.status} after {trial.steps} steps, {_scored(trial)}")
        return trial

    def carry_out(self, trial: Trial, judge: Callable[[int, float], bool]) -> None:
        """Train a candidate in its folder, as far as `judge(step, score)` does not say that it should stop."""
        folder = self.folder_of(trial)
        self._claim(folder, trial)
        started = time.monotonic()
        cold = recipe = self.recipe_of(trial.candidate)
        rungs = self.rungs
        if trial.start is not None:
            rungs = [max(1, rungs[-1] // 3)]
            recipe = replace(cold, training=replace(cold.training, steps=rungs[-1]))

        def watch(model: TaskModel, validation: Any) -> TrainerCallback:
            trial.costs |= self.measured(model, cold, trial.costs)
            if over := self.budget.over(trial.costs):
                raise Over(_excess(over))
            if trial.start is not None and not warmed(model, self.folder_of(self.done[trial.start])):
                raise Cold
            return Watch(trial, rungs, self.until, judge, model, validation, recipe.training.evaluation_batch)

        try:
            trial.costs |= self.prices.exact(trial.candidate, self.shared.plans)
            if over := self.budget.over(trial.costs):
                raise Over(_excess(over))
            run(recipe, folder, measure_costs=False, watch=watch)
            trial.status, trial.test = "whole", tested(folder)
        except Cold:
            trial.start = None
            return self.carry_out(trial, judge)
        except Stopped:
            trial.status = "stopped"
        except Over as error:
            trial.status, trial.reason = "over", str(error)
        except NoTime as error:
            trial.status, trial.reason = "cut", str(error)
        except Exception as error:  # whatever a candidate fails with, the others may do well
            trial.status, trial.reason = "failed", why(error)
        trial.seconds = round(time.monotonic() - started, 2)
        trial.write(folder / "trial.json")

    def _claim(self, folder: Path, trial: Trial) -> None:
        """Take a folder for a trial: what another one left there, checkpoints for one, is removed."""
        note, own = folder / "candidate.txt", f"{trial.candidate} from {trial.start}\n"
        if folder.exists() and not (note.exists() and note.read_text() == own):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(own)

    def folder_of(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"{trial.number:03d}"

    def _confirm(self) -> None:
        """Train the best candidate from a cold start, if its score is of a warm one: so its recipe is all of it."""
        best = max((t for t in self.done if self._kept(t)), key=lambda t: t.score, default=None)
        if (
            best is None
            or best.start is None
            or any(t.candidate == best.candidate and t.start is None and self.tried(t) for t in self.done)
        ):
            return
        trial = Trial(len(self.done), best.candidate, self.prices(best.candidate) or {}, budget=self._asked)
        self.carry_out(trial, lambda step, score: False)
        self.done.append(trial)
        self.tell(
            f"{best.candidate}, from a cold start: {trial.status} after {trial.steps} steps, {100 * trial.score:.1f} %"
        )

    def measured(self, model: TaskModel, recipe: Recipe, counted: Costs) -> Costs:
        """What only the assembled model can tell: how many of its numbers the masks leave, and what the budget wants
        measured on this device."""
        found = measure(model, recipe, {axis.key for axis in self.budget.axes if axis.measured})
        fit = handle_of(model.backbone.model)
        if fit is not None and fit.masks is not None:  # blocks that went took more or fewer zeros with them
            gone = fit.masks.prunable - fit.masks.kept
            found["nonzero_params"] = sum(p.numel() for p in model.parameters()) - gone
            if counted.get("export_bytes") is not None:
                found["export_bytes"] = counted["export_bytes"] + 4 * (
                    found["nonzero_params"] - counted["nonzero_params"]
                )
        return found

    # --- time, and the end ---

    def has_time(self) -> bool:
        """Whether another training may begin; the first always may, and is ended if it takes too long."""
        return self.until is None or time.monotonic() < self.until or not self.done

    def _check(self) -> None:
        """Raise a BudgetError unless a trial came to its end."""
        if any(self._kept(t) and t.start is None for t in self.done):
            return
        done = [t for t in self.done if t.budget == self._asked]
        if cut := [t for t in done if t.status == "cut"]:
            raise BudgetError(
                f"the time did not suffice for one trial to its end: {cut[-1].candidate}: {cut[-1].reason}, after what "
                f"all trials share: give more time, or lower training.steps ({self.rungs[-1]} now)"
            )
        parts = [f"none of {len(done)} trials came to its end"]
        if failed := Counter(t.reason for t in done if t.status == "failed"):
            reason, number = failed.most_common(1)[0]
            parts.append(f"{number} because: {reason}")
        raise BudgetError("; ".join([*parts, *self._least([t for t in done if t.status == "over"])]))

    def _least(self, over: list[Trial]) -> Iterator[str]:
        """For each axis that trials were over: the least that was found."""
        for axis in self.budget.axes:
            known = [t for t in over if t.costs.get(axis.key) is not None]
            if any(axis.name in self.budget.over(t.costs) for t in known):
                t = min(known, key=lambda t: t.costs[axis.key])
                yield (f"{axis.name}: the least of {len(known)} is {shown(float(t.costs[axis.key]), axis.kind)} "
                       f"({t.candidate}), asked are {shown(self.budget.most[axis.name], axis.kind)}")  # fmt: skip

    @property
    def best(self) -> Trial:
        """The trial of the highest validation score among those that keep this budget (a folder may hold trials of
        another one) and were trained to the end from a cold start."""
        return max((t for t in self.done if self._kept(t) and t.start is None), key=lambda t: (t.score, -t.number))

    @property
    def paid(self) -> int:
        """Training steps paid in all, the search of plans included."""
        return sum(t.steps for t in self.done) + self.shared.steps

    @property
    def grid(self) -> int:
        """Training steps of every candidate that fits, at every learning rate, trained to the end."""
        return len(self.fitting) * len(self.space.multiples) * self.rungs[-1]


def _warm(trial: Trial) -> str:
    return "" if trial.start is None else f", from the weights of trial {trial.start}"


def _scored(trial: Trial) -> str:
    return f"{100 * trial.score:.1f} %" if trial.scores else trial.reason


class Cold(Exception):
    """The trial from which one should start has not all that is learned in it."""


def why(error: BaseException) -> str:
    """What went wrong, in a line; of what nobody has foreseen with its kind."""
    kind = "" if isinstance(error, (ValueError, RuntimeError, FileNotFoundError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:500]


def _excess(over: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} % over" for name, share in over.items())


def nearest(prices: Prices, budget: Budget, space: Space) -> Iterator[str]:
    """For a budget that nothing meets: of each axis that is not met by itself the least possible, of each axis the
    least that the other limits allow, and the candidate that comes nearest in all."""
    known = [(c, p, set(budget.over(p))) for c in space if (p := prices(c)) is not None]
    if not known:
        yield "no combination of levers can be used: " + "; ".join(sorted(set(prices.refused.values()))[:3])
        return
    for axis in budget.axes:
        if axis.measured:
            continue
        some = [(float(p[axis.key]), c, over) for c, p, over in known if p.get(axis.key) is not None]
        most = budget.most[axis.name]
        if not some:
            yield f"{axis.name}: no candidate has it"
            continue
        least = min(some, key=lambda x: x[0])
        beside = min((x for x in some if x[2] <= {axis.name}), key=lambda x: x[0], default=None)
        for words, found in (("possible", least), ("that the other limits allow", beside)):
            if found is not None and found[0] > most and (words == "possible" or found[0] > least[0]):
                yield (f"{axis.name}: the least {words} is {shown(found[0], axis.kind)} ({found[1]}), "
                       f"{100 * (found[0] / most - 1):.3g} % over the {shown(most, axis.kind)} asked")  # fmt: skip
    c, p, _ = min(known, key=lambda x: max(budget.over(x[1]).values(), default=0.0))
    yield f"nearest on all axes: {c} with {budget.told(p)} ({_excess(budget.over(p))})"
