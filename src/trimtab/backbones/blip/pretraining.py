"""BLIP's pretraining objective on a batch of pairs; see `trimtab.backbones.pretraining`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from trimtab import divided
from trimtab.contrast import contrast, matching

SMOOTHING = 0.1  # of BLIP's words


def blip_loss(model: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Sum of the three losses of a `BlipPretraining` (`blip_pretrain.py`)."""
    seen = model.look(pixel_values)
    image, text = model.contrast(seen, input_ids, attention_mask)
    similar, contrastive = contrast(image, text, model.temp)
    ids = input_ids.clone()
    ids[:, 0] = model.config.enc_token_id
    whole, words, mask = (divided.gathered(x) for x in (seen, ids, attention_mask))

    def judge(images: Tensor, texts: Tensor) -> Tensor:
        return model.itm_head(model.fuse(whole[images], words[texts], mask[texts])[:, 0])

    match = matching(similar, judge)
    ids = input_ids.clone()
    ids[:, 0] = model.config.text_config.bos_token_id
    hidden = model.text_decoder.bert(input_ids=ids, attention_mask=attention_mask, encoder_hidden_states=seen,
                                     is_decoder=True, use_cache=False).last_hidden_state  # fmt: skip
    wanted = ids.masked_fill(attention_mask == 0, -100)[:, 1:]
    told = model.text_decoder.cls(hidden[:, :-1]).flatten(0, 1).float()
    total = F.cross_entropy(told, wanted.flatten(), label_smoothing=SMOOTHING, reduction="sum")
    return contrastive + match + divided.mean(total, (wanted != -100).sum())
