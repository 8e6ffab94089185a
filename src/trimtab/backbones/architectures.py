"""The papers' backbones at their published sizes, without weights: to know what one costs before downloading it.

    trimtab.load("meter", pretrained=False, image_size=384)                random weights
    backbone: {name: meter, settings: {tasks: [irtr], image_size: 384}}    in a recipe, for `trimtab cost`

A name is that of the format of its official files, and settings that files have too mean the same, so that a recipe
whose costs are known is run by putting the file's path in the name's place. Sizes are those that
`tests/backbones/layouts.py` and the authors' configurations have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from trimtab.backbones.official import FORMATS, own_class
from trimtab.backbones.resnet import ResNetSizes
from trimtab.registry import Registry, unknown

ARCHITECTURES: Registry[Any] = Registry("architecture")
"""Name -> function of settings that gives the model's class and config."""

_ROBERTA: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
                            "layer_norm_eps": 1e-5}  # fmt: skip


def build(name: str, **settings: Any) -> nn.Module:
    """The plain model in evaluation mode on torch's default device, with fresh random weights.

    Raises:
        ValueError: if the name or a setting is unknown.
    """
    import inspect

    function = ARCHITECTURES[name]
    for key in settings:
        if key not in (valid := inspect.signature(function).parameters):
            raise ValueError(unknown(f"setting of the architecture {name!r}", key, valid))
    model_class, config = function(**settings)
    return model_class._from_config(config).eval()


def backbone(name: str, **settings: Any) -> Any:
    """The same as a `Backbone` for tasks; ValueError if the family has none."""
    return FORMATS[name].backbone(name, build(name, **settings), None)


def _one_of(what: str, value: str, valid: Any) -> Any:
    if value not in valid:
        raise ValueError(unknown(what, value, valid))
    return valid[value]


@ARCHITECTURES.register("meter")
def meter(tasks: Sequence[str] = ("mlm", "itm"), image_size: int = 288, answers: int = 3129) -> tuple[type, Any]:
    """METER: CLIP ViT-B/16 (11 blocks), RoBERTa-base, two streams of 6 layers.

    Args:
        tasks: heads, among `meter_model.TASKS`.
        image_size: pixels of a side: 288 in pretraining, 384 for retrieval, 576 for VQA.
        answers: outputs of the `vqa` head.
    """
    from transformers import BertConfig, CLIPVisionConfig, RobertaConfig

    from trimtab.backbones.meter.model import MeterConfig, MeterModel

    outputs = {"mlm": 50265, "itm": 2, "vqa": answers, "nlvr2": 2, "snli": 3, "irtr": 1}
    for task in tasks:
        _one_of("task of METER", task, outputs)
    vision = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, num_attention_heads=12,
                              patch_size=16, image_size=image_size, hidden_act="quick_gelu")  # fmt: skip
    cross = BertConfig(num_hidden_layers=6, is_decoder=True, add_cross_attention=True)
    return MeterModel, MeterConfig(
        vision_config=vision, text_config=RobertaConfig(**_ROBERTA), cross_config=cross,
        tasks={task: outputs[task] for task in tasks}, token_types=3 if "nlvr2" in tasks else 2,
    )  # fmt: skip


@ARCHITECTURES.register("vilt")
def vilt(task: str = "irtr", answers: int = 3129) -> tuple[type, Any]:
    """ViLT-B/32: 12 blocks on 40 tokens of text and pictures whose shorter side has 384 pixels.

    Args:
        task: `pretrain`, `vqa`, `nlvr2` or `irtr`.
        answers: outputs of the `vqa` head.
    """
    import transformers

    from trimtab.backbones.vilt.official import _TASKS

    name = _one_of("task of ViLT", task, _TASKS)[0]
    config = transformers.ViltConfig(
        layer_norm_eps=1e-6, max_image_length=-1, num_labels=answers if task == "vqa" else 2,
        num_images=2 if task == "nlvr2" else -1, modality_type_vocab_size=3 if task == "nlvr2" else 2,
    )  # fmt: skip
    config.vilt_task = task
    return own_class(name) or getattr(transformers, name), config


@ARCHITECTURES.register("blip")
def blip(task: str = "pretrain", image_size: int = 224) -> tuple[type, Any]:
    """BLIP base: ViT-B/16 and BERT-base, whose layers all read the picture.

    Args:
        task: `pretrain`, `retrieval`, `caption`, `vqa` or `nlvr2`.
        image_size: pixels of a side: 224 in pretraining, 480 for VQA, else 384.
    """
    import transformers

    from trimtab.backbones.blip.official import _TASKS

    name = _one_of("task of BLIP", task, _TASKS)[0]
    words = 30522 + 2  # [DEC] and [ENC]
    config = transformers.BlipConfig(
        vision_config={"image_size": image_size, "layer_norm_eps": 1e-6},
        text_config={
            "vocab_size": words, "hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-12,
            "bos_token_id": words - 2, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0,
            "label_smoothing": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
        },
        image_text_hidden_size=256,
    )  # fmt: skip
    config.enc_token_id, config.blip_task = words - 1, task
    return own_class(name) or getattr(transformers, name), config


@ARCHITECTURES.register("xvlm")
def xvlm(vision: str = "swin", task: str = "retrieval", image_size: int | None = None) -> tuple[type, Any]:
    """X-VLM: Swin-B or CLIP ViT-B/16, and BERT-base whose upper six layers read the picture.

    Args:
        vision: `swin`, as released, or `clip`, as MULTIFLOW prunes it.
        task: `pretrain`, `retrieval`, `grounding`, `nlvr2`, `vqa` or `caption`.
        image_size: pixels of a side; None for 224 in pretraining, 480 for VQA with Swin, else 384.
    """
    from trimtab.backbones.xvlm.model import Xvlm, XvlmConfig

    size = image_size or {"pretrain": 224, "vqa": 480}.get(task, 384)
    swin = {"model_type": "swin", "image_size": size, "embed_dim": 128, "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32], "window_size": size // 32, "hidden_size": 1024}  # fmt: skip
    clip = {"model_type": "clip_vision_model", "image_size": size, "patch_size": 16, "hidden_size": 768}
    tower = _one_of("vision tower of X-VLM", vision, {"swin": swin, "clip": clip})
    text = {"num_hidden_layers": 18} if task == "nlvr2" else {}  # a layer for either picture, six times
    return Xvlm, XvlmConfig(text, tower, task=task, local_layers=4 if vision == "clip" else 0)


@ARCHITECTURES.register("mdetr")
def mdetr(answers: dict[str, int] | None = None) -> tuple[type, Any]:
    """MDETR: ResNet-101, RoBERTa-base, 6 + 6 layers of width 256, 100 queries.

    Args:
        answers: kinds of answers and their numbers (`mdetr_model.GQA`; `{"": 1853}` for one head); None for none.
    """
    from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig

    return Mdetr, MdetrConfig(_ROBERTA, answers=answers)


@ARCHITECTURES.register("vse")
def vse(vision: str = "wsl") -> tuple[type, Any]:
    """VSE-infinity: ResNeXt-101 32x8d and BERT-base, to 1024.

    Args:
        vision: `wsl` (ResNeXt on pictures), `detector` (bottom-up attention's ResNet-101 on pictures) or `regions`
            (what it found, 2048 wide).
    """
    from trimtab.backbones.vse.model import VseConfig, VseInfinity

    sizes = {"wsl": ResNetSizes(inner=256, groups=32), "detector": ResNetSizes(caffe=True), "regions": None}
    cnn = _one_of("vision of VSE-infinity", vision, sizes)
    return VseInfinity, VseConfig(cnn=asdict(cnn) if cnn else None)


@ARCHITECTURES.register("clip4clip")
def clip4clip(patch: int = 32, head: str = "meanP", cross_layers: int = 4, depth: int = 1) -> tuple[type, Any]:
    """CLIP4Clip: CLIP ViT-B/32 or B/16 at 224 pixels, and a head over frames.

    Args:
        patch: pixels of a patch's side.
        head: one of `clip4clip_model.HEADS`.
        cross_layers: blocks of the heads that are transformers.
        depth: frames that a patch sees, 1 or 3.
    """
    from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig

    layers = cross_layers if head in ("seqTransf", "tightTransf") else 0
    # 2 is transformers' sign for "read the text at its largest id", as CLIP does.
    clip = {"vision_config": {"patch_size": patch}, "text_config": {"bos_token_id": None, "eos_token_id": 2}}
    cross = {"hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 77, "bos_token_id": None,
             "num_hidden_layers": layers, "layer_norm_eps": 1e-12}  # fmt: skip
    return Clip4Clip, Clip4ClipConfig(clip, cross, head, depth)


@ARCHITECTURES.register("clip_vil")
def clip_vil(vision: str = "RN50x4", task: str = "vqa", answers: int = 3129) -> tuple[type, Any]:
    """CLIP-ViL: the grid of a CLIP ResNet and text in one BERT-base.

    Args:
        vision: `RN50x4` or `RN50`.
        task: `pretrain` or `vqa`.
        answers: outputs of the `vqa` head.
    """
    from transformers import BertConfig

    from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel

    sizes = {"RN50x4": (80, [4, 6, 10, 6]), "RN50": (64, [3, 4, 6, 3])}
    width, layers = _one_of("vision of CLIP-ViL", vision, sizes)
    heads = {"pretrain": {"pretraining_answers": 9500}, "vqa": {"answers": answers}}
    head = _one_of("task of CLIP-ViL", task, heads)
    return ClipVilModel, ClipVilConfig(text_config=BertConfig(), vision_width=width, vision_layers=layers, **head)
