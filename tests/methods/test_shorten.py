"""Models without their skipped blocks: generation with a cache, round trips, exports, and blocks of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltModel,
)  # fmt: skip

from trimtab import Anatomy
from trimtab.anatomy import Block, Sublayer, Tap, Tower
from trimtab.methods.skip.adapters import Adapter, RoutedAdapter
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.shorten import hand_on_positions, shorten, take_out
from trimtab.methods.skip.skipped import Skipped

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **WORDS, num_key_value_heads=2)).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 16, "patch_size": 8}
    text = {"model_type": "llama", **SMALL, **WORDS, "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def sliding() -> Qwen2ForCausalLM:
    """Layers of two kinds: the last two see only the newest four tokens."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **WORDS, num_key_value_heads=2, use_sliding_window=True,
                                        sliding_window=4, max_window_layers=2)).eval()  # fmt: skip


def decoder_anatomy(path: str, count: int = 4, width: int = 32) -> Anatomy:
    """LLaMA-like blocks below a path."""
    blocks = []
    for i in range(count):
        block = f"{path}.layers.{i}"
        attention = Sublayer("attention", Tap(f"{block}.input_layernorm", "input"), Tap(f"{block}.self_attn"))
        mlp = Sublayer("mlp", Tap(f"{block}.post_attention_layernorm", "input"), Tap(f"{block}.mlp"))
        blocks.append(Block(block, width, (attention, mlp)))
    tower = Tower("text", "text", tuple(blocks), (path,), Tap(f"{path}.norm"), causal=True)
    return Anatomy((tower,), ignored=("model.vision_tower", "vision_tower"))


def skip(model: nn.Module, anatomy: Anatomy, *indices: int, **settings) -> None:
    """Attach a plan, and give what it trains weights that matter."""
    candidates = [b for t in anatomy.towers for b in t.blocks]
    method = DAS(plan=tuple(candidates[i].path for i in indices), **settings)
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (Adapter, RoutedAdapter)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    model.eval()


PROMPTS = {"input_ids": torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]),
           "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}  # fmt: skip


def generate(model, cache: bool, **inputs) -> torch.Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache, "output_logits": True}
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    return torch.stack(out.logits)


@pytest.mark.parametrize("form", ["parallel", "sequential", "routed", "none"])
@pytest.mark.parametrize("skipped", [(0,), (1, 2), (3,), (0, 3)])
def test_generation_with_a_cache_is_generation_without(skipped, form):
    model = llama()
    skip(model, decoder_anatomy("model"), *skipped, adapters=form)
    slow = generate(model, cache=False, **PROMPTS)
    torch.testing.assert_close(generate(model, cache=True, **PROMPTS), slow, rtol=1e-4, atol=1e-4)
    plain = generate(llama(), cache=True, **PROMPTS)
    assert not torch.allclose(plain[0], slow[0], atol=1e-3), "the skipped blocks are missing"


@pytest.mark.parametrize("skipped", [(0,), (3,), (0, 2)])
def test_caches_of_layers_of_several_kinds_keep_their_slots(skipped):
    model = sliding()
    assert len(set(model.config.layer_types)) == 2
    skip(model, decoder_anatomy("model"), *skipped)
    torch.testing.assert_close(
        generate(model, True, **PROMPTS), generate(model, False, **PROMPTS), rtol=1e-4, atol=1e-4
    )


def test_a_cache_with_a_gap_would_be_wrong():
    """What the numbering prevents: block 0 skipped and the others left as they are numbered."""
    model = llama()
    model.model.layers[0] = Skipped(model, decoder_anatomy("model").towers[0].blocks[0], 4, "none")
    slow, fast = generate(model, False, **PROMPTS), generate(model, True, **PROMPTS)
    assert not torch.allclose(fast, slow, atol=1e-3)


@pytest.mark.parametrize("skipped", [0, 2, 3])
def test_llava_generates_with_a_cache_and_a_picture(skipped):
    model = llava()
    skip(model, decoder_anatomy("model.language_model"), skipped, adapters="sequential")
    torch.manual_seed(2)
    inputs = {"input_ids": torch.tensor([[1, 49, 49, 49, 49, 5, 6]]), "pixel_values": torch.randn(1, 3, 16, 16),
              "attention_mask": torch.ones(1, 7, dtype=torch.long)}  # fmt: skip
    torch.testing.assert_close(generate(model, True, **inputs), generate(model, False, **inputs), rtol=1e-4, atol=1e-4)


def t5() -> tuple[T5ForConditionalGeneration, Anatomy]:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4,
                      decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    towers = []
    for name in ("encoder", "decoder"):
        blocks = []
        for i in range(3):
            path, last = f"{name}.block.{i}", 2 if name == "decoder" else 1
            parts = [("attention", 0), ("mlp", last)] if name == "encoder" else [
                ("attention", 0), ("cross-attention", 1), ("mlp", last)]  # fmt: skip
            inner = {"attention": "SelfAttention", "cross-attention": "EncDecAttention", "mlp": "DenseReluDense"}
            blocks.append(Block(path, 32, tuple(
                Sublayer(kind, Tap(f"{path}.layer.{n}.layer_norm", "input"), Tap(f"{path}.layer.{n}.{inner[kind]}"))
                for kind, n in parts
            ), also=("position_bias", "encoder_decoder_position_bias")))  # fmt: skip
        towers.append(Tower(name, "text", tuple(blocks), (name,), Tap(f"{name}.final_layer_norm")))
    return T5ForConditionalGeneration(config).eval(), Anatomy(tuple(towers))


@pytest.mark.parametrize("skipped", [(0, 3), (1, 4), (2, 5)])
def test_an_encoder_decoder_generates_with_a_cache(skipped):
    model, anatomy = t5()
    skip(model, anatomy, *skipped)
    inputs = {"input_ids": PROMPTS["input_ids"][1:], "attention_mask": PROMPTS["attention_mask"][1:]}
    torch.testing.assert_close(generate(model, True, **inputs), generate(model, False, **inputs), rtol=1e-4, atol=1e-4)


def test_position_biases_go_to_the_first_block_that_is_kept():
    model, anatomy = t5()
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    skip(model, anatomy, 3, adapters="none")
    assert model.decoder.block[1].layer[0].SelfAttention.relative_attention_bias is bias


ORDINARY = {
    "llama": (llama, "model.layers", (0, 2), PROMPTS),
    "sliding": (sliding, "model.layers", (0, 3), PROMPTS),
    "t5": (lambda: t5()[0], "decoder.block", (0,), {**PROMPTS, "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])}),
    "llava": (llava, "model.language_model.layers", (1,), {"input_ids": torch.tensor([[1, 5, 6]])}),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_a_shortened_model_is_an_ordinary_one(name, tmp_path):
    build, path, skipped, inputs = ORDINARY[name]
    model = build()
    count, before = len(model.get_submodule(path)), sum(p.numel() for p in model.parameters())
    reference = build()
    for i in skipped:  # the same, computed with the block still there
        kept = [f"{path}.{k}" for k in range(count) if k not in skipped]
        hand_on_positions(reference, f"{path}.{i}", kept)
        also = ("position_bias", "encoder_decoder_position_bias") if name.startswith("t5") else ()
        reference.get_submodule(path)[i] = Skipped(reference, Block(f"{path}.{i}", 32, also=also), 1, "none")
    assert shorten(model, [f"{path}.{i}" for i in skipped]) is model
    assert len(model.get_submodule(path)) == count - len(skipped)
    assert sum(p.numel() for p in model.parameters()) < before
    with torch.no_grad():
        wanted = reference(**inputs, use_cache=False).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**inputs).logits, wanted, rtol=0, atol=1e-6)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    if name in ("llama", "sliding"):
        torch.testing.assert_close(
            generate(again, True, **inputs), generate(again, False, **inputs), rtol=1e-4, atol=1e-4
        )


def test_towers_of_one_model_are_shortened_each_by_itself(tmp_path):
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    skip(model, Anatomy.of(model), 1, 2, 4, adapters="none")
    inputs = {"input_ids": torch.tensor([[3, 4, 49]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image
        shorten(model)
        assert model.config.vision_config.num_hidden_layers == 2 and model.config.text_config.num_hidden_layers == 3
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path).eval()(**inputs).logits_per_image, wanted)


def vilt(count: int = 3) -> ViltModel:
    torch.manual_seed(0)
    config = ViltConfig(**{**SMALL, "num_hidden_layers": count}, vocab_size=50, image_size=16, patch_size=8)
    return ViltModel(config).eval()


def test_adapters_have_no_place_in_an_ordinary_model():
    model = vilt()
    skip(model, Anatomy.of(model), 1)
    with pytest.raises(ValueError, match="5 adapters are part of the model"):
        shorten(model)


def test_a_model_with_methods_in_a_handle_is_not_shortened_behind_its_back():
    model = vilt()
    model._trimtab_fit = object()
    with pytest.raises(ValueError, match=r"methods are attached to this model.*use `fit.skip"):
        shorten(model, ["encoder.layer.1"])
    assert len(take_out(model, ["encoder.layer.1"]).encoder.layer) == 2, "the handle itself knows what it does"


def test_lora_is_merged_before_blocks_go():
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["query"]), vilt())
    with pytest.raises(ValueError, match=r"3 layers are wrapped \('encoder.layer.0.*query', ...\): merge"):
        shorten(model, ["encoder.layer.1"])


def test_a_configuration_that_two_models_share_stays_as_it_is():
    config = llama().config
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    shorten(one, ["model.layers.1", "model.layers.2"])
    assert one.config.num_hidden_layers == 2 and one.model.config is one.config
    assert one.model.layers[1].self_attn.config is one.config, "one object within the model"
    assert config.num_hidden_layers == 4 and other.config is config and len(other.model.layers) == 4
    pair = [LlavaForConditionalGeneration(llava().config) for _ in range(2)]
    vision = pair[0].config.vision_config
    pair[1].config.vision_config = vision
    shorten(pair[0], ["model.vision_tower.encoder.layers.1"])
    assert pair[0].config.vision_config.num_hidden_layers == 3 == pair[0].model.vision_tower.config.num_hidden_layers
    assert vision.num_hidden_layers == 4


def gemma3n() -> nn.Module:
    """A decoder with lists and embeddings for each layer."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "vocab_size": 50, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 50,
             "laurel_rank": 4, "sliding_window": 4, "pad_token_id": 0}  # fmt: skip
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
              "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    return Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **layers)).eval()


@pytest.mark.parametrize("block", [1, 3])
def test_what_each_layer_has_is_cut_and_proven(block, tmp_path):
    """Lists with one entry a layer under any name, and embeddings with a part for each."""
    model = gemma3n()
    kept = [i for i in range(4) if i != block]
    table = model.model.embed_tokens_per_layer.weight.unflatten(1, (4, 4))[:, kept].flatten(1)
    shorten(model, [f"model.layers.{block}"])
    assert model.config.activation_sparsity_pattern == [[0.5, 0.5, 0.0, 0.0][i] for i in kept]
    assert len(model.config.layer_types) == len(model.config.intermediate_size) == 3
    assert torch.equal(model.model.embed_tokens_per_layer.weight, table)
    ids = torch.arange(3, 9)[None]
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_what_cannot_be_proven_is_refused_and_changes_nothing(monkeypatch):
    """Without any run, the order of the parts for each layer stays unknown."""
    monkeypatch.setattr("trimtab.methods.skip.shorten.own_example", lambda model: None)
    model = gemma3n()
    ids = torch.arange(3, 9)[None]
    config, parts = model.config, [n for n, _ in model.named_modules()]
    before, written = config.to_dict(), model(ids).logits
    with (
        pytest.warns(UserWarning, match="not run without 'model.layers.1'"),
        pytest.raises(ValueError, match="seems to have a part for each block; give `example=`"),
    ):
        shorten(model, ["model.layers.1"])
    assert model.config is config and config.to_dict() == before
    assert [n for n, _ in model.named_modules()] == parts
    assert [m.layer_idx for m in model.model.layers] == [0, 1, 2, 3]
    assert torch.equal(model(ids).logits, written), "the model is as it was"
    assert "forward" not in vars(model.model.layers[1])


def test_an_encoder_with_fewer_layers_than_its_decoder_is_refused_where_its_class_cannot_write():
    """T5 makes its cache by the encoder's number of layers."""
    with pytest.raises(ValueError, match="does not generate with its cache"):
        shorten(t5()[0], ["encoder.block.2"])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["encoder.layer.9"], "'encoder.layer.9' is no block in a list of ViltModel"),
        (["pooler"], "'pooler' is no block"),
        ([f"encoder.layer.{i}" for i in range(3)], "all 3 blocks of 'encoder.layer' would be gone"),
    ],
)
def test_what_cannot_be_taken_out_is_named(paths, message):
    with pytest.raises(ValueError, match=message):
        shorten(vilt(), paths)


class Encoder(nn.Module):
    """The blocks of a ViLT with what stands around them, for tokens that are embedded already: what exports take."""

    def __init__(self, model: ViltModel):
        super().__init__()
        self.encoder, self.norm = model.encoder, model.layernorm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.encoder(x).last_hidden_state)


def exportable(form: str) -> tuple[Encoder, torch.Tensor]:
    model = vilt()
    skip(model, Anatomy.of(model), 0, 2, adapters=form)
    if form == "none":
        shorten(model)
    return Encoder(model).eval(), torch.randn(2, 9, 32)


@pytest.mark.parametrize("form", ["parallel", "none"])
def test_exported_by_torch_it_computes_the_same(form):
    encoder, x = exportable(form)
    exported = torch.export.export(encoder, (x,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), encoder(x))
    stored = sum(v.numel() for v in exported.state_dict.values())
    assert stored == sum(p.numel() for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parallel", "none"])
def test_exported_to_onnx_it_computes_the_same(form, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra 'export'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    encoder, x = exportable(form)
    file = tmp_path / "model.onnx"
    torch.onnx.export(encoder, (x,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), encoder(x), rtol=1e-4, atol=1e-5)
