"""Every lever on a model, each on a fresh copy, with the checks that must hold after it.

A lever that fails a check raises `Wrong`; what trimtab itself raises is left alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trimtab
from tests.models import checks
from tests.models.checks import Facts, equal, finite, run, same, step, without_gradient
from trimtab.anatomy import Anatomy, arguments
from trimtab.anatomy.structure import plain_parameters, under

Batch = dict[str, Any]


class Wrong(Exception):
    """A check does not hold; the text says which."""


@dataclass
class Case:
    """A tiny model with inputs; every lever gets a fresh copy."""

    family: str
    model: Any
    batch: Batch
    facts: Facts

    @classmethod
    def of(cls, family: str, model: Any, batch: Batch) -> Case:
        return cls(family, model, batch, Facts.of(copy.deepcopy(model), batch))  # some keep what they computed

    def fresh(self) -> Any:
        """A copy that knows which parameters were its own."""
        model = copy.deepcopy(self.model)
        model.census_names = {n for n, _ in model.named_parameters()}
        return model

    def adapt(self, model: nn.Module, folder: Path | None = None) -> Any:
        """The handle on a copy, shown the batch where `adapt` takes an example."""
        return trimtab.adapt(model, folder, **given(trimtab.adapt, example=self.batch))


def given(function: Callable, **values: Any) -> dict[str, Any]:
    """Those of the values that a function takes."""
    takes = inspect.signature(function).parameters
    return {k: v for k, v in values.items() if k in takes}


# --- the levers -------------------------------------------------------------------------------------------------------


def prune(case: Case, method: str = "multiflow") -> None:
    """Half of the prunable weights go, to within one a matrix (MULTIFLOW rounds the share of each, as published), and
    the outputs stay numbers."""
    model = case.fresh()
    fit = case.adapt(model)
    batches = [case.batch] if method == "multiflow" else None
    fit.prune(method, sparsity=0.5, batches=batches)
    total, kept = fit.masks.prunable, sum(int(m.sum()) for m in fit.masks.values())
    parameters = plain_parameters(model)
    zero = sum(int((parameters[path] == 0).sum()) for path in fit.masks)
    rounding = len(fit.masks) if method == "multiflow" else 1
    if abs(total - kept - total / 2) > rounding or zero != total - kept:
        raise Wrong(f"asked for {total // 2} zeros of {total}: {total - kept} in the masks, {zero} in the weights")
    after = run(model, case.batch)
    if not finite(after):
        raise Wrong("outputs are not numbers")
    if equal(after, case.facts.plain):
        raise Wrong("half of the weights are zero, and the outputs are as before")


def magnitude(case: Case) -> None:
    """The same by the size of the weights alone."""
    prune(case, "omp")


def middle(model: Any, anatomy: Anatomy, among: set[str] | None = None) -> str:
    """Path of a middle block of the largest tower."""

    def size(tower: Any) -> int:
        return sum(p.numel() for b in tower.blocks for p in model.get_submodule(b.path).parameters())

    for tower in sorted(anatomy.towers, key=lambda t: (len(t.blocks) > 1, size(t)), reverse=True):
        if paths := [b.path for b in tower.blocks if among is None or b.path in among]:
            return paths[len(paths) // 2]
    raise ValueError("no tower has blocks")


def shorten(case: Case) -> None:
    """A block is taken out: the model computes as if it passed its stream on, and is the same when saved and loaded."""
    model = case.fresh()
    anatomy = anatomy_of(case, model)
    path = middle(model, anatomy)
    expected = bypassed(case, path, anatomy)
    try:
        trimtab.shorten(model, [path], **given(trimtab.shorten, example=case.batch))
    except ValueError:
        if not equal(run(model, case.batch), case.facts.plain):
            raise Wrong(f"without '{path}': refused, and the model is not as before") from None
        raise
    after = run(model, case.batch)
    # Not to the bit: loaded weights may lie elsewhere in memory, and be summed in another order.
    if not same(reloaded(model, case.batch), after, 1e-4) and equal(
        reloaded(case.fresh(), case.batch), case.facts.plain
    ):
        raise Wrong(f"without '{path}', saved and loaded: other outputs")
    if expected is not None and not same(run(model, case.batch, checks.OF_BLOCKS), expected):
        raise Wrong(f"without '{path}': other outputs than when it hands its stream on")
    if why := case.facts.broken(model, case.batch):
        raise Wrong(f"without '{path}': {why}")


def reloaded(model: Any, batch: Batch) -> list:
    """The outputs of a model that was saved and loaded in the way of its class."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return run(type(model).from_pretrained(folder), batch)


def bypassed(case: Case, path: str, anatomy: Anatomy) -> list | None:
    """The outputs when a block hands on its streams unchanged; None if it cannot be made to."""
    model = case.fresh()
    block = next(b for b in anatomy.blocks() if b.path == path)
    module = model.get_submodule(path)
    own, called = module.forward, []

    @functools.wraps(own)
    def hand_on(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        out = own(*args, **kwargs)
        stream = block.stream_of(module, args, kwargs)
        if isinstance(out, torch.Tensor):
            return stream
        named = arguments(module, args, kwargs)
        also = [named.get(name) for name in block.also]
        rest = [o if a is None else a for a, o in zip_longest(also[: len(out) - 1], out[1:])]
        return (stream, *rest)

    module.forward = hand_on  # no hook: those that collect hidden states may run before it
    try:
        out = run(model, case.batch, checks.OF_BLOCKS)
    except Exception:
        return None
    return out if called else None  # what stands in it may be called in its place


def anatomy_of(case: Case, model: Any) -> Anatomy:
    """A copy's anatomy, shown the batch where `Anatomy.of` takes an example."""
    return Anatomy.of(model, **given(Anatomy.of, example=case.batch))


def skip(case: Case) -> None:
    """A block is skipped and the rest get adapters: all that is trained gets a gradient and changes the outputs."""
    model = case.fresh()
    fit = case.adapt(model)
    candidates = {b.path for b in trimtab.METHODS.make("das", skip=1).candidates(fit.anatomy)}
    fit.skip(plan=[middle(model, fit.anatomy, candidates)])
    learns(case, model)
    holds(case, model, fit)


def tune(case: Case, method: str, near: float | None = None) -> None:
    """A tuning method: near the plain model at first, all that is trained gets a gradient and counts, saved and loaded.

    Args:
        case: the model.
        method: its name.
        near: how far the outputs may be from the plain model's before training, relative to them; None: anywhere.
    """
    model = case.fresh()
    fit = case.adapt(model)
    fit.tune(method)
    before = run(model, case.batch)
    if near is not None and not starts_near(case, model, before, near):
        raise Wrong("before training the outputs are not those of the plain model")
    if near is not None:
        reaches(fit, model)
    learns(case, model)
    holds(case, model, fit)


def starts_near(case: Case, model: nn.Module, before: list, near: float) -> bool:
    """Whether untrained additions change little: the outputs, or they would with additions of a hundredth, where a tiny
    model's choices (experts, small logits) make much of little."""
    if close(before, case.facts.plain, near):
        return True
    ends = [p for name, p in checks.trained(model) if near and name.endswith(("up.weight", "up.bias"))]
    kept = [p.detach().clone() for p in ends]
    with torch.no_grad():
        for p in ends:
            p.mul_(0.01)
        found = bool(ends) and close(run(model, case.batch), case.facts.plain, near / 10)
        for p, old in zip(ends, kept, strict=True):
            p.copy_(old)
    return found


def reaches(fit: Any, model: nn.Module) -> None:
    """No tower is left out without a word."""
    paths = [n for n, _ in checks.trained(model)]
    for tower in fit.anatomy.towers:
        if not any(under(p, tower.scope) for p in paths):
            raise Wrong(f"nothing is trained in tower {tower.name!r}")


def close(a: list, b: list, far: float) -> bool:
    """Whether outputs differ by no more than a share of their size."""
    if far == 0:
        return same(a, b, 1e-5)
    moved = sum(float((x - y).nan_to_num(0, 0, 0).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.nan_to_num(0, 0, 0).square().sum()) for y in b)
    return moved**0.5 <= far * size**0.5


def learns(case: Case, model: Any) -> None:
    """One step: every trained tensor gets a gradient, and the outputs move."""
    if not any(True for _ in checks.trained(model)):
        raise Wrong("nothing is trained")
    before = run(model, case.batch)
    start = {name: p.detach().clone() for name, p in checks.trained(model)}
    step(model, case.batch)  # what starts at zero hides others from the gradient
    idle = without_gradient(model, case.batch, case.facts)
    for seed in range(
        6
    ):  # a step may leave the few units of a tiny network without a positive input: elsewhere one has
        if not idle:
            break
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for _, parameter in checks.trained(model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        idle = [name for name in without_gradient(model, case.batch, case.facts) if name in idle]
    if idle:  # a step may take all tokens from an expert, which had some before
        moved = {name: p.detach().clone() for name, p in checks.trained(model)}
        put(model, start)
        idle = [name for name in without_gradient(model, case.batch, case.facts) if name in idle]
        put(model, moved)
    if idle := [name for name in idle if not beside_unreached(case, model, name)]:
        raise Wrong(f"{len(idle)} trained tensors get no gradient, first '{idle[0]}'")
    after = run(model, case.batch)
    if not finite(after):
        raise Wrong("outputs are not numbers")
    if equal(before, after):
        raise Wrong("what is trained does not change the outputs")


def put(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Set what is trained to these values."""
    with torch.no_grad():
        for name, parameter in checks.trained(model):
            parameter.copy_(values[name])


def beside_unreached(case: Case, model: Any, name: str) -> bool:
    """Whether a tensor stands in a side network of a tower that the batch never runs (a sound tower without sounds)."""
    parts = name.split(".")
    towers = {t.name: t for t in anatomy_of(case, case.model).towers}
    tower = towers.get(parts[1]) if len(parts) > 1 and parts[0] in ("unipt", "lst") else None
    return tower is not None and not any(under(n, tower.scope) for n in case.facts.reached)


def holds(case: Case, model: Any, fit: Any) -> None:
    """Rows, padding and causality are as in the plain model; saved and loaded, the outputs are the same."""
    if why := case.facts.broken(model, case.batch, writing=not any(m.changes == "beside" for m in fit.methods)):
        raise Wrong(why)
    loads_again(case, model, fit)


def loads_again(case: Case, model: Any, fit: Any) -> None:
    """Saved and loaded on a fresh copy, the outputs are the same."""
    after = run(model, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        fit.save(Path(folder) / "fit")
        again = case.fresh()
        case.adapt(again, Path(folder) / "fit")
        if not equal(run(again, case.batch), after):
            raise Wrong("saved and loaded: other outputs")


def save(case: Case) -> None:
    """Pruned and tuned with LoRA, or biases where LoRA has no place: saved and loaded, the outputs are the same."""
    model = case.fresh()
    fit = case.adapt(model)
    fit.prune("omp", sparsity=0.5)
    try:
        fit.tune("lora")
    except ValueError:
        fit.tune("bitfit")
    keep = fit.masks
    step(model, case.batch)
    keep.enforce(model)
    loads_again(case, model, fit)


LEVERS: dict[str, Callable[[Case], None]] = {
    "prune": prune,
    "magnitude": magnitude,
    "shorten": shorten,
    "skip": skip,
    "unipt": lambda case: tune(case, "unipt"),
    "lst": lambda case: tune(case, "lst"),
    "adapter": lambda case: tune(case, "adapter", 0.3),
    "lora": lambda case: tune(case, "lora", 0.0),
    "bitfit": lambda case: tune(case, "bitfit", 0.0),
    "save": save,
}
