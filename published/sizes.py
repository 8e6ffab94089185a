"""Parameters and multiply-adds of the papers' backbones at their published sizes, beside those of the authors' classes.

`sizes.json` holds the authors' figures; here is which part of our models each of them is. Models are built
and run as in `trimtab cost`, on tensors that have a shape and no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backbones import build
from trimtab.counting import count_macs
from trimtab.sizes import sizes_only

PUBLISHED: list[dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())["rows"]

Parts = dict[str, Callable[[], Any]]


def ids(length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.long)


def pictures(row: dict[str, Any]) -> Tensor:
    return torch.zeros(1, 3, *row["image"])


def states(length: int, width: int = 768) -> Tensor:
    return torch.zeros(1, length, width)


def meter(model: Any, row: dict[str, Any]) -> Parts:
    head = row["settings"]["tasks"][-1]

    def whole() -> None:
        mask = torch.ones_like(ids(row["text"]))
        out = model(pixel_values=pictures(row), input_ids=ids(row["text"]), attention_mask=mask)
        if head == "itm":  # of pretraining
            model.mlm_score(out.text), model.itm_score(out.pooled)
        elif head != "nlvr2":  # one of its two passes, without the head
            names = {"vqa": "vqa_classifier", "irtr": "rank_output", "snli": "snli_classifier"}
            model.get_submodule(names[head])(out.pooled)

    return {"whole": whole}


def vilt_tokens(model: Any, height: int, width: int) -> Tensor:
    """The embedded picture, (1, 1 + P, D). Positions are resized and added, which counts nothing."""
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(torch.zeros(1, 3, height, width)).flatten(2).transpose(1, 2)
    return torch.cat([embeddings.cls_token, patches], dim=1)


def vilt(model: Any, row: dict[str, Any]) -> Parts:
    task = row["settings"]["task"]

    def whole() -> None:
        seen = vilt_tokens(model, *row["image"])
        mask = torch.ones_like(ids(row["text"]))
        out = model.vilt(input_ids=ids(row["text"]), attention_mask=mask, image_embeds=seen, pixel_mask=mask.new_ones(
            seen.shape[:2]))  # fmt: skip
        if task == "pretrain":
            model.mlm_score(out.last_hidden_state[:, : row["text"]]), model.itm_score(out.pooler_output)
        elif task != "nlvr2":
            (model.classifier if task == "vqa" else model.rank_output)(out.pooler_output)

    return {"whole": whole}


def xvlm(model: Any, row: dict[str, Any]) -> Parts:
    length, swin, task = row["text"], row["settings"]["vision"] == "swin", row["settings"]["task"]
    places = (row["image"][0] // (32 if swin else 16)) ** 2 + 1
    images = (states(places, 1024 if swin else 768),) * (2 if task == "nlvr2" else 1)
    mask = torch.ones_like(ids(length))
    parts: Parts = {
        "vision": lambda: model.encode_image(pictures(row)),
        "text only": lambda: model.encode_text(ids(length), mask),
        "fusion": lambda: model.fuse(states(length), mask, *images),
    }
    if task == "vqa":
        parts["decoder, answer len 4"] = lambda: model.answer_words(states(length), mask, ids(4), None)
    return parts


def blip(model: Any, row: dict[str, Any]) -> Parts:
    length, task = row["text"], row["settings"]["task"]
    seen: Any = states((row["image"][0] // 16) ** 2 + 1)
    seen = (seen, seen) if task == "nlvr2" else seen
    decoder = next((name for name in row["macs"] if name.startswith("decoder")), "decoder")
    answer = 4 if task == "vqa" else length
    read = states(length) if task == "vqa" else seen
    return {
        "vision": lambda: model.vision_model(pixel_values=pictures(row)),
        "text only": lambda: model.text_encoder(input_ids=ids(length)),
        "multimodal encoder": lambda: model.text_encoder(input_ids=ids(length), encoder_hidden_states=seen),
        decoder: lambda: model.text_decoder(input_ids=ids(answer), encoder_hidden_states=read, use_cache=False),
    }


def mdetr(model: Any, row: dict[str, Any]) -> Parts:
    parts: Parts = {}
    for name in row["macs"]:
        height, width = (int(x) for x in name.split(")")[0].strip("(").split(","))
        pixels = torch.zeros(1, 3, height, width)
        if name.endswith("only"):
            parts[name] = lambda x=pixels: model.backbone(x)
        else:
            parts[name] = lambda x=pixels: model(x, ids(row["text"]), torch.ones_like(ids(row["text"])))
    return parts


def vse(model: Any, row: dict[str, Any]) -> Parts:
    images = states(36, 2048) if row["settings"]["vision"] == "regions" else pictures(row)
    return {
        "image": lambda: model.encode_image(images),
        "text L20": lambda: model.encode_text(ids(row["text"]), torch.ones_like(ids(row["text"]))),
    }


def clip4clip(model: Any, row: dict[str, Any]) -> Parts:
    video = torch.zeros(1, row["frames"], 3, *row["image"])
    text, frames = states(1, 512)[0], states(row["frames"], 512)
    if model.config.head == "seqLSTM":  # an LSTM is not counted, and it looks at the lengths of videos
        model._in_time = lambda frames, mask: frames
    return {
        "text L32": lambda: model.encode_text(ids(row["text"]), torch.ones_like(ids(row["text"]))),
        "video 12 frames": lambda: model.encode_video(video),
        "similarity head (1 pair)": lambda: model.compare(text, frames),
    }


def clip_vil(model: Any, row: dict[str, Any]) -> Parts:
    text = {"input_ids": ids(row["text"]), "attention_mask": torch.ones_like(ids(row["text"]))}
    return {
        "vision grid only": lambda: model.vision(pictures(row)),
        "whole VQA L20": lambda: model.logit_fc(model(pixel_values=pictures(row), **text).pooled),
    }


FAMILIES: dict[str, Callable[[Any, dict[str, Any]], Parts]] = {
    "meter": meter, "vilt": vilt, "xvlm": xvlm, "blip": blip, "mdetr": mdetr, "vse": vse, "clip4clip": clip4clip,
    "clip_vil": clip_vil,
}  # fmt: skip


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Parameters of our model, each tied one once, and its multiply-adds by part."""
    with sizes_only():
        model: nn.Module = build(row["architecture"], **row["settings"]).requires_grad_(False)
        getattr(model, "tie_weights", lambda: None)()
        parts = FAMILIES[row["architecture"]](model, row)
        found = {name: count_macs(parts[name]) for name in row["macs"]}
        return {"params": sum(p.numel() for p in model.parameters()), "macs": found}
