"""CLIP-ViL: pretraining and VQA of its published code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage

PRETRAINED = "Epoch11_LXRT.pth"


@compares("backbone clip_vil", told=("n_params", "n_params_without_unused"))
def clip_vil(case: Case) -> Iterator[Check | Skipped]:
    with torch.no_grad():
        yield from stage(case, STAGES[str(case.stage)](case))


def load(case: Case, *more: str, **settings) -> nn.Module:
    return build(case, PRETRAINED, *more, heads=case.info["tiny"]["nh"], **settings)


def inputs(case: Case) -> dict[str, Tensor]:
    t = case.tensors
    return {"pixel_values": t["in.image"], "input_ids": t["in.text_ids"], "attention_mask": t["in.text_atts"],
            "token_type_ids": t["in.segment_ids"]}  # fmt: skip


def pretrain(case: Case) -> dict[str, Tensor]:
    model, t = load(case), case.tensors
    out = model(**inputs(case))
    words = model.cls.words(out.text, model.get_input_embeddings().weight)
    match, answer = model.cls.seq_relationship(out.pooled), model.answer_head(out.pooled)
    losses = torch.stack([
        F.cross_entropy(words.flatten(0, 1), t["pretrain.in.masked_lm_labels"].flatten(), ignore_index=-1),
        F.cross_entropy(match, t["pretrain.in.matched_label"]),
        F.cross_entropy(answer, t["pretrain.in.ans"], ignore_index=-1),
    ])  # fmt: skip
    return {
        "grid": model.vision(t["in.image"]), "visual_embeddings": model.look(t["in.image"]), "lang_feats": out.text,
        "visn_feats": out.image, "pooled": out.pooled, "lm_scores": words, "match_scores": match,
        "answer_scores": answer, "losses_mlm_match_qa": losses[None], "total_loss": losses.sum(),
    }  # fmt: skip


def vqa(case: Case) -> dict[str, Tensor]:
    model = load(case, "vqa_logit_fc_only_LXRT.pth")
    masked = inputs(case) | {"image_mask": case.tensors["vqa.in.visual_attention_mask"]}
    return {
        "logits": model.logit_fc(model(**inputs(case)).pooled),
        "logits_with_visual_mask": model.logit_fc(model(**masked).pooled),
    }


STAGES = {"pretrain": pretrain, "vqa": vqa}
