"""Decoder-only language models that compute as LLaMA (Touvron et al., 2023) does. transformers' classes described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel")
def describe(model: Any) -> Anatomy:
    blocks = []
    for i in range(len(model.layers)):
        path = f"layers.{i}"
        blocks.append(Block(path, model.config.hidden_size, (
            Sublayer("attention", Tap(f"{path}.input_layernorm", "input"), Tap(f"{path}.self_attn")),
            Sublayer("mlp", Tap(f"{path}.post_attention_layernorm", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    tower = Tower(
        "text", "text", tuple(blocks), ("embed_tokens", "layers", "norm"), output=Tap("norm"),
        mask=Tap("", "input", "attention_mask"), causal=True,
        extendable=False,  # rotary positions are computed once, for the tokens that enter, and given to every block
    )  # fmt: skip
    return Anatomy((tower,))
