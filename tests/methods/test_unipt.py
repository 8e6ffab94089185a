"""UniPT: the lean computation against the published one, its sizes, and side networks on models of several kinds."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError, Block, Tap, Tower
from trimtab.counting import saved_bytes
from trimtab.methods.tune.unipt import PUBLISHED, DecoderUniPT, PyramidUniPT, TokenUniPT, UniPT, VectorUniPT
from trimtab.methods.tune.unipt.core import attend
from trimtab.methods.tune.unipt.down import Target

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
    maps = literal.states(3, 6, 12, 4)
    grids = [torch.randn(2, c, 2 * r, 3 * r) for c, r in ((4, 8), (6, 4), (8, 2), (10, 1))]
    made = {
        "vse-text": (TokenUniPT(12, 3, 2, out=8, skip=False, **PUBLISHED["vse-text"]), (maps, mask)),
        "clip-vil": (TokenUniPT(12, 3, 2, skip=False, **PUBLISHED["clip-vil"]), (maps, mask)),
        "first-token": (TokenUniPT(12, 3, 2, first=True, **PUBLISHED["clip-vil"]), (maps, mask)),
        "first-of-all": (TokenUniPT(12, 3, 2, first=True, projection="single"), (maps, None)),
        "skip": (TokenUniPT(12, 3, 2, **PUBLISHED["clip-vil"]), (maps, mask * padded)),
        "skip-causal": (TokenUniPT(12, 3, 2, causal=True), (maps, mask * padded)),
        "skip-less": (TokenUniPT(12, 3, 2, **PUBLISHED["clip-vil"]), (maps, nearly)),
        "single": (TokenUniPT(12, 3, 2, projection="single"), (maps, None)),
        "vector": (VectorUniPT(12, 3, 8, 1), (maps, mask, torch.randn(3, 8), at)),
        "first": (VectorUniPT(12, 3, 8, 2), (maps, None, torch.randn(3, 8), None)),
        "half": (VectorUniPT(12, 3, 8, 1), ([m.half() for m in maps], mask, torch.randn(3, 8), at)),
        "pyramid": (PyramidUniPT([4, 6, 8, 10], 8, 2), (grids,)),
        "decoder": (
            DecoderUniPT(12, 3, 2, levels=True, **PUBLISHED["mdetr-decoder"]),
            (literal.states(3, 5, 12, 4), None, torch.randn(3, 6, 6), mask),
        ),
    }
    return {
        k: literal.Part(k, side.double(), doubled(inputs), 1, reader(side, inputs))
        for k, (side, inputs) in made.items()
    }


def reader(side: nn.Module, inputs: tuple):
    """What may be read of the tokens that a side network hands on."""
    if not isinstance(side, TokenUniPT) or isinstance(side, DecoderUniPT):
        return lambda out: out
    mask = inputs[1]
    if side.first:
        return lambda out: out[:, :1] if mask is None else out[:, :1] * mask[:, :1, None]
    return literal.valid(mask) if side.skip and mask is not None else lambda out: out


def doubled(value):
    """In double precision, where rounding is no difference; maps in half precision stay."""
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(v) for v in value)
    return value.double() if value is not None and value.dtype == torch.float32 else value


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", [n for n in parts() if n != "skip-causal"])  # which is ours
def test_is_what_the_published_computation_gives(name, keep):
    part = parts()[name]
    part.side.keep = keep
    errors = literal.compare(part)
    assert errors["output_error"] < 1e-10 and errors["gradient_error"] < 1e-8


# Not `vse-text`: a row of its scores nearly vanishes, and what is divided by its sum has no digits left in bfloat16.
NAMES = ["clip-vil", "skip", "skip-causal", "first-token", "single", "vector", "first", "half", "pyramid", "decoder"]


@pytest.mark.parametrize("name", NAMES)
def test_learns_the_same_in_mixed_precision(name):
    """In bfloat16 under autocast, as recipes of `precision: auto` train: the same direction of the gradient."""
    part = parts()[name]
    side, inputs = part.side.float(), singled(part.inputs)

    def gradient() -> torch.Tensor:
        side.zero_grad()
        side(*inputs).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for n, p in side.named_parameters() if n != "gate.bias"])

    exact = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = side(*inputs).float()
    side.zero_grad()
    out.square().mean().backward()
    mixed = torch.cat([p.grad.flatten() for n, p in side.named_parameters() if n != "gate.bias"])
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.98


def singled(value):
    if isinstance(value, (list, tuple)):
        return type(value)(singled(v) for v in value)
    return value.float() if value is not None and value.dtype == torch.float64 else value


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["clip-vil", "skip", "decoder"])
@pytest.mark.parametrize("size", [1, 2 * 6 * 4, 4 * 6 * 4, 2 * 6 * 6 * 4])
def test_samples_and_rows_are_looked_at_in_blocks_of_any_size(monkeypatch, size, name, keep):
    from trimtab.methods.tune.unipt import core

    part = parts()[name]
    part.side.keep = keep
    whole = part.side(*part.inputs)
    monkeypatch.setitem(core.CACHE_BYTES, "cpu", size)
    assert torch.allclose(part.side(*part.inputs), whole, atol=1e-10)
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
    out = side(maps, mask)
    assert not out[mask == 0].any() and out[mask == 1].any(dim=-1).all()
    for m in maps:
        m[mask == 0] = torch.nan
    assert torch.equal(side(maps, mask), out)  # it is not even looked at
    side.skip = False
    assert side(literal.states(4, 12, 32, 4), mask)[mask == 0].any()


@pytest.mark.parametrize("settings", [{}, {"projection": "single"}, {"causal": True}, {"first": True}])
def test_samples_may_be_empty_and_batches_too(settings):
    side = TokenUniPT(12, 3, 2, **settings)
    for size in (2, 0):
        out = side(literal.states(size, 6, 12, 4), torch.zeros(size, 6))
        assert out.shape == (size, 1 if "first" in settings else 6, 12) and not out.any()
        out.sum().backward()


@pytest.mark.parametrize("keep", [False, True])
def test_gradients_in_half_precision_survive_a_loss_scale(keep):
    """Rows are divided by their sums before anything is made half."""
    torch.manual_seed(0)
    side, maps = TokenUniPT(96, 3, 2, keep=keep), literal.states(2, 40, 96, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        out = side(maps, None)
    out.backward(torch.randn_like(out) / 80 * 2**13)
    assert all(bool(p.grad.isfinite().all()) for p in side.parameters())


def test_the_first_token_alone_is_made_of_less():
    torch.manual_seed(0)
    inputs = (literal.states(2, 64, 32, 7), literal.padded(2, 64, 60))
    kept, products = {}, {}
    for first in (False, True):
        side = TokenUniPT(32, 6, 2, first=first)
        part = literal.Part("", side, inputs, 1)
        kept[first] = saved_bytes(lambda side=side: side(*inputs).sum(), side)
        products[first] = literal.products(side.__class__.__call__, part)
        assert side(*inputs).shape == (2, 1 if first else 64, 32)
    assert kept[True] < kept[False] and products[True] < 0.5 * products[False]
    with pytest.raises(ValueError, match="tokens: first"):
        TokenUniPT(32, 6, 2, first=True, causal=True)


def test_keeps_less_for_backward_than_the_published_computation():
    torch.manual_seed(0)
    side = TokenUniPT(32, 6, 2)
    inputs = (literal.states(2, 64, 32, 7), literal.padded(2, 64, 30))
    published = saved_bytes(lambda: literal.tokens(side, *inputs).sum(), side)
    lean = saved_bytes(lambda: side(*inputs).sum(), side)
    side.keep = True
    assert lean < 0.35 * published
    assert lean < saved_bytes(lambda: side(*inputs).sum(), side) < published


def test_maps_in_half_precision_are_kept_in_half_precision():
    side = TokenUniPT(64, 3, 4)
    maps = literal.states(2, 8, 64, 4)
    single = saved_bytes(lambda: side(maps, None).sum(), side)
    half = saved_bytes(lambda: side([m.bfloat16() for m in maps], None).sum(), side)
    assert single - half == 4 * 2 * 8 * 64 * 2  # maps, samples, tokens, channels, bytes


@pytest.mark.parametrize("name", [n for n in parts() if n != "half"])
def test_maps_may_be_kept_in_half_precision_and_results_stay(name):
    part = parts()[name]
    side, inputs = part.side.float(), singled(part.inputs)
    exact, gradient = side(*inputs), lambda: torch.cat([p.grad.flatten() for p in side.parameters()])
    exact.square().mean().backward()
    wanted, whole = gradient(), saved_bytes(lambda: side(*inputs).sum(), side)
    side.zero_grad()
    side.kept = torch.bfloat16
    out = side(*inputs)
    assert torch.equal(out, exact)
    out.square().mean().backward()
    assert torch.nn.functional.cosine_similarity(gradient(), wanted, dim=0) > 0.9999
    assert not torch.equal(gradient(), wanted)
    assert saved_bytes(lambda: side(*inputs).sum(), side) < 0.95 * whole


def test_tokens_that_are_not_attended_to_are_not_kept():
    torch.manual_seed(0)
    side = VectorUniPT(64, 1, 8, 1)
    alone, vector = literal.states(1, 50, 64, 2), torch.randn(4, 8)
    kept = []
    for shift in (-1e3, 1e3):  # no token has a positive score, or every one
        for linear in side.down:
            linear.bias.data = shift * side.anchor(torch.relu(vector))[0].detach()
        kept.append(saved_bytes(lambda: side(alone, None, vector[:1], None).sum(), side))
    assert kept[1] - kept[0] == 2 * 50 * 64 * 4  # maps


def test_a_pyramid_keeps_the_statistics_that_batch_norm_keeps():
    part = parts()["pyramid"]
    side, norm = part.side, nn.BatchNorm2d(4).double()
    conv, grid = side.down[-1][0], part.inputs[0][-1]
    norm(conv(grid))
    side(*part.inputs)
    for name, value in norm.named_buffers():
        assert torch.allclose(getattr(side.down[-1][1], name), value), name
    side.eval()
    assert literal.compare(part)["gradient_error"] < 1e-8
    assert int(side.down[-1][1].num_batches_tracked) == 1


def test_a_map_of_which_a_copy_is_kept_is_let_go():
    """As soon as it is read, so that a model's maps and their copies are never in memory together."""
    from trimtab.methods.tune.unipt.method import one_by_one

    maps = literal.states(2, 8, 64, 4)
    first = weakref.ref(maps[0])
    rest = one_by_one(maps)
    side = TokenUniPT(64, 3, 4, kept=torch.bfloat16)
    freed = []
    out = side((h for h in rest if freed.append(first() is None) is None), None)
    assert out.requires_grad and freed[0] is False and freed[2] and not maps


def test_scores_are_kept_where_they_are_few():
    side = TokenUniPT(64, 3, 2)
    few, many = literal.states(2, 16, 64, 4), literal.states(2, 17, 64, 4)  # d / 2 = 16
    for maps, same in ((few, True), (many, False)):
        side.keep = "auto"
        auto = saved_bytes(lambda maps=maps: side(maps, None).sum(), side)
        side.keep = same
        assert auto == saved_bytes(lambda maps=maps: side(maps, None).sum(), side)
        side.keep = not same
        assert auto != saved_bytes(lambda maps=maps: side(maps, None).sum(), side)


def test_a_causal_side_sees_nothing_of_what_comes_later():
    torch.manual_seed(0)
    side = TokenUniPT(12, 2, 2, causal=True)
    maps = literal.states(2, 6, 12, 3)
    out = side(maps, None)
    later = [torch.cat([m[:, :4], torch.randn(2, 2, 12)], dim=1) for m in maps]
    assert torch.allclose(side(later, None)[:, :4], out[:, :4], atol=1e-6)
    side.causal = False
    assert not torch.allclose(side(later, None)[:, :4], side(maps, None)[:, :4], atol=1e-3)


def millions(*sides: nn.Module) -> float:
    return sum(p.numel() for side in sides for p in side.parameters()) / 1e6


def test_trained_parameters_are_the_published_ones():
    with torch.device("meta"):
        text = TokenUniPT(768, 12, 2, out=1024, **PUBLISHED["vse-text"])
        image = PyramidUniPT([256, 512, 1024, 2048], 1024, 2)
        frames, words = VectorUniPT(768, 12, 512, 1), VectorUniPT(512, 12, 512, 1)
        double, single = TokenUniPT(768, 12, 2), TokenUniPT(768, 12, 2, projection="single")
        encoder = TokenUniPT(256, 3, 2, **PUBLISHED["mdetr-encoder"])
        decoder = DecoderUniPT(256, 3, 2, levels=True, **PUBLISHED["mdetr-decoder"])
        head = nn.Sequential(nn.Linear(768, 1536), nn.LayerNorm(1536), nn.Linear(1536, 3129))  # CLIP-ViL's for VQA
    assert millions(text) == pytest.approx(5.921, abs=5e-4) and millions(image) == pytest.approx(6.434, abs=5e-4)
    assert round(millions(text, image), 1) == 12.4
    assert round(millions(frames, words), 1) == 9.6
    assert round(millions(single, head), 1) == 10.3  # as published
    assert round(millions(double, head), 2) == 10.73  # as released
    assert millions(encoder, decoder) == pytest.approx(0.482, abs=5e-4)


# --- on models --------------------------------------------------------------------------------------------------------


def t5(**changes):
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 40, **changes}
    return T5Model(T5Config(**config)).eval()


def t5_anatomy(model) -> Anatomy:
    """Encoder and decoder of a T5; the decoder names the encoder as its memory."""

    def tower(name, **more):
        blocks = tuple(Block(f"{name}.block.{i}", 16, returns_tuple=True) for i in range(3))
        return Tower(name, "text", blocks, (name,), output=Tap(f"{name}.final_layer_norm"), **more)

    encoder = tower("encoder", mask=Tap("encoder", "input", "attention_mask"))
    decoder = tower("decoder", memory="encoder", causal=True, mask=Tap("decoder", "input", "attention_mask"))
    return Anatomy((encoder, decoder))


def t5_inputs() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "decoder_input_ids": torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(1)),
        "use_cache": False,
    }


def test_an_encoder_decoder_gets_two_sides_and_the_second_reads_the_first():
    model = t5().requires_grad_(False)
    UniPT(reduction=2).attach(model, t5_anatomy(model))
    encoder, decoder = model.unipt["encoder"], model.unipt["decoder"]
    assert isinstance(decoder, DecoderUniPT) and isinstance(encoder.up, nn.Identity)
    out = model(**t5_inputs()).last_hidden_state
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.unipt.parameters())
    assert any(bool(p.grad.abs().sum() > 0) for p in encoder.parameters()), "through what the decoder's side reads"
    # What comes later in the answer changes nothing before it, through neither the model nor its side.
    other = t5_inputs()
    other["decoder_input_ids"][:, 3:] = 3
    assert torch.allclose(model(**other).last_hidden_state[:, :3], out[:, :3], atol=1e-5)


def test_one_stack_of_two_gets_a_side_of_its_own():
    model = t5().requires_grad_(False)
    UniPT(towers=("decoder",), layers=(0, 2)).attach(model, t5_anatomy(model))
    side = model.unipt["decoder"]
    assert type(side) is TokenUniPT and len(side.down) == 3
    assert model(**t5_inputs()).last_hidden_state.requires_grad


class Cnn(nn.Module):
    """Four stages of convolutions that halve the picture, and a classifier."""

    def __init__(self):
        super().__init__()
        channels = (3, 4, 6, 8, 10)
        self.stages = nn.Sequential(*(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels)))
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(self.stages(x).mean(dim=(2, 3)))

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"stages.{i}", c, keeps_shape=False) for i, c in enumerate((4, 6, 8, 10)))
        tower = Tower("vision", "vision", blocks, ("stages",), output=Tap("stages.3"), layout="grid")
        return Anatomy((tower,), heads=("head",))


def test_a_convolutional_tower_gets_a_pyramid():
    torch.manual_seed(0)
    model = Cnn().requires_grad_(False)
    UniPT().attach(model, model.anatomy())
    assert isinstance(model.unipt["vision"], PyramidUniPT) and len(model.unipt["vision"].guide) == 3
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for n, p in model.unipt.named_parameters() if n != "gate.bias")
    assert model.stages[0].weight.grad is None
    with pytest.raises(ValueError, match="whole multiples"):
        model(torch.randn(2, 3, 36, 36))


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=40, **sizes), add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def words() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def tuned(model, anatomy=None, **settings):
    torch.manual_seed(0)
    UniPT(**settings).attach(model, anatomy or Anatomy.of(model))
    return model


def test_a_head_of_the_first_token_may_have_that_token_alone():
    whole, first = tuned(bert()), tuned(bert(), tokens="first")
    wanted, found = whole(**words()).last_hidden_state, first(**words()).last_hidden_state
    assert found.shape == (2, 1, 16) and torch.allclose(found, wanted[:, :1], atol=1e-5)
    wanted[:, 0].square().sum().backward()
    found[:, 0].square().sum().backward()
    for (name, p), q in zip(whole.unipt.named_parameters(), first.unipt.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name


def test_the_first_token_alone_is_refused_where_others_are_read():
    for model, anatomy, settings in (
        (t5(), t5_anatomy(t5()), {}),  # an encoder for its decoder
        (t5(), t5_anatomy(t5()), {"towers": ("decoder",)}),  # causal
        (t5(), t5_anatomy(t5()), {"towers": ("encoder",)}),  # read by the decoder
        (Cnn(), Cnn().anatomy(), {}),  # cells
    ):
        with pytest.raises(ValueError, match="`tokens: first`.*use `all`"):
            UniPT(tokens="first", **settings).attach(model, anatomy)


def test_the_frozen_model_may_be_in_half_precision():
    model = tuned(bert().bfloat16())
    assert next(model.unipt.parameters()).dtype == torch.float32
    out = model(**words()).last_hidden_state
    assert out.dtype == torch.bfloat16
    exact = tuned(bert())(**words()).last_hidden_state
    assert torch.allclose(out.float(), exact, atol=0.1)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.unipt.parameters())


@pytest.mark.filterwarnings("ignore")
def test_the_frozen_model_may_be_quantised_to_eight_bits():
    model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(model.encoder.layer[0].intermediate.dense, nn.Linear)
    out = tuned(model)(**words()).last_hidden_state
    assert torch.allclose(out, tuned(bert())(**words()).last_hidden_state, atol=0.1)
    out.sum().backward()
    assert all(p.grad is not None for p in model.unipt.parameters())


@pytest.mark.slow
def test_a_compiled_model_answers_and_learns_the_same():
    model = tuned(bert())
    out = model(**words()).last_hidden_state
    out.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.unipt.named_parameters()}
    model.unipt.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    again = compiled(**words()).last_hidden_state
    assert torch.allclose(again, out, atol=1e-5)
    again.square().sum().backward()
    assert all(torch.allclose(p.grad, grads[n], atol=1e-3) for n, p in model.unipt.named_parameters())


class Merging(nn.Module):
    """Two blocks, the second of which halves the sequence."""

    def __init__(self, step: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.step = step

    def forward(self, x, mask=None):
        x = self.layers[0](x)
        return self.layers[1](x[:, :: self.step])

    def anatomy(self, mask: Tap | None = None) -> Anatomy:
        blocks = tuple(Block(f"layers.{i}", 8) for i in range(2))
        return Anatomy((Tower("text", "text", blocks, ("layers",), output=Tap("layers.1"), mask=mask),))


def test_a_changed_sequence_length_names_the_block():
    model = Merging()
    UniPT().attach(model, model.anatomy())
    with pytest.raises(AnatomyError, match=r"block 'layers.1' put out \(2, 3, 8\), expected \(2, 6, 8\)"):
        model(torch.randn(2, 6, 8))


def test_a_mask_that_is_missing_or_does_not_fit_names_the_block():
    model = Merging(step=1)
    model.embed = nn.Identity()
    UniPT().attach(model, model.anatomy(Tap("embed")))
    with pytest.raises(AnatomyError, match=r"block 'layers.1' has run, but the mask of its tower 'text' was not seen"):
        model(torch.randn(2, 6, 8))
    model = Merging(step=1)
    UniPT().attach(model, model.anatomy(Tap("", "input", "mask")))
    assert model(torch.randn(2, 6, 8), mask=torch.ones(2, 6)).shape == (2, 6, 8)
    with pytest.raises(AnatomyError, match=r"'layers.1' works on \(B, L\) = \(2, 6\), but the mask .* is \(2, 5\)"):
        model(torch.randn(2, 6, 8), mask=torch.ones(2, 5))


def test_layers_that_are_not_there_are_refused():
    model = Merging(step=1)
    with pytest.raises(ValueError, match=r"ascending numbers of 0..1 \(the last, 2, is always read\), found \[0, 2\]"):
        UniPT(layers=(0, 2)).attach(model, model.anatomy())


def test_detached_the_model_is_what_it_was():
    model = bert()
    before, names = model(**words()).last_hidden_state, set(model.state_dict())
    method = UniPT()
    method.attach(model, Anatomy.of(model))
    assert not torch.allclose(model(**words()).last_hidden_state, before)
    method.detach(model)
    assert torch.equal(model(**words()).last_hidden_state, before) and set(model.state_dict()) == names
