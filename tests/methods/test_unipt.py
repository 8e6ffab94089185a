"""UniPT: the lean computation against the plain one, and its sizes."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from trimtab.counting import saved_bytes
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt import (
    PUBLISHED,
    Computation,
    DecoderUniPT,
    GridUniPT,
    PyramidUniPT,
    TokenUniPT,
    VectorUniPT,
)
from trimtab.methods.tune.unipt.core import attend
from trimtab.methods.tune.unipt.down import Target
from trimtab.methods.tune.unipt.plain import plain

spec = importlib.util.spec_from_file_location("literal", Path(__file__).parents[2] / "benchmarks" / "unipt.py")
literal = importlib.util.module_from_spec(spec)
sys.modules["literal"] = literal
spec.loader.exec_module(literal)


def parts() -> dict[str, literal.Part]:
    """Small inputs of every kind; a sample without any valid token among them."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).float()
    nearly = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]).float()
    padded = torch.tensor([1.0, 1, 1, 1, 1, 0])  # a column that is padding in all samples
    at = torch.tensor([3, 5, 0])
    maps, shown = literal.states(3, 6, 12, 4), literal.shown
    grids = [torch.randn(2, c, 2 * r, 3 * r) for c, r in ((4, 8), (6, 4), (8, 2), (10, 1))]

    def decoded(mask_: torch.Tensor | None = None) -> Seen:
        queries = literal.states(3, 5, 12, 4)
        return Seen(queries, mask_, queries[-1][None], memory=torch.randn(3, 6, 6), memory_mask=mask)

    how, plain = PUBLISHED["clip-vil"], replace(PUBLISHED["clip-vil"], skip_padding=False)
    first = replace(how, first=True)
    made = {
        "vse-text": (TokenUniPT(12, 3, 2, replace(PUBLISHED["vse-text"], skip_padding=False), 8), shown(maps, mask)),
        "clip-vil": (TokenUniPT(12, 3, 2, plain), shown(maps, mask)),
        "first-token": (TokenUniPT(12, 3, 2, first), shown(maps, mask)),
        "first-of-all": (TokenUniPT(12, 3, 2, replace(first, projection="single")), shown(maps)),
        "skip": (TokenUniPT(12, 3, 2, how), shown(maps, mask * padded)),
        "skip-causal": (TokenUniPT(12, 3, 2, Computation(causal=True)), shown(maps, mask * padded)),
        "skip-less": (TokenUniPT(12, 3, 2, how), shown(maps, nearly)),
        "single": (TokenUniPT(12, 3, 2, Computation("single")), shown(maps)),
        "vector": (VectorUniPT(12, 3, 8, 1), Seen(maps, mask, torch.randn(3, 8), at)),
        "first": (VectorUniPT(12, 3, 8, 2), Seen(maps, None, torch.randn(3, 8))),
        "half": (VectorUniPT(12, 3, 8, 1), Seen([m.half() for m in maps], mask, torch.randn(3, 8), at)),
        "pyramid": (PyramidUniPT([4, 6, 8, 10], 8, 2), shown(grids)),
        "decoder": (DecoderUniPT(12, 3, 2, PUBLISHED["mdetr-decoder"], levels=True), decoded()),
        "decoder-tokens": (DecoderUniPT(12, 3, 2), decoded(torch.ones(3, 5))),
        "grid": (GridUniPT([4, 6, 8, 10], 10, 2), shown(grids)),
    }
    wide = [torch.randn(3, 6, d) for d in (10, 14, 12)]
    stages = [torch.randn(3, n, d) for n, d in ((24, 6), (12, 8), (6, 8), (6, 12))]  # two maps of the last stage
    made |= {
        "widths": (TokenUniPT([10, 14, 12], 2, 2, how, 8), shown(wide, mask)),
        "widths-vector": (VectorUniPT([10, 14, 12], 2, 8, 1), Seen(wide, mask, torch.randn(3, 8), at)),
        "stages": (TokenUniPT([6, 8, 8, 12], 3, 2, how), shown(stages)),
        "stages-first": (TokenUniPT([6, 8, 8, 12], 3, 2, first), shown(stages)),
        "stages-vector": (VectorUniPT([6, 8, 8, 12], 3, 8, 1), Seen(stages, None, torch.randn(3, 8), at)),
    }
    return {
        k: literal.Part(k, side.double(), cast(seen, torch.float32, torch.float64), 1, reader(side, seen))
        for k, (side, seen) in made.items()
    }


def reader(side: nn.Module, seen: Seen):
    """What may be read of the tokens that a side network hands on."""
    if not isinstance(side, TokenUniPT) or isinstance(side, DecoderUniPT):
        return lambda out: out
    mask = seen.mask
    if side.how.first:
        return lambda out: out[:, :1] if mask is None else out[:, :1] * mask[:, :1, None]
    return literal.valid(mask) if side.how.skip_padding and mask is not None else lambda out: out


def cast(seen: Seen, of: torch.dtype, to: torch.dtype) -> Seen:
    """In double precision, where rounding is no difference, and back; maps in half precision stay."""

    def one(value):
        if isinstance(value, list):
            return [one(v) for v in value]
        return value.to(to) if value is not None and value.dtype == of else value

    return Seen(**{f.name: one(getattr(seen, f.name)) for f in fields(seen)})


def single(part: literal.Part) -> literal.Part:
    return replace(part, side=part.side.float(), inputs=cast(part.inputs, torch.float64, torch.float32))


def computed(side: nn.Module, **changes) -> None:
    side.how = replace(side.how, **changes)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", [n for n in parts() if n != "skip-causal"])  # which is ours
def test_is_what_the_published_computation_gives(name, keep):
    part = parts()[name]
    computed(part.side, keep=keep)
    errors = literal.compare(part)
    assert errors["output_error"] < 1e-10 and errors["gradient_error"] < 1e-8


# Not `vse-text`: a row of its scores nearly vanishes, and what is divided by its sum has no digits left in bfloat16.
NAMES = ["clip-vil", "skip", "skip-causal", "first-token", "single", "vector", "first", "half", "pyramid", "decoder"]


@pytest.mark.parametrize("name", NAMES)
def test_learns_the_same_in_mixed_precision(name):
    """In bfloat16 under autocast, as recipes of `precision: auto` train: the same direction of the gradient."""
    part = single(parts()[name])
    side = part.side

    def gradient() -> torch.Tensor:
        side.zero_grad()
        side(part.seen).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for n, p in side.named_parameters() if n != "gate.bias"])

    exact = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = side(part.seen).float()
    side.zero_grad()
    out.square().mean().backward()
    mixed = torch.cat([p.grad.flatten() for n, p in side.named_parameters() if n != "gate.bias"])
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.98


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["clip-vil", "skip", "stages", "decoder"])
@pytest.mark.parametrize("size", [1, 2 * 6 * 4, 4 * 6 * 4, 2 * 6 * 6 * 4])
def test_samples_and_rows_are_looked_at_in_blocks_of_any_size(monkeypatch, size, name, keep):
    from trimtab.methods.tune.unipt import core

    part = parts()[name]
    computed(part.side, keep=keep)
    whole = part.side(part.seen)
    monkeypatch.setitem(core.CACHE_BYTES, "cpu", size)
    assert torch.allclose(part.side(part.seen), whole, atol=1e-10)
    assert literal.compare(part)["gradient_error"] < 1e-8


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_attention_are_exact(causal, skip, keep):
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1 - skip]]).double()  # a token that no sample has
    shape = (2, 4 if causal else 1, 2)
    targets = [(torch.randn(2, 4, 3), torch.rand(3) + 0.5, torch.randn(3)) for _ in range(2)]
    inputs = [torch.rand(shape) + 0.1, *(t for target in targets for t in target), torch.randn(2, 4, 3)]
    inputs = [i.double().requires_grad_() for i in inputs]

    def function(confidence, *flat):
        anchor, *layers = (Target(*flat[i : i + 3]) for i in range(0, len(flat), 3))  # the last as it is
        return attend(anchor, layers, mask, 1e-6, True, causal, confidence, keep, skip)

    assert torch.autograd.gradcheck(function, inputs)


def test_padding_is_handed_on_as_zeros_and_costs_nothing():
    torch.manual_seed(0)
    side, maps = TokenUniPT(32, 3, 2), literal.states(4, 12, 32, 4)
    mask = literal.padded(4, 12, 3)
    shown = literal.shown
    out = side(shown(list(maps), mask))
    assert not out[mask == 0].any() and out[mask == 1].any(dim=-1).all()
    for m in maps:
        m[mask == 0] = torch.nan
    assert torch.equal(side(shown(list(maps), mask)), out)  # it is not even looked at
    computed(side, skip_padding=False)
    assert side(shown(literal.states(4, 12, 32, 4), mask))[mask == 0].any()


def test_maps_of_another_number_of_tokens_need_no_mask_and_no_order():
    side, maps = TokenUniPT([8, 12], 1, 2), [torch.randn(2, 12, 8), torch.randn(2, 6, 12)]
    with pytest.raises(ValueError, match=r"hidden maps have \[6, 12\] tokens, and a mask: expected one number"):
        side(literal.shown(list(maps), torch.ones(2, 6)))
    computed(side, causal=True)
    with pytest.raises(ValueError, match=r"have \[6, 12\] tokens, and their tower is causal"):
        side(literal.shown(list(maps)))
    with pytest.raises(ValueError, match=r"2 hidden maps are read, found 3 widths: \[8, 8, 12\]"):
        TokenUniPT([8, 8, 12], 1, 2)


def test_a_grid_guides_larger_ones():
    side, grids = PyramidUniPT([4, 6], 8, 2), [torch.randn(2, c, 2, 2) for c in (4, 6)]
    with pytest.raises(
        ValueError, match=r"grid 0 of those that are read is \(2, 2\) as the last is, expected a larger"
    ):
        side(literal.shown(grids))
    config = hf.PoolFormerConfig(hidden_sizes=[8], depths=[2], patch_sizes=[4], strides=[4], num_encoder_blocks=1)
    with pytest.raises(ValueError, match="all blocks of tower 'vision' put out grids of one size"):
        trimtab.tune(hf.PoolFormerModel(config), "unipt")


def test_another_number_of_tokens_takes_the_identity_term_of_that_map_alone():
    """By hand, with one layer: A + project(S z), without z at the token's own place."""
    torch.manual_seed(0)
    side, (early, last) = TokenUniPT([8, 12], 1, 2), (torch.randn(2, 12, 8), torch.randn(2, 6, 12))
    anchor, z = side.down[1](last), side.down[0](early)
    scores = (anchor @ z.transpose(1, 2)).relu()
    read = scores / (scores.sum(dim=-1, keepdim=True) + 1e-6) @ z
    assert torch.allclose(side(literal.shown([early, last])), side.up(anchor + side.project(read)), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"projection": "single"}, {"causal": True}, {"first": True}])
def test_samples_may_be_empty_and_batches_too(settings):
    side = TokenUniPT(12, 3, 2, Computation(**settings))
    for size in (2, 0):
        out = side(literal.shown(literal.states(size, 6, 12, 4), torch.zeros(size, 6)))
        assert out.shape == (size, 1 if "first" in settings else 6, 12) and not out.any()
        out.sum().backward()


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_in_half_precision_survive_a_loss_scale(keep):
    """Rows are divided by their sums before anything is made half."""
    torch.manual_seed(0)
    side, maps = TokenUniPT(96, 3, 2, Computation(keep=keep)), literal.states(2, 40, 96, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        out = side(literal.shown(maps))
    out.backward(torch.randn_like(out) / 80 * 2**13)
    assert all(bool(p.grad.isfinite().all()) for p in side.parameters())


def kept(side: nn.Module, maps: list[torch.Tensor], mask: torch.Tensor | None = None, function=None) -> int:
    """Bytes for the backward pass of a side network, or of another function on it."""
    part = literal.Part("", side, literal.shown(maps, mask), 1)
    return saved_bytes(lambda: (function or type(side).__call__)(side, part.seen).sum(), side)


def test_the_first_token_alone_is_made_of_less():
    torch.manual_seed(0)
    maps, mask = literal.states(2, 64, 32, 7), literal.padded(2, 64, 60)
    bytes_, products = {}, {}
    for first in (False, True):
        side = TokenUniPT(32, 6, 2, Computation(first=first))
        part = literal.Part("", side, literal.shown(maps, mask), 1)
        bytes_[first] = kept(side, maps, mask)
        products[first] = literal.products(side.__class__.__call__, part)
        assert side(part.seen).shape == (2, 1 if first else 64, 32)
    assert bytes_[True] < bytes_[False] and products[True] < 0.5 * products[False]
    with pytest.raises(ValueError, match="tokens: first"):
        Computation(first=True, causal=True)


def test_keeps_less_for_backward_than_the_published_computation():
    torch.manual_seed(0)
    side = TokenUniPT(32, 6, 2)
    maps, mask = literal.states(2, 64, 32, 7), literal.padded(2, 64, 30)
    published, lean = kept(side, maps, mask, plain), kept(side, maps, mask)
    computed(side, keep=True)
    assert lean < 0.35 * published
    assert lean < kept(side, maps, mask) < published


def test_maps_in_half_precision_are_kept_in_half_precision():
    side, maps = TokenUniPT(64, 3, 4), literal.states(2, 8, 64, 4)
    difference = kept(side, maps) - kept(side, [m.bfloat16() for m in maps])
    assert difference == 4 * 2 * 8 * 64 * 2  # maps, samples, tokens, channels, bytes


@pytest.mark.parametrize("name", [n for n in parts() if n != "half"])
def test_maps_may_be_kept_in_half_precision_and_results_stay(name):
    part = single(parts()[name])
    side, gradient = part.side, lambda: torch.cat([p.grad.flatten() for p in part.side.parameters()])
    exact = side(part.seen)
    exact.square().mean().backward()
    wanted, whole = gradient(), saved_bytes(lambda: side(part.seen).sum(), side)
    side.zero_grad()
    computed(side, kept=torch.bfloat16)
    out = side(part.seen)
    assert torch.equal(out, exact)
    out.square().mean().backward()
    assert torch.nn.functional.cosine_similarity(gradient(), wanted, dim=0) > 0.9999
    assert not torch.equal(gradient(), wanted)
    assert saved_bytes(lambda: side(part.seen).sum(), side) < 0.95 * whole


def test_tokens_that_are_not_attended_to_are_not_kept():
    torch.manual_seed(0)
    side = VectorUniPT(64, 1, 8, 1)
    alone, vector = literal.states(1, 50, 64, 2), torch.randn(4, 8)
    bytes_ = []
    for shift in (-1e3, 1e3):  # no token has a positive score, or every one
        for linear in side.down:
            linear.bias.data = shift * side.anchor(torch.relu(vector))[0].detach()
        bytes_.append(saved_bytes(lambda: side(Seen(list(alone), None, vector[:1])).sum(), side))
    assert bytes_[1] - bytes_[0] == 2 * 50 * 64 * 4  # maps


def test_a_pyramid_keeps_the_statistics_that_batch_norm_keeps():
    part = parts()["pyramid"]
    side, norm = part.side, nn.BatchNorm2d(4).double()
    conv, grid = side.down[-1][0], part.inputs.maps[-1]
    norm(conv(grid))
    side(part.seen)
    for name, value in norm.named_buffers():
        assert torch.allclose(getattr(side.down[-1][1], name), value), name
    side.eval()
    assert literal.compare(part)["gradient_error"] < 1e-8
    assert int(side.down[-1][1].num_batches_tracked) == 1


def test_a_map_of_which_a_copy_is_kept_is_let_go():
    """As soon as it is read, so that a model's maps and their copies are never in memory together."""
    maps = literal.states(2, 8, 64, 4)
    first, freed = weakref.ref(maps[0]), []

    class Watched(Seen):
        def take(self):
            return (h for h in super().take() if freed.append(first() is None) is None)

    side = TokenUniPT(64, 3, 4, Computation(kept=torch.bfloat16))
    out = side(Watched(maps, None, maps[-1]))
    assert out.requires_grad and freed[0] is False and freed[2] and not maps


def test_scores_are_kept_where_they_are_few():
    side = TokenUniPT(64, 3, 2)
    few, many = literal.states(2, 16, 64, 4), literal.states(2, 17, 64, 4)  # d / 2 = 16
    for maps, same in ((few, True), (many, False)):
        computed(side, keep="auto")
        auto = kept(side, maps)
        computed(side, keep=same)
        assert auto == kept(side, maps)
        computed(side, keep=not same)
        assert auto != kept(side, maps)


def test_a_causal_side_sees_nothing_of_what_comes_later():
    torch.manual_seed(0)
    side = TokenUniPT(12, 2, 2, Computation(causal=True))
    maps, shown = literal.states(2, 6, 12, 3), literal.shown
    out = side(shown(list(maps)))
    later = [torch.cat([m[:, :4], torch.randn(2, 2, 12)], dim=1) for m in maps]
    assert torch.allclose(side(shown(list(later)))[:, :4], out[:, :4], atol=1e-6)
    computed(side, causal=False)
    assert not torch.allclose(side(shown(later))[:, :4], side(shown(maps))[:, :4], atol=1e-3)


def millions(*sides: nn.Module) -> float:
    return sum(p.numel() for side in sides for p in side.parameters()) / 1e6


def test_trained_parameters_are_the_published_ones():
    with torch.device("meta"):
        text = TokenUniPT(768, 12, 2, PUBLISHED["vse-text"], 1024)
        image = PyramidUniPT([256, 512, 1024, 2048], 1024, 2)
        frames, words = VectorUniPT(768, 12, 512, 1), VectorUniPT(512, 12, 512, 1)
        double, single = TokenUniPT(768, 12, 2), TokenUniPT(768, 12, 2, Computation("single"))
        encoder = TokenUniPT(256, 3, 2, PUBLISHED["mdetr-encoder"])
        decoder = DecoderUniPT(256, 3, 2, PUBLISHED["mdetr-decoder"], levels=True)
        head = nn.Sequential(nn.Linear(768, 1536), nn.LayerNorm(1536), nn.Linear(1536, 3129))  # CLIP-ViL's for VQA
    assert millions(text) == pytest.approx(5.921, abs=5e-4) and millions(image) == pytest.approx(6.434, abs=5e-4)
    assert round(millions(text, image), 1) == 12.4
    assert round(millions(frames, words), 1) == 9.6
    assert round(millions(single, head), 1) == 10.3  # as published
    assert round(millions(double, head), 2) == 10.73  # as released
    assert millions(encoder, decoder) == pytest.approx(0.482, abs=5e-4)
