"""The four tiny models on which levers are combined: a single stream, a dual encoder, a fusion model, a decoder.

Each is a `PreTrainedModel`, 32 wide, without dropout, and gives the same numbers at every call, so that outputs can be
compared bit for bit. Each has a batch of two samples, the second one padded, and a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from trimtab.backbones.meter.model import MeterConfig, MeterModel

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_PICTURE = {"image_size": 16, "patch_size": 8}  # four patches
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_WORDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
_TEXT = {"input_ids": _WORDS, "attention_mask": (_WORDS > 0).long()}
_PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
# Four picture tokens (29), then a text; the first row is padded at its left.
_PROMPT = torch.tensor([[0, 0, 29, 29, 29, 29, 5, 6, 7], [4, 29, 29, 29, 29, 3, 9, 8, 7]])


@dataclass(frozen=True)
class Tiny:
    """A tiny model and what it is called with.

    Attributes:
        name: of its kind.
        build: gives the model with fresh weights.
        batch: keyword arguments for two samples; with them the output has a loss.
        towers: tower -> number of its blocks, as the anatomy must have it.
        idle: prefixes of parameters that have no part in the loss and therefore get no gradient.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: dict[str, Any]
    towers: dict[str, int]
    idle: tuple[str, ...] = ()

    def make(self) -> Any:
        """A new model in evaluation mode, always with the same weights; none of them is exactly 0 or 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            for parameter in model.parameters():
                parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
        return model.eval()

    def loss(self, output: Any) -> Tensor:
        """The scalar loss in an output for `batch`."""
        return output["loss"]


class FixedOrderVilt(hf.ViltForQuestionAnswering):
    """transformers' ViLT draws a random order of the patches at every call; here it is always the same one."""

    def forward(self, **inputs: Any) -> Any:  # type: ignore[override]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return super().forward(**inputs)


class MeterForAnswers(MeterModel):
    """METER that computes its own loss on questions."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """`MeterModel`'s arguments, and the right answers (B,)."""
        logits = self.vqa_classifier(super().forward(**inputs).pooled)  # (B, answers)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def _vilt() -> nn.Module:
    return FixedOrderVilt(hf.ViltConfig(**_SIZES, **_PICTURE, **_STILL, vocab_size=30, num_labels=3))


def _clip() -> nn.Module:
    text = {**_SIZES, "num_hidden_layers": 3, "vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**_SIZES, **_PICTURE}, projection_dim=16))


def _meter() -> nn.Module:
    words = {**_SIZES, **_STILL, "num_hidden_layers": 3, "vocab_size": 30, "max_position_embeddings": 14}
    text = hf.RobertaConfig(**words, type_vocab_size=1)
    cross = hf.BertConfig(**words, is_decoder=True, add_cross_attention=True)
    vision = hf.CLIPVisionConfig(**_SIZES, **_PICTURE)
    return MeterForAnswers(
        MeterConfig(vision_config=vision, text_config=text, cross_config=cross, tasks={"vqa": 3})
    )  # fmt: skip


def _llava() -> nn.Module:
    text = hf.LlamaConfig(**_SIZES, num_key_value_heads=4, vocab_size=30, pad_token_id=0, bos_token_id=1,
                          eos_token_id=2)  # fmt: skip
    vision = hf.CLIPVisionConfig(**_SIZES, **_PICTURE)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=29)
    )  # fmt: skip


SINGLE = Tiny("single stream", _vilt, {**_TEXT, "pixel_values": _PIXELS, "labels": torch.eye(3)[:2]}, {"fusion": 4})
DUAL = Tiny(
    "dual encoder", _clip, {**_TEXT, "pixel_values": _PIXELS, "return_loss": True}, {"vision": 4, "text": 3}
)  # fmt: skip
FUSION = Tiny(
    "fusion", _meter, {**_TEXT, "pixel_values": _PIXELS, "labels": torch.tensor([0, 2])},
    {"vision": 4, "text": 3, "fusion_text": 3, "fusion_image": 3},
)  # fmt: skip
DECODER = Tiny(
    "decoder", _llava,
    {"input_ids": _PROMPT, "attention_mask": (_PROMPT > 0).long(), "pixel_values": _PIXELS,
     "labels": _PROMPT.masked_fill((_PROMPT > 25) | (_PROMPT == 0), -100)},
    # LLaVA reads the hidden states before the last vision block.
    {"vision": 3, "text": 4},
    ("model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm."),
)  # fmt: skip
FOUR: tuple[Tiny, ...] = (SINGLE, DUAL, FUSION, DECODER)
