"""The parts of a description: towers of blocks, and the values in a forward pass that methods read and write.

Everything is named by dotted module paths relative to the plain model. Fields that hold such paths are marked, so that
one walk over a description changes them all (`with_paths`); `every_tap` goes over the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from trimtab.anatomy.calls import arguments, passed, replaced, stream_name
from trimtab.anatomy.structure import AnatomyError, plain_module

Modality = Literal["vision", "text", "audio", "fusion"]
T = TypeVar("T")

Layout = Literal["tokens", "grid", "map"]
Unknown = tuple[tuple[str, str], ...]  # (fact, why it is not known)
PATH = {"path": True}  # of a field that holds a path, or a tuple of paths


@dataclass(frozen=True)
class Tap:
    """One value at the call of a module.

    Attributes:
        path: dotted path of the module; the empty path is the model itself.
        side: whether the value goes into the module or comes out of it.
        key: which one: position or keyword of an input, position or field of an output that is a tuple or a
            `ModelOutput`. An output that is one tensor ignores it.
        flat: whether its axes after the first are read as one: a mask (B, H, W) of patches is one of tokens (B, H W).
        padding: whether it is a mask whose numbers are non-zero at padding (`src_key_padding_mask`), or are added to
            scores, 0 at what is seen; it is read the other way round.
        pairs: whether it is a mask of pairs, (B, 1, L, L), the same for every token that looks: True or, of numbers
            that are added to scores, 0 at what is seen. It is read as one of tokens, (B, L).
        rest: where the tokens stand that a mask has no number for, before or after those that it has one for. They are
            always seen (pictures' tokens beside words').
    """

    path: str = field(metadata=PATH)
    side: Literal["input", "output"] = "output"
    key: int | str = 0
    flat: bool = False
    padding: bool = False
    pairs: bool = False
    rest: Literal["", "before", "after"] = ""

    def whole(self, mask: Tensor, length: int) -> Tensor:
        """A mask (B, M) with a number for every token of a stream, (B, L): those it has none for are seen (`rest`)."""
        if not self.rest or mask.ndim != 2 or (more := length - mask.shape[1]) < 1:
            return mask
        seen = mask.new_ones(len(mask), more)
        return torch.cat([seen, mask] if self.rest == "before" else [mask, seen], dim=1)


@dataclass(frozen=True)
class Sublayer:
    """A part of a block with its own residual connection, where a parallel adapter can be set.

    Attributes:
        kind: `attention`, `cross-attention` or `mlp`.
        read: the un-normalised stream that enters the part, (B, L, D).
        write: a value that is summed into the stream after the part, (B, L, D); an adapter's output is added to it.
        stream: which of the streams that the block carries on: 0, or i for the i-th of the block's `also`.
    """

    kind: Literal["attention", "cross-attention", "mlp"]
    read: Tap
    write: Tap
    stream: int = 0


@dataclass(frozen=True)
class Block:
    """One of a tower's repeated layers.

    It carries a stream on: `stream_of` finds it among its arguments, and what it returns has the stream as its first or
    only element. A block that reads a second stream (METER's fusion layers, a decoder's memory) gets it as a further
    argument, which skipping simply ignores.

    Attributes:
        path: dotted module path.
        width: channels of its output, the last axis for tokens and maps, the second for a grid.
        sublayers: where parallel adapters go, in the order of computation.
        keeps_shape: whether input and output have the same shape, and nothing but the stream (and what `also` names) is
            handed on; only then can it be skipped.
        stream: name of the parameter of its forward that takes the stream; a forward without a parameter of that name
            takes it as its first.
        returns_tuple: whether it returns the stream as the first element of a tuple, not by itself.
        also: names of further arguments that it returns after the stream, changed or not: a second stream (LXMERT), a
            position bias (T5). In place of a skipped block they are handed on; what it is not called with (attention
            weights) is None there.
        begins: whether its stream has another number of tokens than what the block before it put out: a stage begins
            there though the width may stay.
        stays: why it cannot be taken out of the model for good, though it can be skipped: the model around it counts
            its blocks, say. Empty if it can.
        unknown: (fact, why it could not be seen); a method that needs one of these refuses.
    """

    path: str = field(metadata=PATH)
    width: int
    sublayers: tuple[Sublayer, ...] = ()
    keeps_shape: bool = True
    stream: str = "hidden_states"
    returns_tuple: bool = False
    also: tuple[str, ...] = ()
    begins: bool = False
    stays: str = ""
    unknown: Unknown = field(default=(), compare=False)

    def knows(self, *facts: str) -> bool:
        """Whether these facts about it are known."""
        return not any(fact in facts for fact, _ in self.unknown)

    def stream_of(self, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """The stream among the arguments of a call, (B, L, D) or (B, C, H, W), however it was passed.

        Args:
            module: the block itself, or what stands in its place; its signature decides.
            args: what it is called with by position, as a forward hook gets it.
            kwargs: and by keyword.

        Raises:
            AnatomyError: if the stream was not passed, or is no tensor.
        """
        name = stream_name(self.path, self.stream, module, args, kwargs)
        value = args[0] if name is None else arguments(module, args, kwargs)[name]
        if not isinstance(value, Tensor):
            raise AnatomyError(
                f"block '{self.path}' ({type(module).__name__}): expected a tensor as its stream, argument {name!r}, "
                f"found {passed(args, kwargs)}; name the argument that carries the stream in `Block.stream`"
            )
        return value

    def with_stream(self, module: nn.Module, args: tuple, kwargs: dict, new: Tensor) -> tuple[tuple, dict]:
        """The arguments of a call with `new` as the stream, passed as it was before; see `stream_of`."""
        name = stream_name(self.path, self.stream, module, args, kwargs)
        return ((new, *args[1:]), kwargs) if name is None else replaced(module, args, kwargs, name, new)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks through which one stream flows.

    Attributes:
        name: unique within the anatomy.
        modality: whose share of a pruning budget it counts to.
        blocks: in the order of computation.
        scope: path prefixes of everything that belongs to it (blocks, embeddings, norms).
        output: where the stream is handed on after the last block and its norm, in its layout.
        layout: `tokens` for (B, L, D), `grid` for (B, C, H, W), `map` for (B, H, W, D): channels last, and two axes or
            more before them. What computes each place by itself works on a map (adapters, also in place of a skipped
            block); what sets tokens in a row does not (side networks, prompts).
        mask: where the mask of valid tokens is seen, (B, L) with non-zero = valid; None if all are valid.
        mask_required: whether a batch without that mask is an error; otherwise all its tokens are valid.
        mask_source: the argument that the mask is made from, if the model makes up a mask of ones without it.
        may_hide: where the mask is unknown, the model's inputs that may be it; None if these are not known either.
        pooled: where the tower's one-vector summary is handed on, (B, E), if it makes one.
        projected: where a linear map of every token into another width is handed on, (B, L, E), for models that pool
            only behind it (VSE-infinity): a `Linear`.
        levels: where what every block put out is handed on at once, with a norm on each, (blocks, B, L, D), for models
            with losses on every level (DETR's decoders).
        pooled_token: which token the summary is read from: the `first`, or the `last` valid one (an end-of-text token).
        samples: where a value with one row a sample goes in, for a stream that does not begin with the samples: (L, B,
            D), or (L, D) with the tokens of all images one after another. None for (B, L, D) and (B, C, H, W).
        memory: name of the tower whose output the blocks also read (decoders, paired fusion towers).
        memories: outputs of further towers that the blocks read beside it: (the keyword that brings it, name of the
            tower).
        reads: names of further towers whose results go into its stream (fused streams, image tokens among words).
        causal: whether a token sees only those before it (then a key-value cache may be in use).
        starts_blank: whether what enters the first block is zeros, whatever the sample (DETR's queries begin so).
        closed: why no tokens can be set before its own and taken off after the last block, such as that each has a
            place on which the model counts. Empty if they can.
        unknown: (fact, why it could not be seen), of the tower; a method that needs one of these refuses (`need`).
    """

    name: str
    modality: Modality
    blocks: tuple[Block, ...]
    scope: tuple[str, ...] = field(metadata=PATH)
    output: Tap
    layout: Layout = "tokens"
    mask: Tap | None = None
    mask_required: bool = True
    mask_source: Tap | None = None
    may_hide: tuple[str, ...] | None = None
    samples: Tap | None = None
    pooled: Tap | None = None
    projected: Tap | None = None
    levels: Tap | None = None
    pooled_token: Literal["first", "last"] = "first"
    memory: str | None = None
    memories: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    causal: bool = False
    starts_blank: bool = False
    closed: str = ""
    unknown: Unknown = field(default=(), compare=False)

    def knows(self, *facts: str) -> bool:
        """Whether these facts about it are known; those of its blocks are asked for one by one."""
        return not any(fact in facts for fact, _ in self.unknown)

    def need(self, method: str, *facts: str) -> None:
        """Raise an AnatomyError if one of these facts about the tower, or about its blocks, has not been seen."""
        known = [(f"tower {self.name!r}", self.unknown), *((f"block '{b.path}'", b.unknown) for b in self.blocks)]
        for what, unknown in known:
            if missing := next(((fact, why) for fact, why in unknown if fact in facts), None):
                raise AnatomyError(
                    f"{method}: `{missing[0]}` of {what} is unknown: {missing[1]}. Show the model at work, "
                    "`trimtab.adapt(model, example=batch)` with a dict of its keyword arguments, describe it "
                    "(docs/your-own-model.md), or name other towers in `towers`"
                )

    def told(self) -> str:
        """What is known of it beyond its blocks, in words."""
        kinds = dict.fromkeys(tuple(p.kind for p in b.sublayers) for b in self.blocks)
        parts = " or ".join("+".join(k) or "none" for k in kinds)
        mask = "all tokens valid" if self.mask is None else f"mask {_place(self.mask)}"
        if self.mask is not None and self.mask.rest:
            mask += f" (tokens {self.mask.rest} its own are always seen)"
        order = "causal" if self.causal else "not causal"
        facts = {
            "causal": order if self.layout == "tokens" else "", "mask": mask if self.layout == "tokens" else "",
            "sublayers": f"parts {parts}", "samples": "" if self.samples is None else f"samples {_place(self.samples)}",
            "reads": f"reads {', '.join(self.reads)} in its stream" if self.reads else "",
            "memory": f"attends to {', '.join(sorted(self.sources - set(self.reads)))}" if self.memory else "",
            "output": f"handed on at {_place(self.output)}",
        }  # fmt: skip
        return "; ".join(text for fact, text in facts.items() if text and self.knows(fact, "blocks"))

    @property
    def sources(self) -> set[str]:
        """Names of the towers whose results it is given, in its stream or beside it."""
        return {n for n in (self.memory, *self.reads, *(name for _, name in self.memories)) if n is not None}


class Weight(NamedTuple):
    """A prunable matrix (out, in): plain path of the module that holds it, the parameter's name in it, its modality.

    Its parameter has the shape (out, in), or (in, out) when `transposed` (transformers' `Conv1D`), or that of a
    convolution, (out, *kernel) with the kernel (in / groups, kh, kw): its matrix is (out, in * kh * kw / groups). Of a
    parameter that holds several matrices, (experts, out, in), each is a weight of its own with the number `expert`.
    """

    module: str
    parameter: str
    modality: Modality
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    expert: int | None = None

    @property
    def path(self) -> str:
        """Of the parameter, which several experts share."""
        return f"{self.module}.{self.parameter}".lstrip(".")

    def __str__(self) -> str:
        return self.path if self.expert is None else f"{self.path}[{self.expert}]"

    def of(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself, behind whatever wraps its layer; AttributeError if the model has no such layer."""
        return getattr(plain_module(model, self.module), self.parameter)

    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix (out, in) in a tensor of the parameter's shape; a view where that needs no copy."""
        stored = stored if self.expert is None else stored[self.expert]
        return stored.t() if self.transposed else stored.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`; of an expert its own piece."""
        if self.kernel:
            return matrix.unflatten(1, self.kernel)
        return matrix.t().contiguous() if self.transposed else matrix


# --- walks over a description -----------------------------------------------------------------------------------------


def every_tap(part: Any, of: str = "") -> Iterator[tuple[Tap, str]]:
    """Every tap in a description, or part of one, and which field holds it: "`output` of tower 'text'", say."""
    own = _label(part, of)
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Tap):
            yield value, f"`{f.name}` of {own}"
        for item in value if isinstance(value, tuple) else ():
            if is_dataclass(item):
                yield from every_tap(item, own)


def with_paths(part: T, change: Callable[[str], str]) -> T:
    """The same description, or part of one, with every path in it changed."""
    if isinstance(part, tuple):
        return type(part)(with_paths(item, change) for item in part)
    if not is_dataclass(part):
        return part
    new = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if "path" not in f.metadata:
            new[f.name] = with_paths(value, change)
        else:
            new[f.name] = change(value) if isinstance(value, str) else tuple(map(change, value))
    return replace(part, **new)  # type: ignore[type-var]


def _place(tap: Tap) -> str:
    """A tap in words: 'norm', or 'attention_mask of the model'."""
    return f"'{tap.path}'" if tap.side == "output" and tap.path else f"{tap.key!r} of {tap.path or 'the model'}"


def _label(part: Any, of: str) -> str:
    if isinstance(part, Tower):
        return f"tower {part.name!r}"
    if isinstance(part, Block):
        return f"block '{part.path}'"
    return f"{part.kind} in {of}" if isinstance(part, Sublayer) else ""


# --- as JSON ----------------------------------------------------------------------------------------------------------


def to_plain(part: Any) -> Any:
    """A description, or part of one, as plain JSON: what has its default is left out."""
    if isinstance(part, (tuple, list)):
        return [to_plain(item) for item in part]
    if not is_dataclass(part):
        return part
    return {f.name: to_plain(getattr(part, f.name)) for f in fields(part) if getattr(part, f.name) != f.default}


def from_plain(kind: type[T], plain: Any, at: str = "") -> T:
    """The inverse of `to_plain`; a TypeError names the field that is of another kind, is missing or unknown.

    Args:
        kind: of the part.
        plain: what `to_plain` gave.
        at: the field in which it stands, for messages.
    """
    if not isinstance(plain, dict):
        raise TypeError(f"{at or kind.__name__}: expected an object of {kind.__name__}'s fields, found {plain!r:.80}")
    hints, own = get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    where = f"{at}." if at else ""
    if strange := [key for key in plain if key not in own]:
        raise TypeError(f"{where}{strange[0]}: {kind.__name__} has no such field")
    if missing := [name for name, f in own.items() if f.default is MISSING and name not in plain]:
        raise TypeError(f"{where}{missing[0]} is missing")
    return kind(**{key: _from(hints[key], value, f"{where}{key}") for key, value in plain.items()})


def _from(hint: Any, value: Any, at: str) -> Any:
    """A value of the kind that a hint tells; a TypeError that says where it stands if it is of another."""
    kinds = [hint] if get_origin(hint) not in (Union, UnionType) else list(get_args(hint))
    for kind in kinds:
        if is_dataclass(kind) and (isinstance(value, dict) or len(kinds) == 1):
            return from_plain(kind, value, at)  # type: ignore[arg-type]
        if get_origin(kind) is tuple and isinstance(value, list):
            inner = get_args(kind)
            every = inner[-1] is Ellipsis
            if every or len(inner) == len(value):
                return tuple(_from(inner[0] if every else inner[i], v, f"{at}[{i}]") for i, v in enumerate(value))
        if value in get_args(kind) if get_origin(kind) is Literal else kind is type(value):
            return value
    raise TypeError(f"{at}: expected {' or '.join(map(_kind, kinds))}, found {value!r:.80}")


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return (
        "null" if hint is type(None) else getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else "list"
    )
