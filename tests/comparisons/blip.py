"""BLIP: every stage of its published code, in transformers' classes where they compute the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage
from trimtab.backbones.blip.features import rank_answers

PRETRAINED = "model_base_14M.pth"


@compares(
    "backbone blip",
    told=(
        "med_config",
        "n_params_pretrain",
        "tied_pairs_count",
        "untied_between_encoder_and_decoder",
        "n_nlvr_layers_with_merge",
        "hf_check_max_abs_diff",
    ),
)
def blip(case: Case) -> Iterator[Check | Skipped]:
    with torch.no_grad():
        yield from stage(case, STAGES[str(case.stage)](case))


def load(case: Case, task: str, *more: str, **settings) -> nn.Module:
    tiny = case.info["tiny"]
    return build(case, PRETRAINED, *more, task=task, vision_heads=tiny["vh"], text_heads=tiny["nh"],
                 sep_token_id=case.info["ids"]["sep"], **settings)  # fmt: skip


def text(case: Case, first: str) -> dict[str, Tensor]:
    """The text with its first token replaced by [ENC], [DEC] or [CLS]."""
    ids = case.tensors["in.text_ids"].clone()
    ids[:, 0] = case.info["ids"][first]
    return {"input_ids": ids, "attention_mask": case.tensors["in.text_atts"]}


def written(case: Case) -> dict[str, Tensor]:
    """The text that is to be written, and its words as labels, padding left out."""
    batch = text(case, "dec_bos")
    return batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] == case.info["ids"]["pad"], -100)}


def pretrain(case: Case) -> dict[str, Tensor]:
    model = load(case, "pretrain")
    seen = model.look(case.tensors["in.image"])
    image, words = model.contrast(seen, **text(case, "cls"))
    fused = model.fuse(seen, **text(case, "enc"))
    lm = model.text_decoder(encoder_hidden_states=seen, **written(case))
    alone = model.text_encoder(**text(case, "cls")).last_hidden_state
    return {
        "image_embeds": seen, "image_feat": image, "text_embeds": alone, "text_feat": words, "multimodal": fused,
        "sim_i2t": image @ words.T / model.temp, "itm_logits": model.itm_head(fused[:, 0]), "lm_logits": lm.logits,
        "lm_loss_label_smoothing_0.1": lm.loss,
    }  # fmt: skip


def itm(case: Case) -> dict[str, Tensor]:
    """At a larger image, and with [CLS] where pretraining has [ENC], as the authors' `BLIP_ITM` has it."""
    model = load(case, "retrieval", image_size=case.info["tiny"]["S2"])
    batch = text(case, "cls") | {"pixel_values": case.tensors["in.image_large"]}
    matched = model(**batch)
    return {
        "adapted_pos_embed": model.vision_model.embeddings.position_embedding, "itm_logits": matched.itm_score,
        "image_embeds": matched.last_hidden_state, "sim": model(**batch, use_itm_head=False).itm_score,
    }  # fmt: skip


def caption(case: Case) -> dict[str, Tensor]:
    model = load(case, "caption", image_size=case.info["tiny"]["S2"])
    seen = model.vision_model(pixel_values=case.tensors["in.image_large"]).last_hidden_state
    lm = model.text_decoder(encoder_hidden_states=seen, **written(case))
    ids = case.info["ids"]
    prompt = torch.tensor([[ids["dec_bos"], *map(int, ids["prompt"].split()[1:-1]), ids["sep"]]] * len(seen))
    longest = case.tensors["caption.out.greedy_ids_from_prompt"].shape[1]
    image = case.tensors["in.image_large"]
    greedy = model.generate(image, prompt, max_length=longest, min_length=1, do_sample=False, num_beams=1)
    return {"lm_logits": lm.logits, "loss_lm": lm.loss, "greedy_ids_from_prompt": greedy}


def vqa(case: Case) -> dict[str, Tensor]:
    t, ids = case.tensors, case.info["ids"]
    model = load(case, "vqa", image_size=case.info["tiny"]["S2"])
    seen = model.vision_model(pixel_values=t["in.image_large"]).last_hidden_state
    question = text(case, "enc")
    states = model.text_encoder(encoder_hidden_states=seen, **question).last_hidden_state
    answers, atts = t["vqa.in.answer_ids"].clone(), t["vqa.in.answer_atts"]
    answers[:, 0] = ids["dec_bos"]
    several = t["vqa.in.n_per_question"]
    repeated = states.repeat_interleave(several, 0), question["attention_mask"].repeat_interleave(several, 0)
    out = model.text_decoder(
        input_ids=answers, attention_mask=atts, labels=answers.masked_fill(answers == ids["pad"], -100),
        encoder_hidden_states=repeated[0], encoder_attention_mask=repeated[1], reduction="none",
    )  # fmt: skip
    first_two = model.text_decoder(input_ids=answers[:2], attention_mask=atts[:2], encoder_hidden_states=states,
                                   encoder_attention_mask=question["attention_mask"]).logits  # fmt: skip
    return {
        "question_states": states, "train_loss": (t["vqa.in.weights"] * out.loss).sum() / len(states),
        "decoder_logits_first_two_answers": first_two,
        "rank_max_ids_k3": rank_answers(model, states, question["attention_mask"], answers, atts, k=3),
    }  # fmt: skip


def nlvr(case: Case) -> dict[str, Tensor]:
    """With the published conversion of the pretrained file, and the tensors that the delta adds or changes."""
    t = case.tensors
    batch = text(case, "enc")
    model = load(case, "nlvr2", "model_base_nlvr_delta.pth")
    return {"prediction": model(t["in.image_large"], t["nlvr.in.image_1"], **batch)}


STAGES = {"pretrain": pretrain, "itm": itm, "caption": caption, "vqa": vqa, "nlvr": nlvr}
