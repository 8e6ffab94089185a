"""UniPT on models of several kinds: which side network a tower gets, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError, Block, Tap, Tower, read
from trimtab.backbones.examples import EXAMPLES
from trimtab.methods import METHODS
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.results import Results
from trimtab.methods.tune.unipt import DecoderUniPT, PyramidUniPT, TokenUniPT, UniPT
from trimtab.methods.tune.unipt.plain import plain


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
    assert all(p.grad is not None for p in model.unipt.parameters() if p.requires_grad)
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
    assert all(p.grad is not None for p in model.unipt.parameters() if p.requires_grad)
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
        assert not p.requires_grad or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name


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
    assert all(p.grad.dtype == torch.float32 for p in model.unipt.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
def test_the_frozen_model_may_be_quantised_to_eight_bits():
    model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(model.encoder.layer[0].intermediate.dense, nn.Linear)
    out = tuned(model)(**words()).last_hidden_state
    assert torch.allclose(out, tuned(bert())(**words()).last_hidden_state, atol=0.1)
    out.sum().backward()
    assert all(p.grad is not None for p in model.unipt.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_compiled_model_answers_and_learns_the_same():
    model = tuned(bert())
    out = model(**words()).last_hidden_state
    out.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.unipt.named_parameters() if p.requires_grad}
    model.unipt.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    again = compiled(**words()).last_hidden_state
    assert torch.allclose(again, out, atol=1e-5)
    again.square().sum().backward()
    assert all(
        torch.allclose(p.grad, grads[n], atol=1e-3) for n, p in model.unipt.named_parameters() if p.requires_grad
    )


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


def swin(**changes):
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [2, 2, 2]}
    return SwinModel(SwinConfig(**sizes | {"window_size": 4} | changes)).eval().requires_grad_(False)


def test_a_token_tower_of_several_widths_is_read_once_a_stage():
    """Swin merges tokens between its stages: 256 of width 8, 64 of 16, 16 of 32."""
    model, pixels = swin(), torch.randn(2, 3, 32, 32)
    anatomy = Anatomy.of(model)
    maps: list[torch.Tensor] = []
    for stage in (0, 1, 2):
        read(model, Tap(f"encoder.layers.{stage}.blocks.1"), lambda x: maps.append(x.detach()))
    before = model(pixels).last_hidden_state
    UniPT().attach(model, anatomy)
    side = model.unipt["vision"]
    assert [m.shape for m in maps] == [(2, 256, 8), (2, 64, 16), (2, 16, 32)]
    assert [layer[0].in_features for layer in side.down] == [8, 16, 32]
    by_hand = plain(side, Seen(list(maps), None, before))
    out = model(pixels).last_hidden_state
    assert torch.allclose(out, by_hand, atol=1e-5)
    out.square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in side.parameters() if p.requires_grad)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("unipt."))


def test_maps_of_one_number_of_tokens_may_be_named():
    model = swin()
    UniPT(layers=(0, 1, 2)).attach(model, Anatomy.of(model))
    assert [layer[0].in_features for layer in model.unipt["vision"].down] == [8, 8, 8, 32]
    assert model(torch.randn(2, 3, 32, 32)).last_hidden_state.shape == (2, 16, 32)


def test_a_stage_that_is_not_as_wide_as_described_is_named():
    model = swin()
    (tower,) = Anatomy.of(model).towers
    blocks = (*tower.blocks[:2], *(replace(b, width=12) for b in tower.blocks[2:4]), *tower.blocks[4:])
    UniPT().attach(model, Anatomy((replace(tower, blocks=blocks),)))
    with pytest.raises(AnatomyError, match=r"'encoder.layers.1.blocks.0' put out \(2, 64, 16\), expected \(2, L, 12\)"):
        model(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["lst", "sherl", "side-tuning", "deep-prompt"])
def test_methods_that_carry_one_stream_on_refuse_several_widths(name):
    model = swin()
    with pytest.raises(ValueError, match=rf"{name}: tower 'vision' has the widths \[8, 16, 32\]; .* or take unipt"):
        METHODS[name]().attach(model, Anatomy.of(model))


def test_a_reader_of_two_pictures_reads_the_side_results_of_both(monkeypatch):
    example = EXAMPLES["blip-nlvr2"]
    torch.manual_seed(0)
    model = example.model().requires_grad_(False)
    UniPT(reduction=2).attach(model, Anatomy.of(model))
    read_by, take = [], Results.take
    monkeypatch.setattr(Results, "take", lambda *args: read_by.append(take(*args)[0]) or take(*args))
    model(**example.batch)
    both = read_by[0]
    model(**{**example.batch, "second": example.batch["first"]})
    of_first = both.shape[1] // 2
    assert torch.equal(read_by[1][:, :of_first], both[:, :of_first])
    assert torch.equal(read_by[1][:, of_first:], both[:, :of_first]) and not torch.equal(read_by[1], both)


def test_of_several_results_none_is_taken_where_the_reader_is_given_another():
    results, side = Results("unipt", "vision"), nn.Linear(1, 1)
    results.begin()
    for value in (torch.zeros(2, 3, 4), torch.ones(2, 3, 4)):
        results.keep(value, value + 1, None, side)
    with pytest.raises(AnatomyError, match="ran 2 times in this call"):
        results.take("text.0", 2, [torch.full((2, 3, 4), 7.0)], side)
