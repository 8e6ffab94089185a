"""The small modules with which DAS works: adapters in kept blocks, one in place of a skipped block.

    parallel     kept:     y = part(x) + up(relu(down(LN(x))))              x: the un-normalised stream (METER, ViLT)
                 skipped:  y = x + up(relu(down(LN(x))))
    sequential   kept:     y = part(z + up(relu(down(z))))                  z = norm(x), the block's own norm (LLaVA)
                 skipped:  y = x + z + up(relu(down(z)))
    routed       kept:     y = attention(z + r_1 B down(z) + r_2 D down(z)) r = softmax(Linear(z[first token]) / 10)
                 skipped:  y = x + r_1 B down(z) + r_2 D down(z)            (LaVIN's two experts)
    none         nothing is added anywhere: a skipped block is the identity

Sources: `efficientmodules.py` (METER), `adapter.py` (ViLT), `das_adapter.py` (LLaVA-DAS), `mm_adapter.py` (LaVIN-DAS).
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.anatomy import AnatomyError, Block, Sublayer, Tap, arguments, called_like, read, rewrite
from trimtab.anatomy.structure import added_by, mark_added, plain_module
from trimtab.methods.base import placed
from trimtab.methods.placing import computing

Form = Literal["parallel", "sequential", "routed", "none"]
ADDED = "skip"  # who added these modules, see `anatomy.structure.mark_added`


class Adapter(nn.Module):
    """[LayerNorm ->] Linear(D, b) -> ReLU -> Linear(b, D) -> scale [-> LayerNorm] [-> + residual].

    Args:
        width: D of the stream, (B, L, D) in and out.
        bottleneck: b.
        residual: whether the residual is added to the output.
        scale: factor of the output before the residual; `learned` makes it a parameter, 1 at first.
        norm: where the LayerNorm is: before (`in`), after the scale (`out`), or `none`.
        init: `bert` draws weights from N(0, 0.02), `xavier` from Xavier's uniform; biases are 0.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        residual: bool = False,
        scale: float | Literal["learned"] = 1.0,
        norm: Literal["in", "out", "none"] = "in",
        init: Literal["bert", "xavier"] = "bert",
    ):
        super().__init__()
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.residual, self.place = residual, norm
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learned" else scale
        for linear in (self.down, self.up):
            if init == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `residual` is what is added instead of `x`."""
        out = self.up(self.down(self.norm(x) if self.place == "in" else x).relu()) * self.scale
        if self.place == "out":
            out = self.norm(out)
        return out + (x if residual is None else residual) if self.residual else out


class RoutedAdapter(nn.Module):
    """Two experts on one bottleneck, mixed by weights that the first token of the sequence decides (LaVIN).

    With a key-value cache a later pass sees only the newest token: the weights of the pass that began the sequence lie
    in the cache for it, as its own keys and values do. `begin` says whether the next pass begins one.

    Args:
        width: D of the stream, (B, L, D) in and out.
        bottleneck: b, divided by 2 groups.
        residual: whether the input is added to the output.
        temperature: of the softmax over experts.
    """

    def __init__(self, width: int, bottleneck: int, residual: bool = False, temperature: float = 10.0):
        super().__init__()
        bottleneck = max(2, bottleneck - bottleneck % 2)
        self.down = nn.Linear(width, bottleneck)
        self.experts = nn.ModuleList(nn.Conv1d(bottleneck, width, 1, groups=2) for _ in range(2))
        self.route = nn.Linear(width, 2)
        self.dropout = nn.Dropout(0.1)
        self.residual, self.temperature = residual, temperature
        self.begin = True
        self.key = uuid.uuid4().hex  # of its own weights in a cache
        self.kept: dict[str, Tensor] = {}  # (B, 2) of the sequences that are being generated
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for parameter in self.experts.parameters():
            nn.init.zeros_(parameter)

    def called(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the block's call: it begins a sequence if one of its positions is 0; if no positions are given, unless
        the cache knows the sequence already.

        Raises:
            ValueError: if without positions the cache is one of fixed size, which is used for other sequences too.
        """
        given = arguments(block, args, kwargs)
        position = given.get("position_ids")
        cache = next((v for v in given.values() if hasattr(v, "get_seq_length")), None)
        if position is None and getattr(cache, "is_compileable", False):
            raise ValueError(
                f"routed adapters: {block.__class__.__name__} gets no `position_ids`, and {type(cache).__name__} does "
                "not tell where a sequence begins: generate with the usual cache (`cache_implementation=None`)"
            )
        if cache is not None:
            self.kept = vars(cache).setdefault("routes", {})
        self.begin = (cache is None or self.key not in self.kept) if position is None else bool((position == 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        weights = self.kept.get(self.key)
        if self.begin or weights is None or len(weights) != len(x):
            weights = (self.route(x[:, 0]) / self.temperature).softmax(-1)
            self.kept[self.key] = weights.detach()
        hidden = self.dropout(self.down(x)).transpose(1, 2)  # (B, b, L)
        first, second = (expert(hidden).transpose(1, 2) for expert in self.experts)
        out = first * weights[:, :1, None] + second * weights[:, 1:, None]
        return x + out if self.residual else out


def own_norm(model: nn.Module, block: Block, part: Sublayer) -> str:
    """Path of the norm that a block applies before a part.

    Raises:
        AnatomyError: if the part does not begin with a norm (a model that normalises after its parts).
    """
    path = part.read.path
    kind = type(model.get_submodule(path)).__name__
    if part.read.side != "input" or "norm" not in kind.lower():
        raise AnatomyError(
            f"block '{block.path}': sequential and routed adapters work on the normalised input of a part, but its "
            f"{part.kind} reads '{path}', a {kind} and no norm; use parallel adapters"
        )
    return path


class Across:
    """A parallel adapter across a part: the part's input goes in, what comes out is added to the part's output.

    An object and no closure, so that a copied model computes with its own adapters.
    """

    def __init__(self, adapter: nn.Module):
        self.adapter = adapter
        self.seen: list[Tensor] = []  # the part's input, from its read until its write in the same pass

    def read(self, x: Tensor) -> None:
        self.seen.append(x)

    def write(self, out: Tensor) -> Tensor:
        return out + self.adapter(self.seen.pop())


def add_adapters(model: nn.Module, block: Block, bottleneck: int, form: Form = "parallel") -> None:
    """Give the sublayers of a kept block their adapters.

    They are stored in the block itself (`das_0`, `das_1`, ...), so that they go when the block goes.
    """
    owner = model.get_submodule(block.path)
    place = computing(owner)
    for i, part in enumerate(block.sublayers):
        if form == "none" or (form == "routed" and part.kind != "attention"):
            continue
        adapter: nn.Module
        if form == "parallel":
            adapter = Adapter(block.width, bottleneck)
        elif form == "sequential":
            adapter = Adapter(block.width, bottleneck, residual=True, norm="none", init="xavier")
        else:
            adapter = RoutedAdapter(block.width, bottleneck, residual=True)
            owner.register_forward_pre_hook(adapter.called, with_kwargs=True)
        owner.add_module(f"das_{i}", mark_added(placed(adapter, place, place.dtype), ADDED))
        if form == "parallel":
            across = Across(adapter)
            read(model, part.read, across.read)
            rewrite(model, part.write, across.write)
        else:
            rewrite(model, Tap(own_norm(model, block, part)), adapter)


def adapters_in(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The adapters that skipping added in a block, or in place of one: (path in the model, module)."""
    for name, module in plain_module(model, path).named_modules():
        if added_by(module) == ADDED and not isinstance(module, Skipped):
            yield f"{path}.{name}", module


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


def train_adapters(model: nn.Module, heads: tuple[str, ...]) -> None:
    """What DAS trains in the model: adapters, and the heads (pooler and projections), but not the map to a vocabulary,
    which LLaVA-DAS and LaVIN-DAS leave frozen."""
    for module in model.modules():
        if added_by(module) == ADDED and isinstance(module, (Adapter, RoutedAdapter)):
            module.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(name.startswith(h + ".") for h in heads):
            parameter.requires_grad_(True)
    find: Any = getattr(model, "get_output_embeddings", None)
    if find is not None and (words := find()) is not None:
        words.requires_grad_(False)


def spare_blank(model: nn.Module, path: str) -> None:
    """Leave the scale of the norm alone by which the first adapter of a block, or in its place, takes zeros in: where a
    tower starts with zeros (`starts_blank`) it multiplies nothing but them."""
    module = model.get_submodule(path)
    adapter = module.adapter if isinstance(module, Skipped) else getattr(module, "das_0", None)
    if isinstance(adapter, Adapter) and adapter.place == "in" and isinstance(adapter.norm, nn.LayerNorm):
        adapter.norm.weight.requires_grad_(False)
