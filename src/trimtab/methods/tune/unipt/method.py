"""UniPT as a method: which side network a tower gets, and where it is set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.methods.base import METHODS
from trimtab.methods.tune.beside import Beside, Listener, Seen, token_width
from trimtab.methods.tune.unipt.sides import PUBLISHED, DecoderUniPT, PyramidUniPT, TokenUniPT, VectorUniPT, initialise

KEPT = {"exact": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class UniPTSettings:
    """Settings of UniPT."""

    reduction: int = 2
    """Width of the side network = width of the tower / reduction (published: 2; CLIP4Clip: 1)."""
    towers: tuple[str, ...] | None = None
    """Which towers get a side network; None for all through which a loss can reach it: not those whose result goes into
    another, frozen tower, unless that one's side network reads theirs."""
    form: Literal["auto", "token", "vector", "projected"] = "auto"
    """`vector` replaces the tower's pooled vector, `token` its tokens, `projected` their linear map into another width
    (VSE); `auto` takes what fits the tower. Grids have a form of their own, and so have decoders whose encoder gets a
    side network too; one that hands on all its levels (MDETR) gets a level for every layer that is read."""
    layers: tuple[int, ...] | None = None
    """Hidden maps that are read beside the last: 0 is what enters the first block, i what block i puts out. None for
    all; of a grid tower one for each size."""
    projection: Literal["double", "single"] = "double"
    """Between merged tokens and anchor: two linear maps (CLIP-ViL's code), or one (VSE; CLIP-ViL's published count)."""
    init: Literal["torch", "bert", "xavier"] = "torch"
    """How weights start: `torch` (VSE, CLIP4Clip), `bert`: N(0, 0.02) (CLIP-ViL), `xavier` (MDETR)."""
    keep_scores: bool | Literal["auto"] = "auto"
    """Keep attention scores for the backward pass instead of computing them again: faster, more memory. `auto` keeps
    them where they are few: sequences no longer than half the side network's width."""
    keep_maps: Literal["exact", "bf16", "fp16"] = "exact"
    """In which precision hidden maps are kept for the backward pass. What the model computes stays the same to the bit;
    the gradients of the down-projections' weights see the rounding."""
    skip_padding: bool = True
    """Leave padding out of all products of token forms (of a decoder's, that of the memory); what is handed on of it is
    0. False computes it as the published code does."""
    tokens: Literal["all", "first"] = "all"
    """Which tokens the token form hands on: all, or `first`, (B, 1, D), for heads that read the first token alone (VQA
    on ViLT or LXMERT): the same numbers for less than half the products. A head that reads other tokens gets wrong
    numbers; recipes refuse it for tasks that do."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, found {self.reduction}")


@METHODS.register("unipt")
class UniPT(Beside):
    """Side networks beside the frozen towers, attached through their taps."""

    name = "unipt"
    Settings = UniPTSettings

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.one_token = self.settings.tokens == "first"

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Those that no other tower reads, and encoders all of whose readers' side networks read theirs."""
        unread = super().towers(anatomy)

        def is_encoder(tower: Tower) -> bool:
            readers = anatomy.readers(tower.name)
            return all(r.memory == tower.name and r.name in unread and _serves(tower, r) for r in readers)

        return tuple(t.name for t in anatomy.towers if t.name in unread or is_encoder(t))

    def side(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> nn.Module:
        side = self._side(model, anatomy, tower)
        if self.one_token:
            readers = anatomy.readers(tower.name)
            why = (
                f"gets a {type(side).__name__}, not single tokens" if not getattr(side, "first", False)
                else "is read at its last token" if tower.pooled_token == "last"
                else f"is read by tower {readers[0].name!r}" if readers
                else ""
            )  # fmt: skip
            if why:
                raise ValueError(f"unipt: `tokens: first` is for towers whose first token alone is read; tower "
                                 f"{tower.name!r} {why}: use `all`")  # fmt: skip
        initialise(side, self.settings.init)
        return side

    def _side(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> nn.Module:
        s, kept = self.settings, KEPT[self.settings.keep_maps]
        if tower.layout == "grid" and s.form != "vector":
            widths = [tower.blocks[i - 1].width for i in self._maps(tower, "grid")]
            return PyramidUniPT(widths, self._out(model, tower), s.reduction, keep=s.keep_scores, kept=kept)
        width = token_width(self.name, tower)
        if self._projected(tower):
            layers = len(self._maps(tower, "token")) - 1
            return TokenUniPT(width, layers, s.reduction, self._out(model, tower), causal=tower.causal,
                              keep=s.keep_scores, kept=kept, skip=s.skip_padding, **PUBLISHED["vse-text"])  # fmt: skip
        if s.form == "vector" or (s.form == "auto" and _hands_on_vector(model, tower)):
            if tower.pooled is None:
                raise ValueError(f"unipt: tower {tower.name!r} hands on no vector: use form 'token'")
            linear = model.get_submodule(tower.pooled.path)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"unipt: form 'vector' needs a linear projection at '{tower.pooled.path}'")
            layers = len(self._maps(tower, "vector")) - 1
            return VectorUniPT(width, layers, linear.out_features, s.reduction, kept=kept)
        targets = len(self._maps(tower, "token")) - 1
        shared = {"projection": s.projection, "causal": tower.causal, "keep": s.keep_scores, "kept": kept,
                  "skip": s.skip_padding}  # fmt: skip
        if self._memory(anatomy, tower):
            levels = tower.levels is not None
            if levels:
                shared |= {k: v for k, v in PUBLISHED["mdetr-decoder"].items() if k != "projection"}
            return DecoderUniPT(width, targets, s.reduction, levels=levels, **shared)
        if self._read_by_another(anatomy, tower):
            eps = PUBLISHED["mdetr-encoder"]["eps"]
            return TokenUniPT(width, targets, s.reduction, final="none", eps=eps, **shared)
        return TokenUniPT(width, targets, s.reduction, first=s.tokens == "first", **shared)

    def listen(self, model: nn.Module, tower: Tower, side: nn.Module) -> Listener:
        if isinstance(side, PyramidUniPT) and self._projected(tower):
            return self._listener(tower, "grid", side, lambda seen: side(one_by_one(seen.maps)))
        if isinstance(side, PyramidUniPT):
            return self._listener(
                tower, "grid", side, lambda seen: _grid(tower, side(one_by_one(seen.maps)), seen.value)
            )
        if isinstance(side, VectorUniPT):
            compute = lambda seen: side(one_by_one(seen.maps), seen.mask, seen.value, seen.position)  # noqa: E731
            return self._listener(tower, "vector", side, compute)
        if isinstance(side, DecoderUniPT):

            def compute(seen: Seen) -> Tensor:
                # The anchor is the last level as it is handed on, behind the norm; the others without it. It is
                # copied, since a part of the stack would keep all of it for the backward pass.
                if side.levels:
                    seen.maps[-1] = seen.value[-1].clone()
                return side(one_by_one(seen.maps), seen.mask, seen.memory, seen.memory_mask)

            listener = self._listener(tower, "token", side, compute)
            listener.memory = self.listeners[str(tower.memory)]
            listener.memory.readers += 1
            return listener
        listener = self._listener(tower, "token", side, lambda seen: side(one_by_one(seen.maps), seen.mask))
        if isinstance(side.up, nn.Identity):
            listener.place = None  # the frozen decoder goes on reading the frozen encoder; its side reads this side
        return listener

    def _listener(self, tower: Tower, form: str, side: nn.Module, compute) -> Listener:
        place = tower.pooled if form == "vector" else tower.output
        if self._projected(tower):
            place = tower.projected
        elif isinstance(side, DecoderUniPT) and side.levels:
            place = tower.levels
        return Listener(self.name, tower, self._maps(tower, form), compute, place, next(side.parameters()).dtype)

    def _maps(self, tower: Tower, form: str) -> list[int]:
        """The hidden maps that are read, the last at the end."""
        count, chosen = len(tower.blocks), self.settings.layers
        if chosen is None and form == "grid":
            # A block of another shape starts a stage; the one before it is the last of its own.
            starts = [not b.keeps_shape or a.width != b.width for a, b in pairwise(tower.blocks)]
            return [i for i, start in enumerate(starts, 1) if start] + [count]
        if chosen is None:
            return list(range(count + 1))
        wrong = [i for i in chosen if not (form == "grid") <= i < count]
        if wrong or list(chosen) != sorted(set(chosen)):
            first = 1 if form == "grid" else 0
            raise ValueError(
                f"unipt: layers of tower {tower.name!r}: expected ascending numbers of {first}..{count - 1} (the last, "
                f"{count}, is always read), found {list(chosen)}"
            )
        return [*chosen, count]

    def _out(self, model: nn.Module, tower: Tower) -> int:
        """Channels of what stands in the place of a map of tokens, or of a grid that is handed on."""
        if self._projected(tower):
            return model.get_submodule(tower.projected.path).out_features  # type: ignore
        return _handed_on(model, tower)

    def _projected(self, tower: Tower) -> bool:
        """Whether the side network stands in the place of a linear map of the tokens, as in VSE."""
        if self.settings.form == "projected" and tower.projected is None:
            raise ValueError(f"unipt: tower {tower.name!r} has no linear map of its tokens: use another `form`")
        return tower.projected is not None and self.settings.form in ("auto", "projected")

    def _chosen(self, anatomy: Anatomy) -> tuple[str, ...]:
        return self.settings.towers or self.towers(anatomy)

    def _memory(self, anatomy: Anatomy, tower: Tower) -> bool:
        """Whether a tower is a decoder whose encoder gets a side network of tokens before it."""
        names = self._chosen(anatomy)
        if tower.memory not in names or tower.memory == tower.name:
            return False
        return _serves(anatomy.tower(str(tower.memory)), tower)

    def _read_by_another(self, anatomy: Anatomy, tower: Tower) -> bool:
        readers = [anatomy.tower(n) for n in self._chosen(anatomy) if anatomy.tower(n).memory == tower.name]
        return any(self._memory(anatomy, reader) for reader in readers)


def one_by_one(maps: list[Tensor]) -> Iterator[Tensor]:
    """The maps in their order; the list lets go of each, so that one of which a copy is kept is freed at once."""
    maps.reverse()
    while maps:
        yield maps.pop()


def _serves(encoder: Tower, reader: Tower) -> bool:
    """Whether one tower's side network can read the other's: paired towers have none of the other's result when they
    start, and what is attended to must be as wide as what attends."""
    widths = {b.width for b in encoder.blocks + reader.blocks}
    return encoder.memory is None and encoder.layout == "tokens" and len(widths) == 1


def _hands_on_vector(model: nn.Module, tower: Tower) -> bool:
    """Two-tower models hand on a projected vector; single-stream ones hand on tokens, from which poolers read."""
    return tower.pooled is not None and isinstance(model.get_submodule(tower.pooled.path), nn.Linear)


def _handed_on(model: nn.Module, tower: Tower) -> int:
    """Channels of the grid that a tower hands on: those that its projection takes, else the last block's."""
    projection = model.get_submodule(tower.pooled.path) if tower.pooled else None
    return projection.in_features if isinstance(projection, nn.Linear) else tower.blocks[-1].width


def _grid(tower: Tower, tokens: Tensor, value: Tensor) -> Tensor:
    """Tokens (B, n m, C) as the grid (B, C, n, m) that a tower hands on."""
    new = tokens.transpose(1, 2)
    if value.ndim != 4 or new.shape[1:] != value.flatten(2).shape[1:]:
        raise ValueError(
            f"unipt: tower {tower.name!r} hands on {tuple(value.shape)} at '{tower.output.path}', its side network "
            f"makes {tuple(new.shape)}: describe the tower up to its last grid"
        )
    return new.reshape(value.shape)
