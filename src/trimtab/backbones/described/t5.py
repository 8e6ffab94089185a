"""T5 (Raffel et al., JMLR 2020): an encoder, and a decoder that reads it. transformers' classes described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes

_ATTENTION = {"SelfAttention": "attention", "EncDecAttention": "cross-attention", "DenseReluDense": "mlp"}


@describes("T5Model", "T5EncoderModel", "T5ForConditionalGeneration", "T5ForQuestionAnswering")
def describe(model: Any) -> Anatomy:
    towers = [_tower(model, "encoder")]
    if getattr(model, "decoder", None) is not None:
        towers.append(_tower(model, "decoder"))
    parts = ("shared", "encoder", "decoder")
    return Anatomy(tuple(towers), heads=tuple(n for n, _ in model.named_children() if n not in parts))


def _tower(model: Any, name: str) -> Tower:
    decodes = name == "decoder"
    stack = getattr(model, name)
    blocks = tuple(
        # A block hands on position biases too, which the first one makes for all: that one cannot be skipped.
        Block(f"{name}.block.{i}", model.config.d_model, tuple(_sublayers(b, f"{name}.block.{i}")),
              keeps_shape=i > 0, returns_tuple=True, also=("position_bias", "encoder_decoder_position_bias"))
        for i, b in enumerate(stack.block)
    )  # fmt: skip
    return Tower(
        name, "text", blocks, (name,), output=Tap(f"{name}.final_layer_norm"),
        mask=Tap(name, "input", "attention_mask"), memory="encoder" if decodes else None, causal=decodes,
    )  # fmt: skip


def _sublayers(block: Any, path: str) -> Any:
    for i, part in enumerate(block.layer):
        (name,) = (n for n, _ in part.named_children() if n in _ATTENTION)
        own = f"{path}.layer.{i}"
        yield Sublayer(_ATTENTION[name], Tap(f"{own}.layer_norm", "input"), Tap(f"{own}.{name}"))  # type: ignore[arg-type]
