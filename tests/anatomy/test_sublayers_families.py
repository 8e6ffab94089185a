"""What is seen of the blocks of transformers' families that have no description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.anatomy.seeing import calls
from trimtab.anatomy import Block
from trimtab.anatomy.seen.sublayers import SeenBlock, see_sublayers

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
SMALL: dict[str, Any] = {**SIZES, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}
PAIR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 40, "max_position_embeddings": 20,
}  # fmt: skip
PICTURE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
IDS = torch.tensor([[5, 6, 7, 8, 9, 11], [9, 8, 7, 12, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
BOTH = {**TEXT, "decoder_input_ids": IDS}
REGIONS = {**TEXT, "visual_feats": torch.randn(2, 3, 16), "visual_pos": torch.rand(2, 3, 4)}
QUERIES = {"query_embeds": torch.randn(2, 5, 32), "encoder_hidden_states": torch.randn(2, 7, 32)}
MLLAMA: dict[str, Any] = {
    **SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2, "cross_attention_layers": [1],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LXMERT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "l_layers": 1,
    "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16,
}  # fmt: skip
JAMBA: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "num_latents": 5, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
}  # fmt: skip


def family(name: str, batch: dict, **config: Any) -> tuple[Callable[[], Any], dict]:
    return lambda: getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**config)), batch


# (how it is built and called, a block, its parts as `kind read write`: `>` behind a read input).
FAMILIES: dict[str, tuple[tuple[Callable, dict], str, tuple[str, ...]]] = {
    "phi": (family("Phi", TEXT, **SMALL), "layers.0",
            ("attention input_layernorm> self_attn", "mlp input_layernorm> mlp")),
    "falcon": (family("Falcon", TEXT, **SMALL, new_decoder_architecture=True, num_kv_heads=2), "h.0",
               ("attention ln_attn> self_attention", "mlp ln_mlp> mlp")),
    "gpt-neox": (family("GPTNeoX", TEXT, **SMALL), "layers.0",
                 ("attention input_layernorm> attention", "mlp post_attention_layernorm> mlp")),
    "gpt2": (family("GPT2", TEXT, **GPT), "h.0", ("attention ln_1> attn", "mlp ln_2> mlp")),
    "olmo2": (family("Olmo2", TEXT, **SMALL), "layers.0",
              ("attention self_attn> post_attention_layernorm", "mlp mlp> post_feedforward_layernorm")),
    "granite": (family("Granite", TEXT, **SMALL, residual_multiplier=0.5), "layers.1",
                ("attention input_layernorm> self_attn", "mlp post_attention_layernorm> mlp")),
    "bloom": (family("Bloom", TEXT, hidden_size=32, n_layer=2, n_head=4, vocab_size=40), "h.0",
              ("attention input_layernorm> self_attention.dense",
               "mlp post_attention_layernorm> mlp.dense_4h_to_h")),
    "opt": (family("OPT", TEXT, **SIZES, ffn_dim=64, vocab_size=40, word_embed_proj_dim=32, pad_token_id=0),
            "decoder.layers.0", ("attention self_attn_layer_norm> self_attn", "mlp final_layer_norm> fc2")),
    "mamba": (family("Mamba", TEXT, **SMALL, state_size=4), "layers.0", ("attention norm> mixer",)),
    "jamba mamba": (family("Jamba", TEXT, **JAMBA), "layers.0",
                    ("attention input_layernorm> mamba", "mlp pre_ff_layernorm> feed_forward")),
    "jamba attention": (family("Jamba", TEXT, **JAMBA), "layers.1",
                        ("attention input_layernorm> self_attn", "mlp pre_ff_layernorm> feed_forward")),
    "deberta": (family("Deberta", TEXT, **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
                "encoder.layer.0",
                ("attention attention.self> attention.output.dense", "mlp intermediate> output.dense")),
    "albert": (family("Albert", TEXT, **SMALL), "encoder.albert_layer_groups.0.albert_layers.0",
               ("attention attention.query> attention.dense", "mlp ffn> ffn_output")),
    "fnet": (family("FNet", TEXT, **SIZES, vocab_size=40), "encoder.layer.0",
             ("attention fourier.self> fourier.self", "mlp intermediate> output.dense")),
    "pegasus": (family("Pegasus", BOTH, **PAIR), "decoder.layers.0",
                ("attention self_attn_layer_norm> self_attn",
                 "cross-attention encoder_attn_layer_norm> encoder_attn", "mlp final_layer_norm> fc2")),
    "t5": (family("T5", BOTH, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=40),
           "decoder.block.1",
           ("attention layer.0.layer_norm> layer.0.SelfAttention",
            "cross-attention layer.1.layer_norm> layer.1.EncDecAttention",
            "mlp layer.2.layer_norm> layer.2.DenseReluDense")),
    "beit": (family("Beit", PIXELS, **PICTURE), "layers.0",
             ("attention layernorm_before> attention", "mlp layernorm_after> mlp")),
    "sam": (family("SamVision", PIXELS, **SIZES, image_size=16, patch_size=4, window_size=2, mlp_dim=64,
                   global_attn_indexes=[1], output_channels=16), "vision_encoder.layers.1",
            ("attention layer_norm1> attn", "mlp layer_norm2> mlp")),
    "mllama": ((lambda: hf.MllamaTextModel(hf.MllamaTextConfig(**MLLAMA)),
                {**TEXT, "cross_attention_states": torch.randn(2, 4, 32)}), "layers.1",
               ("cross-attention input_layernorm> cross_attn", "mlp post_attention_layernorm> mlp")),
    "qformer": (family("Blip2QFormer", QUERIES, **SMALL, encoder_hidden_size=32, cross_attention_frequency=2),
                "encoder.layer.0",
                ("attention attention.attention> attention.output.dense",
                 "cross-attention crossattention.attention> crossattention.output.dense",
                 "mlp intermediate_query> output_query.dense")),
    "perceiver": (family("Perceiver", {"inputs": torch.randn(2, 7, 32)}, **PERCEIVER), "encoder.cross_attention",
                  ("cross-attention attention.self> attention.output", "mlp layernorm> mlp")),
}  # fmt: skip
# ... and, where something stays unknown, why.
PARTLY: dict[str, tuple[tuple[Callable, dict], str, tuple[str, ...], str]] = {
    "lxmert": (family("Lxmert", REGIONS, **LXMERT), "encoder.x_layers.0",
               ("attention lang_self_att.self> lang_self_att.output.dense",
                "attention visn_self_att.self> visn_self_att.output.dense",
                "mlp lang_inter> lang_output.dense", "mlp visn_inter> visn_output.dense"),
               "no module that runs once puts it out"),
    "sam windows": (family("SamVision", PIXELS, **SIZES, image_size=16, patch_size=4, window_size=3, mlp_dim=64,
                           global_attn_indexes=[1], output_channels=16), "vision_encoder.layers.0",
                    ("mlp layer_norm2> mlp",), "it comes from 'slice'"),
}  # fmt: skip


def seen_of(built: tuple[Callable, dict], path: str) -> tuple[SeenBlock, tuple[str, ...]]:
    build, batch = built
    torch.manual_seed(0)
    model: nn.Module = build()
    for parameter in model.parameters():
        parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
    called = calls(model.eval(), [path], batch)[path]
    seen = see_sublayers(model, Block(path, 32), *called)
    named = []
    for part in seen.sublayers:
        read, write = (tap.path.removeprefix(f"{path}.") for tap in (part.read, part.write))
        named.append(f"{part.kind} {read}{'>' if part.read.side == 'input' else ''} {write}")
    return seen, tuple(named)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_parts_are_seen(name):
    built, path, expected = FAMILIES[name]
    seen, named = seen_of(built, path)
    assert named == expected, seen.notes
    assert seen.complete and seen.width == 32 and seen.deterministic


@pytest.mark.parametrize("name", PARTLY)
def test_what_stays_unknown_is_named(name):
    built, path, expected, why = PARTLY[name]
    seen, named = seen_of(built, path)
    assert named == expected and not seen.complete
    assert any(why in note for note in seen.notes), seen.notes


def test_two_streams_are_numbered():
    built, path, _, _ = PARTLY["lxmert"]
    seen, _ = seen_of(built, path)
    assert [p.stream for p in seen.sublayers] == [0, 1, 0, 1] and seen.also == ("visual_feats",) and seen.keeps_shape
