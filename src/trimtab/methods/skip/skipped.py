"""What stands in place of a skipped block, and what a kept block beside it must hand on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.anatomy import AnatomyError, Block, arguments, called_like
from trimtab.anatomy.structure import added_by, mark_added, plain_module
from trimtab.methods.base import placed
from trimtab.methods.placing import computing
from trimtab.methods.skip.adapters import ADDED, Adapter, Form, RoutedAdapter, own_norm


class Handed:
    """What the last block of a tower handed on in place of a skipped one: how many axes its stream has.

    A model that takes the first element of a tuple takes the first sample of a lone tensor, without a word: the next
    block sees it.
    """

    def __init__(self) -> None:
        self.axes: int | None = None

    def check(self, block: Block, stream: Tensor) -> None:
        """Raise an AnatomyError unless a block gets what the skipped block before it handed on."""
        axes, self.axes = self.axes, None
        if axes is not None and stream.ndim != axes:
            raise AnatomyError(
                f"block '{block.path}' gets a stream of {stream.ndim} axes, and the skipped block before it handed on "
                f"{axes}: the model takes a part of what its blocks return; set `returns_tuple` and `also` in an "
                "anatomy of your own"
            )


class HandsOn:
    """Hooks on a kept block: what it gets and what it returns must be what `Skipped` returns in place of others.

    Raises:
        AnatomyError: if the block returns a tuple and is described otherwise, a tensor by itself where a tuple is
            described, or hands on more tensors than are described.
    """

    def __init__(self, block: Block, handed: Handed):
        self.block, self.handed = block, handed

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.handed.check(self.block, self.block.stream_of(module, args, kwargs))

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        tuples = self.block.returns_tuple or bool(self.block.also)
        if isinstance(output, (tuple, list)) != tuples:
            kind = type(output).__name__
            expected = "a tuple" if tuples else "the stream by itself"
            raise AnatomyError(
                f"block '{self.block.path}' returns a {kind}, expected {expected}, as it is described: to skip blocks "
                f"here, set `returns_tuple={not tuples}` in an anatomy of your own"
            )
        described = 1 + len(self.block.also)
        more = [i for i, v in enumerate(output) if i >= described and isinstance(v, Tensor)] if tuples else []
        if more:
            raise AnatomyError(
                f"block '{self.block.path}' hands on a tensor at position {more[0]} of what it returns, expected "
                f"tensors at the first {described}: to skip blocks here, name in `also` the argument that it goes into"
            )


class PartError(AnatomyError, AttributeError):
    """A part of a block that is not there any more; to `hasattr`, an attribute that is missing."""


def _facts(block: nn.Module) -> dict[str, Any]:
    """Plain facts of a block, its own and those that its class states for all of its kind (which mask they take)."""
    found: dict[str, Any] = {}
    for kind in (k for k in reversed(type(block).__mro__) if k not in GradientCheckpointingLayer.__mro__):
        found |= vars(kind)
    found |= vars(block)
    return {k: v for k, v in found.items() if isinstance(v, (bool, int, float, str)) and k[0] != "_"}


class Skipped(nn.Module):
    """What stands in place of a skipped block: its adapter on the stream that the block would have carried on.

    It takes whatever the block took (masks, memories, caches). What the block would have returned beside the stream is
    handed on as it came in: a second stream with an adapter of its own, a position bias without.

    Args:
        model: the model, with the block still in its place.
        block: its description.
        bottleneck: width of an adapter in a kept block; the skip adapter is as wide as those of the block together.
        form: of the adapters.
        width: of the skip adapter instead.
        handed: where it notes what it hands on, for the block behind it.
    """

    def __init__(self, model: nn.Module, block: Block, bottleneck: int, form: Form = "parallel",
                 width: int | None = None, handed: Handed | None = None):  # fmt: skip
        super().__init__()
        self.handed = Handed() if handed is None else handed
        self.width = width
        original = model.get_submodule(block.path)
        place = computing(original)
        called_like(self, original)
        self.block = block
        self.returns_tuple = block.returns_tuple or bool(block.also)
        self.form = form
        self.norm: nn.Module | None = None
        if form in ("sequential", "routed"):
            # A copy: in the search the block stays beside this module, and its adapters change what its norm puts out.
            self.norm = copy.deepcopy(model.get_submodule(own_norm(model, block, block.sublayers[0])))
            self.norm._forward_hooks.clear()
            self.norm._forward_pre_hooks.clear()
        self.adapter = placed(self._adapter(block, bottleneck, 0), place, place.dtype)
        others = [self._adapter(block, bottleneck, i + 1) for i in range(len(block.also))]
        self.others = nn.ModuleList(others)
        placed(self.others, place, place.dtype)
        for hook in original._forward_hooks.values():  # by which transformers notes what each block puts out
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                self.register_forward_hook(hook)
        self.like = {"class": type(original), "facts": _facts(original), "parts": tuple(original._modules)}
        mark_added(self, ADDED)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Of the block: transformers notes hidden states of all that are of a block's class, and counts them."""
        return self.__dict__.get("like", {}).get("class", Skipped)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles, which look at the class too."""
        found: Any = super().__reduce_ex__(protocol)
        return (_empty, (), *found[2:])

    def __getattr__(self, name: str) -> Any:
        """Plain facts that a model asks its blocks for, such as whether their attention slides."""
        if name in (facts := self.__dict__.get("like", {}).get("facts", {})):
            return facts[name]
        if name in self.__dict__.get("like", {}).get("parts", ()):
            raise PartError(
                f"skipped block '{self.block.path}': the model asks for its part {name!r}, which went with it: leave "
                "it out of the plan, or of `towers`"
            )
        return super().__getattr__(name)

    def _adapter(self, block: Block, bottleneck: int, stream: int) -> nn.Module:
        count = sum(part.stream == stream for part in block.sublayers)
        if self.form == "none" or not count:
            return nn.Identity()
        adapter: nn.Module
        if self.form == "parallel":
            adapter = Adapter(block.width, self.width or bottleneck * count, residual=True)
        elif self.form == "sequential":
            width = self.width or bottleneck * count
            adapter = Adapter(block.width, width, residual=True, norm="none", init="xavier")
        else:  # as wide as four of the one adapter in a kept block
            adapter = RoutedAdapter(block.width, self.width or bottleneck * 4)
        return mark_added(adapter, ADDED)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.block.stream_of(self, args, kwargs)
        self.handed.check(self.block, stream)
        self.handed.axes = stream.ndim
        if isinstance(self.adapter, RoutedAdapter):
            self.adapter.called(self, args, kwargs)
        out = self.adapter(stream) if self.norm is None else stream + self.adapter(self.norm(stream))
        if not self.returns_tuple:
            return out
        given = arguments(self, args, kwargs)
        rest = (given.get(name) for name in self.block.also)
        return (out, *(adapter(value) for adapter, value in zip(self.others, rest, strict=True)))


def _empty() -> Skipped:
    return Skipped.__new__(Skipped)


class Switch(nn.Module):
    """A block and its replacement side by side, for the search: `skip` says which of them runs.

    With `before` set, it is asked first and may answer in the block's place; with `after`, it is told the result.
    """

    def __init__(self, block: nn.Module, replacement: Skipped):
        super().__init__()
        called_like(self, block)
        self.block, self.replacement = block, replacement
        self.skip = False
        self.before: Callable[[], Any] | None = None
        self.after: Callable[[Any], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None and (known := self.before()) is not None:
            return known
        out = (self.replacement if self.skip else self.block)(*args, **kwargs)
        if self.after is not None:
            self.after(out)
        return out


def adapters_in(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The adapters that skipping added in a block, or in place of one: (path in the model, module)."""
    for name, module in plain_module(model, path).named_modules():
        if added_by(module) == ADDED and not isinstance(module, Skipped):
            yield f"{path}.{name}", module


def spare_blank(model: nn.Module, path: str) -> None:
    """Leave the scale of the norm alone by which the first adapter of a block, or in its place, takes zeros in: where a
    tower starts with zeros (`starts_blank`) it multiplies nothing but them."""
    module = model.get_submodule(path)
    adapter = module.adapter if isinstance(module, Skipped) else getattr(module, "das_0", None)
    if isinstance(adapter, Adapter) and adapter.place == "in" and isinstance(adapter.norm, nn.LayerNorm):
        adapter.norm.weight.requires_grad_(False)
