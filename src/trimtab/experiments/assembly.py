"""A recipe's parts, built and put together: model with task, data source, methods on the handle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from trimtab import backbones
from trimtab.anatomy import Anatomy
from trimtab.data.assumed import Assumed
from trimtab.data.images import readable
from trimtab.data.sources import SOURCES
from trimtab.experiments.policy import Resolved, Rule, apply
from trimtab.experiments.recipe import build
from trimtab.experiments.schema import BackboneSpec, Recipe, RecipeError
from trimtab.experiments.watching import check_services
from trimtab.methods import METHODS, Method, Session
from trimtab.methods.adapted import Adapted, adapt
from trimtab.methods.costs import without_gradient
from trimtab.methods.modes import note_idle
from trimtab.methods.stack import refusal
from trimtab.randomness import drawn_aside
from trimtab.registry import unknown
from trimtab.tasks import TASKS, Task, TaskModel
from trimtab.tasks.base import Batch


@dataclass
class Assembly:
    """A recipe's parts.

    Attributes:
        model: the model with its task.
        source: of the data.
        task: what is asked.
        methods: in order, as the recipe names them; attached once `fit` holds them.
        trains: whether the recipe trains anything at all.
        policy: rules for what is trained.
        resolved: what the rules came to.
        assumes: what is assumed of a backbone and of data that are not there, a sentence each.
        fit: the handle on the plain model.
    """

    model: TaskModel
    source: Any
    task: Task
    methods: list[Method]
    trains: bool = True
    policy: tuple[Rule, ...] = ()
    resolved: Resolved | None = None
    assumes: list[str] = field(default_factory=list)
    fit: Adapted = field(init=False)

    def __post_init__(self) -> None:
        backbone = self.model.backbone
        self.fit = adapt(backbone.model, anatomy=backbone.anatomy, with_task=self.model)

    @property
    def plain(self) -> nn.Module:
        """The plain model that methods change."""
        return self.model.backbone.model

    def attach(self, restored: bool = True) -> Anatomy:
        """Freeze the backbone, then attach the methods, which have found what they need (or assume it); returns the
        anatomy that remains."""
        self.freeze()
        for method in self.methods:
            self.fit.attach(method, restored)
        self.settle()
        return self.fit.anatomy

    def pull(self, session: Session) -> None:
        """As `attach`, but let each method find what it needs in a session's data."""
        self.freeze()
        for method in self.methods:
            self.fit.pull(method, session)
        with drawn_aside():  # a task draws wordings
            batch = next(session.batches("train"))
        self.settle(batch)

    def freeze(self) -> None:
        """Leave it to methods and policy what of the backbone is trained.

        The base is looked at here, before anything is trained: what a policy alone trains differs from it later, and so
        is stored.
        """
        self.model.backbone.requires_grad_(False)
        _ = self.fit.base

    def settle(self, batch: Batch | None = None) -> None:
        """Let the policy decide what is trained, when all methods are attached; freeze what no loss reaches.

        A recipe of 0 steps trains nothing, its head neither: nothing of it is counted or stored as learned.

        Args:
            batch: on which it is seen what the loss reaches; None: one of random inputs.
        """
        self.decide()
        if not self.trains:
            return
        was, place = self.model.training, next(self.model.parameters()).device
        self.model.train()
        with drawn_aside(), torch.enable_grad():
            inputs = self.model.example(4) if batch is None else batch
            loss = self.model(**{k: v.to(place) for k, v in inputs.items()})["loss"]
        self.leave(without_gradient(self.model, loss))
        self.model.train(was)

    def decide(self) -> None:
        """Let the policy decide what is trained; nothing is, if the recipe trains nothing."""
        if self.policy:
            try:
                self.resolved = apply(self.policy, self.model, self.model.backbone.anatomy, "backbone.model")
            except ValueError as error:
                raise RecipeError(str(error)) from error
        if not self.trains:
            self.model.requires_grad_(False)

    def leave(self, idle: Sequence[str]) -> None:
        """Freeze what no loss reaches.

        Args:
            idle: names of parameters that are called trained but get no gradient.

        Raises:
            RecipeError: if nothing else is trained.
        """
        if all(n in idle for n, p in self.model.named_parameters() if p.requires_grad):
            named = ", ".join(m.name for m in self.methods) or "none"
            raise RecipeError(
                f"nothing is left to train: the methods ({named}) train no part of the backbone that the loss of task "
                f"{self.task.name!r} reaches, and the task has no head of its own that is trained: choose a method "
                "that does, such as lora, or set training.steps to 0"
            )
        own = dict(self.model.named_parameters())
        for name in idle:
            own[name].requires_grad_(False)
        note_idle(self.fit.model, [own[name] for name in idle])
        if self.resolved is not None:
            self.resolved = self.resolved.without(idle, own)


def assemble(recipe: Recipe, blind: bool = False) -> Assembly:
    """Build what a recipe names, seeded by it.

    Args:
        recipe: what to build.
        blind: for sizes alone: where the data are not there, numbers that are known stand for what they would tell.

    Raises:
        RecipeError: if a name or setting is wrong, or parts do not fit each other.
    """
    set_seed(recipe.seed)
    where = f"recipe {recipe.name}"
    spec = recipe.backbone
    if not blind:
        _check_there(spec, where)
    try:
        source = _named(SOURCES, recipe.data, f"{where}: data")
        told = Assumed(source)
        task = _task(recipe.task, told if blind else source, f"{where}: task")
        methods = [method_of(entry, f"{where}: methods.{i}") for i, entry in enumerate(recipe.methods)]
        kind = task.kinds[0] if len(task.kinds) == 1 else None
        backbone = backbones.load(spec.name, spec.pretrained, spec.tokenizer, spec.pictures, kind, **spec.settings)
        backbone.anatomy = task.reached(backbone.anatomy)
        _check_reading(task, methods, backbone, where)
        for i, method in enumerate(methods):
            if why := refusal(methods[:i], method, backbone.anatomy):
                raise RecipeError(f"{where}: methods.{i}: {why}")
    except (ValueError, FileNotFoundError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error
    if spec.attention:
        backbone.set_attention(spec.attention)
    if spec.max_text is not None:
        backbone.limit_text(spec.max_text)
    if spec.start_from:
        backbone.start_from(backbones.load(spec.start_from))
    if recipe.training.gradient_checkpointing:
        _checkpoint(backbone, where)
    rules = tuple(build(Rule, rule, f"{where}: policy.{i}") for i, rule in enumerate(recipe.policy))
    parts = Assembly(TaskModel(backbone, task), source, task, methods, recipe.training.steps > 0, rules)
    parts.assumes = [*filter(None, [backbones.assumed(spec.name)]), *told.notes]
    return parts


def _checkpoint(backbone: backbones.Backbone, where: str) -> None:
    """Switch gradient checkpointing on; RecipeError if the model has none."""
    model: Any = backbone.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            f"{where}: training.gradient_checkpointing: expected a model of transformers that has it, "
            f"{type(model).__name__} of {backbone.name!r} has none: leave it out, and lower training.batch_size with "
            "training.accumulate instead"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})


def check(recipe: Recipe) -> None:
    """Raise a RecipeError for a wrong name or setting anywhere in a recipe, without building a model, or an ImportError
    for a service of `training.report_to` that is not installed.
    """
    where = f"recipe {recipe.name}"
    _check_there(recipe.backbone, where)
    try:
        source = _named(SOURCES, recipe.data, f"{where}: data")
        _task(recipe.task, source, f"{where}: task")
        for i, entry in enumerate(recipe.methods):
            method_of(entry, f"{where}: methods.{i}")
        for name in filter(None, (recipe.backbone.name, recipe.backbone.start_from)):
            known = [*backbones.BACKBONES, *backbones.ARCHITECTURES]
            if name not in known and not Path(name).exists():
                raise ValueError(f"{unknown('backbone', name, known)}; nor is there a folder or file of that name")
        check_services(recipe.training.report_to)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: {error}") from error


def _check_there(spec: BackboneSpec, where: str) -> None:
    """Raise a RecipeError if a backbone is a name that is only counted, without weights or without its tokenizer."""
    if not backbones.is_architecture(spec.name):
        return
    if spec.pretrained or backbones.only_counted(spec.name):
        lacks = "weights" if spec.pretrained else "its own tokenizer"
        raise RecipeError(
            f"{where}: backbone.name: expected a checkpoint file or a folder, found the name of an architecture, "
            f"{spec.name!r}, without {lacks}, which `trimtab cost` counts: give the path, backbone.name=PATH"
            + (", or take random weights, backbone.pretrained=false" if not backbones.only_counted(spec.name) else "")
        )


def method_of(entry: dict[str, Any], where: str) -> Method:
    try:
        return METHODS.make(entry["name"], **{k: v for k, v in entry.items() if k != "name"})
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


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
    return build(cls, cls.settings_from(source, {k: v for k, v in entry.items() if k != "name"}), where)


def tables(recipe: Recipe, parts: Assembly) -> tuple[Any, Any, Any]:
    """Train, validation and test tables, without undecodable images if the recipe says so."""
    found = []
    for split in ("train", "validation", "test"):
        table = parts.source.load(parts.task.schema or recipe.task["name"], split)
        drop = parts.source.drop_bad_images
        found.append(readable(table, f"{recipe.data['name']} {split}") if drop else table)
    return found[0], found[1], found[2]
