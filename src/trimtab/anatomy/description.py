"""The seam between models and methods: what a method may know about a model.

    Anatomy
      Tower "vision"  (modality, layout, where its result is handed on, where its mask is found)
        Block "encoder.layers.0"  (module path, width, where an adapter may read and write)
        Block "encoder.layers.1"
      Tower "text" ...
      heads: modules that belong to a task or to a projection and are never pruned

A model never imports a method and a method never imports a model: each model family registers one function that
describes it (`@describes("ViltModel")`), and every method works on the description. Models that nobody described are
discovered from their repeated blocks; `Anatomy.table` prints the result so that a person can correct it.

Everything is named by dotted module paths relative to the model. Values inside a forward pass are named by `Tap`s, and
`read` and `rewrite` attach to them from outside with forward hooks, so that no model's code is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from trimtab.anatomy.calls import arguments
from trimtab.anatomy.structure import plain_module, plain_modules, repeated, under
from trimtab.registry import unknown

Modality = Literal["vision", "text", "fusion"]


class AnatomyError(ValueError):
    """A description that does not fit its model; the message names the path, what was expected and what is there."""


@dataclass(frozen=True)
class Tap:
    """One value at the call of a module.

    Attributes:
        path: dotted path of the module; the empty path is the model itself.
        side: whether the value goes into the module or comes out of it.
        key: which one: position or keyword of an input, position or field of an output that is a tuple or a
            `ModelOutput`. An output that is one tensor ignores it.
        flat: whether its axes after the first are read as one: a mask (B, H, W) of patches is one of tokens (B, H W).
    """

    path: str
    side: Literal["input", "output"] = "output"
    key: int | str = 0
    flat: bool = False


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

    Its first argument (or the keyword in `stream`) is the stream that it carries on; what it returns has the stream as
    its first or only element. A block that reads a second stream (METER's fusion layers, a decoder's memory) gets it as
    a further argument, which skipping simply ignores.

    Attributes:
        path: dotted module path.
        width: channels of its output, the last axis for tokens, the second for a grid.
        sublayers: where parallel adapters go, in the order of computation.
        keeps_shape: whether input and output have the same shape, and nothing but the stream (and what `also` names) is
            handed on; only then can it be skipped.
        stream: keyword of the carried stream, used when it is not passed by position.
        returns_tuple: whether it returns the stream as the first element of a tuple, not by itself.
        also: names of further arguments that it returns after the stream, changed or not: a second stream (LXMERT), a
            position bias (T5). In place of a skipped block they are handed on; what it is not called with (attention
            weights) is None there.
        stays: why it cannot be taken out of the model for good, though it can be skipped: the model around it counts
            its blocks, say. Empty if it can.
    """

    path: str
    width: int
    sublayers: tuple[Sublayer, ...] = ()
    keeps_shape: bool = True
    stream: str = "hidden_states"
    returns_tuple: bool = False
    also: tuple[str, ...] = ()
    stays: str = ""

    def stream_of(self, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """The stream among the arguments of a call, however it was passed."""
        given = arguments(module, args, kwargs)
        return given[self.stream] if self.stream in given else next(iter((*args, *given.values())))


@dataclass(frozen=True)
class Tower:
    """A stack of blocks through which one stream flows.

    Attributes:
        name: unique within the anatomy.
        modality: whose share of a pruning budget it counts to.
        blocks: in the order of computation.
        scope: path prefixes of everything that belongs to it (blocks, embeddings, norms).
        output: where the stream is handed on after the last block and its norm, (B, L, D) or (B, C, H, W).
        layout: `tokens` for (B, L, D), `grid` for (B, C, H, W).
        mask: where the mask of valid tokens is seen, (B, L) with non-zero = valid; None if all are valid.
        mask_required: whether a batch without that mask is an error; otherwise all its tokens are valid.
        mask_source: the argument that the mask is made from, if the model makes up a mask of ones without it.
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
        closed: why no tokens can be set before its own and taken off after the last block, such as that each has a
            place on which the model counts. Empty if they can.
    """

    name: str
    modality: Modality
    blocks: tuple[Block, ...]
    scope: tuple[str, ...]
    output: Tap
    layout: Literal["tokens", "grid"] = "tokens"
    mask: Tap | None = None
    mask_required: bool = True
    mask_source: Tap | None = None
    samples: Tap | None = None
    pooled: Tap | None = None
    projected: Tap | None = None
    levels: Tap | None = None
    pooled_token: Literal["first", "last"] = "first"
    memory: str | None = None
    memories: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    causal: bool = False
    closed: str = ""

    @property
    def sources(self) -> set[str]:
        """Names of the towers whose results it is given, in its stream or beside it."""
        return {n for n in (self.memory, *self.reads, *(name for _, name in self.memories)) if n is not None}


class Weight(NamedTuple):
    """A prunable matrix (out, in): plain path of the module that holds it, the parameter's name in it, and its modality.

    Its parameter has the shape (out, in), or (in, out) when `transposed` (transformers' `Conv1D`), or that of a
    convolution, (out, *kernel) with the kernel (in / groups, kh, kw): its matrix is (out, in * kh * kw / groups).
    """

    module: str
    parameter: str
    modality: Modality
    transposed: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.module}.{self.parameter}"

    def of(self, model: nn.Module) -> nn.Parameter:
        """The parameter itself, behind whatever wraps its layer; AttributeError if the model has no such layer."""
        return getattr(plain_module(model, self.module), self.parameter)

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (out, in); a view where that needs no copy."""
        return stored.t() if self.transposed else stored.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.kernel:
            return matrix.unflatten(1, self.kernel)
        return matrix.t().contiguous() if self.transposed else matrix


@dataclass(frozen=True)
class Anatomy:
    """A model described for methods.

    Attributes:
        towers: in the order in which data flows.
        heads: path prefixes of task heads, projections and poolers: never pruned; a method may train them.
        ignored: path prefixes of repeated modules that are no blocks (a list of classifiers, say).
        source: how the description came about, for error messages and the table.
    """

    towers: tuple[Tower, ...]
    heads: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    source: str = field(default="given", compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """The registered description of a model's class, or of the base model inside it, or what discovery finds.

        Raises:
            AnatomyError: if nothing is registered and no repeated blocks are found, or if the description does not
                fit the model.
        """
        for find in FINDERS:
            if (found := find(model)) is not None:
                found.check(model)
                return found
        raise AnatomyError(
            f"{type(model).__name__} has no list of repeated blocks to discover: describe it with an `Anatomy` of its "
            "own, or register a function with `@trimtab.describes('" + type(model).__name__ + "')`"
        )

    def blocks(self, tower: str | None = None) -> Iterator[Block]:
        """All blocks in order, or those of one tower."""
        for t in self.towers if tower is None else (self.tower(tower),):
            yield from t.blocks

    def tower(self, name: str) -> Tower:
        """The tower of that name; ValueError with the nearest names if there is none."""
        for t in self.towers:
            if t.name == name:
                return t
        raise ValueError(unknown("tower", name, [t.name for t in self.towers]))

    def readers(self, name: str) -> tuple[Tower, ...]:
        """The towers that are given a tower's result, without those of which it is given the result itself (pairs)."""
        own = self.tower(name)
        back = own.sources
        return tuple(t for t in self.towers if name in t.sources and t.name != name and t.name not in back)

    def owner(self, path: str) -> Tower | None:
        """The tower to whose scope a module or parameter belongs, None for heads and the rest."""
        if under(path, self.heads):
            return None
        return next((t for t in self.towers if under(path, t.scope)), None)

    def modality(self, path: str) -> Modality | None:
        """Modality of the tower that owns a module or parameter, None for heads and the rest."""
        tower = self.owner(path)
        return tower.modality if tower else None

    def weights(self, model: nn.Module, convolutions: bool = False) -> list[Weight]:
        """The prunable matrices of the plain model in the order of `named_modules`, each tied one once.

        Every `nn.Linear` in a tower's scope, transformers' transposed `Conv1D`, and the input projections of every
        `nn.MultiheadAttention`; biases, norms, embeddings and heads are left out (as MULTIFLOW's code does), and
        convolutions too, unless they are asked for.

        Args:
            model: the model that this describes.
            convolutions: also `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` (never transposed ones) in a tower's scope.
        """
        found, seen = [], set()
        for path, module in plain_modules(model):
            transposed = type(module).__name__ == "Conv1D"
            convolves = convolutions and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            names = ["weight"] if isinstance(module, nn.Linear) or transposed or convolves else []
            if isinstance(module, nn.MultiheadAttention):
                names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
            modality = self.modality(path) if names else None
            if modality is None:
                continue
            for name in names:
                parameter = getattr(module, name)
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found.append(Weight(path, name, modality, transposed, parameter.shape[1:] if convolves else ()))
        return found

    def check(self, model: nn.Module) -> None:
        """Raise an AnatomyError unless every path exists and no repeated block is left out."""
        modules = dict(model.named_modules())
        for path, what in self._paths():
            if path not in modules:
                near = unknown("path", path, list(modules)).split("valid:")[0]
                raise AnatomyError(f"the {what} is described at '{path}', but the model has no such module ({near})")
        described = {b.path for b in self.blocks()}
        for path, children in repeated(model):
            if under(path, self.ignored) or under(path, self.heads):
                continue
            missing = [c for c in children if c not in described and not any(d.startswith(c + ".") for d in described)]
            if missing and not any(path.startswith(d + ".") for d in described):
                raise AnatomyError(
                    f"'{path}' holds {len(children)} repeated blocks, but the anatomy ({self.source}) misses "
                    f"{', '.join(missing[:4])}: describe them in a tower, or name '{path}' in `ignored`"
                )

    def _paths(self) -> Iterator[tuple[str, str]]:
        for tower in self.towers:
            taps = {
                "output": tower.output, "mask": tower.mask, "source of the mask": tower.mask_source,
                "samples": tower.samples, "pooled output": tower.pooled, "projected output": tower.projected,
                "output of all levels": tower.levels,
            }  # fmt: skip
            for what, tap in taps.items():
                if tap is not None:
                    yield tap.path, f"{what} of tower {tower.name!r}"
            for block in tower.blocks:
                yield block.path, f"block of tower {tower.name!r}"
                for part in block.sublayers:
                    yield part.read.path, f"{part.kind} input of block '{block.path}'"
                    yield part.write.path, f"{part.kind} output of block '{block.path}'"

    def prefixed(self, prefix: str) -> Anatomy:
        """The same anatomy for a model that holds the described one under `prefix` (`vilt`, say)."""

        def tap(t: Tap) -> Tap:
            return replace(t, path=f"{prefix}.{t.path}".rstrip("."))

        def block(b: Block) -> Block:
            parts = tuple(replace(s, read=tap(s.read), write=tap(s.write)) for s in b.sublayers)
            return replace(b, path=f"{prefix}.{b.path}", sublayers=parts)

        def paths(p: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{prefix}.{x}" for x in p)

        towers = tuple(
            replace(t, blocks=tuple(map(block, t.blocks)), scope=paths(t.scope), output=tap(t.output),
                    mask=t.mask and tap(t.mask), mask_source=t.mask_source and tap(t.mask_source),
                    samples=t.samples and tap(t.samples), pooled=t.pooled and tap(t.pooled),
                    projected=t.projected and tap(t.projected), levels=t.levels and tap(t.levels))
            for t in self.towers
        )  # fmt: skip
        return replace(self, towers=towers, heads=paths(self.heads), ignored=paths(self.ignored))

    def rows(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row a tower: name, modality, layout, blocks, widths, parameters, share, prunable weights."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        total = sum(sizes.values())
        prunable = {w.path: sizes.get(w.path, 0) for w in self.weights(model)}
        rows: list[dict[str, Any]] = []
        for t in self.towers:
            own = {n: s for n, s in sizes.items() if under(n, t.scope) and not under(n, self.heads)}
            widths = sorted({b.width for b in t.blocks})
            rows.append({
                "tower": t.name, "modality": t.modality, "layout": t.layout, "blocks": len(t.blocks),
                "widths": "-".join(map(str, widths)), "params": sum(own.values()),
                "share": sum(own.values()) / max(total, 1), "prunable": sum(prunable.get(n, 0) for n in own),
                "first_block": t.blocks[0].path,
            })  # fmt: skip
        rest = total - sum(int(r["params"]) for r in rows)
        rows.append({"tower": "heads and rest", "modality": "-", "layout": "-", "blocks": 0, "widths": "-",
                     "params": rest, "share": rest / max(total, 1), "prunable": 0, "first_block": ""})  # fmt: skip
        return rows


# Ways to find the anatomy of a model that comes without one, in order; each answers None where it knows nothing.
FINDERS: list[Callable[[nn.Module], Anatomy | None]] = []
