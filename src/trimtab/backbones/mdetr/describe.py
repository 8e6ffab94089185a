"""The anatomy of MDETR."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.described import bert
from trimtab.backbones.vse import resnet

_EMBEDDED = "each block is given position or query embeddings token by token"


@describes("Mdetr")
def describe(model: Any) -> Anatomy:
    text = bert.describe(model.transformer.text_encoder).prefixed("transformer.text_encoder")
    encoder = [_encoder_block(f"transformer.encoder.layers.{i}", model) for i in range(model.config.encoder_layers)]
    decoder = [_decoder_block(f"transformer.decoder.layers.{i}", model) for i in range(model.config.decoder_layers)]
    towers = (
        resnet.tower(model.backbone, "backbone"), *text.towers,
        Tower("encoder", "fusion", tuple(encoder), ("transformer.encoder",), output=Tap(encoder[-1].path),
              mask=Tap("transformer.encoder", "input", "valid"), reads=("vision", "text"), closed=_EMBEDDED),
        Tower("decoder", "fusion", tuple(decoder), ("transformer.decoder",), output=Tap(decoder[-1].path),
              memory="encoder", levels=Tap("transformer.decoder"), starts_blank=True, closed=_EMBEDDED),
    )  # fmt: skip
    heads = [*text.heads, "transformer.resizer", "input_proj", "query_embed", "class_embed", "bbox_embed"]
    heads += [n for n, _ in model.named_children() if n.startswith(("contrastive", "answer", "qa_embed"))]
    return Anatomy(towers, heads=tuple(heads))


def _encoder_block(path: str, model: Any) -> Block:
    return Block(path, model.config.width, (
        # The third input of the attention is the stream without positions; as in `bert`, what an adapter gives is
        # summed before the norm of the attention and after that of the feed-forward part.
        Sublayer("attention", Tap(f"{path}.self_attn", "input", 2), Tap(f"{path}.self_attn")),
        Sublayer("mlp", Tap(f"{path}.linear1", "input"), Tap(f"{path}.norm2")),
    ), stream="x")  # fmt: skip


def _decoder_block(path: str, model: Any) -> Block:
    return Block(path, model.config.width, (
        Sublayer("attention", Tap(f"{path}.self_attn", "input", 2), Tap(f"{path}.self_attn")),
        Sublayer("cross-attention", Tap(f"{path}.norm1"), Tap(f"{path}.cross_attn_image")),
        Sublayer("mlp", Tap(f"{path}.linear1", "input"), Tap(f"{path}.norm4")),
    ), stream="x")  # fmt: skip
