"""Training with the weights divided among processes: torch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

    between steps      each process holds its part of every weight, gradient and moment of AdamW
    while a block runs all its weights are there, gathered for it, and then dropped again
    after training     the plain model is back, whole in every process

A block of each tower is a unit, what stands outside of them (embeddings, side networks, heads) another. Accelerate's
FSDP plugin does the same on GPUs alone and leaves the model wrapped; here masks, plans and folders go on with the plain
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trimtab.experiments.schema import RecipeError, TrainingSpec
from trimtab.processes import world

HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
         "_load_state_dict_post_hooks")  # fmt: skip


def check(spec: TrainingSpec) -> None:
    """RecipeError if a recipe asks for more than a sharded training can do."""
    if spec.shard and spec.save_every:
        raise RecipeError("training.shard: such a training writes no checkpoints: leave out training.save_every")
    if spec.shard and spec.evaluate_every:
        raise RecipeError("training.shard: a divided model is evaluated when it is whole again: leave out "
                          "training.evaluate_every, and take another schedule than plateau")  # fmt: skip
    if spec.shard and spec.cache:
        raise RecipeError("training.shard: training from a cache never runs the backbone: leave out one of the two")
    if spec.shard and spec.precision == "fp16":
        raise RecipeError(
            "training.shard: fp16 scales losses in each process by itself: set training.precision to bf16"
        )


@contextmanager
def sharded(model: Any, spec: TrainingSpec) -> Iterator[None]:
    """While this is open, a `TaskModel` is divided among several processes, if the recipe asks for it.

    Raises:
        RecipeError: if weights of one block are those of another too, or of different types.
    """
    if not spec.shard or world()[1] == 1:
        yield
        return
    units = [*_blocks(model), model]
    before = [({h: getattr(m, h).copy() for h in HOOKS}, m.__class__) for m in units]
    places = [(owner, name, owner._parameters[name]) for owner in model.modules() for name in owner._parameters]
    shapes = {id(p): p.shape for _, _, p in places if p is not None}
    for parameter in {id(p): p for _, _, p in places if p is not None and not p.ndim}.values():
        parameter.data = parameter.data.view(1)  # scalars cannot be divided; one number computes as they do
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world()[1],))
    try:
        for unit in units:
            fully_shard(unit, mesh=mesh)
        for parameter in {id(p): p for _, _, p in places if p is not None}.values():
            parameter.data = parameter.data.new_empty(0)  # the parts are copies; the whole comes back at the end
    except (ValueError, AssertionError, RuntimeError) as error:
        raise RecipeError(
            f"training.shard: this model cannot be divided by blocks ({error}): set it to false"
        ) from error
    yield  # after an error parts stay parts: processes that fail at different places could not gather them
    _whole_again(units, before, places, shapes)


def _blocks(model: Any) -> list[nn.Module]:
    """The blocks of all towers that hold weights, each once, inner ones first."""
    plain = model.backbone.model
    found: dict[int, nn.Module] = {}
    for tower in model.backbone.anatomy.towers:
        for block in tower.blocks:
            module = plain.get_submodule(block.path)
            stands_in = type(module) is not module.__class__  # for a skipped block: it is small, and looks like another
            if next(module.parameters(), None) is not None and not stands_in:
                found[id(module)] = module
    return list(found.values())


@torch.no_grad()
def _whole_again(units: list[nn.Module], before: list[Any], places: list[tuple[nn.Module, str, Any]],
                 shapes: dict[int, torch.Size]) -> None:  # fmt: skip
    """The plain modules with their own parameters, whose values are those of all parts; in step in all processes."""
    values: dict[int, Tensor] = {}
    for owner, name, parameter in places:
        if parameter is not None and id(parameter) not in values:
            values[id(parameter)] = owner._parameters[name].full_tensor()  # type: ignore[union-attr]
    for unit, (hooks, kind) in zip(units, before, strict=True):
        for name, kept in hooks.items():
            getattr(unit, name).clear()
            getattr(unit, name).update(kept)
        unit.__class__ = kind
    for owner, name, parameter in places:
        if parameter is not None:
            parameter.data = values[id(parameter)].view(shapes[id(parameter)])
            parameter.grad = None
            owner._parameters[name] = parameter
