"""What is seen of unusual blocks: told where it can be, named as unknown where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.anatomy.seeing import parts, see

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """Attention by the plain function, the module itself being all that can be tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Parts(nn.Module):
    """A block of the parts `attn` and `mlp`; `how` is its forward."""

    def __init__(self, how: Callable):
        super().__init__()
        self.n1, self.n2, self.n3 = (nn.LayerNorm(8) for _ in range(3))
        self.attn, self.mlp = Mixer(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.drop = nn.Dropout(0.5)
        self.gate = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.calls = 0
        self.how = how

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor | tuple:
        return self.how(self, x, *rest)


def pre(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.mlp(b.n2(x))


def in_place(b: Parts, x: Tensor) -> Tensor:
    y = b.attn(b.n1(x))
    y += x
    z = b.mlp(b.n2(y))
    return z.add_(y)


def on_its_argument(b: Parts, x: Tensor) -> Tensor:
    x += b.attn(b.n1(x))
    x += b.mlp(b.n2(x))
    return x


def rows(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    flat = x.view(-1, 8)
    return (b.drop(b.mlp(b.n2(x))).view(-1, 8) + flat).view(x.shape)


def weighted(b: Parts, x: Tensor) -> Tensor:
    x = torch.add(x, b.attn(b.n1(x)), alpha=0.5)
    return x + b.scale * b.mlp(b.n2(x))


def differences(b: Parts, x: Tensor) -> Tensor:
    x = x - b.attn(b.n1(x))
    return x + (b.mlp(b.n2(x)) + 1.0)


def beside(b: Parts, x: Tensor) -> Tensor:
    normed = b.n1(x)
    return x + b.drop(b.attn(normed) + b.mlp(normed))


def post(b: Parts, x: Tensor) -> Tensor:
    x = b.n1(x + b.attn(x))
    return b.n2(x + b.mlp(x))


def masked(b: Parts, x: Tensor) -> Tensor:
    x = (x + b.attn(b.n1(x))).masked_fill(torch.zeros(2, 5, 1, dtype=torch.bool), 0.0)
    return F.relu(x + b.mlp(b.n2(x)))


TOLD = {
    "pre": (pre, "n1>", "n2>"), "in place": (in_place, "n1>", "n2>"),
    "on its argument": (on_its_argument, "n1>", "n2>"),
    "rows": (rows, "n1>", "n2>"), "weighted": (weighted, "n1>", "n2>"), "differences": (differences, "n1>", "n2>"),
    "beside": (beside, "n1>", "n1>"), "post": (post, "attn>", "mlp>"), "masked": (masked, "n1>", "n2>"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_sums_are_found_however_they_are_written(name):
    how, first, second = TOLD[name]
    given = X.clone()
    seen = see(Parts(how), given)
    assert parts(seen) == [("attention", first, "attn", 0), ("mlp", second, "mlp", 0)], seen.notes
    assert seen.complete and seen.deterministic and seen.keeps_shape and torch.equal(given, X)
    assert (seen.width, seen.layout, seen.returns_tuple, seen.also) == (8, "tokens", False, ())
    scaled = [n for n in seen.notes if "'block.mlp' puts out is multiplied by a fixed factor" in n]
    assert seen.notes == tuple(scaled) and bool(scaled) == (name == "weighted")


def fused(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return torch.addmm(x.view(-1, 8), b.n2(x).view(-1, 8), b.weight).view(x.shape)


def gated(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.gate.tanh() * b.mlp(b.n2(x))


def open_gate(b: Parts, x: Tensor) -> Tensor:
    x = x + torch.sigmoid(b.gate).sqrt() * b.attn(b.n1(x))
    return (1 - b.scale.tanh()) * x + b.scale.tanh() * b.mlp(b.n2(x))


def drawn(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + (b.scale * torch.rand_like(b.scale)) * b.mlp(b.n2(x))


def foreign(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + torch.tensor(0.5).tanh() * b.mlp(b.n2(x))


def zero(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.gate * b.mlp(b.n2(x))


def bare(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.n2(x) @ b.weight


def twice(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.mlp(b.n2(x)) + b.mlp(x)


def turned(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + b.mlp(b.n2(x)).flip(1)


def spread(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return x + x.mean(1, keepdim=True)


def shared(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    y = b.mlp(b.n2(x))
    return x + y + y


def used(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    y = b.mlp(b.n2(x))
    return (x + y) * y.mean(-1, keepdim=True)


def silent(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    return torch.add(x, b.mlp(b.n2(x)), alpha=0.0)


def through_a_view(b: Parts, x: Tensor) -> Tensor:
    x = x + b.attn(b.n1(x))
    flat = x.view(-1, 8)
    flat += b.mlp(b.n2(x)).view(-1, 8)
    return x


def at_two_places(b: Parts, x: Tensor) -> Tensor:
    y = x + b.attn(b.n1(x))
    return y + b.mlp(b.n2(x) + b.n3(y))


UNKNOWN = {
    "at two places": (at_two_places, "was computed from the stream at 2 places"),
    "silent": (silent, "it is multiplied by 0 before it is added"),
    "shared": (shared, "it goes elsewhere too"),
    "used": (used, "it goes elsewhere too"),
    "fused": (fused, "'addmm' multiplies and adds at once"),
    "gated": (gated, "multiplied by what 'tanh' makes of parameters, a gate that has zeros"),
    "drawn": (drawn, "multiplied by a factor that 'mul' makes of random or new numbers"),
    "foreign": (foreign, "multiplied by a factor that 'tanh' computes from what is no parameter of the block"),
    "zero": (zero, "multiplied by a parameter that has zeros"),
    "bare": (bare, "no module that runs once puts it out in the shape of the stream (it comes from 'mm'"),
    "twice": (twice, "no module that runs once puts it out"),
    "turned": (turned, "it comes from 'flip'"),
    "spread": (spread, "a value of shape (2, 1, 8) that depends on the block's input is added to every token"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_sum_that_cannot_be_told_is_named_and_the_rest_is_seen(name):
    how, why = UNKNOWN[name]
    seen = see(Parts(how), X)
    assert parts(seen) == [("attention", "n1>", "attn", 0)] and not seen.complete
    assert any(why in note and note.startswith("block 'block': ") for note in seen.notes), seen.notes


def test_what_goes_through_an_open_gate_is_told():
    """A gate that parameters alone make, `tanh(g)`, is a fixed factor as long as none of its numbers is 0."""
    seen = see(Parts(open_gate), X)
    assert parts(seen) == [("attention", "n1>", "attn", 0), ("mlp", "n2>", "mlp", 0)] and seen.complete
    assert sum("is multiplied by a fixed factor" in note for note in seen.notes) == 2
    block = Parts(open_gate)
    with torch.no_grad():
        block.scale[3] = 0.0
    shut = see(block, X)
    assert [p.kind for p in shut.sublayers] == ["attention"] and not shut.complete
    assert any("a gate that has zeros" in note for note in shut.notes)


def both(b: Parts, x: Tensor) -> Tensor:
    return x + b.n1(x + b.attn(x))


def none(b: Parts, x: Tensor) -> Tensor:
    return b.mlp(x)


BROKEN = {"through a view": (through_a_view, "the stream cannot be followed through 'changed' in 'block'"),
          "both": (both, "both sides of a sum in 'block' carry the stream on"),
          "none": (none, "the stream cannot be followed through 'addmm' in 'block.mlp.2'")}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_cannot_be_followed_has_no_parts(name):
    how, why = BROKEN[name]
    seen = see(Parts(how), X)
    assert seen.sublayers == () and not seen.complete and seen.keeps_shape
    assert any(why in note for note in seen.notes), seen.notes


def test_a_module_that_returns_its_part_after_the_sum_is_not_where_to_write():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple:
            y = self.inner(self.norm(x))
            return x + y, y

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = Late()

        def forward(self, x: Tensor) -> Tensor:
            return self.late(x)[0]

    assert parts(see(Around(), X)) == [("mlp", "late.norm>", "late.inner", 0)]
