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

import uuid
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import AnatomyError, Block, Sublayer, Tap, arguments, read, rewrite
from trimtab.anatomy.structure import added_by, mark_added
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
        self.seen: Tensor | None = None  # the part's input, from its read until its write in the same pass

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": None}

    def read(self, x: Tensor) -> None:
        self.seen = x

    def write(self, out: Tensor) -> Tensor:
        seen, self.seen = self.seen, None
        return out + self.adapter(seen)


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
