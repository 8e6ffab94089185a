"""What a search is asked for: the recipe of all its candidates, and the folder that is its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from trimtab.budgets.limits import Limit
from trimtab.budgets.space import Space
from trimtab.data import tables as user_tables
from trimtab.data.identity import warn_if_same
from trimtab.data.images import encoded
from trimtab.experiments.assembly import Assembly, assemble, tables
from trimtab.experiments.collation import table_print
from trimtab.experiments.recipe import expand
from trimtab.experiments.schema import Recipe, TrainingSpec
from trimtab.files import replace_file

HELD_OUT = 0.1  # of the training rows, where no others are for validation
SEARCHED = ("learning_rate", "head_multiplier")  # of the training, which each way to tune has of its own


class OtherSearch(ValueError):
    """A folder holds a search that was asked for something else."""


def recipe_of(model: str | Path, task: Any, data: Any, test: Any, validation: Any, overrides: Sequence[str]) -> Recipe:
    """The recipe of all candidates, without methods.

    Raises:
        ValueError: if it says what the search decides, or how long each trial trains by its own score.
    """
    raw: dict[str, Any] = {
        "title": "found under a budget",
        "backbone": {"name": str(model)},
        "task": dict(task) if isinstance(task, Mapping) else {"name": task},
        "data": data_of(data, test, validation),
        "methods": [],
        "training": {"steps": 180, "batch_size": 16, "precision": "auto"},
    }
    recipes = expand(raw, "fit", overrides, "fit")
    _check_overrides(recipes, overrides)
    recipe = recipes[0]
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


def _check_overrides(recipes: Sequence[Recipe], overrides: Sequence[str]) -> None:
    """ValueError if they say what the search would not heed."""
    if len(recipes) > 1:
        raise ValueError(f"overrides: expected one recipe for all trials, found {len(recipes)} (variants or seeds): "
                         "search once for each, in a folder of its own")  # fmt: skip
    named = {override.partition("=")[0].strip() for override in overrides}
    default = {f.name: f.default for f in fields(TrainingSpec)}
    for key in SEARCHED:
        if f"training.{key}" in named or getattr(recipes[0].training, key) != default[key]:
            raise ValueError(f"training.{key}: each way to tune has its own: leave it out, and give other ones with "
                             "`space=` (`Tune.rate`, `Tune.head`), or set it afterwards, trimtab run found.yaml "
                             f"training.{key}=VALUE")  # fmt: skip
    if recipes[0].methods:
        raise ValueError("methods: the search chooses them: leave them out, and pin or leave out ways with `only` and "
                         "`without`")  # fmt: skip


def data_of(data: Any, test: Any, validation: Any) -> dict[str, Any]:
    """A recipe's `data`, as `trimtab.fit` is given it."""
    from trimtab.data.sources import SOURCES

    if isinstance(data, Mapping) or (str(data) in SOURCES and not Path(data).exists()):
        found = dict(data) if isinstance(data, Mapping) else {"name": str(data)}
        if given := [name for name, value in (("test", test), ("validation", validation)) if value is not None]:
            raise ValueError(
                f"{given[0]}: stands beside a file of training rows, and the rows of {found.get('name')!r} are named "
                f"inside `data`: data={{name: ..., {given[0]}: ...}}"
            )
        if found.get("name") == "files" and not found.keys() & {"validation", "held_out"}:
            found["held_out"] = HELD_OUT
        return found
    path = Path(data)
    if not path.exists():
        raise ValueError(f"data: '{data}' is no file or folder, nor a source of data; valid: {', '.join(SOURCES)}")
    if test is None and path.is_dir():
        return _folder(path, validation)
    if test is None:
        raise ValueError(f"data: '{data}' holds the rows to train on; name those to report on with `test`")
    return _files(path, test, validation)


def _files(train: Path, test: Any, validation: Any) -> dict[str, Any]:
    found = {"name": "files", "train": str(train), "test": str(test)}
    return found | ({"held_out": HELD_OUT} if validation is None else {"validation": str(validation)})


def _folder(path: Path, validation: Any) -> dict[str, Any]:
    """A folder that has all splits."""
    from trimtab.data.check import check

    found = check(path, samples=0)
    if len(found) != 1:
        names = ", ".join(f.source for f in found) or "none"
        raise ValueError(f"data: {path}: expected one data set, found {names}: name it, data={{name: ..., root: ...}}")
    source, settings = found[0].source, found[0].settings
    own_rows = source in ("files", "imagefolder", "datasets")
    splits = user_tables.splits(path) if own_rows else {}
    if own_rows and not {"train", "test"} <= splits.keys():
        raise ValueError(f"data: {path}: expected files or folders for train and test, found "
                         f"{', '.join(splits) or 'neither'}: name the rows to report on with `test`")  # fmt: skip
    if not own_rows or any(len(paths) > 1 for paths in splits.values()):  # a split in several files has no one path
        source = "datasets" if own_rows else source
        if validation is not None:
            raise ValueError(f"validation: {path} is read by the source {source!r}, whose rows for it are named inside "
                             f"`data`: data={{name: {source}, root: {path}, ...}}")  # fmt: skip
        return {"name": source, "root": str(path), **settings}
    own = validation if validation is not None else next(iter(splits.get("validation", ())), None)
    return _files(splits["train"][0], splits["test"][0], own) | settings


def seconds_of(time: str | float | None) -> float | None:
    """Raises ValueError for another form, and for no time at all."""
    if time is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h)?\s*", str(time))
    seconds = float(match[1]) * {"s": 1, None: 1, "m": 60, "min": 60, "h": 3600}[match[2]] if match else time
    if isinstance(seconds, str) or not seconds > 0:
        raise ValueError(f"time: expected '20m', '90s', '2h' or seconds, more than none, found {time!r}")
    return seconds


def usual_space(recipe: Recipe) -> Space:
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


def searched(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Settings of the space's search of plans."""
    from trimtab.methods import METHODS

    own = METHODS[space.search].Settings.__dataclass_fields__
    return {"search_steps": max(10, recipe.training.steps // 4)} if "search_steps" in own else {}


# --- the folder -------------------------------------------------------------------------------------------------------


def take(folder: Path, recipe: Recipe, space: Space, limits: Sequence[Limit], trials: int) -> None:
    """Take a folder for a search: a new one, or one of the same recipe, space, rows and weights; what was tried there
    under another budget is known under this one too.

    Raises:
        OtherSearch: if it holds another one.
        ValueError: if something else is there, the task cannot use the rows, there are too few, or those for validation
            are the training rows.
    """
    asked = {"recipe": recipe.to_dict(), "space": asdict(space), "budget": [str(x) for x in limits], "trials": trials}
    asked = json.loads(json.dumps(asked))
    file = folder / "asked.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if not before and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is there already and holds no search; name a new folder")
    _check_same(folder, before, asked, ("recipe", "space"))
    parts = assemble(recipe)
    asked |= {"rows": _rows(recipe, parts), "weights": parts.fit.base["fingerprint"]}
    _check_same(folder, before, asked, ("rows", "weights"))
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as partial:
        partial.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _check_same(folder: Path, before: Mapping[str, Any], asked: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if key in before and before[key] != asked[key]:
            other = "on other rows" if key == "rows" else f"with {'other' if key == 'weights' else 'another'} {key}"
            raise OtherSearch(f"{folder}: holds a search {other}: name another folder, or remove this one")


def _rows(recipe: Recipe, parts: Assembly) -> dict[str, str]:
    """Read the rows as a trial does, before anything is counted; a hash of those of each split."""
    train, validation, test = tables(recipe, parts)
    warn_if_same(validation, test, "test")
    for table in (train, test):
        parts.task.check(parts.model.backbone, table)
    each = {"train": train, "validation": validation, "test": test}
    found = {name: table_print(encoded(table)) for name, table in each.items()}
    if found["validation"] == found["train"]:
        raise ValueError(
            "data: validation rows are the training rows, by which candidates would be chosen for what they learned by "
            "heart: name others inside `data` (validation), or, of files, a share of the training rows (held_out)"
        )
    return found
