"""X-VLM with either vision tower: pretraining with regions and masked words, and its tasks from the pretrained file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage
from trimtab.backbones.xvlm.model import Xvlm, word_loss
from trimtab.backbones.xvlm.vision import resize_bias

FILES = {"xvlm_swin": "4m_base_model_state_step_199999.th", "xvlm_clipvit": "clipvit_model_state_step_199999.th"}


@compares(
    "backbone xvlm_swin",
    "backbone xvlm_clipvit",
    told=(
        "image_from_u8",
        "kind",
        "bert_config",
        "vision_config",
        "vision_config_finetune",
        "n_params_pretrain",
        "ln_eps",
    ),
)
def xvlm(case: Case) -> Iterator[Check | Skipped]:
    with torch.no_grad():
        yield from stage(case, STAGES[str(case.stage)](case))
        if case.stage == "retrieval" and case.folder.name == "xvlm_swin":
            yield from _resizes(load_file(case.folder / "relpos_interp.safetensors"))


def load(case: Case, *more: str, **settings: Any) -> Xvlm:
    tiny = case.info["tiny"]
    settings |= {"text_heads": tiny["nh"], "vision_heads": tiny.get("vh"), "local_layers": tiny.get("lad", 4)}
    return build(case, FILES[case.folder.name], *more, **settings)


def picture(case: Case, key: str) -> Tensor:
    return (case.tensors[key].float() - 127.5) / 64


def tower(model: Xvlm, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What pretraining and retrieval have in common."""
    images, text = model.encode_image(image), model.encode_text(ids, mask)
    fused, (image_feat, text_feat) = model.fuse(text, mask, images), model.features(images, text)
    return {
        "image_embeds": images, "text_embeds": text, "cross_embeds": fused, "image_feat": image_feat,
        "text_feat": text_feat, "sim_i2t": image_feat @ text_feat.T / model.temp,
        "itm_logits": model.itm_head(fused[:, 0]),
    }  # fmt: skip


def pretrain(case: Case) -> dict[str, Tensor]:
    model, t = load(case), case.tensors
    out = tower(model, picture(case, "pretrain.in.image_u8"), t["pretrain.in.text_ids"], t["pretrain.in.text_atts"])
    return out | {"bbox_cxcywh": model.boxes(out["cross_embeds"])}


def mlm(case: Case) -> dict[str, Tensor]:
    model, t = load(case), case.tensors
    mask, images = t["pretrain.in.text_atts"], model.encode_image(picture(case, "pretrain.in.image_u8"))
    fused = model.fuse(model.encode_text(t["mlm.in.text_ids_masked"], mask), mask, images)
    at = t["mlm.in.masked_pos"][..., None].expand(-1, -1, fused.shape[-1])
    words = model.text_encoder.scores(fused.gather(1, at))
    loss = F.cross_entropy(words.flatten(0, 1), t["mlm.in.masked_ids"].flatten(), ignore_index=-100)
    return {"logits_at_masked_pos": words, "loss": loss}


def region(case: Case) -> dict[str, Tensor]:
    model = load(case)
    given = {k.removeprefix("region.in."): v for k, v in case.tensors.items() if k.startswith("region.in.")}
    of, mask = given["idx_to_group_img"], given["text_atts"]
    regions, full = model.vision_encoder(picture(case, "pretrain.in.image_u8"), (given["image_atts"], of))
    text = model.encode_text(given["text_ids"], mask)
    boxes = model.boxes(model.fuse(text, mask, full[of]))
    real, target = 1 - given["is_image"], given["target_bbox"]
    return {
        "image_embeds": regions, "image_embeds_fullatts": full[of], "bbox": boxes,
        "cross_embeds": model.fuse(text, mask, regions, image_mask=given["image_atts"]),
        "loss_bbox": ((boxes - target).abs().sum(dim=1) * real).sum() / real.sum(),
        "loss_giou": ((1 - giou(boxes, target)) * real).sum() / real.sum(),
    }  # fmt: skip


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised overlap of boxes (centre, size) in pairs."""
    (a0, a1), (b0, b1) = ((x[:, :2] - x[:, 2:] / 2, x[:, :2] + x[:, 2:] / 2) for x in (a, b))
    both = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(dim=1)
    either = (a1 - a0).prod(dim=1) + (b1 - b0).prod(dim=1) - both
    around = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(dim=1)
    return both / either - (around - either) / around


def fine_tuned(case: Case, task: str, *more: str) -> tuple[Xvlm, Tensor, Tensor, Tensor]:
    model, t = load(case, *more, task=task, image_size=case.info["tiny"]["S2"]), case.tensors
    return model, picture(case, "retrieval.in.image_u8"), t["retrieval.in.text_ids"], t["retrieval.in.text_atts"]


def retrieval(case: Case) -> dict[str, Tensor]:
    model, *batch = fine_tuned(case, "retrieval")
    tables = {"vision_encoder.pos_embed.weight": "vision_encoder.embeddings.position_embedding.weight"}
    for s in range(3):
        to = f"vision_encoder.encoder.layers.{s}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
        tables[f"vision_encoder.layers.{s}.blocks.0.attn.relative_position_bias_table"] = to
    own = dict(model.named_parameters())
    adapted = {f"adapted.{k}": own[v] for k, v in tables.items() if v in own}
    return tower(model, *batch) | adapted


def bbox(case: Case) -> dict[str, Tensor]:
    model, image, ids, mask = fine_tuned(case, "grounding")
    return {"coord_at_retrieval_inputs": model(image, ids, mask)["boxes"]}


def nlvr(case: Case) -> dict[str, Tensor]:
    model, image, ids, mask = fine_tuned(case, "nlvr2", "nlvr_cls_head_only.th")
    return {"prediction": model(image, ids, mask, second_image=picture(case, "nlvr.in.image_1_u8"))["classes"]}


def vqa(case: Case) -> dict[str, Tensor]:
    """The decoder's file holds what is trained; the rest starts from the pretrained file."""
    model, image, ids, mask = fine_tuned(case, "vqa")
    delta = torch.load(case.folder / "vqa_text_decoder_only.th", weights_only=True)
    own, tied = model.state_dict(), "text_decoder.cls.predictions.decoder."
    delta = {k: v for k, v in delta.items() if not k.startswith(tied) and not k.endswith("position_ids")}
    assert {k for k in own if k.startswith("text_decoder.")} == delta.keys()
    model.load_state_dict(delta, strict=False)
    question = model.fuse(model.encode_text(ids, mask), mask, model.encode_image(image))
    given = {k.removeprefix("vqa.in."): v for k, v in case.tensors.items() if k.startswith("vqa.in.")}
    answers, seen = given["answer_ids"], given["answer_atts"]
    of = torch.arange(len(ids)).repeat_interleave(given["n_per_question"])
    loss = word_loss(model.answer_words(question[of], mask[of], answers, seen), answers)
    first_two = model.answer_words(question, mask, answers[:2], seen[:2])
    best, chances = model.rank_answers(question, mask, answers, seen, int(given["k"]))
    return {
        "question_states": question, "train_loss": (given["weights"] * loss).sum() / len(ids), "topk_ids": best,
        "topk_probs": chances, "decoder_logits_first_two_answers": first_two,
    }  # fmt: skip


def _resizes(tensors: dict[str, Tensor]) -> Iterator[Check]:
    for key in sorted(k.removesuffix(".in") for k in tensors if k.endswith(".in")):
        found = resize_bias(tensors[f"{key}.in"], int(key.rsplit("w", 1)[1]))
        yield Check(f"table resized {key}", float((found - tensors[f"{key}.out"]).abs().max()), 1e-6)


STAGES = {"pretrain": pretrain, "mlm": mlm, "region": region, "retrieval": retrieval, "bbox": bbox, "nlvr": nlvr,
          "vqa": vqa}  # fmt: skip
