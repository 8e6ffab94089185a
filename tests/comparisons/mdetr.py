"""MDETR: pretraining, and both kinds of GQA heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage
from trimtab.backbones.mdetr.model import sine_positions

PRETRAINED = "pretrained_resnet101_checkpoint.pth"
MORE = {"pretrain": (), "gqa": ("gqa_delta.pth",), "gqa_single": ("gqa_single_head_delta.pth",)}


@compares("backbone mdetr", told=("roberta", "n_params", "patched"))
def mdetr(case: Case) -> Iterator[Check | Skipped]:
    tiny, t = case.info["tiny"], case.tensors
    model = build(case, PRETRAINED, *MORE[str(case.stage)], heads=tiny["nh"], text_heads=tiny["th"])
    images, seen = padded([t["in.image_0"], t["in.image_1"]])
    batch = (images, t["in.text_ids"], t["in.text_atts"], seen)
    with torch.no_grad():
        out = model(*batch)
        found = {
            "pred_logits": out["logits"][-1], "pred_boxes": out["boxes"][-1], "proj_queries": out["objects"][-1],
            "proj_tokens": out["words"], "aux0.pred_logits": out["logits"][0], "aux0.pred_boxes": out["boxes"][0],
        }  # fmt: skip
        found |= {f"pred_{k}": v for k, v in out.items() if k.startswith("answer")}
        if case.stage == "pretrain":
            found |= inside(model.encode(*batch), tiny["dm"])
        yield from stage(case, found)


def padded(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H, W) on the right and below to the largest, (B, 3, H, W), and where there is an image, (B, H, W)."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch, seen = torch.zeros(len(images), 3, height, width), torch.zeros(len(images), height, width)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        seen[i, : image.shape[1], : image.shape[2]] = 1
    return batch, seen


def inside(seen: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """What the encoder gets and gives, in the axes of the reference (sequence first)."""
    height, columns = seen["grid"].shape[-2:]
    valid = seen["valid"][:, : height * columns].view(-1, height, columns)
    pos = sine_positions(valid, width).transpose(1, 2).unflatten(2, (height, columns))
    return {
        "backbone": seen["grid"], "backbone_mask": ~valid, "mask": ~seen["valid"], "pos": pos,
        "img_memory": seen["memory"].transpose(0, 1), "text_memory_resized": seen["text"].transpose(0, 1),
    }  # fmt: skip
