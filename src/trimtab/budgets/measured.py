"""What a budget wants measured on this device: latency, the time of training, its memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from trimtab.budgets.limits import Base, BudgetError, Limit
from trimtab.budgets.prices import Costs
from trimtab.counting import latency, peak_memory
from trimtab.experiments.assembly import assemble
from trimtab.experiments.schema import Recipe, TrainingSpec
from trimtab.files import replace_file
from trimtab.precision import half_of
from trimtab.tasks.base import TaskModel


def measure(model: TaskModel, recipe: Recipe, keys: set[str]) -> Costs:
    """Measure an assembled model, which is left as it was.

    Args:
        keys: of the costs that are wanted: `latency_ms` of a sample, `training_seconds` of all steps, and
            `peak_memory_bytes` of a training step: all that is allocated on the GPU at the worst moment.
    """
    found: Costs = {}
    with _as_it_was(model):
        if "latency_ms" in keys:
            least = model.task.least
            one = _example(model, least)
            model.eval()
            found["latency_ms"] = latency(lambda: model(**one))["median"] / least
        if "training_seconds" in keys:
            passes = recipe.training.steps * recipe.training.accumulate  # an optimiser's step is counted with each
            found["training_seconds"] = passes * _step_seconds(model, recipe.training)
        if "peak_memory_bytes" in keys:
            batch = _example(model, recipe.training.batch_size)
            peak = peak_memory(lambda: _step(model, batch, recipe.training.precision))
            if peak is None:
                raise BudgetError(
                    "budget: measured memory: this system does not tell a process' peak; use 'train memory'"
                )
            found["peak_memory_bytes"] = peak
    return found


def measured_bases(recipe: Recipe, limits: Sequence[Limit], file: Path) -> dict[Base, Costs]:
    """What relative limits on measured axes are relative to; measured once and kept in a file, so that a search that
    goes on has the same limits.

    Args:
        recipe: without methods.

    Raises:
        BudgetError: if memory is to be measured without a GPU: what a process grows by depends on what it has freed.
    """
    if any(x.axis.key == "peak_memory_bytes" for x in limits) and not torch.cuda.is_available():
        raise BudgetError(
            "budget: measured memory: needs a GPU, and there is none: use 'train memory', which is counted"
        )
    wanted: dict[Base, set[str]] = {}
    for limit in limits:
        if limit.axis.measured and limit.value is None:
            wanted.setdefault(limit.base or limit.axis.base, set()).add(limit.axis.key)
    known: dict[Base, Costs] = json.loads(file.read_text()) if file.exists() else {}
    for base, keys in wanted.items():
        if keys <= known.get(base, {}).keys():
            continue
        methods = ({"name": "full"},) if base == "full" else ()
        parts = assemble(replace(recipe, methods=methods))
        parts.attach()
        parts.model.to("cuda" if torch.cuda.is_available() else "cpu")
        known[base] = known.get(base, {}) | measure(parts.model, recipe, keys - known.get(base, {}).keys())
    if wanted:
        with replace_file(file) as partial:
            partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known


@contextmanager
def _as_it_was(model: TaskModel) -> Iterator[None]:
    """Measuring leaves no gradients, and the mode and the buffers (running statistics) that there were."""
    was, buffers = model.training, {name: value.clone() for name, value in model.named_buffers()}
    try:
        yield
    finally:
        model.train(was)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])


def _example(model: TaskModel, rows: int) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in model.example(rows).items()}


def _step(model: TaskModel, batch: dict[str, torch.Tensor], precision: str) -> None:
    """One training step, in the precision in which it trains; its rate of 0 leaves the weights as they are."""
    model.train()
    trained, half = [p for p in model.parameters() if p.requires_grad], half_of(precision)
    with torch.autocast(next(model.parameters()).device.type, half, enabled=half is not None):
        loss = model(**batch)["loss"]
    if loss.requires_grad:
        loss.backward()
        torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0).step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _step_seconds(model: TaskModel, spec: TrainingSpec, repeats: int = 3) -> float:
    """Seconds of a training step: the median of a few, after one that does not count."""
    batch = _example(model, spec.batch_size)
    times: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        _step(model, batch, spec.precision)
        times.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    return sorted(times[1:])[repeats // 2]
