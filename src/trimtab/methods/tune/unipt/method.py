"""UniPT as a method: which side network a tower gets, and where it is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.methods.base import METHODS
from trimtab.methods.tune.beside import Beside, Stand
from trimtab.methods.tune.unipt.forms import Form, Site, form_of, serves
from trimtab.methods.tune.unipt.sides import initialise
from trimtab.settings import within

_KEPT = {"exact": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        within(vars(self), reduction="[1, inf)")

    @property
    def kept(self) -> torch.dtype | None:
        """The precision of kept maps; None for their own."""
        return _KEPT[self.keep_maps]


@METHODS.register("unipt")
class UniPT(Beside):
    """Side networks beside the frozen towers, attached through their taps."""

    Settings = UniPTSettings

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.one_token = self.settings.tokens == "first"

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Those that no other tower reads, and encoders all of whose readers' side networks read theirs."""
        unread = super().towers(anatomy)

        def is_encoder(tower: Tower) -> bool:
            readers = anatomy.readers(tower.name)
            return all(r.memory == tower.name and r.name in unread and serves(tower, r) for r in readers)

        return tuple(t.name for t in anatomy.towers if t.name in unread or is_encoder(t))

    def stand(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> Stand:
        chosen = self.settings.towers or self.towers(anatomy)
        site = Site(model, anatomy, tower, self.settings, chosen)
        form = form_of(site)
        if self.one_token:
            self._check_one_token(form, site)
        stand = form.stand(site)
        initialise(stand.side, self.settings.init)
        _freeze_gate(stand.side)
        return stand

    def _check_one_token(self, form: Form, site: Site) -> None:
        tower = site.tower
        readers = site.anatomy.readers(tower.name)
        why = (
            f"gets the form {type(form).__name__}, which hands on no single tokens" if not form.one_token
            else "is read at its last token" if tower.pooled_token == "last"
            else f"is read by tower {readers[0].name!r}" if readers
            else "is causal: its first token sees itself alone" if tower.causal
            else ""
        )  # fmt: skip
        if why:
            raise ValueError(f"unipt: `tokens: first` is for towers whose first token alone is read; tower "
                             f"{tower.name!r} {why}: use `all`")  # fmt: skip


@torch.no_grad()
def _freeze_gate(side: Any) -> None:
    """Do not train what no gradient can reach: a softmax over layers does not see what is added to all of them, and is
    always 1 where there is one."""
    side.gate.bias.requires_grad_(False).zero_()
    side.gate.weight.requires_grad_(side.layers > 1)
