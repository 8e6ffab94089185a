"""The anatomy of METER."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.clip import describe as clip
from trimtab.backbones.described import bert

# Task -> where its head stands in file and model, and the parameter whose rows are its outputs.
HEADS = {
    "mlm": ("mlm_score", "decoder.weight"), "itm": ("itm_score", "fc.weight"), "vqa": ("vqa_classifier", "3.weight"),
    "nlvr2": ("nlvr2_classifier", "3.weight"), "snli": ("snli_classifier", "3.weight"),
    "irtr": ("rank_output", "weight"),
}  # fmt: skip


@describes("MeterModel")
def describe(model: Any) -> Anatomy:
    vision = Tower("vision", "vision", clip.tower_blocks(model.vision, "vision"), ("vision",),
                   output=Tap("vision.post_layernorm"))  # fmt: skip
    (text,) = bert.describe(model.text_transformer).prefixed("text_transformer").towers
    text = replace(text, mask=Tap("", "input", "attention_mask"))  # RoBERTa itself is given one ready for attention
    streams = [_stream(model, name, other) for name, other in (("text", "image"), ("image", "text"))]
    # Of what is in no tower, DAS trains these and leaves the two linear transforms frozen.
    heads = ["token_type_embeddings", "cross_modal_text_pooler", "cross_modal_image_pooler"]
    heads += [head for task, (head, _) in HEADS.items() if task in model.config.tasks]
    return Anatomy((vision, text, *streams), heads=tuple(heads))


def _stream(model: Any, name: str, other: str) -> Tower:
    prefix = f"cross_modal_{name}_layers"
    blocks = []
    for i in range(len(getattr(model, prefix))):
        path = f"{prefix}.{i}"
        # Post-norm, as in `bert`: DAS sums its adapters before the norm of either attention and after that of the MLP.
        blocks.append(Block(path, model.config.cross_config.hidden_size, (
            Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
            Sublayer("cross-attention", Tap(f"{path}.crossattention", "input"),
                     Tap(f"{path}.crossattention.output.dense")),
            Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
        )))  # fmt: skip
    return Tower(
        f"fusion_{name}", "fusion", tuple(blocks), (prefix,), output=Tap(blocks[-1].path),
        mask=Tap("", "input", "attention_mask") if name == "text" else None,
        pooled=Tap(f"cross_modal_{name}_pooler"), memory=f"fusion_{other}",
        reads=("text" if name == "text" else "vision",),
        closed="its blocks hand what they put out to the other stream too",
    )  # fmt: skip
