"""Masks: which weights stay. Selecting the smallest scores, packing masks into bits, keeping them on a model.

A mask is boolean, of its weight's shape, True = kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab import processes
from trimtab.files import replace_file
from trimtab.registry import unknown
from trimtab.storage.bits import pack, unpack

# --- selection --------------------------------------------------------------------------------------------------------

_SMALL = 1 << 14  # below it one call of kthvalue costs less than the passes of the radix selection
_CHUNK = 1 << 18  # elements looked at together: their keys fit into a core's cache
_DIGIT = 11


def kth_smallest(scores: Sequence[Tensor], count: int) -> Tensor:
    """The `count`-th smallest of all elements of several tensors, as a scalar tensor: exactly `kthvalue` of their
    concatenation, which is never made.

    Few elements are sorted out by `kthvalue`. Of many, the answer's bits are found from the highest down, eleven a pass
    (radix selection): a pass counts, among the elements that share the bits found so far, which digit comes next. The
    memory is that of one chunk, however many elements there are.

    Args:
        scores: floating point tensors of one type and any shapes, without NaN.
        count: from 1 to the number of elements.

    Raises:
        ValueError: if `count` lies outside that range.
    """
    total = sum(s.numel() for s in scores)
    if not 1 <= count <= total:
        raise ValueError(f"the {count}-th smallest of {total} scores was asked for: expected 1 to {total}")
    if total <= _SMALL:
        return torch.cat([s.flatten() for s in scores]).kthvalue(count).values
    bits = 64 if scores[0].dtype == torch.float64 else 32
    found = shift = 0
    for width in [_DIGIT] * (bits // _DIGIT) + [bits % _DIGIT]:
        above = bits - shift
        low = above - width
        counts = torch.zeros(1 << width, dtype=torch.long, device=scores[0].device)
        # The highest digit holds the sign: shifted up by half its range, it counts from 0 as the others do.
        offset = 1 << (width - 1) if shift == 0 else 0
        for key in _keys(scores):
            if shift:
                key = key[(key >> above) == found]
            digit = (key >> low) + offset if shift == 0 else (key >> low) & ((1 << width) - 1)
            counts += torch.bincount(digit, minlength=1 << width)
        ends = counts.cumsum(0)
        digit = int(torch.searchsorted(ends, count))
        count -= int(ends[digit] - counts[digit])
        found = digit - offset if shift == 0 else (found << width) | digit
        shift += width
    floating, integer = (torch.float64, torch.int64) if bits == 64 else (torch.float32, torch.int32)
    key = torch.tensor([found], dtype=integer, device=scores[0].device)
    return _ordered(key).view(floating)[0].to(scores[0].dtype)


def _keys(scores: Sequence[Tensor]) -> Iterator[Tensor]:
    """Chunks of the tensors as integers in the same order; halves become single precision, which changes no order."""
    for tensor in scores:
        for chunk in tensor.flatten().split(_CHUNK):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            yield _ordered(wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32))


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers of the same order, and back: negative floats count backwards."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mask that is False at the `count` smallest scores (and at all that equal the largest of these)."""
    if count < 1:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > kth_smallest([scores], count)


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask that is True at exactly `count` of the largest scores; of equal ones the first stay."""
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    order = scores.flatten().argsort(descending=True, stable=True)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def largest_of_each(scores: Tensor, group: int, kept: int) -> Tensor:
    """Mask (out, in) that is True at exactly `kept` of the largest scores in each `group` inputs that follow each
    other; of equal ones the first stay."""
    groups = scores.reshape(len(scores), -1, group)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(scores.shape)


# --- masks of a model -------------------------------------------------------------------------------------------------

_FORMAT = "trimtab masks 1"
VALUES = ".values"  # suffix of the tensor that holds a weight's kept values, where a method has changed them


class Masks(Mapping[str, Tensor]):
    """What a pruner found: a boolean mask for each weight's path, and the kept weights where the pruner changed them.

    `packed` is what a file of them holds: the masks as bits under the weights' paths, the changed values that are kept,
    in a row, under `PATH.values`.

    Attributes:
        masks: path of a parameter -> mask of its shape, True = kept.
        weights: path of a parameter -> its new values, zero where pruned; only of pruners that change what they keep.
    """

    def __init__(self, masks: dict[str, Tensor], weights: dict[str, Tensor] | None = None):
        self.masks, self.weights = masks, weights or {}

    def __getitem__(self, path: str) -> Tensor:
        return self.masks[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, sparsity {self.sparsity:.4f})"

    @property
    def prunable(self) -> int:
        """How many weights the masks cover."""
        return sum(m.numel() for m in self.masks.values())

    @property
    def kept(self) -> int:
        """How many of them stay."""
        return sum(int(m.sum()) for m in self.masks.values())

    @property
    def sparsity(self) -> float:
        """The share of them that goes."""
        return 1 - self.kept / max(self.prunable, 1)

    def from_first_process(self) -> Masks:
        """What process 0 of a group holds, in every process; without a group, these."""
        if processes.world()[1] == 1:
            return self
        masks = {path: processes.from_first(mask) for path, mask in self.masks.items()}
        return Masks(masks, {path: processes.from_first(weight) for path, weight in self.weights.items()})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to zero, and the kept ones to their new values where there are such.

        Raises:
            ValueError: if the masks are for another model; the first weight that differs is named, nothing is changed.
        """
        parameters = self._parameters(model)
        for path, parameter in parameters.items():
            if path in self.weights:
                parameter.copy_(self.weights[path])
        self.enforce(model)

    @torch.no_grad()
    def enforce(self, model: nn.Module) -> None:
        """Set pruned weights to zero again, after a step of an optimiser that may have revived them."""
        clear_weights(self._masked(model))

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Keep the zeros through every step of an optimiser: nothing is multiplied in the forward pass.

        Gradients of pruned weights are zeroed before a step, so that moments and momentum stay clean, and the weights
        after it, so that weight decay and what the moments held before cannot revive them.

        Args:
            model: to which the masks were applied.
            optimizer: of its parameters; a learning rate schedule and a gradient scaler may drive it.

        Returns:
            Two handles whose `remove()` ends it.

        Raises:
            ValueError: if the masks are for another model.
        """
        masked = self._masked(model)
        return [
            optimizer.register_step_pre_hook(lambda *_: clear_gradients(masked)),
            optimizer.register_step_post_hook(lambda *_: clear_weights(masked)),
        ]

    def _masked(self, model: nn.Module) -> Masked:
        return [(p, self.masks[path].to(p.device)) for path, p in self._parameters(model).items()]

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = dict(model.named_parameters(remove_duplicate=False))
        for path, mask in self.masks.items():
            if path not in found:
                raise ValueError(f"these masks are for another model: {unknown('parameter', path, found)[:300]}")
            if found[path].shape != mask.shape:
                raise ValueError(
                    f"these masks are for another model: '{path}' has the shape {tuple(found[path].shape)}, its mask "
                    f"{tuple(mask.shape)}; load the checkpoint that they were found on, or prune this one"
                )
        return {path: found[path] for path in self.masks}

    def packed(self) -> dict[str, Tensor]:
        """Masks as bits, and the kept values of changed weights, by the names that a file holds."""
        out = {path: pack(mask) for path, mask in self.masks.items()}
        for path, weight in self.weights.items():
            out[path + VALUES] = weight[self.masks[path]].contiguous().cpu()
        return out

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Masks:
        """The inverse of `packed`, given the weights' shapes; weights without a mask in `tensors` are left out.

        Raises:
            ValueError: if a mask or the values of a weight have another size than its shape asks for.
        """
        masks, weights = {}, {}
        for path in shapes.keys() & tensors.keys():
            mask = masks[path] = unpack(tensors[path], shapes[path])
            values = tensors.get(path + VALUES)
            if values is not None:
                if len(values) != int(mask.sum()):
                    raise ValueError(f"the mask of '{path}' keeps {int(mask.sum())} weights, found {len(values)}")
                weights[path] = torch.zeros(shapes[path], dtype=values.dtype).masked_scatter_(mask, values)
        order = [path for path in shapes if path in masks]
        return cls({path: masks[path] for path in order}, weights)

    def save(self, path: str | Path) -> None:
        """Write the masks as a safetensors file: a bit a weight, with the names and shapes that they belong to."""
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        with replace_file(Path(path)) as partial:
            save_file(self.packed(), partial, {"format": _FORMAT, "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Masks:
        """Read masks that `save` wrote.

        Args:
            path: the file.
            model: refuse masks that are not for this model, now rather than when they are applied.

        Raises:
            ValueError: if the file holds no masks, or masks for another model than the given one.
        """
        with safe_open(path, "pt") as file:
            info = file.metadata() or {}
            if info.get("format") != _FORMAT:
                raise ValueError(f"{path}: expected a file of masks ('{_FORMAT}'), found {info.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        shapes = {name: torch.Size(shape) for name, shape in json.loads(info["shapes"]).items()}
        masks = cls.unpacked(tensors, shapes)
        if model is not None:
            try:
                masks._parameters(model)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return masks


Masked = list[tuple[nn.Parameter, Tensor]]  # parameters with their masks


@torch.no_grad()
def clear_gradients(masked: Masked) -> None:
    """Zero the gradients of pruned weights."""
    for parameter, mask in masked:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(~mask, 0)


@torch.no_grad()
def clear_weights(masked: Masked) -> None:
    """Zero pruned weights; a product with the mask would leave -0.0."""
    for parameter, mask in masked:
        parameter.masked_fill_(~mask, 0)


def keep_zeros(masked: Masked) -> Any:
    """What `Masks.keep` does, as a trainer's callback."""
    from transformers import TrainerCallback

    class KeepZeros(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            clear_gradients(masked)

        def on_optimizer_step(self, args, state, control, **kwargs):
            clear_weights(masked)

    return KeepZeros()
