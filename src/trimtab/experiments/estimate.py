"""What a model with its methods costs, before and after paying it.

params, trainable_params       numbers; what is called trained gets a gradient
nonzero_params, dense_params   those that no mask makes zero, with the methods; all of them, without
macs, dense_macs               multiply-adds of one forward pass of one sample, with and without the methods; one
                               multiply-add is 1 MAC (torch counts 2 FLOPs); matrix products, convolutions, attention
saved_activation_bytes         what autograd keeps for backward in one training batch, in the precision of the weights
                               whatever the training's, each storage once, without parameters and buffers
checkpoint_bytes               the learned part as safetensors
training_peak_bytes            estimated before: weights, gradients, AdamW's two moments and whatever else lives at the
                               worst moment of one training step, from the sizes of tensors; no kernel's workspace
peak_memory_bytes              of one training step, in the training's precision: CUDA's peak, or without a GPU the
                               growth of the resident set
latency_ms                     one sample, one forward pass in the precision of the weights: median, and the 10th and
                               90th percentile
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy
from trimtab.counting import count_macs, latency, peak_memory, safetensors_size, saved_bytes, training_step
from trimtab.experiments.assembly import Assembly, assemble, method_of
from trimtab.experiments.schema import Recipe, RecipeError, TrainingSpec
from trimtab.methods import Session
from trimtab.precision import half_of
from trimtab.sizes import sizes_only
from trimtab.tasks.base import TaskModel

MOST_REAL = 2 * 10**9
"""Bytes of random weights on which costs are counted where sizes do not tell them."""


def measure(parts: Assembly, whole: dict[str, int], spec: TrainingSpec, weights: Path) -> dict[str, Any]:
    """All costs of an assembled, attached model.

    Args:
        parts: attached.
        whole: what `dense` gives.
        spec: of its training: the batch size, and the precision in which a step's memory is measured.
        weights: the file of its learned part.
    """
    model = parts.model
    device, half = next(model.parameters()).device, half_of(spec.precision)
    one, batch = ({k: v.to(device) for k, v in model.example(n).items()} for n in (parts.task.least, spec.batch_size))
    model.train()

    def step() -> None:
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = model(**batch)["loss"]
        if loss.requires_grad:
            loss.backward()
        model.zero_grad(set_to_none=True)

    saved = saved_bytes(lambda: model(**batch)["loss"], model)
    costs = {
        **_counts(parts, one),
        "saved_activation_bytes": saved,
        "batch_size": spec.batch_size,
        **whole,
        "checkpoint_bytes": weights.stat().st_size,
        "peak_memory_bytes": peak_memory(step),
    }
    model.eval()
    costs["latency_ms"] = {name: ms / parts.task.least for name, ms in latency(lambda: model(**one)).items()}
    return costs


def _counts(parts: Assembly, one: dict[str, Tensor], macs: int | None = None) -> dict[str, Any]:
    """Numbers and multiply-adds; `macs` where they are known."""
    model = parts.model
    if macs is None:
        model.eval()
        macs = count_macs(lambda: model(**one)) // parts.task.least
    model.train()
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    return {
        "params": total,
        "nonzero_params": total - sum(m.state["prunable"] - m.state["kept"] for m in parts.fit.levers("prune")),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "macs": macs,
    }


def dense(recipe: Recipe, blind: bool = False) -> dict[str, int]:
    """Multiply-adds (`dense_macs`) and parameters (`dense_params`) of a recipe's model before any method changes it;
    `blind` as in `assemble`."""
    bare = replace(recipe, methods=(), backbone=replace(recipe.backbone, pretrained=False, start_from=None))
    key = json.dumps([asdict(bare.backbone), bare.task, bare.data])
    if key not in _DENSE:  # every variant of a recipe asks for the same figure
        parts = assemble(bare, blind)
        parts.model.eval()
        one = parts.model.example(parts.task.least)
        macs = count_macs(lambda: parts.model(**one)) // parts.task.least
        _DENSE[key] = {"dense_macs": macs, "dense_params": sum(p.numel() for p in parts.model.parameters())}
    return _DENSE[key]


_DENSE: dict[str, dict[str, int]] = {}


def estimate(recipe: Recipe) -> dict[str, Any]:
    """The costs that need no data and no weights: random weights, and fake tensors where the model allows them.

    Plans and masks that only data could give are assumed: DAS skips the last k blocks, or as many of the last as its
    budget takes; a pruner keeps its share. Where a head's size depends on data that are not there, the published number
    of answers or classes is taken, or the one that `data.count` states.

    Returns:
        `params`, `nonzero_params`, `dense_params`, `trainable_params`, `macs`, `dense_macs`, `checkpoint_bytes`, and
        for the recipe's batch size, which is in `batch_size`, `saved_activation_bytes` and `training_peak_bytes`;
        `assumes`, what was assumed of a backbone and of data that are not there, a sentence each.

    Raises:
        RecipeError: if a name or setting is wrong, parts do not fit, nothing says how many answers or classes there
            are, or a model's weights would have to be made for real and are too large for that.
    """
    blind = replace(recipe, backbone=replace(recipe.backbone, pretrained=False, start_from=None))
    try:
        with sizes_only():
            return _estimate(blind)
    except RuntimeError as error:
        # A model that looks at its weights while it runs, or a budget of latency, cannot work on fake tensors: count on
        # real random weights, if they are few. An error of another cause comes again there.
        _refuse_large(blind, error)
        return _estimate(blind)


def _refuse_large(recipe: Recipe, error: RuntimeError) -> None:
    """Raise a RecipeError if random weights of a recipe's model would take more than `MOST_REAL` bytes."""
    with sizes_only():
        parts = assemble(replace(recipe, methods=(), policy=()), blind=True)
        size = sum(p.nbytes for p in parts.model.parameters())
    if size > MOST_REAL:
        raise RecipeError(
            f"recipe {recipe.name}: its costs cannot be counted from sizes alone ({error}), and its weights would take "
            f"{size / 1e9:.1f} GB: leave out what needs values (a budget of latency; write it in macs or params), or "
            "count an adapted model of yours with `fit.cost(batch)`"
        ) from error


class _Blind:
    """The part of a `Session` that needs no data."""

    folder = None

    def __init__(self, model: TaskModel, anatomy: Anatomy, seed: int):
        self.with_task, self.anatomy, self.seed = model, anatomy, seed

    @property
    def plain(self) -> nn.Module:
        return self.with_task.backbone.model

    def plain_in(self, model: Any) -> nn.Module:
        return model.backbone.model

    def example(self) -> dict[str, Tensor]:
        device = next(self.with_task.parameters()).device
        return {k: v.to(device) for k, v in self.with_task.example(self.with_task.task.least).items()}


def _estimate(recipe: Recipe) -> dict[str, Any]:
    """See `estimate`; methods that cost the same are counted once (`Method.costs_as`)."""
    methods: list[Any] = [method_of(entry, f"methods.{i}") for i, entry in enumerate(recipe.methods)]
    alike = [m.costs_as() for m in methods] if all(m.lever != "skip" for m in methods) else recipe.methods
    key = json.dumps([asdict(recipe.backbone), recipe.task, recipe.data, alike, recipe.policy, recipe.seed,
                      recipe.training.batch_size, recipe.training.gradient_checkpointing, recipe.training.steps > 0],
                     default=str)  # fmt: skip
    if key not in _COUNTED:
        _COUNTED[key] = _counted(recipe)
    costs, prunable = _COUNTED[key]
    zeros = sum(m.zeros(n) for m, n in zip((m for m in methods if m.lever == "prune"), prunable, strict=True))
    return costs if alike is recipe.methods else {**costs, "nonzero_params": costs["params"] - zeros}


_COUNTED: dict[str, tuple[dict[str, Any], list[int]]] = {}


def _counted(recipe: Recipe) -> tuple[dict[str, Any], list[int]]:
    """The costs of a recipe, and how many weights each of its pruners may prune."""
    whole = dense(recipe, blind=True)
    parts = assemble(recipe, blind=True)
    parts.model.backbone.requires_grad_(False)
    session = cast("Session", _Blind(parts.model, parts.fit.anatomy, recipe.seed))
    for method in parts.methods:
        session.anatomy = parts.fit.anatomy
        method.assume(parts.plain, session.anatomy, session)
        parts.fit.attach(method, restored=True)
    parts.decide()
    batch = parts.model.example(recipe.training.batch_size)
    parts.model.train()
    step = training_step(lambda: parts.model(**batch)["loss"], parts.model)
    if parts.trains:
        parts.leave(step.idle)
    if parts.trains and step.idle:
        parts.model.train()
        step = training_step(lambda: parts.model(**batch)["loss"], parts.model)
    costs = {
        **_counts(parts, parts.model.example(parts.task.least), None if parts.methods else whole["dense_macs"]),
        "saved_activation_bytes": step.saved,
        "batch_size": recipe.training.batch_size,
        "training_peak_bytes": step.peak,
        **whole,
        "checkpoint_bytes": safetensors_size(parts.fit.stored()),
        "assumes": parts.assumes,
    }
    return costs, [m.state["prunable"] for m in parts.fit.levers("prune")]
