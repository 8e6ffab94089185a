"""The modules of VSE-infinity; what they compute is drawn in `trimtab.backbones.vse`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel, PretrainedConfig, PreTrainedModel

from trimtab.backbones.base import check_sizes
from trimtab.backbones.vse.resnet import ResNet, ResNetSizes
from trimtab.pooling import GPO, size_augmented


class VseConfig(PretrainedConfig):
    """Sizes of a VSE-infinity.

    Args:
        text_config: of the BERT.
        cnn: fields of `ResNetSizes`, or None if regions come ready made.
        features: channels of the grid or of a region.
        embed: width of the common space.
        normalise_image, normalise_text: whether vectors get length 1.
    """

    model_type = "trimtab_vse"
    sub_configs = {"text_config": BertConfig}

    def __init__(
        self,
        text_config: Any = None,
        cnn: dict[str, Any] | None = None,
        features: int = 2048,
        embed: int = 1024,
        normalise_image: bool = True,
        normalise_text: bool = True,
        **rest: Any,
    ):
        if not isinstance(text_config, BertConfig):
            text_config = BertConfig(**(text_config or {}))
        self.text_config = text_config
        self.cnn, self.features, self.embed = cnn, features, embed
        self.normalise_image, self.normalise_text = normalise_image, normalise_text
        super().__init__(**rest)


class RegionMlp(nn.Module):
    """Two layers on region features, (B, R, F) -> (B, R, E), summed with a plain linear map."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(features, width // 2), nn.Linear(width // 2, width)])
        # The released modules hold a second norm that is never used.
        self.bns = nn.ModuleList([nn.BatchNorm1d(width // 2), nn.BatchNorm1d(width)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x).flatten(0, 1)  # (B R, E/2): statistics over all regions
        return self.layers[1](torch.relu(self.bns[0](y)).view(*x.shape[:2], -1))


class FeatureEncoder(nn.Module):
    """Grid or region features (B, R, F) -> vectors (B, E)."""

    def __init__(self, config: VseConfig):
        super().__init__()
        self.normalise = config.normalise_image
        self.fc = nn.Linear(config.features, config.embed)
        self.mlp = RegionMlp(config.features, config.embed) if config.cnn is None else None
        self.gpool = GPO()

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.fc(features)
        return self.pool(x if self.mlp is None else x + self.mlp(features), valid)

    def pool(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Tokens of the common width (B, R, E) -> vectors (B, E)."""
        x = self.gpool(x, valid)
        return unit(x) if self.normalise else x


class GridEncoder(nn.Module):
    """Images (B, 3, H, W) -> vectors (B, E)."""

    augments = True  # in training the pooled tokens are a part of all, also where the encoder itself is frozen

    def __init__(self, config: VseConfig):
        super().__init__()
        self.backbone: Any = nn.Module()
        self.backbone.resnet = ResNet(ResNetSizes(**(config.cnn or {})))
        self.image_encoder = FeatureEncoder(config)

    def train(self, mode: bool = True) -> GridEncoder:
        """Batch norms keep their statistics in training too, as published."""
        super().train(mode)
        self.backbone.eval()
        return self

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, HW / 32^2, F), row by row."""
        return self.backbone.resnet(pixels).flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        # A map of each token by itself: before tokens are dropped or after it is the same, and a side network that
        # stands in its place (UniPT) has all of them to attend to.
        tokens = self.image_encoder.fc(self.tokens(pixels))
        if not self.training:
            return self.image_encoder.pool(tokens)
        kept = size_augmented(tokens)
        order = (~kept).long().argsort(dim=1, stable=True)  # what is kept moves to the front
        tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        return self.image_encoder.pool(tokens, kept.gather(1, order))


class TextEncoder(nn.Module):
    """Token ids (B, L) -> vectors (B, E)."""

    def __init__(self, config: VseConfig):
        super().__init__()
        self.normalise = config.normalise_text
        self.bert = BertModel(config.text_config)
        self.linear = nn.Linear(config.text_config.hidden_size, config.embed)
        self.gpool = GPO()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_sizes("VSE-infinity", input_ids, self.bert.config.max_position_embeddings)
        if attention_mask is None:
            attention_mask = (input_ids != 0).long()  # as published
        x = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        x = self.gpool(self.linear(x), attention_mask != 0)
        return unit(x) if self.normalise else x


def unit(x: Tensor) -> Tensor:
    """To length 1; the small number is added to the norm, as published."""
    return x / (x.pow(2).sum(dim=-1, keepdim=True).sqrt() + 1e-8)


def hinge_loss(similar: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """Triplet loss of VSE++ (Faghri et al., BMVC 2018) over a batch of pairs, summed.

    Args:
        similar: (B, B), images by texts; pairs stand on the diagonal.
        hardest: only the worst negative of each row and column counts; False (the first epoch): all do.
    """
    pairs = similar.diagonal()
    own = torch.eye(len(similar), dtype=torch.bool, device=similar.device)
    texts = (margin + similar - pairs[:, None]).clamp(min=0).masked_fill(own, 0)
    images = (margin + similar - pairs[None, :]).clamp(min=0).masked_fill(own, 0)
    if hardest:
        texts, images = texts.amax(dim=1), images.amax(dim=0)
    return texts.sum() + images.sum()


class VseInfinity(PreTrainedModel):
    """Both encoders. `img_enc` takes images, or regions and which of them are valid; `txt_enc` takes token ids."""

    config_class = VseConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: VseConfig):
        super().__init__(config)
        self.img_enc = FeatureEncoder(config) if config.cnn is None else GridEncoder(config)
        self.txt_enc = TextEncoder(config)
        self.post_init()

    def encode_image(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W), or regions (B, R, F) with those that are valid, (B, R) -> (B, E)."""
        wanted = 3 if self.config.cnn is None else 4
        if images.dim() != wanted:
            what = "regions (B, R, F)" if wanted == 3 else "images (B, 3, H, W)"
            raise ValueError(f"this VSE-infinity takes {what}, found the shape {tuple(images.shape)}")
        return self.img_enc(images) if wanted == 4 else self.img_enc(images, valid)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L), padded with 0 -> (B, E)."""
        return self.txt_enc(input_ids, attention_mask)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None,
                valid: Tensor | None = None) -> Tensor:  # fmt: skip
        """Similarities of all images with all texts, (B, B)."""
        return self.encode_image(pixel_values, valid) @ self.encode_text(input_ids, attention_mask).T


AutoConfig.register(VseConfig.model_type, VseConfig)
