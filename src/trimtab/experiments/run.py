"""A run: what a recipe leaves behind, as a folder of plain files, and the way back from it to a model.

recipe.yaml           resolved: nothing in it depends on anything outside
run.json              name, variant, seed, git state, versions, time; written last: a folder without it is not a run
metrics.json          test metrics and the training curve
costs.json            see trimtab.experiments.estimate
methods.json          what each method found (a plan, say)
policy.json           what the recipe's policy came to, if it has one
weights.safetensors   the learned part only: trained parameters, masks
samples/              predictions on a few test rows, with pictures
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import set_seed

from trimtab import backbones
from trimtab.anatomy import Anatomy
from trimtab.backbones.base import check_safetensors
from trimtab.data.images import decode, encoded, readable
from trimtab.data.sources import SOURCES
from trimtab.experiments import training
from trimtab.experiments.policy import Resolved, Rule, apply
from trimtab.experiments.recipe import Recipe, RecipeError, TrainingSpec, build, expand
from trimtab.files import cache_dir, replace_file
from trimtab.methods import METHODS, Method
from trimtab.registry import unknown
from trimtab.storage.learned import copy_learned, fingerprint, learned_part
from trimtab.tasks import TASKS, Task, TaskModel

FORMAT = 1
log = logging.getLogger(__name__)


class RunError(ValueError):
    """A run folder that cannot be used; the message names the file, what was expected and what was found."""


@dataclass
class Assembly:
    """A recipe's parts, built: model with task, data source, methods (not yet attached)."""

    model: TaskModel
    source: Any
    task: Task
    methods: list[Method]
    trains: bool = True
    policy: tuple[Rule, ...] = ()
    resolved: Resolved | None = None

    @property
    def plain(self) -> nn.Module:
        """The plain model that methods change."""
        return self.model.backbone.model

    def attach(self) -> Anatomy:
        """Freeze the backbone, then attach the methods in order; returns the anatomy that remains."""
        self.model.backbone.requires_grad_(False)
        anatomy = self.model.backbone.anatomy
        for method in self.methods:
            anatomy = method.attach(self.plain, anatomy)
        self.settle()
        return anatomy

    def settle(self) -> None:
        """Let the policy decide what is trained, when all methods are attached.

        A recipe of 0 steps trains nothing, its head neither: nothing of it is counted or stored as learned.
        """
        if self.policy:
            try:
                self.resolved = apply(self.policy, self.model, self.model.backbone.anatomy, "backbone.model")
            except ValueError as error:
                raise RecipeError(str(error)) from error
        if not self.trains:
            self.model.requires_grad_(False)

    def detach_learned(self) -> dict[str, Tensor]:
        """What must be stored to get this model back: trained tensors, buffers beside them, methods' tensors."""
        out = learned_part(self.model)
        for i, method in enumerate(self.methods):
            out |= {f"methods.{i}.{k}": v.contiguous() for k, v in method.tensors.items()}
        return out


def assemble(recipe: Recipe) -> Assembly:
    """Build what a recipe names, seeded by it.

    Raises:
        RecipeError: if a name or setting is wrong, or parts do not fit each other.
    """
    set_seed(recipe.seed)
    where = f"recipe {recipe.name}"
    try:
        source = _named(SOURCES, recipe.data, f"{where}: data")
        task = _task(recipe.task, source, f"{where}: task")
        methods = [_method(entry, f"{where}: methods.{i}") for i, entry in enumerate(recipe.methods)]
        spec = recipe.backbone
        backbone = backbones.load(spec.name, spec.pretrained, spec.tokenizer, **spec.settings)
        _check_reading(task, methods, backbone, where)
    except (ValueError, FileNotFoundError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error
    if spec.attention:
        backbone.set_attention(spec.attention)
    if spec.max_text is not None:
        backbone.limit_text(spec.max_text)
    if spec.start_from:
        backbone.start_from(backbones.load(spec.start_from))
    rules = tuple(build(Rule, rule, f"{where}: policy.{i}") for i, rule in enumerate(recipe.policy))
    return Assembly(TaskModel(backbone, task), source, task, methods, recipe.training.steps > 0, rules)


def check(recipe: Recipe) -> None:
    """Raise a RecipeError for a wrong name or setting anywhere in a recipe, without building a model."""
    where = f"recipe {recipe.name}"
    try:
        source = _named(SOURCES, recipe.data, f"{where}: data")
        _task(recipe.task, source, f"{where}: task")
        for i, entry in enumerate(recipe.methods):
            _method(entry, f"{where}: methods.{i}")
        for name in filter(None, (recipe.backbone.name, recipe.backbone.start_from)):
            known = [*backbones.BACKBONES, *backbones.ARCHITECTURES]
            if name not in known and not Path(name).exists():
                raise ValueError(f"{unknown('backbone', name, known)}; nor is there a folder or file of that name")
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error


def _method(entry: dict[str, Any], where: str) -> Method:
    cls = METHODS[entry["name"]]
    settings = {k: v for k, v in entry.items() if k != "name"}
    checked = build(cls.Settings, settings, f"{where} ({cls.name})")
    return cls(**{k: getattr(checked, k) for k in settings})


def _check_reading(task: Task, methods: list[Method], backbone: backbones.Backbone, where: str) -> None:
    """Raise a RecipeError if a method would let words see those that follow, which the task asks for, or leaves out
    tokens that it reads."""
    masked = any(tower.causal for tower in backbone.anatomy.towers)  # then what stands beside it is masked too
    for i, method in enumerate(methods):
        if task.causal and method.mixes_tokens and not masked:
            raise RecipeError(
                f"{where}: methods.{i}: {method.name!r} lets every word see every other, so that "
                f"{task.name!r} would be asked for words that it sees; choose a method that works inside the model, "
                "such as lora or full"
            )
        if method.one_token and not task.first_token:
            raise RecipeError(
                f"{where}: methods.{i}: {method.name!r} hands on the first token alone, and task {task.name!r} "
                "reads others: use `tokens: all`"
            )


def _named(registry: Any, entry: dict[str, Any], where: str) -> Any:
    return build(registry[entry["name"]], {k: v for k, v in entry.items() if k != "name"}, where)


def _task(entry: dict[str, Any], source: Any, where: str) -> Task:
    cls = TASKS[entry["name"]]
    values = {k: v for k, v in entry.items() if k != "name"}
    if entry["name"] == "vqa":
        values.setdefault("answers", list(source.answers()))
    return build(cls, values, where)


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
    import yaml

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            f"{folder}: a run is the work of one process, found WORLD_SIZE={os.environ['WORLD_SIZE']} in the "
            "environment: start it without `accelerate launch` or torchrun. `trimtab.prune` shares its calibration "
            "among processes"
        )
    started = time.time()
    gc.collect()  # an earlier run's model lives on in cycles of hooks until it is collected
    parts = assemble(recipe)
    model, spec = parts.model, recipe.training
    train, validation, test = tables(recipe, parts)
    for table in (train, test):
        parts.task.check(model.backbone, table)
    print_ = fingerprint(model.backbone.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    label = f"{recipe.name} {recipe.variant}"
    session = training.TrainingSession(model, train, validation, spec, recipe.seed, label, folder)
    model.backbone.requires_grad_(False)
    anatomy = model.backbone.anatomy
    for method in parts.methods:
        session.anatomy = anatomy
        method.prepare(session)
        anatomy = method.attach(parts.plain, anatomy)
    parts.settle()
    callbacks = [c for m in parts.methods for c in m.callbacks()]
    set_seed(recipe.seed)
    checkpoints = folder / "checkpoints"
    rates = None
    if parts.resolved is not None:
        rates = parts.resolved.rates
        print(f"{label}: what is trained\n{parts.resolved.table()}")
    learner, cache = _from_cache(parts, train, spec, recipe.seed) if spec.cache else (model, None)
    history = training.fit(
        learner, train, spec, recipe.seed, callbacks, label, checkpoints=checkpoints, rates=rates, cache=cache
    )
    for method in parts.methods:
        method.finish(parts.plain)
    metrics, records = training.evaluate(model, test, spec.evaluation_batch)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    _write(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    tensors = parts.detach_learned()
    with replace_file(folder / "weights.safetensors") as partial:
        save_file(tensors, partial)
    _write_json(folder / "methods.json", [{"name": m.name, "state": m.state} for m in parts.methods])
    if parts.resolved is not None:
        _write_json(folder / "policy.json", parts.resolved.to_json())
    for method in parts.methods:
        if "skip" in method.state:
            _write_json(folder / "plan.json", method.state)
    result = {"primary": parts.task.primary, "chance": parts.task.chance(test), "test": metrics, "history": history}
    _write_json(folder / "metrics.json", result)
    if measure_costs and recipe.costs:
        from trimtab.experiments import estimate as cost

        costs = cost.measure(parts, cost.dense(recipe), spec.batch_size, folder / "weights.safetensors")
        _write_json(folder / "costs.json", costs)
    _gallery(parts.task, records, test, folder / "samples")
    for scratch in (checkpoints, folder / "search"):
        shutil.rmtree(scratch, ignore_errors=True)
    info = {
        "format": FORMAT, "status": "finished", "name": recipe.name, "variant": recipe.variant, "seed": recipe.seed,
        "recipe_title": recipe.title, "task": recipe.task["name"], "data": _data_label(recipe.data),
        "backbone": recipe.backbone.name, "fingerprint": print_, "git": _git(), "versions": _versions(),
        "started": datetime.fromtimestamp(started, timezone.utc).isoformat(),
        "seconds": round(time.time() - started, 2),
        "command": " ".join(["trimtab", *sys.argv[1:]]),
    }  # fmt: skip
    _write_json(folder / "run.json", info)
    return folder


def _from_cache(parts: Assembly, train: Any, spec: TrainingSpec, seed: int) -> tuple[Any, Any]:
    """A model that trains from the activation cache, which is filled; RecipeError if the recipe does not allow it."""
    from trimtab.experiments import cached

    method = parts.methods[0] if len(parts.methods) == 1 else None
    if not getattr(method, "cacheable", False) or spec.cache is None:
        raise RecipeError("training.cache: only the side networks of `methods: [unipt]` train from a cache")
    try:
        how = (spec.cache, spec.cache_views, seed, spec.augmentation)
        key = cached.cache_key(parts.model, method, train, *how)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_dir() / "activations" / name
        cache = cached.TableCache(parts.model, method, train, folder, *how)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    cache.fill()
    return cached.CachedModel(parts.model, method), cache


def tables(recipe: Recipe, parts: Assembly) -> tuple[Any, Any, Any]:
    """Train, validation and test tables, without undecodable images if the recipe says so."""
    found = []
    for split in ("train", "validation", "test"):
        table = parts.source.load(recipe.task["name"], split)
        skip = parts.source.skip_bad_images
        found.append(readable(table, f"{recipe.data['name']} {split}") if skip else table)
    return found[0], found[1], found[2]


def is_finished(folder: Path, recipe: Recipe | None = None) -> bool:
    """Whether a folder holds a whole run (of that recipe, if one is given)."""
    try:
        done = json.loads((folder / "run.json").read_text())["status"] == "finished"
        return done and (recipe is None or load_recipe(folder) == recipe)
    except (OSError, ValueError, KeyError):
        return False


def load_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    import yaml

    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    name, variant = raw.pop("name"), raw.pop("variant")
    return expand({**raw, "variants": {variant: {}}}, name, where=str(folder / "recipe.yaml"))[0]


def load(folder: str | Path) -> TaskModel:
    """The trained model of a run, ready to answer: see `TaskModel.predict` and `trimtab.experiments.training.evaluate`.

    Raises:
        RunError: if the folder is no finished run, its weights are truncated, or they do not fit the backbone.
    """
    return _loaded(Path(folder)).model.eval()


def _loaded(folder: Path) -> Assembly:
    if not is_finished(folder):
        raise RunError(f"{folder}: not a finished run (no run.json that says so); run its recipe again")
    info = json.loads((folder / "run.json").read_text())
    if info["format"] != FORMAT:
        raise RunError(f"{folder / 'run.json'}: format {info['format']}, this version reads {FORMAT}")
    file = folder / "weights.safetensors"
    try:
        check_safetensors(file)
    except ValueError as error:
        raise RunError(str(error)) from error
    recipe = load_recipe(folder)
    parts = assemble(recipe)
    found = fingerprint(parts.model.backbone.model)
    if found != info["fingerprint"]:
        raise RunError(
            f"{folder}: its weights were learned on a backbone {recipe.backbone.name!r} with fingerprint "
            f"{info['fingerprint']}, the one here has {found}: another version or another checkpoint"
        )
    tensors = load_file(file)
    states = json.loads((folder / "methods.json").read_text())
    for i, (method, stored) in enumerate(zip(parts.methods, states, strict=True)):
        prefix = f"methods.{i}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        method.load_state(stored["state"], own)
    parts.attach()
    load_learned(parts.model, {k: v for k, v in tensors.items() if not k.startswith("methods.")}, file)
    for method in parts.methods:
        method.finish(parts.plain)
    return parts


def export(folder: str | Path, out: str | Path, dtype: str = "float32", sparse: bool = False) -> Path:
    """Write the backbone of a run as a transformers folder, which `trimtab.load` reads too.

    What methods added is folded into the weights: LoRA's updates are merged, and of a pruned model every zero stays.

    Args:
        folder: the run.
        out: a folder that is not there yet.
        dtype: `float32`, `float16` or `bfloat16`.
        sparse: in trimtab's sparse layout (docs/sparse.md) instead of transformers' own.

    Raises:
        RunError: if the run cannot be loaded, a method of it added modules that do not fold, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise RunError(f"{out}: is there already; name a new folder")
    if not is_finished(folder):
        raise RunError(f"{folder}: not a finished run (no run.json that says so); name a run folder")
    for i, entry in enumerate(load_recipe(folder).methods):
        if why := _method(entry, f"methods.{i}").keeps:
            raise RunError(f"{folder}: {entry['name']} cannot be exported as a transformers folder: {why}")
    parts = _loaded(folder)
    for method in reversed(parts.methods):
        method.fold(parts.plain)
    parts.model.task.fold(parts.model.backbone, parts.model.head)
    parts.model.backbone.save_pretrained(out, getattr(torch, dtype), sparse=sparse)
    return out


def load_learned(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy stored tensors into a model; RunError unless they are exactly its learned part, shape by shape."""
    try:
        copy_learned(model, tensors, str(where))
    except ValueError as error:
        raise RunError(str(error)) from error


def _gallery(task: Task, records: list[dict[str, Any]], table: Any, folder: Path, count: int = 8) -> None:
    rows = encoded(table)
    indices = list(range(min(count, len(records))))
    entries = task.gallery(records, rows, indices)
    if not entries or len(records) != len(rows):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, entry in zip(indices, entries, strict=True):
        entry["image"] = f"{i}.png"
        decode(rows[i]["image"]).convert("RGB").save(folder / entry["image"])
    _write_json(folder / "samples.json", entries)


def _write(path: Path, text: str) -> None:
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _data_label(data: dict[str, Any]) -> str:
    return ":".join(str(data[k]) for k in ("name", "style", "split") if k in data)


def _git() -> dict[str, Any]:
    """Commit and whether the tree is changed, of the repository that holds this package, if it is in one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _versions() -> dict[str, str]:
    names = ("trimtab", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")
    out = {"python": sys.version.split()[0], "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
