"""Convolutions as the linear layers that they are: W x at every position, W (out, in * kh * kw / groups), x a patch.

    input (B, C, H, W) -> patches (B, C, H', W', kh, kw), a view of the padded input -> sums over B, H', W'

Sums of squares need no copy of the patches; sums of x x^T copy some of them at a time. What a convolution is given is
read where it is computed, not at its module: subclasses may pad the input first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PIECE = 1 << 22  # elements of patches that are copied at once
_CALLS = (F.conv1d, F.conv2d, F.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Convolutions(TorchFunctionMode):
    """A context in which every convolution with one of some parameters is reported before it is computed.

    Args:
        parameters: the parameters to look for.
        then: called with the parameter's place among them and the arguments of the convolution, by name.
    """

    def __init__(self, parameters: Iterable[Tensor], then: Callable[[int, dict[str, Any]], None]):
        super().__init__()
        self.places = {id(p): i for i, p in enumerate(parameters)}
        self.then = then

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _CALLS:
            call = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
            place = self.places.get(id(call["weight"]))
            if place is not None:
                self.then(place, call)
        return function(*args, **(kwargs or {}))


def patch_sums(call: Mapping[str, Any], gram: bool) -> list[Tensor]:
    """Sums over the patches that a convolution reads.

    Args:
        call: its arguments by name, as of `torch.nn.functional.conv2d`; the input has a batch axis.
        gram: sum x x^T rather than x^2.

    Returns:
        For each group of channels a sum of squares (in,), or of x x^T (in, in), where in = C * kh * kw / groups counts
        as the flattened weight does.
    """
    x, groups = call["input"], call.get("groups", 1)
    kernel = call["weight"].shape[2:]
    if not gram:
        view = _patches(x.square(), kernel, call)  # (B, C, *out, *kernel)
        axes = (0, *range(2, 2 + len(kernel)))
        return list(view.sum(dim=axes).reshape(groups, -1).unbind())
    view = _patches(x, kernel, call)
    width = view.shape[1] * kernel.numel() // groups
    total = x.new_zeros(groups, width, width)
    for samples in view.split(max(1, _PIECE // view[0].numel())):
        for piece in samples.split(max(1, _PIECE // samples[:, :, :1].numel()), dim=2):
            patches = piece.movedim(1, 1 + len(kernel)).reshape(-1, groups, width).transpose(0, 1)  # (groups, n, in)
            total += patches.transpose(1, 2) @ patches
    return list(total.unbind())


def _patches(x: Tensor, kernel: torch.Size, call: Mapping[str, Any]) -> Tensor:
    """(B, C, *space) -> (B, C, *out, *kernel), a view of the padded input."""
    stride, dilation = (_each(call.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padding = call.get("padding", 0)
    if padding == "same":  # torch puts the odd element of an uneven padding behind
        whole = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _each(value: int | Sequence[int], axes: int) -> Sequence[int]:
    """One number an axis."""
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else value
