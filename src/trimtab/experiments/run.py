"""Carrying out a recipe: prepare and attach its methods, train, evaluate, count, write the run's folder."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from trimtab import progress
from trimtab.data.identity import firsts, warn_if_same
from trimtab.data.images import encoded
from trimtab.data.streams import Streamed
from trimtab.experiments import cached, estimate, failures, many, sharded, training
from trimtab.experiments import folder as files
from trimtab.experiments.assembly import Assembly, assemble, tables
from trimtab.experiments.collation import table_print, tensors_print
from trimtab.experiments.folder import write, write_json
from trimtab.experiments.plateau import Judge
from trimtab.experiments.schema import Recipe, RecipeError, TrainingSpec
from trimtab.experiments.watching import check_services, logged
from trimtab.methods.saved import WEIGHTS
from trimtab.metrics.intervals import interval
from trimtab.precision import half_of
from trimtab.tasks.base import TaskModel

Watch = Callable[[TaskModel, Any], TrainerCallback]
"""Is given the model with its task, methods attached, and the validation rows; gives a callback of the training."""


def run(recipe: Recipe, folder: Path, measure_costs: bool = True, watch: Watch | None = None) -> Path:
    """Carry out a recipe and write its run folder.

    An interrupted run leaves no run.json and is done again, from its last checkpoint if `training.save_every` is set.

    Args:
        recipe: one resolved recipe.
        folder: the run folder.
        measure_costs: False, like `costs: false` in the recipe, writes no costs.json.
        watch: for who wants to look at the model before and while it trains; an exception of it ends the run.

    Returns:
        The folder.

    Raises:
        RecipeError: if the recipe's parts do not fit each other.
        ValueError: if the task cannot train on the training rows, or cannot score the test rows.
        ImportError: if a service of `training.report_to` is not installed.
        RunError: if it is one of several processes that did not meet; BusyError if another process is at this run.
    """
    recipe.to_yaml()  # what cannot be written is told before training
    many.join()
    check_services(recipe.training.report_to)
    if recipe.training.steps:
        many.part(recipe.training.batch_size)
        sharded.check(recipe.training)
    begun = any((folder / scratch).is_dir() for scratch in ("checkpoints", "search"))
    alone = files.claimed(folder) if many.started() == 1 else nullcontext()
    with alone, logged(folder, fresh=not begun and (folder / "run.json").is_file()):
        return _run(recipe, folder, measure_costs, watch)


def _run(recipe: Recipe, folder: Path, measure_costs: bool, watch: Watch | None) -> Path:
    started = time.time()
    gc.collect()  # an earlier run's model lives on in cycles of hooks until it is collected
    with many.one_by_one():
        parts = assemble(recipe)
        train, validation, test = tables(recipe, parts)
    for table in (train, test):
        parts.task.check(parts.model.backbone, table)
    parts.task.check_test(test)
    judge = _judge(parts, validation, recipe.training)
    if judge is not None and (recipe.training.schedule == "plateau" or recipe.training.load_best_model_at_end):
        warn_if_same(validation, train, "training")
        warn_if_same(validation, test, "test")
    if watch is not None:
        parts.task.check_scored(validation)  # by whose score a search chooses
    progress.tell({"event": "start", "name": recipe.name, "variant": recipe.variant, "seed": recipe.seed})
    label = f"{recipe.name} {recipe.variant}"
    with failures.enough_memory(recipe):
        parts.model.to("cuda" if torch.cuda.is_available() else "cpu")
        session = training.TrainingSession(parts.model, train, validation, recipe.training, recipe.seed, label, folder)
        parts.pull(session)
        for method, found in _settled(parts).items():
            print(f"{label}: {method} was calibrated on {found['batches']} batches, masks of two halves differ by "
                  f"{found['distance']:.2%} of the kept weights (until {found['until']:.2%})")  # fmt: skip
        callbacks = [] if watch is None else [watch(parts.model, validation)]
        history = _train(parts, train, recipe, label, folder, callbacks, judge)
    if judge is not None:
        print(f"{label}: {judge.sentence()}")
    waited = [entry.pop("waiting") for entry in history]
    waiting = sum(waited) / len(waited) if waited else None
    if waiting is not None:
        more = "; more `training.workers` read ahead" if waiting > 0.05 else ""
        print(f"{label}: waited for data in {waiting:.1%} of the training time{more}")
    with failures.enough_memory(recipe):
        metrics, records = training.evaluate(parts.model, test, recipe.training.evaluation_batch)
    progress.tell({"event": "evaluated", "metrics": metrics})
    result: dict[str, Any] = {"primary": parts.task.primary, "chance": parts.task.chance(test), "test": metrics,
              "steps": recipe.training.steps if judge is None else judge.steps, "history": history,
              **({} if judge is None else {"validation": judge.told()})}  # fmt: skip
    credits = _credits(records, metrics[parts.task.primary])
    told = {"metric": parts.task.primary, "table": table_print(encoded(test)), "credits": credits}
    pictures = _pictures(test, credits)
    if len(set(pictures)) < len(pictures):
        told["pictures"] = pictures
    if given := [(credit, place) for credit, place in zip(credits, pictures, strict=True) if credit is not None]:
        result["interval"] = interval(*zip(*given, strict=True))
    if many.is_first():
        _write(recipe, parts, folder, result, measure_costs)
        write_json(folder / "rows.json", told)
        files.write_gallery(parts.task, records, test, folder / "samples")
        for scratch in (folder / "checkpoints", folder / "search"):
            shutil.rmtree(scratch, ignore_errors=True)
        settled = {"calibration": found} if (found := _settled(parts)) else {}
        write_json(folder / "run.json", {**_info(recipe, parts, started), "waiting": waiting, **settled})
    many.wait()
    return folder


def _credits(records: list[dict[str, Any]], score: float) -> list[float | None]:
    """What each test row gives to the primary metric; None of rows that count for nothing. Empty where a task does not
    tell, or tells what does not add up to the metric, which is no reason to lose a run."""
    credits = [record.get("credit") for record in records]
    given = [credit for credit in credits if credit is not None]
    if not given:
        return []
    if not abs(fmean(given) - score) <= 1e-4 * max(1.0, abs(score)):  # not a number is no mean either
        warnings.warn(f"the task's `credit` of rows has the mean {fmean(given)}, its primary metric is {score}: there "
                      "is no interval", stacklevel=2)  # fmt: skip
        return []
    return credits


def _pictures(test: Any, credits: list[float | None]) -> list[int]:
    """Of each test row the first one with the same picture: intervals draw them together. Itself where nobody tells."""
    return firsts(test) if hasattr(test, "data") and len(test) == len(credits) else list(range(len(credits)))


def _settled(parts: Assembly) -> dict[str, Any]:
    """Of pruners with `until`: how many batches they took, and how far from settled they are."""
    return {m.name: m.state["calibration"] for m in parts.methods if "calibration" in m.state}


def _write(recipe: Recipe, parts: Assembly, folder: Path, result: dict[str, Any], measure_costs: bool) -> None:
    """The run's folder but for the gallery, and for run.json, which says that it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "costs.json", "policy.json", "rows.json"):  # of a run before
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "samples", ignore_errors=True)
    write(folder / "recipe.yaml", recipe.to_yaml())
    parts.fit.write(folder)
    if parts.resolved is not None:
        write_json(folder / "policy.json", parts.resolved.to_json())
    write_json(folder / "metrics.json", result)
    if measure_costs and recipe.costs:
        dense = estimate.dense(recipe)
        write_json(folder / "costs.json", estimate.measure(parts, dense, recipe.training, folder / WEIGHTS))


def _train(parts: Assembly, train: Any, recipe: Recipe, label: str, folder: Path,
           callbacks: list[TrainerCallback], judge: Judge | None) -> list[dict[str, float]]:  # fmt: skip
    """Train what the methods, the policy and the task leave to be trained; the logged history."""
    set_seed(recipe.seed)
    rates = None
    if parts.resolved is not None:
        rates = parts.resolved.rates
        print(f"{label}: what is trained\n{parts.resolved.table()}")
    spec = recipe.training
    learner, cache, own = parts.model, None, parts.fit.callbacks()
    if spec.cache:
        learner, cache, own = _from_cache(parts, train, spec, label)
    callbacks = [*own, *callbacks]
    return training.fit(learner, train, spec, recipe.seed, callbacks, label, checkpoints=folder / "checkpoints",
                        rates=rates, cache=cache, reports=folder, judge=judge,
                        made_of=_made_of(recipe, parts))  # fmt: skip


def _made_of(recipe: Recipe, parts: Assembly) -> dict[str, Any]:
    """Of a recipe what decides which function is trained, for checkpoints; of masks and plans that it names what is in
    their files today."""
    told = recipe.to_dict()
    given = [(m.name, m.state.get("skip"), tensors_print(sorted(m.tensors.items()))) for m in parts.methods
             if any(getattr(getattr(m, "settings", None), k, None) is not None for k in ("masks", "plan"))]  # fmt: skip
    kept = ("backbone", "task", "data", "methods", "policy")
    return {"base": parts.fit.base, "given": given, **{k: told.get(k) for k in kept}}


def _judge(parts: Assembly, validation: Any, spec: TrainingSpec) -> Judge | None:
    """Who evaluates while the recipe trains; None if nobody does.

    Raises:
        RecipeError: if there are no validation rows.
        ValueError: if the task cannot score them.
    """
    if spec.evaluate_every is None or not spec.steps:
        return None
    if not len(validation):
        raise RecipeError("training.evaluate_every: evaluates on the validation rows, found none: give "
                          "`data.validation` some, or leave it out (and with it `schedule: plateau`)")  # fmt: skip
    parts.task.check(parts.model.backbone, validation)
    parts.task.check_scored(validation)

    def measure() -> dict[str, float]:
        return training.evaluate(parts.model, validation, spec.evaluation_batch)[0]

    return Judge(spec, measure, parts.task.primary, validation)


def _print_of(recipe: Recipe) -> str:
    """A hash of a recipe but for its seed and title: what runs of several seeds have in common."""
    told = {k: v for k, v in recipe.to_dict().items() if k not in ("seed", "title")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _info(recipe: Recipe, parts: Assembly, started: float) -> dict[str, Any]:
    """What run.json tells."""
    return {
        "format": files.FORMAT, "status": "finished", "name": recipe.name, "variant": recipe.variant,
        "seed": recipe.seed, "recipe": _print_of(recipe), "recipe_title": recipe.title, "task": recipe.task["name"],
        "data": files.data_label(recipe.data), "backbone": recipe.backbone.name,
        "fingerprint": parts.fit.base["fingerprint"], "git": files.git_state(), "versions": files.versions(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(),
        "seconds": round(time.time() - started, 2), "processes": many.started(),
        "command": " ".join(["trimtab", *sys.argv[1:]]),
    }  # fmt: skip


def _from_cache(parts: Assembly, train: Any, spec: TrainingSpec, label: str) -> tuple[Any, Any, list[TrainerCallback]]:
    """A model that trains from the activation cache, which is filled, and the methods' callbacks for it; RecipeError if
    the recipe does not allow it."""

    assert spec.cache is not None
    if isinstance(train, Streamed):
        raise RecipeError("training.cache: a cache reads its table often and in any order, a stream cannot: leave out "
                          "data.stream, or the cache")  # fmt: skip
    try:
        # Drawn alike whatever the recipe's seed: its seeds share a cache; their order and what starts random differ.
        cache = cached.TableCache(parts.model, parts.methods, train, None, spec.cache, spec.cache_views, 0,
                                  spec.augmentation or None, half_of(spec.precision))  # fmt: skip
    except ValueError as error:
        raise RecipeError(str(error)) from error
    held, blocks = cache.held
    print(f"{label}: cache: {held} of {blocks} blocks need not run; {cache.told()}")
    cache.fill()  # several processes divide it
    many.wait()
    return cached.CachedModel(cache), cache, [cached.OfWhole(parts.fit.callbacks(), parts.model)]
