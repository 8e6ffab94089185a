"""Tuned models that are copied, pickled, cast, checkpointed, generated with, in every tuner's own way."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from trimtab.anatomy import Anatomy, Block, Tap, Tower
from trimtab.anatomy.structure import added_by, plain_parameters
from trimtab.methods import METHODS

ADDED = ("unipt", "lst", "sherl", "side-tuning", "adapter", "parallel-adapter", "scaled-parallel-adapter",
         "shallow-prompt", "deep-prompt")  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).eval().requires_grad_(False)


def bart(**changes) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **sizes, **tokens)).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0,
                      pad_token_id=0, eos_token_id=1)  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, num_key_value_heads=4, initializer_range=0.1, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def images(model: nn.Module) -> torch.Tensor:
    return model(PIXELS.to(next(iter(plain_parameters(model).values())).dtype)).last_hidden_state


def texts(model: nn.Module) -> torch.Tensor:
    mask = torch.ones_like(WORDS)
    return model(WORDS, attention_mask=mask, decoder_input_ids=WORDS[:, :5], decoder_attention_mask=mask[:, :5],
                 use_cache=False).logits  # fmt: skip


def tuned(model: nn.Module, name: str, **settings) -> nn.Module:
    torch.manual_seed(1)
    METHODS[name](**settings).attach(model.requires_grad_(False), Anatomy.of(model))
    return model


@torch.no_grad()
def learned(model: nn.Module, share: float = 0.5) -> nn.Module:
    """As if it had been trained."""
    for p in model.parameters():
        if p.requires_grad:
            p += share * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p.dtype)
    return model


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", [*ADDED, "lora", "norm-tuning", "bitfit"])
def test_a_copy_computes_with_what_is_its_own(name, twin_of):
    model = tuned(vit(), name)
    images(model).sum().backward()  # nothing of a pass is in the way of a copy
    model.zero_grad()
    twin = twin_of(model)
    before = images(model).detach()
    assert torch.equal(images(twin), before)
    learned(twin)
    out = images(twin)
    assert not torch.allclose(out, before) and torch.equal(images(model), before)
    out.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled])
def test_side_networks_that_read_each_other_are_copied_together(twin_of):
    model = tuned(bart(), "unipt")
    twin = learned(twin_of(model))
    texts(twin).sum().backward()
    sides = twin.unipt
    assert all(p.grad is not None for p in sides.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_is_marked_and_in_single_precision_beside_a_half_model(name):
    model = tuned(vit().bfloat16(), name)
    assert set(plain_parameters(model)) == set(dict(vit().named_parameters()))
    assert name in {added_by(m) for m in model.modules()}
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.float32}
    out = images(model)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in own)
    images(model.half() if name.startswith("adapter") else model)  # cast again afterwards


@pytest.mark.parametrize("name", ["unipt", "lst", "sherl", "side-tuning", "deep-prompt"])
def test_a_tower_may_have_dots_in_its_name(name):
    model = vit()
    (tower,) = Anatomy.of(model).towers
    settings = {"initialise": "random"} if name == "lst" else {}
    named = Tower("vit.encoder", "vision", tower.blocks, tower.scope, tower.output)
    METHODS[name](**settings).attach(model, Anatomy((named,)))
    assert images(model).requires_grad
    assert f"{name.replace('-', '_')}.vit-encoder" in dict(model.named_modules())


def test_a_method_attached_twice_is_refused():
    model = tuned(vit(), "unipt")
    with pytest.raises(ValueError, match="this ViTModel has a 'unipt' already: it is tuned with it; load the model"):
        METHODS["unipt"]().attach(model, Anatomy.of(model))


@pytest.mark.parametrize("name", ["shallow-prompt", "deep-prompt", "unipt"])
def test_a_row_does_not_depend_on_the_padding_of_another(name):
    """With a row that is padded a causal tower is given a mask, and none without."""
    model = learned(tuned(llama(), name), 0.1)
    mask, short = torch.ones_like(WORDS), torch.ones_like(WORDS)
    short[1, 5:] = 0
    with torch.no_grad():
        full, same = (model(WORDS, attention_mask=m, use_cache=False).logits for m in (mask, short))
    assert torch.allclose(full[0], same[0], atol=1e-5)
    assert torch.allclose(full[1, :5], same[1, :5], atol=1e-5)


@pytest.mark.parametrize("name", ["unipt", "lst", "sherl", "side-tuning", "shallow-prompt", "deep-prompt"])
def test_a_row_that_is_padded_on_the_left_is_what_it_is_alone(name):
    """Also where no positions are given: a rotary model then counts the padding, and its result stays the same."""
    model = learned(tuned(llama(), name), 0.1)
    mask = torch.ones_like(WORDS)
    mask[1, :3] = 0
    with torch.no_grad():
        padded = model(WORDS, attention_mask=mask, use_cache=False).logits[1, 3:]
        alone = model(WORDS[1:, 3:], use_cache=False).logits[0]
    assert torch.allclose(padded, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["shallow-prompt", "deep-prompt"])
def test_prompts_refuse_padding_between_them_and_the_tokens_where_distances_count(name):
    model, mask = learned(tuned(t5(), name)), torch.ones_like(WORDS)
    mask[1, 5:] = 0

    def run(rows, padding):
        return model(WORDS[rows], attention_mask=padding, decoder_input_ids=WORDS[rows, :3], use_cache=False).logits

    with torch.no_grad():
        alone = model(WORDS[1:, :5], decoder_input_ids=WORDS[1:, :3], use_cache=False).logits
        assert torch.allclose(run([0, 1], mask)[1:], alone, atol=1e-5)
        with pytest.raises(
            ValueError, match=f"{name}: block 'encoder.block.0' counts distances .* pad it on the right"
        ):
            run([0, 1], mask.flip(1))


def test_prompts_refuse_a_bias_of_distances():
    from transformers import BloomConfig, BloomModel

    model = tuned(BloomModel(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)), "deep-prompt")
    with pytest.raises(ValueError, match=r"a bias of each token's distance \(ALiBi\), 'alibi' \(4, 1, 7\), in which"):
        model(WORDS)


# --- LoRA -------------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Layers that torch computes in one operation in evaluation."""

    def __init__(self, layers: int = 2):
        super().__init__()
        made = (nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(layers))
        self.blocks = nn.ModuleList(made)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", 16) for i in range(len(self.blocks)))
        return Anatomy((Tower("vision", "vision", blocks, ("blocks",), output=Tap(blocks[-1].path)),))


def lora(model: nn.Module, anatomy: Anatomy, *targets: str) -> nn.Module:
    METHODS["lora"](targets=targets).attach(model.requires_grad_(False), anatomy)
    return learned(model, 0.3)


def test_lora_counts_in_fused_layers_and_folds_into_plain_ones():
    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(2, 5, 16)
    before, names = model(x), set(model.state_dict())
    lora(model, model.anatomy(), "linear1", "linear2")
    with torch.no_grad():
        trained, tested = model.train()(x), model.eval()(x)
        assert torch.allclose(trained, tested, atol=1e-5) and not torch.allclose(tested, before)
        METHODS["lora"]().fold(model)
        assert set(model.state_dict()) == names and type(model.blocks[0].linear1) is nn.Linear
        assert torch.allclose(model(x), tested, atol=1e-5)


def test_lora_refuses_a_layer_that_is_never_called():
    model = Fused()
    with pytest.raises(ValueError, match=r"lora: 'blocks.0.self_attn.out_proj' belongs to an nn.MultiheadAttention"):
        lora(model, model.anatomy(), "out_proj", "linear1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_folds_transposed_layers(dtype):
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).to(dtype).eval()
    lora(model, Anatomy.of(model), "c_attn", "c_fc")
    with torch.no_grad():
        wanted = model(WORDS).last_hidden_state
        METHODS["lora"]().fold(model)
        assert type(model.h[0].attn.c_attn).__name__ == "Conv1D" and model.h[0].attn.c_attn.weight.dtype == dtype
        found = model(WORDS).last_hidden_state
    assert (found - wanted).abs().float().mean() < (1e-6 if dtype == torch.float32 else 0.02)


def test_lora_on_shared_layers_and_shared_weights():
    """A layer under two names has one update; a layer that shares a weight leaves the other's as it is."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    model.layers[1][0] = model.layers[0][0]
    model.other = nn.Linear(8, 8)
    model.other.weight = model.layers[0][1].weight
    kept = model.other.weight.clone()
    blocks = tuple(Block(f"layers.{i}", 8) for i in range(2))
    anatomy = Anatomy((Tower("text", "text", blocks, ("layers",), output=Tap("layers.1")),))
    lora(model, anatomy, "0", "1")
    assert model.layers[0][0] is model.layers[1][0] and hasattr(model.layers[0][0], "lora_A")
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = model.layers[1](model.layers[0](x))
        METHODS["lora"]().fold(model)
        assert torch.allclose(model.layers[1](model.layers[0](x)), wanted, atol=1e-5)
    assert torch.equal(model.other.weight, kept) and model.layers[0][0] is model.layers[1][0]


# --- the stream -------------------------------------------------------------------------------------------------------


class Keyword(nn.Module):
    """Blocks that are called by keyword, the stream second."""

    class Layer(nn.Linear):
        def forward(self, context, states):  # type: ignore[override]
            return states + super().forward(states) + context

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(8, 8) for _ in range(2))

    def forward(self, x, context):
        for layer in self.layers:
            x = layer(context=context, states=x)
        return x

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"layers.{i}", 8, stream="states") for i in range(2))
        return Anatomy((Tower("text", "text", blocks, ("layers",), output=Tap("layers.1")),))


@pytest.mark.parametrize("name", ["side-tuning", "shallow-prompt"])
def test_the_stream_is_found_where_it_is(name):
    torch.manual_seed(0)
    model = Keyword()
    METHODS[name](**({"blocks": 1} if name == "side-tuning" else {})).attach(model, model.anatomy())
    seen = []
    if name == "side-tuning":
        model.side_tuning["text"].register_forward_pre_hook(lambda m, args: seen.append(args[0].maps[0]))
    x, context = torch.randn(2, 3, 8), torch.zeros(1)
    out = model(x, context)
    assert out.shape == x.shape and out.requires_grad
    assert all(torch.equal(s, x) for s in seen)
