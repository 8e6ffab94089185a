"""A tiny model of every family, with random weights and a batch of two samples: what the matrix of methods and
backbones is made of, and what tests run on.

One entry of `EXAMPLES` is one row of the matrix. A new family adds one, `name: Example(class, build, batch)`; its class
must be described (`@describes`), or be discovered as it should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from trimtab.backbones.blip.model import BlipForMatchingAndCaptions, BlipForNlvr2, BlipForVqa, BlipPretraining
from trimtab.backbones.examples import papers, today
from trimtab.backbones.examples.inputs import (
    BIG_PAIR,
    CLASSES,
    DECODER_MASK,
    DECODES,
    FLORENCE,
    FRAMES,
    GROUNDING,
    IDS,
    PAIR,
    PALIGEMMA,
    PATCHES,
    PICTURE,
    QUESTION,
    QWEN,
    READS,
    SMALL,
    SMOL,
    T5,
    TEXT,
    VISION,
    pixels,
)


@dataclass(frozen=True)
class Example:
    """A tiny model and what it is called with.

    Attributes:
        title: the family, and which of its models.
        build: gives the model with fresh weights.
        batch: its keyword arguments for two samples.
        idle: towers that the batch does not reach.
        needs: packages without which it cannot be built.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: dict[str, Any]
    idle: tuple[str, ...] = field(default=(), kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)

    def model(self, seed: int = 0) -> Any:
        """The model in evaluation mode, always the same, with random numbers in what its class starts as 0 or 1.

        Raises:
            ImportError: if a package is missing.
        """
        for package in self.needs:
            if find_spec(package) is None:
                raise ImportError(f"needs the package '{package.replace('_', '-')}': pip install 'trimtab[real]'")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            for parameter in model.parameters():
                parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
        return model.eval()


def objective(output: Any) -> Tensor:
    """A scalar that depends on all of a model's output: mean squares of the distances to fixed random numbers.

    For models that are called without labels, and the same for all of them. Sums would do, but that what is normalised
    (features of length 1, probabilities) has no gradient of its sum. Infinite scores, of padding, are left out.
    """
    generator = torch.Generator().manual_seed(0)
    found = [t for t in tensors(output) if t.is_floating_point()]
    aims = [torch.randn(t.shape, generator=generator) for t in found]
    whole = [t.isfinite() for t in found]
    return torch.stack([(t[w] - a[w]).square().mean() for t, a, w in zip(found, aims, whole, strict=True)]).sum()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors(part)]


EXAMPLES: dict[str, Example] = {
    "meter": Example("METER", papers.meter, PAIR),
    "vilt": Example(
        "ViLT", lambda: hf.ViltForQuestionAnswering(hf.ViltConfig(**SMALL, **PICTURE, vocab_size=30, num_labels=3)),
        {**PAIR, "labels": torch.eye(3)[:2]},
    ),
    "xvlm-swin": Example("X-VLM, Swin", partial(papers.xvlm, papers.SWIN), BIG_PAIR),
    "xvlm-clip": Example("X-VLM, CLIP ViT", partial(papers.xvlm, papers.VIT), PAIR),
    "xvlm-vqa": Example(
        "X-VLM, questions", partial(papers.xvlm, papers.VIT, "vqa"),
        {**PAIR, "answer_ids": DECODES, "answer_mask": DECODER_MASK}
    ),
    "blip": Example("BLIP, questions", partial(papers.blip, BlipForVqa), QUESTION),
    "blip-pretrain": Example("BLIP, pretraining", partial(papers.blip, BlipPretraining), PAIR, idle=("decoder",)),
    "blip-nlvr2": Example(
        "BLIP, two pictures", partial(papers.blip, BlipForNlvr2),
        {**TEXT, "first": pixels(2, 3, 16, 16), "second": pixels(2, 3, 16, 16).flip(0)},
    ),
    "tiny-blip": Example("BLIP, one text tower", partial(papers.blip, BlipForMatchingAndCaptions), PAIR),
    "mdetr": Example("MDETR", papers.mdetr, BIG_PAIR),
    "vse": Example("VSE-infinity, grid", partial(papers.vse, papers.CNN), BIG_PAIR),
    "vse-regions": Example(
        "VSE-infinity, regions", partial(papers.vse, None),
        {**TEXT, "pixel_values": pixels(2, 4, 20), "valid": torch.tensor([[True] * 4, [True] * 3 + [False]])},
    ),
    "clip4clip": Example("CLIP4Clip, meanP", partial(papers.clip4clip, "meanP"), FRAMES),
    "clip4clip-seq": Example("CLIP4Clip, seqTransf", partial(papers.clip4clip, "seqTransf"), FRAMES),
    "clip4clip-tight": Example("CLIP4Clip, tightTransf", partial(papers.clip4clip, "tightTransf"), FRAMES),
    "clip-vil": Example("CLIP-ViL", papers.clip_vil, BIG_PAIR),
    "dino": Example(
        "ViT, DINO", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, **PICTURE)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
    "dinov2": Example(
        "DINOv2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, **PICTURE, mlp_ratio=2)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
    "t5": Example("T5", partial(papers.t5, hf.T5ForConditionalGeneration), {**T5, "labels": DECODES}),
    "llava": Example("LLaVA", papers.llava, {**READS, "pixel_values": pixels(2, 3, 16, 16)}),
    "clip": Example("CLIP", partial(papers.dual, hf.CLIPConfig, hf.CLIPModel), {**PAIR, "return_loss": True}),
    "siglip": Example("SigLIP", partial(papers.dual, hf.SiglipConfig, hf.SiglipModel), {**PAIR, "return_loss": True}),
    "siglip2": Example(
        "SigLIP 2", partial(papers.dual, hf.Siglip2Config, hf.Siglip2Model, num_patches=4),
        {**TEXT, **PATCHES, "return_loss": True},
    ),
    "bridgetower": Example(
        "BridgeTower", partial(papers.bridgetower, hf.BridgeTowerForImageAndTextRetrieval), {**PAIR, "labels": CLASSES}
    ),
    "bert": Example(
        "BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=30)),
        {**TEXT, "labels": CLASSES},
    ),
    "llama": Example("LLaMA, Mistral, Qwen", partial(papers.decoder, "Llama"), {**TEXT, "labels": IDS}),
    "qwen2-vl": Example("Qwen2-VL", papers.qwen2_vl, QWEN),
    "qwen2.5-vl": Example("Qwen2.5-VL", papers.qwen25_vl, QWEN),
    "lite0-minilm": Example(
        "EfficientNet-Lite and MiniLM", papers.lite0_minilm, BIG_PAIR, needs=("efficientnet_lite_pytorch",)
    ),
    "idefics3": Example("Idefics3", partial(today.idefics, "Idefics3"), SMOL),
    "smolvlm": Example("SmolVLM", partial(today.idefics, "SmolVLM"), SMOL),
    "qwen3-vl": Example("Qwen3-VL", today.qwen3, QWEN),
    "paligemma": Example("PaliGemma", today.paligemma, PALIGEMMA),
    "paligemma2": Example("PaliGemma 2", partial(today.paligemma, "gemma2"), PALIGEMMA),
    "florence2": Example("Florence-2", today.florence, FLORENCE),
    "grounding-dino": Example("Grounding DINO", today.grounding_dino, GROUNDING),
}  # fmt: skip
