"""A recurrence on tensors without values, looked at once: what a GRU keeps and needs, without running it at each call.

A GRU runs some twenty operations at each position, and as many again backwards. On fake tensors an operation costs what
it costs whatever its size, so a GRU over 256 positions takes longer than the network around it. But all of its figures
follow from the sizes of what it is given. So the first call with given sizes is run and watched, and that call and all
others like it are one step: it makes tensors of the sizes that were seen, where a counter sees them.

    forward    input, weights -> output, last states    multiply-adds, the worst moment, what is kept for backward
    backward   their gradients                          the worst moment
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from trimtab.counting import Alive, flops_of

_VF: Any = torch._VF  # type: ignore[attr-defined]
"""Where `nn.GRU` finds its operation."""


@dataclass(frozen=True)
class _Sized:
    """What of a tensor decides what a recurrence costs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    trained: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Sized:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).requires_grad_(self.trained)


@dataclass(frozen=True)
class _Seen:
    """What one call was seen to do; bytes are beside what there was before it.

    Attributes:
        flops: of the forward pass.
        outputs: sizes of the output and of the last states.
        most: bytes at the worst moment of the forward pass.
        kept: bytes that are kept for backward, without the call's inputs and outputs.
        saved: places of the inputs that are kept for it.
        back: bytes at the worst moment of the backward pass.
        reached: for each input, whether it gets a gradient.
    """

    flops: int
    outputs: tuple[_Sized, ...]
    most: int
    kept: int
    saved: tuple[int, ...]
    back: int
    reached: tuple[bool, ...]


@contextmanager
def seen_once() -> Iterator[None]:
    """GRUs on padded sequences are run once for each set of sizes; for tensors without values only."""
    with mock.patch.object(_VF, "gru", _instead(_VF.gru)):
        yield


def _instead(gru: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if not isinstance(args[2], (list, tuple)):  # packed sequences: how many rows a step has depends on values
            return gru(*args)
        given = (args[0], args[1], *args[2])
        if not all(isinstance(t, FakeTensor) and t.device.type == "cpu" for t in given):
            return gru(*args)  # the outcome is asked for, or a GPU has one operation for all positions
        if torch.is_autocast_enabled("cpu"):
            return gru(*args)
        look = _Look(gru, tuple(_Sized.of(t) for t in given), args[3:], torch.is_grad_enabled())
        return _AtOnce.apply(look, *given) if _simple(look) else gru(*args)

    return call


@dataclass(frozen=True)
class _Look:
    """A call that may be looked at: of sizes `given`, with the settings that follow them, with gradients or without."""

    gru: Callable[..., Any]
    given: tuple[_Sized, ...]
    settings: tuple[Any, ...]
    graded: bool


class _AtOnce(torch.autograd.Function):
    """A whole recurrence as one step, by what was seen of one like it."""

    # What is kept, and what comes back, goes before the gradients of weights are whole.
    clear_saved_tensors_on_access = True
    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, look: _Look, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.look, ctx.device = look, given[0].device
        ctx.set_materialize_grads(False)
        found = _seen(look, (True, False))
        for tensor in given[:2]:
            tensor.detach()  # views of them are made, by which a counter knows what it has not seen being made
        here = _empty(found.most, ctx.device)
        del here
        row = torch.empty(1, device=ctx.device).expand(1, found.flops // 2)
        row @ row.T  # as many multiply-adds, which take no memory
        kept = [_empty(found.kept, ctx.device)] if found.kept else []
        ctx.save_for_backward(*kept, *(given[i] for i in found.saved))
        return tuple(torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=ctx.device) for o in found.outputs)

    @staticmethod
    def backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        found = _seen(ctx.look, tuple(g is not None for g in gradients))
        kept = ctx.saved_tensors
        here = _empty(found.back, ctx.device)
        gradients.clear()
        del here, kept
        return None, *(
            torch.empty(size.shape, dtype=size.dtype, device=ctx.device) if reached else None
            for size, reached in zip(ctx.look.given, found.reached, strict=True)
        )


def _empty(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _simple(look: _Look) -> bool:
    """Whether all that lives after a call is kept for backward, and so can be told by one number."""
    return _seen(look, (True, False)).kept >= 0


@cache
def _seen(look: _Look, wanted: tuple[bool, ...]) -> _Seen:
    """Run a call on fake tensors of its own, of which no counter around it knows.

    Args:
        look: the call.
        wanted: which of its outputs a gradient comes back to.
    """
    # Hooks of the caller are not asked about what is saved here: the innermost are.
    with _disable_current_modes(), FakeTensorMode(), torch.set_grad_enabled(look.graded):
        given = [size.make() for size in look.given]
        held: list[Tensor] = []

        def run() -> Sequence[Tensor]:
            return cast("Sequence[Tensor]", look.gru(given[0], given[1], given[2:], *look.settings))

        flops = flops_of(run)
        with Alive(given) as alive, torch.autograd.graph.saved_tensors_hooks(_noted(held), lambda tensor: tensor):
            before = alive.now
            outputs = list(run())
            most, after = alive.peak - before, alive.now
            sizes = tuple(_Sized.of(o) for o in outputs)
            own = {t.untyped_storage()._cdata: i for i, t in enumerate(given)}
            made = {o.untyped_storage()._cdata for o in outputs}
            stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
            held.clear()
            kept = sum(size for key, size in stored.items() if key not in own and key not in made)
            if after - before != kept + sum(o.untyped_storage().nbytes() for o in outputs) or made & stored.keys():
                kept = -1
            saved = tuple(i for key, i in own.items() if key in stored)
            back, reached = _backward(alive, given, outputs, wanted)
    return _Seen(flops, sizes, most, kept, saved, back, reached)


def _noted(held: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pack(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        held.append(tensor)
        return tensor

    return pack


def _backward(alive: Alive, given: list[Tensor], outputs: list[Tensor], wanted: tuple[bool, ...]
              ) -> tuple[int, tuple[bool, ...]]:  # fmt: skip
    """Bytes at the worst moment of a backward pass, and which inputs get a gradient."""
    asked = [t for t in given if t.requires_grad]
    roots = [o for o, want in zip(outputs, wanted, strict=True) if want and o.requires_grad]
    if not roots:
        return 0, tuple(False for _ in given)
    start = _Start.apply(*roots)
    alive.peak = alive.now
    before = alive.now + start.nbytes + sum(o.untyped_storage().nbytes() for o in roots)  # with its own gradient
    found = iter(torch.autograd.grad(start, asked, allow_unused=True))
    reached = tuple(t.requires_grad and next(found) is not None for t in given)
    return max(0, alive.peak - before), reached


class _Start(torch.autograd.Function):
    """Where gradients of outputs come from; nobody else holds them, as in a network."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.sizes = [_Sized.of(o) for o in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(size.make().detach() for size in ctx.sizes)
