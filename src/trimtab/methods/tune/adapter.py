"""Bottleneck adapters in the blocks, one after another or in parallel to the block's parts.

    sequential (Houlsby et al., ICML 2019; Pfeiffer et al., EACL 2021)     parallel (He et al., ICLR 2022)

    x -> attention -> a + Adapter(a) -(+)-> x                               x -> attention -> a + s Adapter(x) -(+)-> x

Adapter(x) = Linear(b, D)(relu(Linear(D, b)(LN(x)))). The LayerNorm at its start is DAS's form, which is used for all
three, so that they differ in where they stand alone; Houlsby's and He's own have none there. A part's own residual sum
may lie before the place of a sequential adapter (ViLT, BERT's feed-forward part); Pfeiffer's stands there by design.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Sublayer, read, rewrite
from trimtab.anatomy.structure import mark_added
from trimtab.methods.base import METHODS, Method, placed
from trimtab.methods.skip.adapters import Adapter
from trimtab.settings import within


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of sequential adapters."""

    bottleneck: int = 16
    """Width b between the two linear maps."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """`houlsby`: after every part of a block; `pfeiffer`: after the feed-forward part alone."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), bottleneck="[1, inf)")


@dataclass(frozen=True)
class ParallelAdapterSettings:
    """Settings of parallel adapters."""

    bottleneck: int = 16
    """Width b between the two linear maps."""
    parts: Literal["all", "attention", "mlp"] = "all"
    """Beside which parts of a block they stand."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), bottleneck="[1, inf)")


@dataclass(frozen=True)
class ScaledParallelAdapterSettings(ParallelAdapterSettings):
    """Settings of scaled parallel adapters."""

    scale: float = 4.0
    """Factor s of the adapter's output (He et al.: 4)."""
    parts: Literal["all", "attention", "mlp"] = "mlp"
    """Beside which parts of a block they stand (He et al.: the feed-forward part)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(vars(self), scale="(0, inf)")


class _Adapters(Method):
    """Adapters at the parts of every block; they are kept in the block as `<method>_0`, `<method>_1`, ..."""

    lever = "tune"
    trains = "added"
    changes = "inside"
    keeps = "its adapters stand in the blocks, where the model's own class has no place for them"

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        for block, parts in list(self._places(anatomy)):  # every tower is looked at before the first is changed
            for i, part in enumerate(parts):
                self._add(model, block, i, part)
        return anatomy

    def _places(self, anatomy: Anatomy) -> Iterator[tuple[Block, list[Sublayer]]]:
        """The blocks with the parts that get an adapter; ValueError if a tower or a block has none."""
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            tower = anatomy.tower(name)
            tower.need(self.name, "blocks", "layout", "gradient")
            if tower.layout == "grid":
                raise ValueError(f"{self.name}: tower {name!r} is a grid tower; adapters need tokens: name others")
            for block in tower.blocks:
                parts = [p for p in block.sublayers if self.chosen(p)]
                if not parts:
                    tower.need(self.name, "sublayers")
                    raise ValueError(
                        f"{self.name}: block '{block.path}' has no described part for it: give its `sublayers` in the "
                        "anatomy (docs/your-own-model.md)"
                    )
                yield block, parts

    def _add(self, model: nn.Module, block: Block, index: int, part: Sublayer) -> None:
        owner = model.get_submodule(block.path)
        adapter = placed(self.adapter(block.width), next(chain(owner.parameters(), model.parameters())))
        owner.add_module(f"{self.name.replace('-', '_')}_{index}", mark_added(adapter, self.name))
        self.place(model, part, adapter)

    def adapter(self, width: int) -> Adapter:
        return Adapter(width, self.settings.bottleneck, scale=getattr(self.settings, "scale", 1.0))

    def chosen(self, part: Sublayer) -> bool:
        wanted = self.settings.parts
        return wanted == "all" or (part.kind == "mlp") == (wanted == "mlp")

    def place(self, model: nn.Module, part: Sublayer, adapter: nn.Module) -> None:
        hook = _Parallel(adapter)
        read(model, part.read, hook.note)
        rewrite(model, part.write, hook.add)


class _Sequential:
    """Puts an adapter behind a part. An object and no closure, so that a copy of the model calls the copy's adapter.

    The adapter keeps its own precision, float32 in a model of half precision or of integers.
    """

    def __init__(self, adapter: nn.Module):
        self.adapter = adapter

    def change(self, out: Tensor) -> Tensor:
        return self.adapter(out.to(self._dtype)).to(out.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.adapter.parameters()).dtype


class _Parallel(_Sequential):
    """Adds what an adapter makes of a part's input to what the part puts out."""

    def __init__(self, adapter: nn.Module):
        super().__init__(adapter)
        self.seen: Tensor | None = None  # the part's input, from its read until its write in the same pass

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": None}

    def note(self, value: Tensor) -> None:
        self.seen = value

    def add(self, out: Tensor) -> Tensor:
        seen, self.seen = self.seen, None
        assert seen is not None
        return out + self.change(seen).to(out.dtype)


@METHODS.register("adapter")
class SequentialAdapter(_Adapters):
    """Bottleneck adapters after the parts of every block (Houlsby's or Pfeiffer's places)."""

    Settings = AdapterSettings

    def chosen(self, part: Sublayer) -> bool:
        return self.settings.placement == "houlsby" or part.kind == "mlp"

    def adapter(self, width: int) -> Adapter:
        return Adapter(width, self.settings.bottleneck, residual=True)

    def place(self, model: nn.Module, part: Sublayer, adapter: nn.Module) -> None:
        rewrite(model, part.write, _Sequential(adapter).change)


@METHODS.register("parallel-adapter")
class ParallelAdapter(_Adapters):
    """Bottleneck adapters that read a part's input and are added to its output."""

    Settings = ParallelAdapterSettings


@METHODS.register("scaled-parallel-adapter")
class ScaledParallelAdapter(_Adapters):
    """The same, scaled, beside the feed-forward parts."""

    Settings = ScaledParallelAdapterSettings
