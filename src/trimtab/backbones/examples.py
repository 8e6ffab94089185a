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

from trimtab.backbones.blip_model import BlipForMatchingAndCaptions, BlipForNlvr2, BlipForVqa, BlipPretraining
from trimtab.backbones.clip4clip_model import Clip4Clip, Clip4ClipConfig
from trimtab.backbones.clip_vil_model import ClipVilConfig, ClipVilModel
from trimtab.backbones.dual import DualEncoder
from trimtab.backbones.mdetr_model import Mdetr, MdetrConfig
from trimtab.backbones.meter_model import MeterConfig, MeterModel
from trimtab.backbones.vse_model import VseConfig, VseInfinity
from trimtab.backbones.xvlm_model import Xvlm, XvlmConfig


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
    (features of length 1, probabilities) has no gradient of its sum.
    """
    generator = torch.Generator().manual_seed(0)
    found = [t for t in tensors(output) if t.is_floating_point()]
    return torch.stack([(t - torch.randn(t.shape, generator=generator)).square().mean() for t in found]).sum()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors(part)]


# --- sizes and inputs that many share ---------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
VISION = {**SMALL, "hidden_size": 24, "num_hidden_layers": 3}
PICTURE = {"image_size": 16, "patch_size": 8}  # four patches
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = (IDS > 0).long()
DECODER = {
    **SMALL, "num_key_value_heads": 2, "vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TEXT: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
PAIR = {**TEXT, "pixel_values": pixels(2, 3, 16, 16)}
BIG_PAIR = {**TEXT, "pixel_values": pixels(2, 3, 64, 64)}  # for towers that halve the picture five times
# Two rows of a language model: four image tokens, then text; the first is padded at its left.
SEEN = torch.tensor([[0, 0, 29, 29, 29, 29, 5, 6, 7], [27, 29, 29, 29, 29, 26, 9, 8, 7]])
SEEN_MASK = (SEEN > 0).long()
READS = {
    "input_ids": SEEN, "attention_mask": SEEN_MASK, "labels": SEEN.masked_fill((SEEN > 25) | (SEEN == 0), -100),
}  # fmt: skip
QWEN = {  # 4 x 4 patches a picture, merged by four
    **READS, "pixel_values": pixels(32, 3 * 2 * 4 * 4),
    "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (SEEN == 29).long(),
}  # fmt: skip
DECODES = torch.tensor([[0, 4, 6, 8], [0, 7, 0, 0]])
DECODER_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
T5 = {
    "input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODES, "decoder_attention_mask": DECODER_MASK,
}  # fmt: skip
PATCHES = {
    "pixel_values": pixels(2, 6, 3 * 8 * 8), "spatial_shapes": torch.tensor([[2, 2], [2, 3]]),
    "pixel_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
}  # fmt: skip
CLASSES = torch.tensor([0, 1])
_BERT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 14}
_CNN = {"layers": (1, 1, 1, 2), "stem": 4, "inner": 4}


# --- builders ---------------------------------------------------------------------------------------------------------


def clip_text(**options: Any) -> dict[str, Any]:
    return {**SMALL, "vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, **options}


def dual(config: type, model: type, **vision: Any) -> nn.Module:
    """A model of transformers of two towers."""
    text = clip_text(**({"projection_size": 24} if model is not hf.CLIPModel else {}))
    return model(config(text_config=text, vision_config={**VISION, **PICTURE, **vision}))


def bridgetower(model: type) -> nn.Module:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, **PICTURE}
    config = hf.BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, text_config={**text, "vocab_size": 30},
        vision_config=vision,
    )  # fmt: skip
    return model(config)


def t5(model: type, feed_forward: str = "relu") -> nn.Module:
    sizes = {"num_layers": 3, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    return model(hf.T5Config(**sizes, feed_forward_proj=feed_forward, decoder_start_token_id=0))


def decoder(name: str) -> nn.Module:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**DECODER, head_dim=8))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER), image_token_index=29)
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=sizes, **_qwen_text()))


def qwen25_vl() -> nn.Module:
    sizes = {"hidden_size": 24, "depth": 3, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 16}
    sizes |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(vision_config=sizes, **_qwen_text()))


def _qwen_text() -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {"image_token_id": 29, "video_token_id": 28, "vision_start_token_id": 27, "vision_end_token_id": 26}
    return {"text_config": {**DECODER, "rope_parameters": rope}, **tokens}


def _meter() -> nn.Module:
    text = hf.RobertaConfig(**_BERT, type_vocab_size=1)
    cross = hf.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    heads = {"vqa": 3, "itm": 2}
    return MeterModel(MeterConfig(vision_config=vision, text_config=text, cross_config=cross, tasks=heads))


def _xvlm(vision: dict[str, Any], task: str = "pretrain") -> nn.Module:
    text = {**_BERT, "num_hidden_layers": 4}
    return Xvlm(XvlmConfig(text, vision, fusion_layer=2, embed=8, task=task, decoder_layers=2, local_layers=1))


_SWIN = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 8, "hidden_size": 16, "mlp_ratio": 2,
}  # fmt: skip
_VIT = {"model_type": "clip_vision_model", **VISION, **PICTURE}


def _blip(model: type) -> nn.Module:
    text = {**_BERT, "encoder_hidden_size": 16, "bos_token_id": 28, "eos_token_id": 2, "sep_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    vision = {**VISION, **PICTURE, "hidden_size": 16}  # questions are read as pictures are: one width for both
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    config.enc_token_id = 29
    return model(config)


def _mdetr() -> nn.Module:
    text = hf.RobertaConfig(**_BERT, type_vocab_size=1)
    sizes = {"width": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 32}
    return Mdetr(MdetrConfig(text, {**_CNN, "frozen": True}, **sizes, queries=3, classes=6, align=8))


def _vse(cnn: dict[str, Any] | None) -> nn.Module:
    return VseInfinity(VseConfig(dict(_BERT), cnn, features=20 if cnn is None else 128, embed=16))


def _clip4clip(head: str) -> nn.Module:
    config = hf.CLIPConfig(text_config=clip_text(), vision_config={**VISION, **PICTURE}, projection_dim=16)
    cross = {**SMALL, "max_position_embeddings": 8}
    return Clip4Clip(Clip4ClipConfig(config.to_dict(), cross, head))


def _clip_vil() -> nn.Module:
    sizes = {"vision_width": 4, "vision_layers": (1, 2, 1, 1), "positions": 3, "pretraining_answers": 4}
    return ClipVilModel(ClipVilConfig(text_config=hf.BertConfig(**_BERT), **sizes))


def _lite0_minilm() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import get_model_params

    stages, sizes = get_model_params("efficientnet-lite0", {"image_size": 64, "num_classes": 2})
    return DualEncoder(EfficientNet(stages[:3], sizes), hf.BertModel(hf.BertConfig(**_BERT)), width=16)


_FRAMES = {**TEXT, "video": pixels(2, 3, 3, 16, 16), "video_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
_QUESTION = {**PAIR, "decoder_input_ids": DECODES.clamp(min=1) * DECODER_MASK, "decoder_attention_mask": DECODER_MASK,
             "labels": DECODES.masked_fill(DECODER_MASK == 0, -100)}  # fmt: skip

EXAMPLES: dict[str, Example] = {
    "meter": Example("METER", _meter, PAIR),
    "vilt": Example(
        "ViLT", lambda: hf.ViltForQuestionAnswering(hf.ViltConfig(**SMALL, **PICTURE, vocab_size=30, num_labels=3)),
        {**PAIR, "labels": torch.eye(3)[:2]},
    ),
    "xvlm-swin": Example("X-VLM, Swin", partial(_xvlm, _SWIN), BIG_PAIR),
    "xvlm-clip": Example("X-VLM, CLIP ViT", partial(_xvlm, _VIT), PAIR),
    "xvlm-vqa": Example(
        "X-VLM, questions", partial(_xvlm, _VIT, "vqa"), {**PAIR, "answer_ids": DECODES, "answer_mask": DECODER_MASK}
    ),
    "blip": Example("BLIP, questions", partial(_blip, BlipForVqa), _QUESTION),
    "blip-pretrain": Example("BLIP, pretraining", partial(_blip, BlipPretraining), PAIR, idle=("decoder",)),
    "blip-nlvr2": Example(
        "BLIP, two pictures", partial(_blip, BlipForNlvr2),
        {**TEXT, "first": pixels(2, 3, 16, 16), "second": pixels(2, 3, 16, 16).flip(0)},
    ),
    "tiny-blip": Example("BLIP, one text tower", partial(_blip, BlipForMatchingAndCaptions), PAIR),
    "mdetr": Example("MDETR", _mdetr, BIG_PAIR),
    "vse": Example("VSE-infinity, grid", partial(_vse, _CNN), BIG_PAIR),
    "vse-regions": Example(
        "VSE-infinity, regions", partial(_vse, None),
        {**TEXT, "pixel_values": pixels(2, 4, 20), "valid": torch.tensor([[True] * 4, [True] * 3 + [False]])},
    ),
    "clip4clip": Example("CLIP4Clip, meanP", partial(_clip4clip, "meanP"), _FRAMES),
    "clip4clip-seq": Example("CLIP4Clip, seqTransf", partial(_clip4clip, "seqTransf"), _FRAMES),
    "clip4clip-tight": Example("CLIP4Clip, tightTransf", partial(_clip4clip, "tightTransf"), _FRAMES),
    "clip-vil": Example("CLIP-ViL", _clip_vil, BIG_PAIR),
    "dino": Example(
        "ViT, DINO", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, **PICTURE)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
    "dinov2": Example(
        "DINOv2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, **PICTURE, mlp_ratio=2)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
    "t5": Example("T5", partial(t5, hf.T5ForConditionalGeneration), {**T5, "labels": DECODES}),
    "llava": Example("LLaVA", llava, {**READS, "pixel_values": pixels(2, 3, 16, 16)}),
    "clip": Example("CLIP", partial(dual, hf.CLIPConfig, hf.CLIPModel), {**PAIR, "return_loss": True}),
    "siglip": Example("SigLIP", partial(dual, hf.SiglipConfig, hf.SiglipModel), {**PAIR, "return_loss": True}),
    "siglip2": Example(
        "SigLIP 2", partial(dual, hf.Siglip2Config, hf.Siglip2Model, num_patches=4),
        {**TEXT, **PATCHES, "return_loss": True},
    ),
    "bridgetower": Example(
        "BridgeTower", partial(bridgetower, hf.BridgeTowerForImageAndTextRetrieval), {**PAIR, "labels": CLASSES}
    ),
    "bert": Example(
        "BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=30)),
        {**TEXT, "labels": CLASSES},
    ),
    "llama": Example("LLaMA, Mistral, Qwen", partial(decoder, "Llama"), {**TEXT, "labels": IDS}),
    "qwen2-vl": Example("Qwen2-VL", qwen2_vl, QWEN),
    "qwen2.5-vl": Example("Qwen2.5-VL", qwen25_vl, QWEN),
    "lite0-minilm": Example(
        "EfficientNet-Lite and MiniLM", _lite0_minilm, BIG_PAIR, needs=("efficientnet_lite_pytorch",)
    ),
}  # fmt: skip
