"""`trimtab.fit`: a budget in, a model out.

found/found.yaml     a recipe that gives the same model again: `trimtab run found/found.yaml`
found/model/         the run folder of the best trial; `trimtab.load_run` reads it, fit.json and weights are in it
found/report/        a page: the frontier, what each lever contributed, the course of the trials
found/fit.json       what was asked, found and paid
found/trials/        one run folder a trial
found/shared/        masks and plans that serve them all
found/search.log     Optuna's journal, from which an interrupted search goes on
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import yaml

from trimtab.budgets.asking import recipe_of, searched, seconds_of, take, usual_space
from trimtab.budgets.halving import Search, nearest, why
from trimtab.budgets.limits import Budget, BudgetError, Limit, parse, shown
from trimtab.budgets.measured import measured_bases
from trimtab.budgets.page import title, write_page
from trimtab.budgets.prices import Costs, Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import TUNES, Candidate, Space
from trimtab.budgets.trial import Clock, NoTime, Trial, tested
from trimtab.experiments.folder import claimed, is_finished, load, write_json
from trimtab.experiments.run import run
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.tasks.base import TaskModel

FULL = Candidate(0.0, 0, "full")


@dataclass(frozen=True)
class Found:
    """What `fit` found.

    Attributes:
        folder: of everything.
        best: the trial whose model was taken.
        primary: name of the score.
        test: its scores on the test rows, on which nothing was chosen.
        budget: in absolute numbers.
        full: full tuning at the same number of steps, if there was time for it.
        without: the best candidate without one of its levers, by the lever's name.
        paid, grid: training steps of the search, and of training every candidate that fits to its end.
    """

    folder: Path
    best: Trial
    primary: str
    test: dict[str, float]
    budget: Budget
    full: Trial | None
    without: dict[str, Trial]
    paid: int
    grid: int

    @property
    def model(self) -> Path:
        """The run folder of the model."""
        return self.folder / "model"

    def load(self) -> TaskModel:
        """The model, ready to answer."""
        return load(self.model)

    def __str__(self) -> str:
        score = f"at {self.budget.told(self.best.costs)}: {_percent(self.test[self.primary])} ({self.best.candidate})"
        if self.full is not None and self.full.test is not None:
            score += f"; full tuning: {_percent(self.full.test)} at {self.budget.told(self.full.costs)}"
        return f"{score}. {self.paid} training steps were paid, of {self.grid} that all candidates would take."


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def fit(model: str | Path, task: str | Mapping[str, Any], data: str | Path | Mapping[str, Any], *,
        budget: str | Mapping[str, Any], test: str | Path | None = None, validation: str | Path | None = None,
        time: str | float | None = None, out: str | Path = "found", only: Sequence[str] = (),
        without: Sequence[str] = (), trials: int = 24, space: Space | None = None, overrides: Sequence[str] = (),
        reference: bool = True, warm: bool = False, tell: Callable[[str], None] = print) -> Found:  # fmt: skip
    """Find how to adapt a model to a task at the best validation score that a budget allows, and adapt it.

    Args:
        model: a transformers folder, an official checkpoint file, or a registered backbone (`trimtab list backbones`).
        task: name of a task, or a mapping with its settings.
        data: a file or folder of training rows, the name of a source (`trimtab list data`), or a mapping.
        budget: limits, see `limits.py`: `"macs <= -30%, disk <= 5 MB"` or a mapping.
        test: rows to report on, beside a file of training rows; a folder may have its own.
        validation: rows by which candidates are compared; None takes those that belong to `data`, or holds out a tenth
            of the training pictures.
        time: for everything: "20m", or seconds. A trial that would not come to its end by then ends at a rung; only the
            evaluation of the last one may take longer.
        out: folder for everything; a search that was interrupted there goes on. With another budget, what was trained
            to its end there and keeps to this one is not trained again.
        only, without: levers and methods to pin or to leave out, see `Space.narrowed`.
        trials: most candidates to try.
        space: another space than the usual.
        overrides: changes to the recipe of all trials, such as `training.steps=300`; not of what the search decides.
        reference: train full tuning too, whatever it costs, to compare with, unless that takes more than half of the
            time; and in the end what was found without each of its levers, as far as there is time.
        warm: start candidates from the tuned weights of like ones, see `Search`.
        tell: is given lines for a person.

    Raises:
        BudgetError: if the budget cannot be understood or met (with the least possible on each axis), all trials fail,
            or the time does not suffice for one.
        BusyError: if another process searches in `out`.
        ValueError: if a name or setting is wrong, `out` holds another search (of other rows or weights, too), there are
            too few rows, or those for validation are the training rows.
    """
    limits = parse(budget)
    seconds = seconds_of(time)
    until = None if seconds is None else monotonic() + seconds
    folder = Path(out)
    recipe = recipe_of(model, task, data, test, validation, overrides)
    space = (space or usual_space(recipe)).narrowed(only, without)
    with claimed(folder):
        take(folder, recipe, space, limits, trials)
        return _search(recipe, space, limits, folder, trials, until, tell, warm, reference)


def _search(recipe: Recipe, space: Space, limits: tuple[Limit, ...], folder: Path, trials: int, until: float | None,
            tell: Callable[[str], None], warm: bool, reference: bool) -> Found:  # fmt: skip
    """All of `fit` in a folder that is its own."""
    measured = measured_bases(recipe, limits, folder / "measured.json")
    tell("counting what candidates cost")
    exports = any(limit.axis.key == "export_bytes" for limit in limits)
    prices = Prices(recipe, space, folder / "prices.json", exports=exports)
    prices.count_all()
    goal = Budget.of(limits, {base: {**costs, **measured.get(base, {})} for base, costs in prices.bases.items()})
    shared = Shared(recipe, space, folder / "shared", searched(space, recipe))
    search = Search(recipe, space, goal, prices, shared, folder, trials, until, tell, warm)
    if not search.fitting:
        raise BudgetError("; ".join(["no candidate meets the budget", *nearest(prices, goal, space)]))
    tell(f"{len(search.fitting)} of {len(list(space))} combinations fit the budget: "
         + ", ".join(f"{x.name} <= {shown(goal.most[x.name], x.kind)}" for x in goal.axes))  # fmt: skip
    shared.find({c.sparsity for c in search.fitting if c.sparsity}, {c.skip for c in search.fitting})
    full = None
    if reference and FULL not in search.fitting:  # otherwise it is a trial
        half = None if until is None else (monotonic() + until) / 2
        full = _beside(replace(search, until=half), FULL, "full")
    search.go()
    found = _finish(search, reference, full)
    write_page(search, found)
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------


def _finish(search: Search, reference: bool, full: Trial | None) -> Found:
    """Keep the best model, its recipe, and what is told of it."""
    best, folder = search.best, search.folder
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(folder / "trials" / f"{best.number:03d}", folder / "model")
    own = search.recipe_of(best.candidate, shared=False).to_dict()
    for key in ("name", "variant"):
        own.pop(key)
    with replace_file(folder / "found.yaml") as partial:
        partial.write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    metrics = json.loads((folder / "model" / "metrics.json").read_text())
    if reference and full is None:
        full = _known(search, FULL) or _beside(search, FULL, "full")
    found = Found(folder, best, metrics["primary"], metrics["test"], search.budget, full, _levers(search, reference),
                  search.paid, search.grid)  # fmt: skip
    with replace_file(folder / "fit.json") as partial:
        partial.write_text(json.dumps(_json(found, title(search.recipe)), indent=1) + "\n", encoding="utf-8")
    return found


def _levers(search: Search, train: bool) -> dict[str, Trial]:
    """The best candidate without each of its levers, one at a time; those that were not tried are trained."""
    best = search.best.candidate
    fewer: dict[str, Candidate] = {}
    if best.sparsity:
        fewer["prune"] = replace(best, sparsity=0.0)
    if best.skip and best.tune in search.space.tunes and search.space.tunes[best.tune].method is not None:
        fewer["skip"] = replace(best, skip=0)
    if best.tune != "linear-probe" and "linear-probe" in search.space.tunes:
        fewer["tune"] = replace(best, tune="linear-probe", multiple=1.0)
    found = {}
    for lever, candidate in fewer.items():
        trial = _known(search, candidate) or (_beside(search, candidate, f"without-{lever}") if train else None)
        if trial is not None:
            found[lever] = trial
    return found


def _known(search: Search, candidate: Candidate) -> Trial | None:
    """A candidate's trial, if it was trained to its end."""
    return next((t for t in search.done if t.candidate == candidate and t.status == "whole" and t.start is None), None)


def _beside(search: Search, candidate: Candidate, name: str) -> Trial | None:
    """A run beside the search, whatever it costs; None, with a line that says why, if it cannot be carried out or there
    is no time."""
    space = search.space
    if candidate.tune not in space.tunes:
        space = replace(space, tunes={**space.tunes, candidate.tune: TUNES[candidate.tune]})
    twin = replace(search, space=space)
    recipe = replace(twin.recipe_of(candidate), variant=name)
    folder = search.folder / "reference" / name
    measured: Costs = {}

    def watch(model: TaskModel, rows: Any) -> Clock:
        measured.update(twin.measured(model, recipe, costs))
        return Clock(search.rungs, search.until)

    try:
        costs = replace(search.prices, space=space).exact(candidate, search.shared.plans)
        if is_finished(folder, recipe):
            before = folder / "measured.json"
            measured.update(json.loads(before.read_text()) if before.exists() else {})
        else:
            if search.until is not None and monotonic() > search.until:
                raise NoTime
            search.tell(f"to compare with: {candidate}")
            run(recipe, folder, measure_costs=False, watch=watch)
            write_json(folder / "measured.json", measured)
    except NoTime:
        search.tell(f"no time to compare with {candidate}")
        return None
    except (ValueError, RuntimeError) as error:
        search.tell(f"{candidate}, to compare with, failed: {why(error)}")
        return None
    return Trial(-1, candidate, costs | measured, "whole", test=tested(folder), steps=recipe.training.steps)


def _json(found: Found, title: str) -> dict[str, Any]:
    return {
        "format": 1, "title": title, "sentence": str(found), "primary": found.primary, "test": found.test,
        "budget": {axis.name: found.budget.most[axis.name] for axis in found.budget.axes},
        "best": asdict(found.best), "full": asdict(found.full) if found.full else None,
        "without": {k: asdict(t) for k, t in found.without.items()}, "paid": found.paid, "grid": found.grid,
    }  # fmt: skip
