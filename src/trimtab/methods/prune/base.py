"""Pruning = score, allocate, act: three small functions, and the one loop over calibration data that they share.

    score(weight, statistics) -> (out, in)     how much each weight matters
    allocate(...) -> sparsity a tensor         how much each tensor gives
    act -> masks                               the smallest scores of each tensor go; zeros are kept while training

A pruner is a row in `PRUNERS`: a score, an allocation and whether it needs calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tap, Weight, read
from trimtab.bits import pack, unpack
from trimtab.methods.base import Method, Session

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class PruneSettings:
    """Settings of every pruner."""

    sparsity: float = 0.63
    """Share of the prunable weights that become zero, in [0, 1)."""
    batches: int = 32
    """Calibration batches, for pruners that need them (the paper: 3000 batches of 32)."""
    batch_size: int = 32
    """Rows a calibration batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), found {self.sparsity}")
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches and batch_size must be at least 1, found {self.batches} and {self.batch_size}")


Statistics = dict[str, Tensor]  # weight path -> per-input-channel statistic, (in,)
Score = Callable[[Tensor, Tensor | None], Tensor]  # weight (out, in), statistic (in,) -> scores (out, in)
Allocation = Callable[[dict[Weight, Tensor], float], dict[Weight, float]]  # weights, sparsity -> sparsity a tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask that is False at the `count` smallest scores (and at all that equal the largest of these)."""
    if count < 1:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.flatten().kthvalue(count).values


def prune_masks(weights: dict[Weight, Tensor], statistics: Statistics, score: Score, allocate: Allocation,
                sparsity: float) -> dict[str, Tensor]:  # fmt: skip
    """Masks (True = kept) by weight path: in every tensor the allocated share with the smallest scores goes."""
    shares = allocate(weights, sparsity)
    masks = {}
    for weight, tensor in weights.items():
        scores = score(tensor, statistics.get(weight.path))
        masks[weight.path] = smallest(scores, int(shares[weight] * scores.numel()))
    return masks


class InputNorms:
    """Mean squared input of every linear layer, summed in forward hooks: O(width) memory a layer, nothing a batch.

    a_j = (sum over batches and tokens of x_j^2) / (number of samples), as MULTIFLOW's code counts it: the divisor is
    the number of images or captions, not of tokens. Padding tokens are left out when the input has the mask's length.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, weights: Iterable[Weight]):
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, int] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.handles = []
        for tower in anatomy.towers:
            if tower.mask is not None:
                keep = lambda mask, name=tower.name: self.masks.__setitem__(name, mask)  # noqa: E731
                self.handles.append(read(model, tower.mask, keep))
        self.tower_of = {w.path: tower.name for w in weights if (tower := anatomy.owner(w.module))}
        for weight in weights:
            add = lambda x, path=weight.path: self._add(path, x)  # noqa: E731
            self.handles.append(read(model, Tap(weight.module, "input", 0), add))

    def _add(self, path: str, x: Tensor) -> None:
        mask = self.masks.get(self.tower_of[path])
        samples = len(x)
        x = x.detach()
        if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
            x = x[mask.bool()]
        total = x.reshape(-1, x.shape[-1]).float().square().sum(dim=0)
        self.sums[path] = self.sums[path] + total if path in self.sums else total
        self.samples[path] = self.samples.get(path, 0) + samples

    def result(self) -> Statistics:
        """Statistics by weight path; the hooks are gone afterwards.

        Raises:
            ValueError: if a layer was never called during calibration.
        """
        for handle in self.handles:
            handle.remove()
        silent = sorted(self.tower_of.keys() - self.sums.keys())
        if silent:
            raise ValueError(f"calibration never reached {len(silent)} linear layers, first '{silent[0]}'")
        return {path: total / self.samples[path] for path, total in self.sums.items()}


class Pruner(Method):
    """The lever that every pruner shares: masks found once, applied to the weights, and kept while training."""

    lever = "prune"
    Settings = PruneSettings
    score: Score
    allocate: Allocation
    needs_statistics = False

    def prepare(self, session: Session) -> None:
        model, anatomy = session.subject, session.anatomy
        weights = {w: _tensor(model, w).detach() for w in anatomy.weights(model)}
        statistics: Statistics = {}
        if self.needs_statistics:
            statistics = self._calibrate(session, list(weights))
        kind = type(self)
        masks = prune_masks(weights, statistics, kind.score, kind.allocate, self.settings.sparsity)
        self.tensors = {path: pack(mask) for path, mask in masks.items()}
        kept = sum(int(m.sum()) for m in masks.values())
        total = sum(m.numel() for m in masks.values())
        self.state = {"prunable": total, "kept": kept, "sparsity": 1 - kept / max(total, 1)}

    def assume(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Masks that keep everything, of the size of real ones: zeros change no cost but the number of non-zeros."""
        weights = {w: _tensor(model, w) for w in anatomy.weights(model)}
        total = sum(t.numel() for t in weights.values())
        self.tensors = {w.path: pack(torch.ones(t.shape, dtype=torch.bool)) for w, t in weights.items()}
        self.state = {"prunable": total, "kept": total - int(total * self.settings.sparsity)}

    def _calibrate(self, session: Session, weights: list[Weight]) -> Statistics:
        was = session.model.training
        session.model.eval()
        norms = InputNorms(session.subject, session.anatomy, weights)
        with torch.no_grad():
            for _, batch in zip(range(self.settings.batches), session.batches("train", self.settings.batch_size),
                                strict=False):  # fmt: skip
                session.model(**batch)
        session.model.train(was)
        return norms.result()

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        self.masked: list[tuple[nn.Parameter, Tensor]] = []
        for weight in anatomy.weights(model):
            packed = self.tensors.get(weight.path)
            if packed is None:
                continue
            parameter = _tensor(model, weight)
            mask = unpack(packed, parameter.shape).to(parameter.device)
            self.masked.append((parameter, mask))
        self._apply()
        return anatomy

    @torch.no_grad()
    def _apply(self) -> None:
        for parameter, mask in self.masked:
            parameter.mul_(mask)

    def callbacks(self) -> list[TrainerCallback]:
        return [_keep_zeros(self)]

    def finish(self, model: nn.Module) -> None:
        self._apply()


def _keep_zeros(pruner: Pruner) -> Any:
    """A callback that zeroes gradients of pruned weights before a step, and the weights after it.

    The first keeps the optimiser's moments clean, the second undoes weight decay and moments from before.
    """
    from transformers import TrainerCallback

    class KeepZeros(TrainerCallback):
        @torch.no_grad()
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for parameter, mask in pruner.masked:
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)

        def on_optimizer_step(self, args, state, control, **kwargs):
            pruner._apply()

    return KeepZeros()


def _tensor(model: nn.Module, weight: Weight) -> nn.Parameter:
    return getattr(model.get_submodule(weight.module), weight.parameter)
