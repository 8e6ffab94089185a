"""Names and shapes of checkpoint files as their authors wrote them, at any size; written from the files, not from our
translation of them. Filled with random numbers at tiny sizes, or with nothing (`device="meta"`) at the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def fill(shapes: Shapes, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random float tensors; names that end in `position_ids` or `num_batches_tracked` hold whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        if name.endswith(("position_ids", "num_batches_tracked")):
            out[name] = torch.zeros(shape, dtype=torch.long, device=device)
        elif device == "meta":
            out[name] = torch.empty(shape, device=device)
        else:
            out[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
            if name.endswith("running_var"):
                out[name] = 1 + out[name].abs()
    return out


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert_layer(name: str, width: int, inner: int, cross: int | None = None) -> Shapes:
    """A BERT layer; `cross` is the width of what its cross-attention reads."""
    out: Shapes = {}
    for part, source in (("attention", width), ("crossattention", cross)):
        if source is None:
            continue
        out |= linear(f"{name}.{part}.self.query", width, width)
        out |= linear(f"{name}.{part}.self.key", width, source) | linear(f"{name}.{part}.self.value", width, source)
        out |= linear(f"{name}.{part}.output.dense", width, width) | norm(f"{name}.{part}.output.LayerNorm", width)
    out |= linear(f"{name}.intermediate.dense", inner, width) | linear(f"{name}.output.dense", width, inner)
    return out | norm(f"{name}.output.LayerNorm", width)


def bert_embeddings(name: str, words: int, positions: int, width: int, types: int | None) -> Shapes:
    out: Shapes = {f"{name}.position_ids": (1, positions), f"{name}.word_embeddings.weight": (words, width),
                   f"{name}.position_embeddings.weight": (positions, width)}  # fmt: skip
    if types is not None:
        out[f"{name}.token_type_embeddings.weight"] = (types, width)
    return out | norm(f"{name}.LayerNorm", width)


def classifier(name: str, width: int, hidden: int, outputs: int) -> Shapes:
    """Linear, LayerNorm, GELU, Linear."""
    return linear(f"{name}.0", hidden, width) | norm(f"{name}.1", hidden) | linear(f"{name}.3", outputs, hidden)


METER: dict[str, Any] = {
    "width": 768, "vision_layers": 11, "patch": 16, "grid": 18, "text_width": 768, "text_layers": 12, "words": 50265,
    "positions": 514, "hidden": 768, "layers": 6, "clip_text": 512,
}  # fmt: skip
TINY_METER: dict[str, Any] = {
    "width": 16, "vision_layers": 2, "patch": 8, "grid": 2, "text_width": 16, "text_layers": 2, "words": 40,
    "positions": 14, "hidden": 16, "layers": 2, "clip_text": 8,
}  # fmt: skip


def meter(tasks: tuple[str, ...] = ("mlm", "itm"), answers: int = 3129, **sizes: int) -> Shapes:
    """A METER with CLIP ViT and RoBERTa. `sizes` as in METER above."""
    s = METER | sizes
    w, t, h = s["width"], s["text_width"], s["hidden"]
    visual = "vit_model.visual"
    out: Shapes = {
        "vit_model.positional_embedding": (77, s["clip_text"]), **norm("vit_model.ln_final", s["clip_text"]),
        f"{visual}.class_embedding": (w,), f"{visual}.positional_embedding": (s["grid"] ** 2 + 1, w),
        f"{visual}.conv1.weight": (w, 3, s["patch"], s["patch"]), **norm(f"{visual}.ln_pre", w),
        **norm(f"{visual}.ln_post", w), "token_type_embeddings.weight": (3 if "nlvr2" in tasks else 2, h),
    }  # fmt: skip
    for i in range(s["vision_layers"]):
        block = f"{visual}.transformer.resblocks.{i}"
        out |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,)}
        out |= linear(f"{block}.attn.out_proj", w, w) | norm(f"{block}.ln_1", w) | norm(f"{block}.ln_2", w)
        out |= linear(f"{block}.mlp.c_fc", 4 * w, w) | linear(f"{block}.mlp.c_proj", w, 4 * w)
    out |= bert_embeddings("text_transformer.embeddings", s["words"], s["positions"], t, 1)
    for i in range(s["text_layers"]):
        out |= bert_layer(f"text_transformer.encoder.layer.{i}", t, 4 * t)
    out |= linear("text_transformer.pooler.dense", t, t)
    out |= linear("cross_modal_text_transform", h, t) | linear("cross_modal_image_transform", h, w)
    for stream in ("image", "text"):
        for i in range(s["layers"]):
            out |= bert_layer(f"cross_modal_{stream}_layers.{i}", h, 4 * h, cross=h)
        out |= linear(f"cross_modal_{stream}_pooler.dense", h, h)
    heads = {
        "mlm": {"mlm_score.bias": (s["words"],), **linear("mlm_score.transform.dense", h, h),
                **norm("mlm_score.transform.LayerNorm", h), **linear("mlm_score.decoder", s["words"], h, bias=False)},
        "itm": linear("itm_score.fc", 2, 2 * h), "vqa": classifier("vqa_classifier", 2 * h, 2 * h, answers),
        "nlvr2": classifier("nlvr2_classifier", 4 * h, 2 * h, 2),
        "snli": classifier("snli_classifier", 2 * h, 2 * h, 3), "irtr": linear("rank_output", 1, 2 * h),
    }  # fmt: skip
    for task in tasks:
        out |= heads[task]
    return out
