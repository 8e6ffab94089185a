"""What the papers' methods cost on the papers' backbones: DAS's multiply-adds and adapters, UniPT's trained parameters,
and the memory that training takes with UniPT, LST and in full. Nothing needs weights: see
`trimtab.sizes.sizes_only`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from published.sizes import ids, vilt_tokens
from trimtab import Anatomy
from trimtab.backbones import build
from trimtab.backbones.clip4clip.model import symmetric_loss
from trimtab.backbones.vse.model import hinge_loss
from trimtab.counting import count_macs, saved_bytes, training_peak
from trimtab.methods import METHODS
from trimtab.methods.tune.unipt import PUBLISHED, DecoderUniPT, PyramidUniPT, TokenUniPT, VectorUniPT
from trimtab.sizes import sizes_only

FUSION = ("fusion_text", "fusion_image")


# --- DAS --------------------------------------------------------------------------------------------------------------


def skipped(model: nn.Module, k: int | None, towers: tuple[str, ...] | None = None, plan: Any = None) -> nn.Module:
    """A frozen model with DAS's adapters and without k blocks, or as it is."""
    model.requires_grad_(False)
    if k is not None:
        method = METHODS["das"](skip=k, towers=towers, plan=plan)
        anatomy = Anatomy.of(model)
        method.assume(model, anatomy)
        method.attach(model, anatomy)
    return model


def adapters(model: nn.Module) -> dict[str, int]:
    """Parameters of DAS's adapters, their LayerNorms counted and not."""
    own = {n: p.numel() for n, p in model.named_parameters() if ".das_" in n or ".adapter." in n}
    return {"with norms": sum(own.values()), "without": sum(v for n, v in own.items() if ".norm." not in n)}


def das_meter(k: int | None) -> dict[str, Any]:
    """METER at 384 px and 40 tokens; k fusion layers skipped, half of them of either stream, from the top."""
    with sizes_only():
        plan = tuple(f"cross_modal_{s}_layers.{5 - i}" for s in ("text", "image") for i in range((k or 0) // 2)) or None
        model = skipped(build("meter", tasks=["itm", "irtr"], image_size=384), k, FUSION, plan)
        x = {"pixel_values": torch.zeros(1, 3, 384, 384), "input_ids": ids(40), "attention_mask": ids(40) + 1}
        return {"macs": count_macs(lambda: model.rank_output(model(**x).pooled)), **adapters(model)}


def das_vilt(k: int | None) -> dict[str, Any]:
    """ViLT at 320 x 640 px and 40 tokens, 241 in all."""
    with sizes_only():
        model = skipped(build("vilt"), k)

        def run() -> Any:
            seen = vilt_tokens(model, 320, 640)
            mask = torch.ones(seen.shape[:2], dtype=torch.long)
            return model.vilt(input_ids=ids(40), attention_mask=ids(40) + 1, image_embeds=seen, pixel_mask=mask)

        return {"macs": count_macs(run), **adapters(model)}


# --- UniPT ------------------------------------------------------------------------------------------------------------


def vse_sides() -> nn.ModuleDict:
    return nn.ModuleDict({
        "text": TokenUniPT(768, 12, 2, PUBLISHED["vse-text"], 1024),
        "image": PyramidUniPT([256, 512, 1024, 2048], 1024, 2),
    })  # fmt: skip


def unipt_parameters() -> dict[str, dict[str, int]]:
    """Trained parameters by part, with the published sizes and settings."""

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    with sizes_only():
        vse, clip_vil, mdetr = build("vse"), build("clip_vil"), build("mdetr")
        sides = vse_sides()
        pools = count(vse.img_enc.image_encoder.gpool, vse.txt_enc.gpool)
        heads = count(mdetr.class_embed, mdetr.bbox_embed, mdetr.contrastive_align_projection_image,
                      mdetr.contrastive_align_projection_text)  # fmt: skip
        encoder = TokenUniPT(256, 3, 2, PUBLISHED["mdetr-encoder"])
        decoder = DecoderUniPT(256, 3, 2, PUBLISHED["mdetr-decoder"], levels=True)
        single = TokenUniPT(768, 12, 2, replace(PUBLISHED["clip-vil"], projection="single"))
        double = TokenUniPT(768, 12, 2, PUBLISHED["clip-vil"])
        return {
            "VSE-infinity": {"text": count(sides["text"]), "image": count(sides["image"]), "GPO": pools},
            "CLIP4Clip": {"text": count(VectorUniPT(512, 12, 512, 1)), "frames": count(VectorUniPT(768, 12, 512, 1))},
            "CLIP-ViL, as published": {"side": count(single), "VQA head": count(clip_vil.logit_fc)},
            "CLIP-ViL, as released": {"side": count(double), "VQA head": count(clip_vil.logit_fc)},
            "MDETR": {"sides": count(encoder, decoder), "heads": heads},
        }


# --- memory of training -----------------------------------------------------------------------------------------------


def beside(model: nn.Module, method: str, **settings: Any) -> None:
    """Freeze a model, set side networks beside it and let them alone train."""
    model.requires_grad_(False)
    METHODS[method](**settings).attach(model, Anatomy.of(model))
    model.get_submodule(method).train()


def in_full(model: nn.Module) -> None:
    model.train().requires_grad_(True)


def vse(way: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """112 pairs of a 512 px picture and 32 words."""
    model = build("vse")
    model.set_attn_implementation("eager")
    for pool in (model.img_enc.image_encoder.gpool, model.txt_enc.gpool):
        # On fake tensors a GRU runs step by step, for minutes; of 256 tokens 64 wide it keeps less than 0.1 GiB.
        pool.weights = lambda size, valid: torch.full((112, size, 1), 1 / size)
    pixels, text = torch.zeros(112, 3, 512, 512), torch.ones(112, 32, dtype=torch.long)
    if way == "full":
        in_full(model)
        return model, lambda: hinge_loss(model(pixels, text))
    if way == "lst":  # a ladder needs tokens: beside BERT alone; of the image side the projection and GPO are trained
        beside(model, "lst", towers=("text",))
        for part in (model.img_enc.image_encoder, model.txt_enc.linear, model.txt_enc.gpool):
            part.requires_grad_(True)
        return model, lambda: hinge_loss(model(pixels, text))
    # As published, the side networks stand in the place of the projections to 1024.
    model.requires_grad_(False)
    model.sides = vse_sides()
    image, words = model.img_enc.image_encoder.gpool, model.txt_enc.gpool
    for part in (image, words):
        part.requires_grad_(True)
    resnet, bert = model.img_enc.backbone.resnet, model.txt_enc.bert

    def loss() -> Tensor:
        with torch.no_grad():
            x = resnet.maxpool(torch.relu(resnet.bn1(resnet.conv1(pixels))))
            grids = [x := getattr(resnet, f"layer{i}")(x) for i in (1, 2, 3, 4)]
            maps = bert(input_ids=text, attention_mask=text, output_hidden_states=True).hidden_states
        one = image(model.sides["image"](grids))
        other = words(model.sides["text"](list(maps), text.float()), text.bool())
        return hinge_loss(one @ other.T)

    return model, loss


def clip4clip(way: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """32 videos of 12 frames with 32 words; CLIP in half precision."""
    torch.set_default_dtype(torch.half)  # fake tensors cannot be converted where they are
    try:
        model = build("clip4clip")
    finally:
        torch.set_default_dtype(torch.float)
    model.set_attn_implementation("eager")
    if way == "full":
        in_full(model)
    else:
        beside(model, way, towers=("vision", "text"), **({"reduction": 1} if way == "unipt" else {}))
    text, video = torch.ones(32, 32, dtype=torch.long), torch.zeros(32, 12, 3, 224, 224, dtype=torch.half)
    return model, lambda: symmetric_loss(model(text, video))


def clip_vil(way: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """32 pictures of 384 x 640 px and questions of 20 words; mixed precision."""
    model = build("clip_vil")
    model.set_attn_implementation("eager")
    if way == "full":
        in_full(model)
    else:
        beside(model, way, towers=("fusion",))
        model.logit_fc.requires_grad_(True)
    x = {"pixel_values": torch.zeros(32, 3, 384, 640), "input_ids": torch.ones(32, 20, dtype=torch.long),
         "attention_mask": torch.ones(32, 20, dtype=torch.long)}  # fmt: skip

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logit_fc(model(**x).pooled)
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), torch.zeros(32, 3129))

    return model, loss


def mdetr(way: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """4 pictures of 800 x 1333 px and phrases of 20 words."""
    model = build("mdetr")
    model.set_attn_implementation("eager")
    if way == "full":
        in_full(model)
    else:
        settings = {"layers": (1, 3, 5)} if way == "unipt" else {"initialise": "random"}
        beside(model, way, towers=("encoder", "decoder"), **settings)
        for name, part in model.named_children():
            part.requires_grad_(name.startswith(("class_embed", "bbox_embed", "contrastive", way)))
    pixels, text = torch.zeros(4, 3, 800, 1333), torch.ones(4, 20, dtype=torch.long)

    def loss() -> Tensor:
        out = model(pixels, text, text)
        return out["logits"].square().mean() + out["boxes"].mean() + (out["objects"].mean() + out["words"].mean())

    return model, loss


BACKBONES = {"VSE-infinity": vse, "CLIP4Clip": clip4clip, "CLIP-ViL": clip_vil, "MDETR": mdetr}


def memory(backbone: str, way: str) -> dict[str, int]:
    """Bytes that a training step keeps for backward and takes at its worst moment, and what is trained."""
    with sizes_only():
        model, loss = BACKBONES[backbone](way)
        return {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "saved": saved_bytes(loss, model), "peak": training_peak(loss, model),
        }  # fmt: skip
