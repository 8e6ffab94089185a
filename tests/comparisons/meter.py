"""METER: every stage of its published code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage

PRETRAINED = "meter_clip16_288_roberta_pretrain.ckpt"


@compares("backbone meter", told=("config", "roberta_config", "cross_layer", "vit", "files", "n_params"))
def meter(case: Case) -> Iterator[Check | Skipped]:
    with torch.no_grad():
        yield from stage(case, STAGES[str(case.stage)](case))


def load(case: Case, *files: str, **settings) -> nn.Module:
    tiny = case.info["tiny"]
    return build(
        case, *files, vision_heads=tiny["vit_heads"], text_heads=tiny["th"], fusion_heads=tiny["nh"], **settings
    )


def inputs(case: Case) -> dict[str, Tensor]:
    """The pictures and texts of pretraining, which several tasks share."""
    t = case.tensors
    return {"pixel_values": t["pretrain.in.image"], "input_ids": t["pretrain.in.text_ids"],
            "attention_mask": t["pretrain.in.text_masks"]}  # fmt: skip


def pretrain(case: Case) -> dict[str, Tensor]:
    model = load(case, PRETRAINED)
    out = model(**inputs(case))
    return {
        "vit": model.vision(case.tensors["pretrain.in.image"]), "text_feats": out.text, "image_feats": out.image,
        "cls_feats": out.pooled, "mlm_logits": model.mlm_score(out.text), "itm_logits": model.itm_score(out.pooled),
    }  # fmt: skip


def mlm(case: Case) -> dict[str, Tensor]:
    model = load(case, PRETRAINED)
    batch = inputs(case) | {"input_ids": case.tensors["mlm.in.text_ids_mlm"]}
    logits = model.mlm_score(model(**batch).text)
    loss = F.cross_entropy(logits.flatten(0, 1), case.tensors["mlm.in.text_labels_mlm"].flatten(), ignore_index=-100)
    return {"mlm_logits": logits, "mlm_loss": loss}


def vqa(case: Case) -> dict[str, Tensor]:
    model = load(case, "meter_clip16_288_roberta_vqa.ckpt")
    t = case.tensors
    out = model(pixel_values=t["vqa.in.image"], input_ids=t["vqa.in.text_ids"], attention_mask=t["vqa.in.text_masks"])
    larger = load(
        case, PRETRAINED, image_size=case.info["tiny"]["S2"], tasks=("vqa",), answers=case.info["tiny"]["ans"]
    )
    return {
        "cls_feats": out.pooled, "vqa_logits": model.vqa_classifier(out.pooled),
        "adapted_positional_embedding": larger.vision.embeddings.position_embedding.weight,
    }  # fmt: skip


def nlvr2(case: Case) -> dict[str, Tensor]:
    t = case.tensors
    model = load(case, PRETRAINED, "nlvr2_delta.ckpt", tasks=("nlvr2",))
    logits = model.nlvr2(t["nlvr2.in.image_0"], t["nlvr2.in.image_1"], t["nlvr2.in.text_ids"], t["nlvr2.in.text_masks"])
    fresh = load(case, PRETRAINED, tasks=("nlvr2",))
    return {"nlvr2_logits": logits, "token_type_rows_right_after_load": fresh.token_type_embeddings.weight}


def snli(case: Case) -> dict[str, Tensor]:
    model = load(case, PRETRAINED, "snli_delta.ckpt", tasks=("snli",))
    return {"snli_logits": model.snli_classifier(model(**inputs(case)).pooled)}


def irtr(case: Case) -> dict[str, Tensor]:
    """The ranking head that the pretrained file gives, and the one that was saved: they must be the same."""
    batch, t = inputs(case), case.tensors
    scores = []
    for model in (load(case, PRETRAINED, "irtr_delta.ckpt"), load(case, PRETRAINED, tasks=("irtr",))):
        own = model.rank_output(model(**batch).pooled).squeeze(-1)
        false = batch | {"input_ids": t["irtr.in.false_text_0_ids"], "attention_mask": t["irtr.in.false_text_0_masks"]}
        scores.append(torch.stack([own, model.rank_output(model(**false).pooled).squeeze(-1)], dim=1))  # (B, 2)
    assert torch.equal(*scores)
    loss = F.cross_entropy(scores[0], torch.zeros(len(scores[0]), dtype=torch.long))
    return {"rank_scores_pretrain_pairs": scores[0][:, 0], "irtr_loss": loss}


STAGES = {"pretrain": pretrain, "mlm": mlm, "vqa": vqa, "nlvr2": nlvr2, "snli": snli, "irtr": irtr}
