"""Streams that are cut into pieces of their tokens, stand beside other tokens, or begin as one row for all samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.anatomy.seeing import parts, see
from tests.anatomy.test_sublayers_unusual import Mixer, Parts, X
from trimtab.anatomy import Anatomy


class Two(Parts):
    """With a part more."""

    def __init__(self, how) -> None:
        super().__init__(how)
        self.second = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.other = nn.Linear(8, 8)


def cut(b: Two, x: Tensor) -> Tensor:
    """A Q-Former's: queries and words have feed-forward parts of their own."""
    x = x + b.attn(b.n1(x))
    first, last = x[:, :2], x[:, 2:]
    return torch.cat([b.n2(first + b.mlp(first)), b.n3(last + b.second(last))], 1)


def split(b: Two, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    first, last = x.split([2, 3], 1)
    return torch.cat([first + b.mlp(b.n2(first)), last + b.second(b.n3(last))], 1)


def beside(b: Two, x: Tensor) -> Tensor:
    """X-CLIP's: a token that tells of the other frames stands beside the frame's for a while."""
    row = torch.cat([x, b.other(x[:, :1])], 1)
    row = row + b.attn(b.n1(row))
    x = row[:, :5]
    return x + b.mlp(b.n2(x))


TOLD = {
    "cut": (cut, [("attention", "n1>", "attn", 0), ("mlp", "mlp>", "mlp", 0), ("mlp", "second>", "second", 0)]),
    "split": (split, [("attention", "n1>", "attn", 0), ("mlp", "n2>", "mlp", 0), ("mlp", "n3>", "second", 0)]),
    "beside": (beside, [("attention", "n1>", "attn", 0), ("mlp", "n2>", "mlp", 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_parts_of_pieces_are_told(name):
    how, expected = TOLD[name]
    seen = see(Two(how), X)
    assert parts(seen) == expected and seen.notes == ()
    assert seen.complete and seen.keeps_shape and (seen.layout, seen.width) == ("tokens", 8)


def channels(b: Two, x: Tensor) -> Tensor:
    """Half of the channels, and the other half: no tokens."""
    first, last = x.chunk(2, -1)
    return torch.cat([first + b.attn(b.n1(x))[..., 4:], last], -1)


def crossed(b: Two, x: Tensor) -> Tensor:
    """A piece is added to another one: two ways lead back."""
    x = x + b.attn(b.n1(x))
    return torch.cat([x[:, :2] + x[:, 2:4], x[:, 2:]], 1)


REFUSED = {"channels": (channels, "followed through 'cat'"), "crossed": (crossed, "both sides of a sum")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_piece_of_tokens_is_refused(name):
    how, why = REFUSED[name]
    seen = see(Two(how), X)
    assert seen.sublayers == () and not seen.complete and any(why in note for note in seen.notes), seen.notes


def test_tokens_that_are_there_twice_are_no_stream_that_is_kept():
    seen = see(Two(lambda b, x: torch.cat([x + b.mlp(b.n2(x)), x], 1)), X)
    assert not seen.keeps_shape


class Wider(nn.Module):
    """A block in which the width changes: its stream begins in it, and has a part; `beside`: two that know nothing of
    each other."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.first, self.other, self.norm = nn.Linear(8, 12), nn.Linear(8, 12), nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + (self.other(x).relu() if self.beside else self.mlp(self.norm(y)))


def test_of_a_stream_that_begins_in_the_block_the_parts_after_that_are_told():
    seen = see(Wider(False), X)
    assert parts(seen) == [("mlp", "norm>", "mlp", 0)] and not seen.complete and not seen.keeps_shape
    assert seen.width == 12 and any("the stream cannot be followed through 'add'" in note for note in seen.notes)
    beside = see(Wider(True), X)
    assert beside.sublayers == () and not beside.complete


class Asking(nn.Module):
    """Queries that are the same for all samples until they have looked at them."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.n3 = (nn.LayerNorm(8) for _ in range(3))
        self.attn, self.mlp = Mixer(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        x = x + self.cross(self.n2(x).expand(len(memory), -1, -1), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.n3(x))


class Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.patches = nn.Parameter(torch.randn(1, 4, 8)), nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList(Asking() for _ in range(2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        memory, x = self.patches(pixel_values).flatten(2).transpose(1, 2), self.queries
        for layer in self.layers:
            x = layer(x, memory)
        return x


EXPECTED = [("attention", "n1>", "attn", 0), ("cross-attention", "n2>", "cross", 0), ("mlp", "n3>", "mlp", 0)]


def test_a_row_for_all_samples_becomes_one_of_each():
    seen = see(Asking(), X[:1], torch.randn(2, 6, 8))
    assert parts(seen) == EXPECTED and seen.complete and not seen.keeps_shape


@pytest.mark.parametrize("method", ["adapter", "parallel-adapter"])
def test_adapters_stand_where_a_row_becomes_many(method):
    model, pictures = Asked().eval(), torch.randn(2, 3, 8, 12)
    anatomy = Anatomy.of(model, {"pixel_values": pictures})
    fit = trimtab.adapt(model, anatomy=anatomy)
    fit.tune(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 6  # a norm and two layers for each part
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    out = model(pixel_values=pictures)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    alone = model(pixel_values=pictures[:1])
    assert torch.allclose(alone, out[:1], atol=1e-5)
