"""One batch that several processes share, so that loss and gradients are those of one process on the whole batch.

    process 0   rows 0 .. n - 1    ->  features  \\
                                                   the features of all rows  ->  the loss of the whole batch
    process 1   rows n .. 2n - 1   ->  features  /

Most losses are means over rows: those of equal parts, averaged, are that of the whole. Three kinds are not, and each
has its function here: a loss that compares rows needs the features of all (`gathered`), a mean over what rows have
different numbers of (words, known labels) needs the number of all (`mean`), and so does a norm over the batch
(`norms`). One rule holds for the gradients of all of them: **the mean over processes of their losses is the loss**, and
DistributedDataParallel averages gradients.

All of it does nothing unless a batch is said to be divided (`divided`): in calibration, for example, each process has
whole batches of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.processes import from_first, world

_open = False
_groups: list[Any] = []


@contextmanager
def divided() -> Iterator[None]:
    """While this is open, the batch at hand is this process's part of one, cut in the order of ranks."""
    global _open
    was, _open = _open, world()[1] > 1
    try:
        yield
    finally:
        _open = was


def parts() -> int:
    """Among how many processes the batch at hand is divided; 1 if it is whole."""
    return world()[1] if _open else 1


def own(rows: int) -> slice:
    """Which of the whole batch's rows are this process's."""
    size = rows // parts()
    rank = world()[0] if _open else 0
    return slice(rank * size, (rank + 1) * size)


def gathered(part: Tensor) -> Tensor:
    """The rows of all processes, (n, ...) -> (parts n, ...), with their gradient.

    Texts may have different lengths: axes beyond the first are padded with zeros at the end, to the longest.

    Raises:
        ValueError: if processes have different numbers of rows.
    """
    if parts() == 1:
        return part
    sizes = torch.tensor([*part.shape, -part.shape[0]], device=part.device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=_group())
    most, *shape, least = sizes.tolist()
    if most != -least:
        raise ValueError(f"a batch is divided into equal parts, found parts of {-least} and of {most} rows")
    more = [n for axis in range(part.ndim - 1, 0, -1) for n in (0, shape[axis - 1] - part.shape[axis])]
    padded = F.pad(part, more) if any(more) else part
    if padded.dtype == torch.bool:
        return _Gathered.apply(padded.to(torch.uint8)).bool()
    return _Gathered.apply(padded)


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """A sum over what this process has of something, by their number in the whole batch; the sum itself if there are
    none. Averaged over processes it is the mean over the whole batch."""
    if parts() == 1:
        number = torch.as_tensor(count, device=total.device).to(total.dtype)
    else:
        number = torch.as_tensor(count, dtype=torch.float64, device=total.device).clone()
        dist.all_reduce(number, group=_group())
        number = (number / parts()).to(total.dtype)
    return total / torch.where(number > 0, number, 1)


def drawn(shape: torch.Size, device: torch.device) -> Tensor:
    """Uniform numbers for this process's rows (n, L): those that one process draws for the whole batch."""
    if parts() == 1:
        return torch.rand(shape, device=device)
    longest = torch.tensor(shape[1], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=_group())
    whole = torch.rand((shape[0] * parts(), int(longest)), device=device)
    return whole[own(len(whole)), : shape[1]]


def agreed(choice: Tensor) -> Tensor:
    """A draw about the whole batch, as the first process made it."""
    return choice if parts() == 1 else from_first(choice)


# --- norms over the batch ---------------------------------------------------------------------------------------------


@contextmanager
def norms(model: nn.Module) -> Iterator[None]:
    """While this is open, BatchNorms in training take their statistics from the whole of a divided batch.

    torch has `SyncBatchNorm` for it, which runs on GPUs alone.
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)] if world()[1] > 1 else []
    before = [module.__dict__.get("forward") for module in found]
    for module in found:
        module.forward = partial(_norm, module, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(found, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


def _norm(module: _BatchNorm, usual: Any, x: Tensor) -> Tensor:
    if parts() == 1 or not module.training:
        return usual(x)
    rows = x.transpose(1, -1)  # channels last: (N, ..., C)
    y, _ = standardised(rows, module)
    if module.affine:
        y = y * module.weight + module.bias
    return y.transpose(1, -1).to(x.dtype)


def standardised(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """Every channel with mean 0 and variance 1 over the whole batch, (..., C), and one by the root of its variance,
    (C); the running statistics go on."""
    rows = x.flatten(0, -2).float()
    count = _Summed.apply(rows.new_tensor([float(len(rows))]))
    average = _Summed.apply(rows.sum(dim=0)) / count
    centred = rows - average
    variance = _Summed.apply(centred.square().sum(dim=0)) / count
    if norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(average.to(norm.running_mean.dtype), share)
            unbiased = variance * count / (count - 1).clamp(min=1)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
    scale = torch.rsqrt(variance + norm.eps)
    return (centred * scale).view(x.shape).to(x.dtype), scale


def standardised_slope(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient before the scale of what `standardised` made x of, from that of x, rows (N, C) both."""
    n, sums, products = (_total(t) for t in (grad.new_tensor(float(len(grad))), grad.sum(dim=0), (grad * x).sum(dim=0)))
    return grad - (sums + x * products) / n


def _total(part: Tensor) -> Tensor:
    total = part.detach().clone().contiguous()
    dist.all_reduce(total, group=_group())
    return total


# --- with gradients ---------------------------------------------------------------------------------------------------


def meet() -> None:
    """Make the group in which parts are gathered, when processes have met or have met anew. Made at its first use,
    a process would wait in its making for one that has failed, whose closed connections do not reach there."""
    _groups[:] = [dist.new_group()]


def forget() -> None:
    """Forget that group."""
    _groups.clear()


def _group() -> Any:
    """A group of its own: DistributedDataParallel sends gradients in the default one at the same time, and messages of
    one group must come in the same order everywhere."""
    if not _groups:
        meet()
    return _groups[0]


class _Gathered(torch.autograd.Function):
    """The rows of all processes. What they do with a row's features all counts towards its gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        part = part.contiguous()
        found = [torch.empty_like(part) for _ in range(world()[1])]
        dist.all_gather(found, part, group=_group())
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=_group())
        rank, size = world()
        part = len(grad) // size
        return grad[rank * part : (rank + 1) * part]


class _Summed(torch.autograd.Function):
    """The sum over processes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _total(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _total(grad)
