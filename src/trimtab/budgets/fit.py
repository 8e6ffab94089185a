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
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import yaml

from trimtab.budgets.halving import Search, nearest, why
from trimtab.budgets.limits import Budget, BudgetError, Limit, parse, shown
from trimtab.budgets.measured import measured_bases
from trimtab.budgets.page import title, write_page
from trimtab.budgets.prices import Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import TUNES, Candidate, Space
from trimtab.budgets.trial import Clock, NoTime, Trial, tested
from trimtab.data.identity import warn_if_same
from trimtab.experiments.assembly import assemble, tables
from trimtab.experiments.folder import claimed, is_finished, load
from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.tasks.base import TaskModel

FULL = Candidate(0.0, 0, "full")


class OtherSearch(ValueError):
    """A folder holds a search that was asked for something else."""


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
        test: rows to report on, beside a file of training rows.
        validation: rows by which candidates are compared; None holds out some of the training rows.
        time: for everything: "20m", or seconds. A trial that would not come to its end by then ends at a rung; only the
            evaluation of the last one may take longer.
        out: folder for everything; a search that was interrupted there goes on. With another budget, what was trained
            to its end there and keeps to this one is not trained again.
        only, without: levers and methods to pin or to leave out, see `Space.narrowed`.
        trials: most candidates to try.
        space: another space than the usual.
        overrides: changes to the recipe of all trials, such as `training.steps=300`.
        reference: train full tuning too, whatever it costs, to compare with, unless that takes more than half of the
            time; and in the end what was found without each of its levers, as far as there is time.
        warm: start candidates from the tuned weights of like ones, see `Search`.
        tell: is given lines for a person.

    Raises:
        BudgetError: if the budget cannot be understood or met (with the least possible on each axis), all trials fail,
            or the time does not suffice for one.
        BusyError: if another process searches in `out`.
        ValueError: if a name or setting is wrong, `out` holds another search, or there are too few rows.
    """
    limits = parse(budget)
    seconds = _seconds(time)
    until = None if seconds is None else monotonic() + seconds
    folder = Path(out)
    recipe = _recipe(model, task, data, test, validation, overrides)
    space = (space or _space(recipe)).narrowed(only, without)
    asked = _asked(recipe, space, limits, trials)
    with claimed(folder):
        _claim(folder, asked)
        return _search(recipe, space, limits, folder, trials, until, tell, warm, reference)


def _search(recipe: Recipe, space: Space, limits: tuple[Limit, ...], folder: Path, trials: int, until: float | None,
            tell: Callable[[str], None], warm: bool, reference: bool) -> Found:  # fmt: skip
    """All of `fit` in a folder that is its own."""
    _check_rows(recipe)
    measured = measured_bases(recipe, limits, folder / "measured.json")
    tell("counting what candidates cost")
    exports = any(limit.axis.key == "export_bytes" for limit in limits)
    prices = Prices(recipe, space, folder / "prices.json", exports=exports)
    prices.count_all()
    goal = Budget.of(limits, {base: {**costs, **measured.get(base, {})} for base, costs in prices.bases.items()})
    shared = Shared(recipe, space, folder / "shared", _searched(space, recipe))
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


# --- what is asked ----------------------------------------------------------------------------------------------------


def _recipe(model: str | Path, task: Any, data: Any, test: Any, validation: Any, overrides: Sequence[str]) -> Recipe:
    """The recipe of all candidates, without methods."""
    raw: dict[str, Any] = {
        "title": "found under a budget",
        "backbone": {"name": str(model)},
        "task": dict(task) if isinstance(task, Mapping) else {"name": task},
        "data": _data(data, test, validation),
        "methods": [],
        "training": {"steps": 180, "batch_size": 16, "precision": "auto"},
    }
    recipe = expand(raw, "fit", overrides, "fit")[0]
    if recipe.training.schedule == "plateau":
        raise ValueError(
            "training.schedule: plateau: trials are compared after the same steps, and this schedule ends each at its "
            "own: leave it out, with training.patience, and set training.steps; train found.yaml to its plateau "
            "afterwards, trimtab run found.yaml training.schedule=plateau training.evaluate_every=N training.patience=N"
        )
    if recipe.training.load_best_model_at_end:
        raise ValueError(
            "training.load_best_model_at_end: trials are compared by the weights that they have after the same steps: "
            "leave it out; train found.yaml so afterwards, trimtab run found.yaml training.load_best_model_at_end=true "
            "training.evaluate_every=N"
        )
    return recipe


def _data(data: Any, test: Any, validation: Any) -> dict[str, Any]:
    """A recipe's `data`."""
    from trimtab.data.sources import SOURCES

    if isinstance(data, Mapping):
        return dict(data)
    if str(data) in SOURCES and not Path(data).exists():
        return {"name": str(data)}
    path = Path(data)
    if not path.exists():
        raise ValueError(f"data: '{data}' is no file or folder, nor a source of data; valid: {', '.join(SOURCES)}")
    if test is None and path.is_dir():
        return _folder(path)
    if test is None:
        raise ValueError(f"data: '{data}' holds the rows to train on; name those to report on with `test`")
    found: dict[str, Any] = {"name": "files", "train": str(path), "test": str(test)}
    return found | ({"validation": str(validation)} if validation is not None else {"held_out": 0.1})


def _folder(path: Path) -> dict[str, Any]:
    from trimtab.data.check import check

    found = check(path, samples=0)
    if len(found) != 1:
        names = ", ".join(f.source for f in found) or "none"
        raise ValueError(f"data: {path}: expected one data set, found {names}: name it, data={{name: ..., root: ...}}")
    return {"name": found[0].source, **found[0].settings}


def _seconds(time: str | float | None) -> float | None:
    """Raises ValueError for another form, and for no time at all."""
    if time is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h)?\s*", str(time))
    seconds = float(match[1]) * {"s": 1, None: 1, "m": 60, "min": 60, "h": 3600}[match[2]] if match else time
    if isinstance(seconds, str) or not seconds > 0:
        raise ValueError(f"time: expected '20m', '90s', '2h' or seconds, more than none, found {time!r}")
    return seconds


def _space(recipe: Recipe) -> Space:
    """The usual space, with as many skipped blocks as half of those that can go."""
    from trimtab.methods import METHODS

    parts = assemble(recipe)
    try:
        blocks = len(METHODS.make("block-influence", skip=1).candidates(parts.fit.anatomy))
    except ValueError:
        return Space(skips=())
    most = max(1, blocks // 2)
    skips = sorted({round(most * i / 6) for i in range(1, 7)} - {0}) if most > 6 else range(1, most + 1)
    # Greedy search tries each block at each step: 26 plans for 4 of 8 blocks, 222 for 12 of 24.
    return Space(skips=tuple(skips), search="greedy-skip" if blocks <= 16 else "block-influence")


def _check_rows(recipe: Recipe) -> None:
    """Read the rows as a trial does, before anything is counted; ValueError as there (too few to hold out, say)."""
    parts = assemble(recipe)
    train, validation, test = tables(recipe, parts)
    warn_if_same(validation, test)
    for table in (train, test):
        parts.task.check(parts.model.backbone, table)


def _searched(space: Space, recipe: Recipe) -> dict[str, Any]:
    from trimtab.methods import METHODS

    own = METHODS[space.search].Settings.__dataclass_fields__
    return {"search_steps": max(10, recipe.training.steps // 4)} if "search_steps" in own else {}


def _asked(recipe: Recipe, space: Space, limits: Sequence[Any], trials: int) -> dict[str, Any]:
    own = recipe.to_dict()
    return {"recipe": own, "space": json.loads(json.dumps(asdict(space))), "budget": [str(x) for x in limits],
            "trials": trials}  # fmt: skip


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    """Take a folder for this search: a new one, or one of the same recipe and space; what was tried there under another
    budget is known under this one too."""
    file = folder / "asked.json"
    plain = json.loads(json.dumps(asked))
    if file.exists():
        before = json.loads(file.read_text())
        if different := [k for k in plain if k in ("recipe", "space") and before.get(k) != plain[k]]:
            raise OtherSearch(
                f"{folder}: holds a search with another {different[0]}: name another folder, or remove this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is there already and holds no search; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as partial:
        partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


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
    try:
        if not is_finished(folder, recipe):
            if search.until is not None and monotonic() > search.until:
                raise NoTime
            search.tell(f"to compare with: {candidate}")
            run(recipe, folder, measure_costs=False, watch=lambda model, rows: Clock(search.rungs, search.until))
        costs = replace(search.prices, space=space).exact(candidate, search.shared.plans)
    except NoTime:
        search.tell(f"no time to compare with {candidate}")
        return None
    except (ValueError, RuntimeError) as error:
        search.tell(f"{candidate}, to compare with, failed: {why(error)}")
        return None
    return Trial(-1, candidate, costs, "whole", test=tested(folder), steps=recipe.training.steps)


def _json(found: Found, title: str) -> dict[str, Any]:
    return {
        "format": 1, "title": title, "sentence": str(found), "primary": found.primary, "test": found.test,
        "budget": {axis.name: found.budget.most[axis.name] for axis in found.budget.axes},
        "best": asdict(found.best), "full": asdict(found.full) if found.full else None,
        "without": {k: asdict(t) for k, t in found.without.items()}, "paid": found.paid, "grid": found.grid,
    }  # fmt: skip
