"""Carrying out a recipe: prepare and attach its methods, train, evaluate, count, write the run's folder."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from trimtab.experiments import estimate, training
from trimtab.experiments import folder as files
from trimtab.experiments.assembly import Assembly, assemble, tables
from trimtab.experiments.folder import RunError, write, write_json
from trimtab.experiments.schema import Recipe, RecipeError, TrainingSpec
from trimtab.files import cache_dir
from trimtab.methods.saved import WEIGHTS
from trimtab.precision import native_bf16


def run(recipe: Recipe, folder: Path, measure_costs: bool = True) -> Path:
    """Carry out a recipe and write its run folder.

    An interrupted run leaves no run.json and is done again, from its last checkpoint if `training.save_every` is set.

    Args:
        recipe: one resolved recipe.
        folder: the run folder.
        measure_costs: False, like `costs: false` in the recipe, writes no costs.json.

    Returns:
        The folder.

    Raises:
        RecipeError: if the recipe's parts do not fit each other.
        RunError: if it was started as one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            f"{folder}: a run is the work of one process, found WORLD_SIZE={os.environ['WORLD_SIZE']} in the "
            "environment: start it without `accelerate launch` or torchrun. `trimtab.prune` shares its calibration "
            "among processes"
        )
    started = time.time()
    gc.collect()  # an earlier run's model lives on in cycles of hooks until it is collected
    parts = assemble(recipe)
    train, validation, test = tables(recipe, parts)
    for table in (train, test):
        parts.task.check(parts.model.backbone, table)
    parts.model.to("cuda" if torch.cuda.is_available() else "cpu")
    label = f"{recipe.name} {recipe.variant}"
    parts.pull(training.TrainingSession(parts.model, train, validation, recipe.training, recipe.seed, label, folder))
    for method in parts.methods:
        if found := method.state.get("calibration"):
            print(f"{label}: {method.name} was calibrated on {found['batches']} batches, masks of two halves differ by "
                  f"{found['distance']:.2%} of the kept weights (until {found['until']:.2%})")  # fmt: skip
    history = _train(parts, train, recipe, label, folder / "checkpoints")
    waited = [entry.pop("waiting") for entry in history]
    waiting = sum(waited) / len(waited) if waited else None
    if waiting is not None:
        more = "; `training.workers` reads ahead" if waiting > 0.05 and not recipe.training.workers else ""
        print(f"{label}: waited for data in {waiting:.1%} of the training time{more}")
    metrics, records = training.evaluate(parts.model, test, recipe.training.evaluation_batch)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    write(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    parts.fit.write(folder)
    if parts.resolved is not None:
        write_json(folder / "policy.json", parts.resolved.to_json())
    result = {"primary": parts.task.primary, "chance": parts.task.chance(test), "test": metrics, "history": history}
    write_json(folder / "metrics.json", result)
    if measure_costs and recipe.costs:
        dense = estimate.dense(recipe)
        write_json(folder / "costs.json", estimate.measure(parts, dense, recipe.training.batch_size, folder / WEIGHTS))
    files.write_gallery(parts.task, records, test, folder / "samples")
    for scratch in (folder / "checkpoints", folder / "search"):
        shutil.rmtree(scratch, ignore_errors=True)
    settled = {m.name: m.state["calibration"] for m in parts.methods if "calibration" in m.state}
    told = {"calibration": settled} if settled else {}
    write_json(folder / "run.json", {**_info(recipe, parts, started), "waiting": waiting, **told})
    return folder


def _train(parts: Assembly, train: Any, recipe: Recipe, label: str, checkpoints: Path) -> list[dict[str, float]]:
    """Train what the methods, the policy and the task leave to be trained; the logged history."""
    set_seed(recipe.seed)
    rates = None
    if parts.resolved is not None:
        rates = parts.resolved.rates
        print(f"{label}: what is trained\n{parts.resolved.table()}")
    spec = recipe.training
    learner, cache = _from_cache(parts, train, spec, recipe.seed) if spec.cache else (parts.model, None)
    return training.fit(learner, train, spec, recipe.seed, parts.fit.callbacks(), label, checkpoints=checkpoints,
                        rates=rates, cache=cache)  # fmt: skip


def _info(recipe: Recipe, parts: Assembly, started: float) -> dict[str, Any]:
    """What run.json tells."""
    return {
        "format": files.FORMAT, "status": "finished", "name": recipe.name, "variant": recipe.variant,
        "seed": recipe.seed, "recipe_title": recipe.title, "task": recipe.task["name"],
        "data": files.data_label(recipe.data), "backbone": recipe.backbone.name,
        "fingerprint": parts.fit.base["fingerprint"], "git": files.git_state(), "versions": files.versions(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(),
        "seconds": round(time.time() - started, 2), "command": " ".join(["trimtab", *sys.argv[1:]]),
    }  # fmt: skip


def _from_cache(parts: Assembly, train: Any, spec: TrainingSpec, seed: int) -> tuple[Any, Any]:
    """A model that trains from the activation cache, which is filled; RecipeError if the recipe does not allow it."""
    from trimtab.experiments import cached

    found = [m for m in parts.methods if m.trains != "nothing"]
    method: Any = found[0] if found else None
    if len(found) > 1 or not getattr(method, "cacheable", method is None) or spec.cache is None:
        raise RecipeError("training.cache: only the side networks of `methods: [unipt]` and heads by themselves, "
                          "`methods: [linear-probe]`, train from a cache")  # fmt: skip
    try:
        bf16 = spec.precision == "bf16" or (spec.precision == "auto" and native_bf16())
        # Drawn alike whatever the recipe's seed: its seeds share a cache; their order and what starts random differ.
        how = (spec.cache, spec.cache_views, 0, spec.augmentation or None, bf16)
        key = cached.cache_key(parts.model, method, train, *how)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_dir() / "activations" / name
        cache = cached.TableCache(parts.model, method, train, folder, *how)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    cache.fill()
    return cached.CachedModel(parts.model, method), cache
