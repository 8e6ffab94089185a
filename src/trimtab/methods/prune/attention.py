"""torch's attention, which multiplies by the weights of its projections without calling any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def batch_first(x: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """(B, L, D), however the attention is called."""
    if x.ndim == 2:
        return x[None]
    return x if attention.batch_first else x.transpose(0, 1)


@contextmanager
def projecting_outside(
    attention: nn.MultiheadAttention, projection: Any, then: Callable[[Tensor], None]
) -> Iterator[None]:
    """Compute an attention with an identity as its output projection, which is applied afterwards: `then` sees its
    input.

    The module hands its output projection's weight to a fused function, so there is no call to hook.
    """
    real = dict(projection._parameters)
    weight = projection.weight
    identity = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device), requires_grad=False)

    def before(module: nn.Module, args: tuple) -> None:
        projection._parameters.update(weight=identity, bias=None)

    def after(module: nn.Module, args: tuple, output: tuple) -> tuple:
        projection._parameters.update(real)
        then(batch_first(output[0], attention))
        return F.linear(output[0], projection.weight, projection.bias), *output[1:]

    handles = [attention.register_forward_pre_hook(before), attention.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        projection._parameters.update(real)
