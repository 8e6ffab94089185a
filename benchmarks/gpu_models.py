"""Models of `gpu.py`: the papers' four settings and three larger ones, at their sizes or tiny, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from trimtab.backbones import build
from trimtab.backbones.examples import EXAMPLES


@dataclass(frozen=True)
class Setting:
    """A model and what a training step is called with.

    Attributes:
        example: of the library's tiny models, which stands for it in `--tiny`.
        make: gives the model at its size.
        batch: keyword arguments at its size for a number of samples.
        samples: a step takes.
        settings: of methods at this model, by method.
        published: G of memory in the papers' tables, by method (MP-ISMoE's and SHERL's repositories repeat them).
    """

    example: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    samples: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


def words(batch: int, length: int, largest: int = 1000) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, largest, (batch, length)),
            "attention_mask": torch.ones(batch, length, dtype=torch.long)}  # fmt: skip


def pictures(batch: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(batch, 3, height, width or height)


def clip4clip_batch(batch: int) -> dict[str, Tensor]:
    """Videos of 12 frames, 224 px, and 32 words."""
    return {**words(batch, 32), "video": torch.randn(batch, 12, 3, 224, 224),
            "video_mask": torch.ones(batch, 12, dtype=torch.long)}  # fmt: skip


# --- larger models ----------------------------------------------------------------------------------------------------

PATCHES = 28  # of a picture's side in Qwen3-VL: 448 px
IMAGE_TOKEN, START, END = 151655, 151652, 151653


def siglip() -> nn.Module:
    """SigLIP-so400m, 384 px: 878 M parameters."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text = {**sizes, "vocab_size": 32000, "max_position_embeddings": 64}
    return hf.SiglipModel(
        hf.SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 384, "patch_size": 14})
    )


def siglip_batch(batch: int) -> dict[str, Any]:
    return {"input_ids": words(batch, 64)["input_ids"], "pixel_values": pictures(batch, 384), "return_loss": True}


def smolvlm() -> nn.Module:
    """SmolVLM-256M: SigLIP-base over 512 px, 64 tokens a picture, and SmolLM2-135M."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280}  # fmt: skip
    config = hf.SmolVLMConfig(
        vision_config=vision, text_config=text, image_token_id=49190, scale_factor=4, pad_token_id=2
    )
    return hf.SmolVLMForConditionalGeneration(config)


def smolvlm_batch(batch: int) -> dict[str, Tensor]:
    """A picture and 64 words."""
    text = torch.cat([torch.full((batch, 64), 49190), torch.randint(5, 1000, (batch, 64))], dim=1)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": pictures(batch, 512)[:, None],
            "labels": text.masked_fill(text == 49190, -100)}  # fmt: skip


def qwen3() -> nn.Module:
    """Qwen3-VL-2B: 2.1 G parameters."""
    vision = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 16,
              "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True}}  # fmt: skip
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN,
                              vision_start_token_id=START, vision_end_token_id=END,
                              tie_word_embeddings=True)  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config)


def qwen3_batch(batch: int) -> dict[str, Tensor]:
    """A picture of 448 px (196 tokens) and 64 words."""
    one = [START, *[IMAGE_TOKEN] * (PATCHES // 2) ** 2, END]
    text = torch.cat([torch.tensor([one] * batch), torch.randint(5, 1000, (batch, 64))], dim=1)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text.masked_fill(text >= START, -100),
            "pixel_values": torch.randn(batch * PATCHES**2, 3 * 2 * 16 * 16),
            "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]] * batch),
            "mm_token_type_ids": (text == IMAGE_TOKEN).int()}  # fmt: skip


# Settings of UniPT and LST as the recipes for the papers' tables have them; VSE's pairs are fewer than published (112),
# for which full tuning does not fit a card of 80 GB.
SETTINGS: dict[str, Setting] = {
    "VSE-infinity": Setting(
        "vse", lambda: build("vse"), lambda n: {**words(n, 32), "pixel_values": pictures(n, 512)}, 48,
        {name: {"towers": ("text",)} for name in ("lst", "lora", "adapter")},
        {"full": 176.8, "lst": 24.4, "unipt": 24.4},
    ),
    "CLIP4Clip": Setting(
        "clip4clip", lambda: build("clip4clip"), clip4clip_batch, 32,
        {"unipt": {"towers": ("vision", "text"), "reduction": 1}}, {"full": 48.8, "lst": 32.0, "unipt": 13.6},
    ),
    "CLIP-ViL": Setting(
        "clip-vil", lambda: build("clip_vil"), lambda n: {**words(n, 20), "pixel_values": pictures(n, 384, 640)}, 32,
        {"unipt": {"towers": ("fusion",), "init": "bert"}, "lst": {"towers": ("fusion",)},
         "lora": {"towers": ("fusion",)}, "adapter": {"towers": ("fusion",)}},
        {"full": 82.0, "lst": 25.6, "unipt": 11.6},
    ),
    "MDETR": Setting(
        "mdetr", lambda: build("mdetr"), lambda n: {**words(n, 20), "pixel_values": pictures(n, 800, 1333)}, 4,
        {"unipt": {"towers": ("encoder", "decoder"), "layers": (1, 3, 5), "init": "xavier"},
         "lst": {"towers": ("encoder", "decoder"), "initialise": "random"},
         "adapter": {"towers": ("encoder", "decoder")}, "lora": {"towers": ("encoder", "decoder")}},
        {"full": 39.6, "lst": 12.6, "unipt": 6.8},
    ),
    "SigLIP-so400m": Setting("siglip", siglip, siglip_batch, 16),
    "SmolVLM-256M": Setting("smolvlm", smolvlm, smolvlm_batch, 16),
    "Qwen3-VL-2B": Setting("qwen3-vl", qwen3, qwen3_batch, 4),
}  # fmt: skip


def made(name: str, tiny: bool, device: torch.device, half: bool) -> nn.Module:
    """The model on the device; its weights in bfloat16 if they stay frozen."""
    torch.manual_seed(0)
    if tiny:
        model = EXAMPLES[SETTINGS[name].example].model().to(device)
    else:
        with device:
            model = SETTINGS[name].make().to(device)
    return model.to(torch.bfloat16) if half else model


def batch_of(name: str, tiny: bool, device: torch.device) -> tuple[dict[str, Any], int]:
    """What a step is called with, and how many samples it has."""
    setting = SETTINGS[name]
    batch = EXAMPLES[setting.example].batch if tiny else setting.batch(setting.samples)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved, 2 if tiny else setting.samples


def settings_of(name: str, method: str, tiny: bool) -> dict[str, Any]:
    """A method's settings at a model; tiny ones have fewer layers."""
    found = dict(SETTINGS[name].settings.get(method, {}))
    if tiny:
        found.pop("layers", None)
    return found
