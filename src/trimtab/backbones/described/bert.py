"""BERT (Devlin et al., NAACL 2019), a text tower by itself or inside a dual encoder: transformers' class described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("BertModel")
def describe(model: Any) -> Anatomy:
    width = model.config.hidden_size
    blocks = []
    for i in range(len(model.encoder.layer)):
        path = f"encoder.layer.{i}"
        blocks.append(Block(path, width, (
            # Post-norm: an attention adapter is summed before the LayerNorm that follows, one at the feed-forward part
            # after it, as DAS sets them in METER's BERT-like layers.
            Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
            Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
        )))  # fmt: skip
    tower = Tower(
        "text", "text", tuple(blocks), ("embeddings", "encoder"),
        output=Tap(blocks[-1].path), mask=Tap("", "input", "attention_mask"),
        pooled=Tap("pooler") if model.pooler is not None else None,
    )  # fmt: skip
    return Anatomy((tower,), heads=("pooler",))


def infer(state: Any, prefix: str, heads: int | None = None, kind: Any = None, **fixed: Any) -> Any:
    """The config of a BERT or a relative from the tensors under a prefix of a checkpoint file.

    Args:
        state: `Tensors` of the file.
        prefix: what stands before `embeddings.` and `encoder.layer.`.
        heads: attention heads, the setting `text_heads`; None for heads of 64 channels, as all published sizes have.
        kind: class of the config; None for `BertConfig`.
        fixed: further fields.

    Raises:
        CheckpointError: if a tensor from which a size is read is missing, or the width is no multiple of the heads.
    """
    from transformers import BertConfig

    from trimtab.backbones.official import head_count

    width = state.size(f"{prefix}embeddings.word_embeddings.weight", 1)
    return (kind or BertConfig)(
        vocab_size=state.size(f"{prefix}embeddings.word_embeddings.weight"), hidden_size=width,
        num_hidden_layers=state.count(f"{prefix}encoder.layer."),
        num_attention_heads=head_count(width, heads, "text_heads"),
        intermediate_size=state.size(f"{prefix}encoder.layer.0.intermediate.dense.weight"),
        max_position_embeddings=state.size(f"{prefix}embeddings.position_embeddings.weight"),
        type_vocab_size=state.size(f"{prefix}embeddings.token_type_embeddings.weight"), **fixed,
    )  # fmt: skip
