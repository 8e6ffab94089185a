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


def vit_block(name: str, width: int) -> Shapes:
    """A block as timm names it."""
    out = norm(f"{name}.norm1", width) | linear(f"{name}.attn.qkv", 3 * width, width)
    out |= linear(f"{name}.attn.proj", width, width) | norm(f"{name}.norm2", width)
    return out | linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)


VILT: dict[str, int] = {"width": 768, "layers": 12, "patch": 32, "grid": 12, "words": 30522, "positions": 40}
TINY_VILT: dict[str, int] = {"width": 16, "layers": 2, "patch": 8, "grid": 3, "words": 40, "positions": 9}


def vilt(tasks: tuple[str, ...] = ("mlm", "itm"), answers: int = 3129, **sizes: int) -> Shapes:
    """A ViLT with heads of any of `mlm`, `itm`, `vqa`, `nlvr2`, `irtr`. `sizes` as in VILT above."""
    s = VILT | sizes
    w = s["width"]
    out = bert_embeddings("text_embeddings", s["words"], s["positions"], w, 2)
    out |= {"token_type_embeddings.weight": (3 if "nlvr2" in tasks else 2, w), "transformer.cls_token": (1, 1, w),
            "transformer.pos_embed": (1, s["grid"] ** 2 + 1, w)}  # fmt: skip
    out |= {"transformer.patch_embed.proj.weight": (w, 3, s["patch"], s["patch"])}
    out |= {"transformer.patch_embed.proj.bias": (w,)}
    for i in range(s["layers"]):
        out |= vit_block(f"transformer.blocks.{i}", w)
    out |= norm("transformer.norm", w) | linear("pooler.dense", w, w)
    heads = {
        "mlm": {"mlm_score.bias": (s["words"],), **linear("mlm_score.transform.dense", w, w),
                **norm("mlm_score.transform.LayerNorm", w), **linear("mlm_score.decoder", s["words"], w, bias=False)},
        "itm": linear("itm_score.fc", 2, w), "vqa": classifier("vqa_classifier", w, 2 * w, answers),
        "nlvr2": classifier("nlvr2_classifier", 2 * w, 2 * w, 2), "irtr": linear("rank_output", 1, w),
    }  # fmt: skip
    for task in tasks:
        out |= heads[task]
    return out


BLIP: dict[str, int] = {"vision": 768, "vision_layers": 12, "patch": 16, "grid": 14, "width": 768, "layers": 12,
                        "words": 30524, "positions": 512, "embed": 256}  # fmt: skip
TINY_BLIP: dict[str, int] = {"vision": 16, "vision_layers": 2, "patch": 8, "grid": 2, "width": 16, "layers": 2,
                             "words": 40, "positions": 12, "embed": 6}  # fmt: skip


def blip(parts: tuple[str, ...] = ("text_encoder", "text_decoder", "contrast", "itm"), momentum: bool = False,
         **sizes: int) -> Shapes:  # fmt: skip
    """A BLIP of any of these parts and `nlvr2` (an encoder for two pictures). `sizes` as in BLIP above."""
    s = BLIP | sizes
    v, w = s["vision"], s["width"]
    out: Shapes = {"visual_encoder.cls_token": (1, 1, v), "visual_encoder.pos_embed": (1, s["grid"] ** 2 + 1, v),
                   "visual_encoder.patch_embed.proj.weight": (v, 3, s["patch"], s["patch"]),
                   "visual_encoder.patch_embed.proj.bias": (v,), **norm("visual_encoder.norm", v)}  # fmt: skip
    for i in range(s["vision_layers"]):
        out |= vit_block(f"visual_encoder.blocks.{i}", v)
    for part, root in (
        ("text_encoder", "text_encoder"),
        ("nlvr2", "text_encoder"),
        ("text_decoder", "text_decoder.bert"),
    ):
        if part not in parts:
            continue
        out |= bert_embeddings(f"{root}.embeddings", s["words"], s["positions"], w, None)
        for i in range(s["layers"]):
            layer = bert_layer(f"{root}.encoder.layer.{i}", w, 4 * w, cross=v)
            out |= twin(layer, f"{root}.encoder.layer.{i}", w, merge=i >= 6) if part == "nlvr2" else layer
    if "text_decoder" in parts:
        head = "text_decoder.cls.predictions"
        out |= {f"{head}.bias": (s["words"],), **linear(f"{head}.transform.dense", w, w),
                **norm(f"{head}.transform.LayerNorm", w), **linear(f"{head}.decoder", s["words"], w)}  # fmt: skip
    if "contrast" in parts:
        out |= linear("vision_proj", s["embed"], v) | linear("text_proj", s["embed"], w) | {"temp": ()}
    if "itm" in parts:
        out |= linear("itm_head", 2, w)
    if "nlvr2" in parts:
        out |= linear("cls_head.0", w, w) | linear("cls_head.2", 2, w)
    if momentum:
        copies = {"visual_encoder", "text_encoder", "vision_proj", "text_proj"}
        split = {k: k.split(".", 1) for k in out}
        out |= {f"{a}_m.{b[0]}": out[k] for k, (a, *b) in split.items() if a in copies}
        out |= {"image_queue": (s["embed"], 4), "text_queue": (s["embed"], 4), "queue_ptr": (1,)}
    return out


def twin(layer: Shapes, name: str, width: int, merge: bool) -> Shapes:
    """A layer whose cross-attention reads two pictures."""
    cross, out = f"{name}.crossattention", {}
    for key, shape in layer.items():
        if key.startswith(f"{cross}.self."):
            out |= {key.replace(f"{cross}.self.", f"{cross}.self{i}."): shape for i in (0, 1)}
        elif key.startswith(f"{cross}.output.dense."):
            out |= {key.replace(".output.dense.", f".output.dense{i}."): shape for i in (0, 1)}
        else:
            out[key] = shape
    return out | (linear(f"{cross}.output.merge_layer", width, 2 * width) if merge else {})


CLIP_VIL: dict[str, Any] = {"stem": 80, "stages": (4, 6, 10, 6), "grid_positions": 25, "width": 768, "layers": 12,
                            "words": 30522, "positions": 512}  # fmt: skip
TINY_CLIP_VIL: dict[str, Any] = {"stem": 4, "stages": (1, 2, 1, 1), "grid_positions": 3, "width": 16, "layers": 2,
                                 "words": 40, "positions": 12}  # fmt: skip


def clip_vil(task: str = "pretrain", answers: int = 9500, **sizes: Any) -> Shapes:
    """A CLIP-ViL, pretrained or for VQA, with its `module.` prefix and some of what it leaves unused."""
    s = CLIP_VIL | sizes
    w, stem = s["width"], s["stem"]
    root = "module.bert" if task == "pretrain" else "module.lxrt_encoder.model.bert"
    visual = f"{root}.encoder.visual_model.visual"

    def conv(name: str, bn: str, out: int, into: int, kernel: int) -> Shapes:
        stats = {f"{bn}.{n}": (out,) for n in ("weight", "bias", "running_mean", "running_var")}
        return {f"{name}.weight": (out, into, kernel, kernel), **stats, f"{bn}.num_batches_tracked": ()}

    out = conv(f"{visual}.conv1", f"{visual}.bn1", stem // 2, 3, 3)
    out |= conv(f"{visual}.conv2", f"{visual}.bn2", stem // 2, stem // 2, 3)
    out |= conv(f"{visual}.conv3", f"{visual}.bn3", stem, stem // 2, 3)
    channels = stem
    for i, count in enumerate(s["stages"]):
        for j in range(count):
            block, inner = f"{visual}.layer{i + 1}.{j}", stem * 2**i
            out |= conv(f"{block}.conv1", f"{block}.bn1", inner, channels, 1)
            out |= conv(f"{block}.conv2", f"{block}.bn2", inner, inner, 3)
            out |= conv(f"{block}.conv3", f"{block}.bn3", 4 * inner, inner, 1)
            if not j:
                out |= conv(f"{block}.downsample.0", f"{block}.downsample.1", 4 * inner, channels, 1)
            channels = 4 * inner
    out |= linear(f"{visual}.attnpool.k_proj", channels, channels)
    out |= {f"{root}.encoder.visual_model.logit_scale": ()} | norm(f"{root}.encoder.visual_model.ln_final", 8)
    out |= {f"{root}.encoder.visual_pos.{a}_position_embedding.weight": (s["grid_positions"], channels) for a in "xy"}
    out |= linear(f"{root}.encoder.visn_fc.visn_fc", w, channels) | norm(f"{root}.encoder.visn_fc.visn_layer_norm", w)
    out |= linear(f"{root}.encoder.visn_fc.box_fc", w, 4) | norm(f"{root}.encoder.visn_fc.box_layer_norm", w)
    embeddings = bert_embeddings(f"{root}.embeddings", s["words"], s["positions"], w, 2)
    out |= {k: v for k, v in embeddings.items() if not k.endswith("position_ids")}
    for i in range(s["layers"]):
        out |= bert_layer(f"{root}.encoder.layer.{i}", w, 4 * w)
    out |= linear(f"{root}.pooler.dense", w, w)
    head = "module.answer_head.logit_fc" if task == "pretrain" else "module.logit_fc"
    out |= linear(f"{head}.0", 2 * w, w) | norm(f"{head}.2", 2 * w) | linear(f"{head}.3", answers, 2 * w)
    if task == "pretrain":
        cls = "module.cls"
        out |= {f"{cls}.predictions.bias": (s["words"],), **linear(f"{cls}.predictions.transform.dense", w, w),
                **norm(f"{cls}.predictions.transform.LayerNorm", w), **linear(f"{cls}.seq_relationship", 2, w),
                **linear(f"{cls}.predictions.decoder", s["words"], w, bias=False)}  # fmt: skip
    return out
