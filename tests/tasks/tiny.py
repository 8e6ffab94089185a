"""Tiny backbones of every kind with a tokenizer of a few words, and rows made up for the tasks that read them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from trimtab.backbones.base import Pictures
from trimtab.backbones.blip.features import backbone as blip
from trimtab.backbones.clip.features import ClipBackbone
from trimtab.backbones.clip4clip.examples import build as build_clip4clip
from trimtab.backbones.clip4clip.features import Clip4ClipBackbone
from trimtab.backbones.examples import EXAMPLES
from trimtab.backbones.examples.inputs import BERT, CNN, PICTURE, VISION
from trimtab.backbones.mdetr.features import MdetrBackbone
from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig
from trimtab.backbones.meter.features import MeterBackbone
from trimtab.backbones.meter.model import MeterConfig, MeterModel
from trimtab.backbones.vilt.features import ViltBackbone
from trimtab.backbones.vision.features import VisionBackbone
from trimtab.backbones.xvlm.examples import VIT
from trimtab.backbones.xvlm.examples import build as build_xvlm
from trimtab.backbones.xvlm.features import backbone as xvlm

WORDS = [
    "red",
    "blue",
    "green",
    "left",
    "right",
    "dog",
    "cat",
    "the",
    "a",
    "is",
    "of",
    "photo",
    "both",
    "one",
    "two",
    ".",
    "it",
    "near",
    "big",
    "sea",
]


def tokenizer(pad: int = 0, clip: bool = False) -> Any:
    """One token a word, begun and ended by a special one; as many ids as the tiny models know, less two. CLIP reads a
    text at its largest id, which is therefore the one that ends it."""
    special = ["[PAD]", "[CLS]"] if pad == 0 else ["[CLS]", "[PAD]"]
    names = [*special, "[unused]" if clip else "[SEP]", "[UNK]", "[MASK]", *WORDS]
    names += [f"[unused{i}]" for i in range(28 - len(names) - clip)] + ["[SEP]"] * clip
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", names.index("[SEP]"))]
    )
    tokens = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "SEP", "UNK", "MASK")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)


def meter(**heads: int) -> MeterBackbone:
    text, cross = hf.RobertaConfig(**BERT, type_vocab_size=1), hf.BertConfig(**BERT, is_decoder=True,
                                                                              add_cross_attention=True)  # fmt: skip
    config = MeterConfig(vision_config=hf.CLIPVisionConfig(**VISION, **PICTURE), text_config=text, cross_config=cross,
                         tasks=heads, token_types=3 if "nlvr2" in heads else 2)  # fmt: skip
    return MeterBackbone("meter", MeterModel(config).eval(), tokenizer(1))


def vilt(model: type = hf.ViltForImageAndTextRetrieval, types: int = 2) -> ViltBackbone:
    config = hf.ViltConfig(**BERT, **PICTURE, modality_type_vocab_size=types, num_images=2, num_labels=2)
    return ViltBackbone("vilt", model(config).eval(), tokenizer())


def clip() -> Any:
    config = build_clip4clip("meanP").config.clip_config
    model, words = hf.CLIPModel(config).eval(), tokenizer(clip=True)
    return ClipBackbone("clip", model, words, Pictures(16), config.projection_dim, 8)


def vision(kind: str) -> VisionBackbone:
    sizes = {**VISION, **PICTURE}
    made = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**sizes), add_pooling_layer=False),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**sizes)),
        "swin": lambda: hf.SwinModel(hf.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1],
                                                   num_heads=[2, 2], window_size=2), add_pooling_layer=False),
    }  # fmt: skip
    return VisionBackbone(kind, made[kind]().eval(), Pictures(16))


def mdetr(queries: int = 5, layers: int = 3) -> MdetrBackbone:
    sizes: dict[str, Any] = {
        "width": 16, "heads": 2, "encoder_layers": layers, "decoder_layers": layers, "feed_forward": 32,
    }  # fmt: skip
    text = hf.RobertaConfig(**BERT, type_vocab_size=1)
    config = MdetrConfig(text, {**CNN, "frozen": True}, **sizes, queries=queries, classes=12, align=8)
    found = MdetrBackbone("mdetr", Mdetr(config).eval(), tokenizer(1))
    found.pictures = replace(found.pictures, size=64, longest=96)
    return found


BACKBONES: dict[str, Any] = {
    "meter": meter,
    "vilt": vilt,
    "blip pairs": lambda: blip("blip", _example("blip-nlvr2"), tokenizer()),
    "xvlm pairs": lambda: xvlm("xvlm", build_xvlm(VIT, "nlvr2").eval(), tokenizer()),
    "xvlm": lambda: xvlm("xvlm", build_xvlm(VIT, "grounding").eval(), tokenizer()),
    "mdetr": mdetr,
    "clip": clip,
    "vit": lambda: vision("vit"),
    "dinov2": lambda: vision("dinov2"),
    "swin": lambda: vision("swin"),
    **{head: lambda head=head: Clip4ClipBackbone("clip4clip", build_clip4clip(head).eval(), tokenizer(clip=True))
       for head in ("meanP", "seqLSTM", "seqTransf", "tightTransf")},
}  # fmt: skip


def _example(name: str) -> nn.Module:
    return EXAMPLES[name].model()


def picture(colour: str, size: tuple[int, int] = (20, 16)) -> Any:
    return Pillow.new("RGB", size, colour)


COLOURS = ("red", "blue", "green")


def table(kind: str, rows: int = 6) -> Dataset:
    """Rows of a task, whose pictures are of one colour; neither picture nor words alone tell the answer."""
    pictures = [picture(COLOURS[i % 3]) for i in range(rows)]
    if kind == "pairs":
        both = [[p, picture(COLOURS[i % 2], (16, 24))] for i, p in enumerate(pictures)]
        features = Features({"images": List(Image()), "statement": Value("string"), "label": Value("string"),
                             "identifier": Value("string")})  # fmt: skip
        data = {
            "images": both, "statement": ["both is red", "left is blue"] * (rows // 2),
            "label": ["true", "false", "false"] * (rows // 3),
            "identifier": [f"dev-1-{i}-{i // 2}" for i in range(rows)],
        }  # fmt: skip
        return Dataset.from_dict(data, features=features)
    if kind == "entailment":
        more: dict[str, list[Any]] = {
            "statement": [f"it is {COLOURS[i % 2]}" for i in range(rows)], "premise": ["a photo of the sea"] * rows,
            "label": [("entailment", "contradiction", "neutral")[i % 3] for i in range(rows)],
        }  # fmt: skip
    elif kind == "grounding":
        more = {
            "phrase": ["the red dog", "big cat near the sea"] * (rows // 2),
            "box": [[float(i), 2.0, 12.0 + i, 14.0] for i in range(rows)],
            "tokens_positive": [[[4, 11]], [[0, 7]]] * (rows // 2),
        }  # fmt: skip
    else:
        more = {"label": [COLOURS[i % 3] for i in range(rows)]}
    return Dataset.from_dict({"image": pictures, **more}).cast_column("image", Image())


def descent(model: nn.Module, batch: dict[str, Any], rate: float, steps: int) -> list[float]:
    """The losses of a few steps of plain gradient descent on one batch; gradients of the last step are left."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), []
    for _ in range(steps):
        loss = model(**batch)["loss"]
        assert loss.shape == () and loss.isfinite()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses
