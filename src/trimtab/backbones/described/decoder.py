"""Decoder-only language models: LLaMA (Touvron et al., 2023) and what computes as it does, Gemma 2 with its four norms.

transformers' classes described.
"""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes(
    "LlamaModel", "MistralModel", "GemmaModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
)  # fmt: skip
def describe(model: Any) -> Anatomy:
    blocks = []
    for i in range(len(model.layers)):
        path = f"layers.{i}"
        blocks.append(Block(path, model.config.hidden_size, (
            Sublayer("attention", Tap(f"{path}.input_layernorm", "input"), Tap(f"{path}.self_attn")),
            Sublayer("mlp", Tap(f"{path}.post_attention_layernorm", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    return _tower(blocks)


@describes("Gemma2Model")
def describe_gemma2(model: Any) -> Anatomy:
    blocks = []
    for i in range(len(model.layers)):
        path = f"layers.{i}"
        blocks.append(Block(path, model.config.hidden_size, (
            # Each part's result goes through a norm of its own before it is summed into the stream.
            Sublayer("attention", Tap(f"{path}.input_layernorm", "input"), Tap(f"{path}.post_attention_layernorm")),
            Sublayer("mlp", Tap(f"{path}.pre_feedforward_layernorm", "input"),
                     Tap(f"{path}.post_feedforward_layernorm")),
        )))  # fmt: skip
    return _tower(blocks)


def _tower(blocks: list[Block]) -> Anatomy:
    tower = Tower(
        "text", "text", tuple(blocks), ("embed_tokens", "layers", "norm"), output=Tap("norm"),
        mask=Tap("", "input", "attention_mask"), causal=True,
    )  # fmt: skip
    return Anatomy((tower,))
