"""What kind a part is, streams of several kinds, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.anatomy.seeing import parts, see
from tests.anatomy.test_sublayers_unusual import Parts, X, pre
from trimtab.anatomy import AnatomyError, Block
from trimtab.anatomy.seen.sublayers import see_sublayers

# --- kinds ------------------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Attention from x to memory, and what stands beside it: positions of either."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, places: Tensor | None = None) -> Tensor:
        query = self.norm(x)
        key = memory if places is None else memory + places
        return x + self.attn(query, key, memory, need_weights=False)[0]


def test_cross_attention_is_told_from_attention():
    memory = torch.randn(2, 3, 8)
    seen = see(Cross(), X, memory)
    assert parts(seen) == [("cross-attention", "norm>", "attn", 0)] and seen.sublayers[0].write.key == 0
    assert see(Cross(), X, X).sublayers[0].kind == "attention"  # the stream itself, passed twice
    with_places = see(Cross(), X, memory, places=torch.randn(2, 3, 8))
    assert [n.split("argument ")[1][:8] for n in with_places.notes] == ["'memory'"]


def test_memory_beside_the_stream_in_one_row_is_memory():
    """Perceivers: tokens look at memory and at each other."""

    def joined(b: Parts, x: Tensor, memory: Tensor) -> Tensor:
        row = torch.cat([memory, b.n1(x)], 1)
        return x + b.drop(F.scaled_dot_product_attention(b.n2(x), row @ b.weight, row @ b.weight))

    class Joined(Parts):
        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.how(self, x, memory)

    seen = see(Joined(joined), X, torch.randn(2, 3, 8))
    assert [p.kind for p in seen.sublayers] == ["cross-attention"] and "'memory'" in seen.notes[0]


def test_positions_are_no_memory():
    def placed(b: Parts, x: Tensor, places: Tensor) -> Tensor:
        normed = b.n1(x)
        query, key = normed + F.linear(places, b.weight), normed + F.linear(places, b.weight)
        return x + b.drop((query @ key.transpose(1, 2)).softmax(-1) @ normed)

    seen = see(Parts(placed), X, torch.randn(2, 5, 8))
    assert [p.kind for p in seen.sublayers] == ["attention"] and seen.notes == ()


def test_torch_layers():
    """The fused path of torch's encoder layer is not taken where hooks are set; streams may be (L, B, D)."""
    for first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=first)
        encoder = see(layer, X if first else X.transpose(0, 1), stream="src")
        assert parts(encoder) == [("attention", "self_attn>", "self_attn", 0), ("mlp", "linear1>", "linear2", 0)]
        assert encoder.complete and encoder.deterministic and torch.backends.mha.get_fastpath_enabled()
    decoder = see(nn.TransformerDecoderLayer(8, 2, 16), X.transpose(0, 1), torch.randn(3, 2, 8), stream="tgt")
    assert [p.kind for p in decoder.sublayers] == ["attention", "cross-attention", "mlp"] and decoder.complete


def test_one_token_does_not_tell_whether_tokens_mix():
    seen = see(Parts(pre), X[:, :1])
    assert seen.sublayers == () and not seen.complete
    assert sum("the example has one token" in note for note in seen.notes) == 2
    row = see(Parts(lambda b, x: x + b.mlp(b.n2(x))), X[0, :1])
    assert row.sublayers == () and "the example has one token" in row.notes[0]


def test_tokens_that_all_look_at_themselves_do_not_make_an_mlp():
    def alone(b: Parts, x: Tensor) -> Tensor:
        return x + b.drop(F.scaled_dot_product_attention(x, b.n1(x), b.n1(x), torch.eye(5).bool()))

    seen = see(Parts(alone), X)
    assert seen.sublayers == () and "no token moved another one" in seen.notes[0]


def test_tokens_in_one_row_are_told():
    """OPT: the feed-forward part works on (B L, D), in and out."""

    def flat(b: Parts, x: Tensor) -> Tensor:
        x = (x + b.attn(b.n1(x))).view(-1, 8)
        return (x + b.mlp(b.n2(x))).view(2, 5, 8)

    seen = see(Parts(flat), X)
    assert parts(seen) == [("attention", "n1>", "attn", 0), ("mlp", "n2>", "mlp", 0)] and seen.complete
    assert len(seen.notes) == 1 and "puts its part out in the shape (10, 8)" in seen.notes[0]


def test_dead_parts_stay_unknown():
    block = Parts(pre)
    nn.init.zeros_(block.attn.out.weight)
    seen = see(block, X)
    assert [p.kind for p in seen.sublayers] == ["mlp"] and "does not move when the stream changes" in seen.notes[0]


# --- streams and what is handed on ------------------------------------------------------------------------------------


def test_two_streams_each_with_its_parts():
    def pair(b: Parts, x: Tensor, y: Tensor) -> tuple:
        return x + b.attn(b.n1(x)), y + b.mlp(b.n2(y)), None

    class Pair(Parts):
        def forward(self, x: Tensor, y: Tensor) -> tuple:
            return self.how(self, x, y)

    seen = see(Pair(pair), X, torch.randn(2, 3, 8))
    assert parts(seen) == [("attention", "n1>", "attn", 0), ("mlp", "n2>", "mlp", 1)] and seen.complete
    assert seen.also == ("y", "output_2") and seen.returns_tuple and seen.keeps_shape and seen.made == ()


def test_what_is_made_anew_is_told():
    def weights(b: Parts, x: Tensor) -> tuple:
        return pre(b, x), b.n1(x).softmax(-1)

    seen = see(Parts(weights), X)
    assert seen.made == (1,) and not seen.keeps_shape and seen.complete and len(seen.sublayers) == 2
    assert "element 1 of what it returns is none of its arguments" in seen.notes[0]
    second = see(Parts(lambda b, x: (None, pre(b, x))), X)
    assert second.sublayers == () and not second.keeps_shape and not second.complete
    shaped = see(Parts(lambda b, x: {"out": pre(b, x)}), X)
    assert not shaped.keeps_shape and "it returns a dict" in shaped.notes[0]


def test_grids_have_no_parts_but_a_width():
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x).relu()

    seen = see(Grid(), torch.randn(2, 8, 4, 4))
    assert (seen.layout, seen.width, seen.keeps_shape, seen.sublayers) == ("grid", 8, True, ())
    assert "parts are told for tokens only" in seen.notes[-1]
    last = see(Parts(lambda b, x: x + b.mlp(b.n2(x))), torch.randn(2, 4, 4, 8))
    assert (last.layout, last.width) == ("map", 8) and [p.kind for p in last.sublayers] == ["mlp"]


# --- refused, or said -------------------------------------------------------------------------------------------------


def test_random_numbers_are_held_and_state_is_said():
    noisy = see(Parts(lambda b, x: pre(b, x) + 0 * torch.randn(1)), X)
    assert noisy.deterministic and noisy.complete
    random = see(Parts(lambda b, x: pre(b, x) * torch.rand(1)), X)
    assert not random.deterministic and len(random.sublayers) == 2

    def counting(b: Parts, x: Tensor) -> Tensor:
        b.calls += 1
        return pre(b, x) * b.calls

    kept = see(Parts(counting), X)
    assert not kept.deterministic and kept.sublayers == () and not kept.complete
    assert "keeps something from call to call" in kept.notes[0]


def test_bad_calls_are_named():
    model = nn.ModuleDict({"block": Parts(pre)})
    with pytest.raises(AnatomyError, match="block 'block': expected it in evaluation mode, found 'itself' in training"):
        see_sublayers(model, Block("block", 8, stream="x"), (X,), {})
    model.eval()
    with pytest.raises(AnatomyError, match="called without its stream: expected 'x', found \\(\\)"):
        see_sublayers(model, Block("block", 8, stream="x"), (), {})
    with pytest.raises(AnatomyError, match=r"cannot be run by itself .*Tensor\(2, 5, 7\).* without a key-value cache"):
        see_sublayers(model, Block("block", 8, stream="x"), (X[..., :7],), {})
