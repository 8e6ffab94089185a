"""ViLT: every stage of its published code, in transformers' classes.

The order of image tokens is drawn at random, by theirs and by transformers' code alike: with the seed that is given in
the reference's description, both draw the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage
from trimtab.backbones.vilt.official import pixel_mask

SEED = 7


@compares("backbone vilt", told=("n_params", "ln_eps", "hf_check_max_abs_diff"))
def vilt(case: Case) -> Iterator[Check | Skipped]:
    with torch.no_grad():
        found = STAGES[str(case.stage)](case)
    if "in.pixel_mask" in case.tensors:
        different = pixel_mask(case.tensors["in.image"]) != case.tensors["in.pixel_mask"]
        yield Check("pixels taken for padding that are none, and the reverse", int(different.sum()), 0)
    yield from stage(case, found)


def load(case: Case, file: str, **settings) -> nn.Module:
    torch.manual_seed(SEED)  # for what the forward pass draws; loading draws nothing that is kept
    model = build(case, file, heads=case.info["tiny"]["nh"], **settings)
    torch.manual_seed(SEED)
    return model


def inputs(case: Case) -> dict[str, Tensor]:
    t = case.tensors
    return {"input_ids": t["in.text_ids"], "attention_mask": t["in.text_masks"], "pixel_values": t["in.image"],
            "pixel_mask": t["in.pixel_mask"]}  # fmt: skip


def pretrain(case: Case) -> dict[str, Tensor]:
    batch = inputs(case)
    length = batch["input_ids"].shape[1]
    model = load(case, "vilt_200k_mlm_itm.ckpt")
    out = model.vilt(**batch)
    text, image = out.last_hidden_state[:, :length], out.last_hidden_state[:, length:]
    torch.manual_seed(SEED)
    embedded, masks, (index, _) = model.vilt.embeddings.visual_embed(batch["pixel_values"], batch["pixel_mask"], -1)
    return {
        "text_feats": text, "image_feats": image, "raw_cls_feats": text[:, 0], "cls_feats": out.pooler_output,
        "mlm_logits": model.mlm_score(text), "itm_logits": model.itm_score(out.pooler_output),
        "visual_embed": embedded, "image_masks": masks, "patch_index": index,
    }  # fmt: skip


def mlm(case: Case) -> dict[str, Tensor]:
    model = load(case, "vilt_200k_mlm_itm.ckpt")
    logits, _ = model(**inputs(case) | {"input_ids": case.tensors["mlm.in.text_ids_mlm"]})
    loss = F.cross_entropy(logits.flatten(0, 1), case.tensors["mlm.in.text_labels_mlm"].flatten(), ignore_index=-100)
    return {"mlm_logits": logits, "mlm_loss": loss}


def vqa(case: Case) -> dict[str, Tensor]:
    return {"vqa_logits": load(case, "vilt_vqa.ckpt")(**inputs(case)).logits}


def nlvr2(case: Case) -> dict[str, Tensor]:
    batch, t = inputs(case), case.tensors
    batch["pixel_values"] = torch.stack([batch["pixel_values"], t["nlvr2.in.image_1"]], dim=1)
    batch["pixel_mask"] = torch.stack([batch["pixel_mask"], t["nlvr2.in.pixel_mask_1"]], dim=1)
    return {"nlvr2_logits": load(case, "vilt_nlvr2.ckpt")(**batch).logits}


def irtr(case: Case) -> dict[str, Tensor]:
    return {"rank_scores": load(case, "vilt_irtr_coco.ckpt")(**inputs(case)).logits.squeeze(-1)}


STAGES = {"pretrain": pretrain, "mlm": mlm, "vqa": vqa, "nlvr2": nlvr2, "irtr": irtr}
