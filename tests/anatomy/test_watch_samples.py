"""Which axis of a stream holds samples, where numbers alone do not tell: seen by who moves with whom, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.anatomy.test_watch_broken import Block, D
from trimtab.anatomy import Anatomy, AnatomyError


class Reader(Block):
    """Tokens read a memory, and do not see each other."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        scores = self.query(self.norm(x)) @ self.key(memory).transpose(-1, -2)
        x = x + self.out(scores.softmax(-1) @ self.value(memory))
        return x + self.down(self.up(self.norm2(x)).relu())


class Alone(Block):
    """Tokens neither see each other nor read anything."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x + self.down(self.up(self.norm2(x)).relu())


class Turned(Block):
    """Its stream is (L, B, D)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x.transpose(0, 1), bias).transpose(0, 1)


class Few(nn.Module):
    """As many tokens as samples."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.places = nn.Conv2d(3, D, 4, 4), nn.Conv2d(3, D, 2, 2)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.head, self.reads, self.turns = nn.Linear(D, 3), kind is Reader, kind is Turned

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = x.transpose(0, 1) if self.turns else x
        memory = self.places(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, memory) if self.reads else layer(x)
        return self.head(x.transpose(0, 1) if self.turns else x)


def samples(model: nn.Module, pictures: Tensor) -> str:
    """Why the samples' axis of the only tower is unknown; empty if it is known."""
    (tower,) = Anatomy.of(model.eval(), {"pixel_values": pictures}).towers
    return dict(tower.unknown).get("samples", "")


@pytest.mark.parametrize("size", [(4, 8), (8, 8)], ids=["two tokens", "four"])
@pytest.mark.parametrize("kind", [Block, Reader])
def test_as_many_tokens_as_samples_are_told_by_who_moves_with_whom(kind, size):
    rows = size[0] * size[1] // 16
    assert samples(Few(kind), torch.randn(rows, 3, *size)) == ""


@pytest.mark.parametrize("kind", [Alone, Turned])
def test_as_many_tokens_as_samples_are_refused_where_nothing_tells(kind):
    pictures = torch.randn(4, 3, 8, 8)
    model = Few(kind)
    assert "as many tokens as samples; give another number" in samples(model, pictures)
    with pytest.raises(AnatomyError, match="`samples` of tower 'vision' is unknown"):
        trimtab.adapt(model, example={"pixel_values": pictures}).prune(
            "multiflow", sparsity=0.5, batches=[{"pixel_values": pictures}]
        )


class Frames(nn.Module):
    """Frames of videos, one after another, that see each other through a mean; `across`: those of other videos too."""

    def __init__(self, across: bool = False, turned: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, D, 4, 4)
        self.layers = nn.ModuleList(Telling(across, turned) for _ in range(2))
        self.head, self.turned = nn.Linear(D, 3), turned

    def forward(self, pixel_values: Tensor) -> Tensor:
        videos = pixel_values.transpose(0, 1) if self.turned else pixel_values
        x = self.patches(videos.flatten(0, 1)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        x = x.mean(1).unflatten(0, videos.shape[:2])
        return self.head(x.mean(0 if self.turned else 1))


class Telling(Block):
    def __init__(self, across: bool, turned: bool):
        super().__init__()
        self.tell, self.shape = nn.Linear(D, D), (1, 6) if across else (3, 2) if turned else (2, 3)
        self.axis = 0 if turned else 1

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        others = self.tell(x[:, 0]).unflatten(0, self.shape).mean(self.axis, keepdim=True)
        others = others.expand(*self.shape, D).flatten(0, 1)[:, None]
        return super().forward(torch.cat([x, others], 1), bias)[:, :-1]


VIDEOS = torch.randn(2, 3, 3, 8, 8)


def test_rows_of_one_sample_may_see_each_other():
    model = Frames().eval()
    (tower,) = Anatomy.of(model, {"pixel_values": VIDEOS}).towers
    assert tower.samples is None and tower.knows("samples", "mask", "causal")
    assert {tuple(p.kind for p in b.sublayers) for b in tower.blocks} == {("attention", "mlp")}
    fit = trimtab.adapt(model, example={"pixel_values": VIDEOS})
    fit.prune("multiflow", sparsity=0.5, batches=[{"pixel_values": VIDEOS}])
    fit.tune("adapter")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert 0.45 < fit.masks.sparsity < 0.55
        both = model(pixel_values=VIDEOS)
        for layer in model.layers:
            layer.shape = (1, 3)
        assert torch.allclose(model(pixel_values=VIDEOS[:1]), both[:1], atol=1e-5)


@pytest.mark.parametrize("how", [{"across": True}, {"turned": True}], ids=["across videos", "frame by frame"])
def test_rows_that_see_those_of_other_samples_are_refused(how):
    why = samples(Frames(**how), VIDEOS)
    assert "a row of its stream (6, 4, 16) moves when one of another sample is changed" in why
