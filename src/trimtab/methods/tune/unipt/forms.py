"""Which form of UniPT a tower gets: the forms are tried in order, and the first that fits is taken.

| form | fits | reads | in the place of |
|---|---|---|---|
| `ProjectedGrid` | a grid tower with a linear map of its cells behind it (VSE) | a grid of each size | that map |
| `Grid` | any other grid tower | the same | the last grid |
| `Projected` | a token tower with a linear map of its tokens behind it (VSE's texts) | all maps | that linear map |
| `Vector` | a token tower that ends in a linear projection of one vector (CLIP) | all maps | the vector |
| `Decoder` | a token tower that reads one with a side network of its own (T5, MDETR) | all maps | tokens, or levels |
| `Encoder` | that other tower | all maps | nothing: the decoder's side network reads the result |
| `Tokens` | any other token tower | all maps | its tokens |

"All maps" of a token tower of several widths (Swin, PVT) are the last one of each: what its stages hand on. Each map
has a linear map of its own, as in the published code.

A new form is a class with four methods and a place in `FORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from trimtab.anatomy import Anatomy, Tap, Tower
from trimtab.methods.tune.beside import Stand, stages, token_misfit
from trimtab.methods.tune.unipt.sides import (
    PUBLISHED,
    Computation,
    DecoderUniPT,
    GridUniPT,
    PyramidUniPT,
    TokenUniPT,
    VectorUniPT,
)

if TYPE_CHECKING:
    from trimtab.methods.tune.unipt.method import UniPTSettings


@dataclass(frozen=True)
class Site:
    """A tower for which a side network is wanted.

    Attributes:
        model: that has it.
        anatomy: of the model.
        tower: itself.
        settings: of UniPT.
        chosen: names of all towers that get a side network.
    """

    model: nn.Module
    anatomy: Anatomy
    tower: Tower
    settings: UniPTSettings
    chosen: Sequence[str]

    def computation(self, base: Computation) -> Computation:
        """How a side network computes here."""
        s = self.settings
        return replace(base, keep=s.keep_scores, kept=s.kept, skip_padding=s.skip_padding, causal=self.tower.causal)

    def linear(self, tap: Tap | None) -> nn.Linear | None:
        """The linear map at a tap, if there is one."""
        module = None if tap is None else self.model.get_submodule(tap.path)
        return module if isinstance(module, nn.Linear) else None


class Form(ABC):
    """One form of UniPT. Stateless: the methods are given the site.

    Attributes:
        settings: values of the setting `form` with which it is tried.
        one_token: whether it can hand on the first token alone.
    """

    settings: ClassVar[tuple[str, ...]]
    one_token: ClassVar[bool] = False

    @abstractmethod
    def misfit(self, site: Site) -> str:
        """Why it does not fit a tower; empty if it does."""

    @abstractmethod
    def side(self, site: Site, layers: int) -> nn.Module:
        """The side network that attends to so many maps, beside the last."""

    @abstractmethod
    def place(self, site: Site) -> Tap | None:
        """The output that it replaces."""

    def memory(self, site: Site) -> str | None:
        """The tower whose side network's result it reads."""
        return None

    def maps(self, site: Site) -> list[int]:
        """The hidden maps that it reads, the last at the end."""
        blocks = site.tower.blocks
        several = len({b.width for b in blocks}) > 1 or any(b.begins for b in blocks)
        first = 1 if several and not blocks[0].keeps_shape else 0  # the width of what enters is not known then
        every = [*sorted(stages(blocks)), len(blocks)] if several else list(range(len(blocks) + 1))
        return _chosen_maps(site, first) or every

    def stand(self, site: Site) -> Stand:
        """The side network in its place."""
        maps = self.maps(site)
        return Stand(self.side(site, len(maps) - 1), maps, self.place(site), self.memory(site))


class Grid(Form):
    settings = ("auto", "token")

    def misfit(self, site: Site) -> str:
        return "" if site.tower.layout == "grid" else f"tower {site.tower.name!r} is no grid tower"

    def maps(self, site: Site) -> list[int]:
        tower = site.tower
        maps = _chosen_maps(site, 1) or [*sorted(stages(tower.blocks)), len(tower.blocks)]
        if len(maps) < 2:
            raise ValueError(
                f"unipt: all blocks of tower {tower.name!r} put out grids of one size, expected larger ones, of which "
                "the last guides the pooling: tune it in another way (bitfit, norm-tuning)"
            )
        return maps

    def side(self, site: Site, layers: int) -> nn.Module:
        # Channels that the projection behind the tower takes, else the last block's.
        projection = site.linear(site.tower.pooled)
        return self._pyramid(GridUniPT, site, projection.in_features if projection else site.tower.blocks[-1].width)

    def _pyramid(self, kind: type[PyramidUniPT], site: Site, out: int) -> nn.Module:
        widths = [site.tower.blocks[i - 1].width for i in self.maps(site)]
        return kind(widths, out, site.settings.reduction, site.computation(PUBLISHED["vse-image"]))

    def place(self, site: Site) -> Tap | None:
        return site.tower.output


class ProjectedGrid(Grid):
    settings = ("auto", "projected")

    def misfit(self, site: Site) -> str:
        return _no_map(site) or super().misfit(site)

    def side(self, site: Site, layers: int) -> nn.Module:
        return self._pyramid(PyramidUniPT, site, _map_width(site))

    def place(self, site: Site) -> Tap | None:
        return site.tower.projected


class Tokens(Form):
    settings = ("auto", "token")
    one_token = True

    def misfit(self, site: Site) -> str:
        return _misfit(site)

    def side(self, site: Site, layers: int) -> nn.Module:
        s = site.settings
        base = Computation(projection=s.projection, first=s.tokens == "first")
        return TokenUniPT(_widths(self, site), layers, s.reduction, site.computation(base))

    def place(self, site: Site) -> Tap | None:
        return site.tower.output


class Projected(Tokens):
    settings = ("auto", "projected")
    one_token = False

    def misfit(self, site: Site) -> str:
        return _misfit(site) or _no_map(site)

    def side(self, site: Site, layers: int) -> nn.Module:
        how = site.computation(PUBLISHED["vse-text"])
        return TokenUniPT(_widths(self, site), layers, site.settings.reduction, how, _map_width(site))

    def place(self, site: Site) -> Tap | None:
        return site.tower.projected


class Vector(Form):
    settings = ("auto", "vector")

    def misfit(self, site: Site) -> str:
        tower = site.tower
        if reason := _misfit(site):
            return reason
        if tower.pooled is None:
            return f"tower {tower.name!r} hands on no vector: use form 'token'"
        if site.linear(tower.pooled) is None:  # single-stream models hand on tokens, from which poolers read
            return f"form 'vector' needs a linear projection at '{tower.pooled.path}'"
        return ""

    def side(self, site: Site, layers: int) -> nn.Module:
        linear = site.linear(site.tower.pooled)
        assert linear is not None
        how = site.computation(Computation())
        return VectorUniPT(_widths(self, site), layers, linear.out_features, site.settings.reduction, how)

    def place(self, site: Site) -> Tap | None:
        return site.tower.pooled


class Decoder(Tokens):
    one_token = False

    def misfit(self, site: Site) -> str:
        return _misfit(site) or ("" if _reads_a_side(site, site.tower) else "no tower that it reads is tuned")

    def side(self, site: Site, layers: int) -> nn.Module:
        s, levels = site.settings, site.tower.levels is not None
        base = replace(PUBLISHED["mdetr-decoder"] if levels else Computation(), projection=s.projection)
        return DecoderUniPT(_widths(self, site), layers, s.reduction, site.computation(base), levels=levels)

    def memory(self, site: Site) -> str | None:
        return site.tower.memory

    def place(self, site: Site) -> Tap | None:
        return site.tower.levels or site.tower.output


class Encoder(Tokens):
    one_token = False

    def misfit(self, site: Site) -> str:
        readers = (site.anatomy.tower(n) for n in site.chosen)
        read = any(r.memory == site.tower.name and _reads_a_side(site, r) for r in readers)
        return _misfit(site) or ("" if read else "no side network reads it")

    def side(self, site: Site, layers: int) -> nn.Module:
        s = site.settings
        base = replace(PUBLISHED["mdetr-encoder"], projection=s.projection)
        return TokenUniPT(_widths(self, site), layers, s.reduction, site.computation(base))

    def place(self, site: Site) -> Tap | None:
        return None  # the frozen decoder goes on reading the frozen encoder; its side reads this side


FORMS: tuple[Form, ...] = (ProjectedGrid(), Grid(), Projected(), Vector(), Decoder(), Encoder(), Tokens())


def form_of(site: Site) -> Form:
    """The first form that fits; ValueError with the last one's reason if none does."""
    reason = ""
    for form in FORMS:
        if site.settings.form in form.settings:
            reason = form.misfit(site)
            if not reason:
                return form
    raise ValueError(reason if reason.startswith("unipt: ") else f"unipt: {reason}")


def serves(encoder: Tower, reader: Tower) -> bool:
    """Whether one tower's side network can read the other's: paired towers have none of the other's result when they
    start, and what is attended to must be as wide as what attends."""
    alike = encoder.blocks[-1].width == reader.blocks[-1].width
    return encoder.memory is None and encoder.layout == "tokens" and alike


def _reads_a_side(site: Site, tower: Tower) -> bool:
    """Whether a tower is a decoder whose encoder gets a side network of tokens before it."""
    memory = tower.memory
    return memory in site.chosen and memory != tower.name and serves(site.anatomy.tower(str(memory)), tower)


def _misfit(site: Site) -> str:
    """Why a tower is none of tokens, samples first."""
    return token_misfit("unipt", site.tower)


def _widths(form: Form, site: Site) -> list[int]:
    """The width of each map that a form reads; what enters the first block is as wide as what it puts out."""
    return [site.tower.blocks[max(i - 1, 0)].width for i in form.maps(site)]


def _no_map(site: Site) -> str:
    if site.tower.projected is not None:
        return ""
    return f"tower {site.tower.name!r} has no linear map of its tokens: use another `form`"


def _map_width(site: Site) -> int:
    """Width into which the linear map behind a tower takes tokens."""
    assert site.tower.projected is not None
    return site.model.get_submodule(site.tower.projected.path).out_features  # type: ignore[return-value]


def _chosen_maps(site: Site, first: int) -> list[int] | None:
    """The maps that the settings name, and the last; ValueError if one is not there."""
    count, chosen = len(site.tower.blocks), site.settings.layers
    if chosen is None:
        return None
    if any(not first <= i < count for i in chosen) or list(chosen) != sorted(set(chosen)):
        raise ValueError(
            f"unipt: layers of tower {site.tower.name!r}: expected ascending numbers of {first}..{count - 1} (the "
            f"last, {count}, is always read), found {list(chosen)}"
        )
    return [*chosen, count]
