"""What goes wrong in training, said with what to do about it: a loss that is no number, and too little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.experiments.folder import RunError
from trimtab.experiments.schema import Recipe
from trimtab.processes import world
from trimtab.report.runs import BYTES
from trimtab.report.tables import amount


def check_finite(logs: Mapping[str, float], step: int, model: nn.Module, batch: Mapping[str, Tensor],
                 mixed: AbstractContextManager[Any], precision: str) -> None:  # fmt: skip
    """Raise a RunError that names the first broken module or parameter if the logged loss is no finite number.

    Args:
        logs: what is logged.
        step: of the optimiser.
        model: as it is trained, not wrapped.
        batch: the last one.
        mixed: the context of its forward pass, in which it is repeated to find the place.
        precision: of the forward pass, for the message.
    """
    loss = float(logs.get("loss", 0.0))
    if math.isfinite(loss):
        return
    where = broken_parameter(model) or broken_module(model, batch, mixed) or "no module on the last batch alone"
    ways = "lower training.learning_rate, or lengthen training.warmup"
    if precision == "fp16":
        ways = f"set training.precision to bf16 or fp32 (fp16 ends at 65,504), or {ways}"
    elif precision != "fp32":
        ways = f"set training.precision to fp32, or {ways}"
    raise RunError(f"the training loss is {loss} at step {step} in {precision}: what is not finite is {where}: {ways}")


def broken_parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            return f"the parameter '{name}' itself"
    return None


@torch.no_grad()
def broken_module(model: nn.Module, batch: Mapping[str, Tensor], mixed: AbstractContextManager[Any]) -> str | None:
    """The first module whose output is not finite, in the order of computation."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def look(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            if not found and any(not bool(t.isfinite().all()) for t in _tensors(out)):
                found.append(f"the output of '{name or type(module).__name__}' ({type(module).__name__})")

        handles.append(module.register_forward_hook(look))
    try:
        with mixed:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


@contextmanager
def enough_memory(recipe: Recipe) -> Iterator[None]:
    """Say of an out-of-memory error what a run takes, by `trimtab cost`, and which settings lower it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _of_memory(error):
            raise
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise RunError(
            f"{recipe.name} {recipe.variant}: out of memory ({said}). {_numbers(recipe)} Lower it by: "
            f"{'; '.join(_ways(recipe))}"
        ) from error


def _of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


def _numbers(recipe: Recipe) -> str:
    """What `trimtab cost` says, computed without memory for values."""
    cost = _cost(recipe)
    if isinstance(cost, Exception):
        return f"`trimtab cost` does not know what it takes ({cost})."
    size = world()[1]
    shared = f", of which each of {size} processes has its part" if size > 1 else ""
    return (
        f"By `trimtab cost`, a training step on {recipe.training.batch_size} rows takes {_peak(cost)}, "
        f"{amount(cost['saved_activation_bytes'], BYTES)} of them saved for the backward pass{shared}."
    )


def _cost(recipe: Recipe) -> dict[str, Any] | Exception:
    from trimtab.experiments.estimate import estimate

    try:
        return estimate(recipe)
    except Exception as error:  # the advice must come whatever the estimate meets
        return error


def _peak(cost: dict[str, Any]) -> str:
    return amount(cost["training_peak_bytes"], BYTES)


def _ways(recipe: Recipe) -> list[str]:
    """What lowers it, with what a step then takes where `trimtab cost` knows it."""
    spec = recipe.training

    now = _cost(recipe)

    def then(**changes: Any) -> str:
        cost = _cost(replace(recipe, training=replace(spec, **changes)))
        if isinstance(now, Exception) or isinstance(cost, Exception):
            return ""
        return f" ({_peak(cost)})" if cost["training_peak_bytes"] < now["training_peak_bytes"] else ""

    half = max(1, spec.batch_size // 2)
    ways = []
    if spec.batch_size > 1:
        ways.append(
            f"training.batch_size {half}{then(batch_size=half)} with training.accumulate {2 * spec.accumulate} (losses "
            "that compare rows then see fewer)"
        )
    if spec.precision == "fp32":
        ways.append("training.precision bf16, in which most of what is saved takes half")
    if not spec.gradient_checkpointing and (told := then(gradient_checkpointing=True)):
        ways.append(f"training.gradient_checkpointing true{told}")
    if spec.cache is None:
        ways.append("training.cache fp16 with `methods: [unipt]` or [linear-probe], which then never run the backbone "
                    "in training")  # fmt: skip
    ways.append(f"training.evaluation_batch below {spec.evaluation_batch} if it ended in evaluation")
    return ways
