"""The modules of CLIP4Clip; what they compute is drawn in `trimtab.backbones.clip4clip.features`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTextConfig, PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from trimtab.backbones.base import check_sizes
from trimtab.registry import unknown

HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")


class Clip4ClipConfig(PretrainedConfig):
    """Sizes of a CLIP4Clip.

    Args:
        clip_config: of the CLIP.
        cross_config: of the transformer over frames or pairs (no layers if the head has none).
        head: one of `HEADS`.
        depth: frames that a patch embedding looks at: 1, or 3 for the published `3d`.
    """

    model_type = "trimtab_clip4clip"
    sub_configs = {"clip_config": CLIPConfig, "cross_config": CLIPTextConfig}

    def __init__(self, clip_config: Any = None, cross_config: Any = None, head: str = "meanP", depth: int = 1,
                 **rest: Any):  # fmt: skip
        self.clip_config = clip_config if isinstance(clip_config, CLIPConfig) else CLIPConfig(**(clip_config or {}))
        if not isinstance(cross_config, CLIPTextConfig):
            cross_config = CLIPTextConfig(**(cross_config or {}))
        self.cross_config = cross_config
        if head not in HEADS:
            raise ValueError(unknown("head of a CLIP4Clip", head, HEADS))
        self.head, self.depth = head, depth
        super().__init__(**rest)


class FrameEmbeddings(CLIPVisionEmbeddings):
    """Patches embedded together with those of the neighbouring frames: (B, F, 3, H, W) -> (B F, 1 + P, D)."""

    patch_embedding: Any

    def __init__(self, config: Any, depth: int):
        super().__init__(config)
        p = config.patch_size
        kernel, stride, padding = (depth, p, p), (1, p, p), (depth // 2, 0, 0)
        self.patch_embedding = nn.Conv3d(3, config.hidden_size, kernel, stride, padding, bias=False)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        patches = self.patch_embedding(pixel_values.transpose(1, 2))  # (B, D, F, h, w)
        patches = patches.transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)  # (B F, P, D)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CrossModel(nn.Module):
    """Transformer over the tokens of a pair: (N, 1 + F, E) -> (N, E)."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.embeddings: Any = nn.Module()
        self.embeddings.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.transformer = CLIPEncoder(config)
        self.pooler: Any = nn.Module()
        self.pooler.ln_pool = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pooler.dense = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens + self.embeddings.position_embeddings.weight[: tokens.shape[1]]
        tokens = self.transformer(inputs_embeds=tokens, attention_mask=hide(mask, tokens)).last_hidden_state
        pooled = self.pooler.dense(self.pooler.ln_pool(tokens[:, 0]))
        return pooled * torch.sigmoid(1.702 * pooled)  # CLIP's quick GELU


def hide(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to attention scores, (B, 1, L, L): -1e6 at padding, as published."""
    hidden = (1.0 - mask.to(like.dtype)) * -1e6
    return hidden[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


class Clip4Clip(PreTrainedModel):
    """CLIP with one of the four heads."""

    config_class = Clip4ClipConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: Clip4ClipConfig):
        super().__init__(config)
        self.clip = CLIPModel(config.clip_config)
        if config.depth > 1:
            self.clip.vision_model.embeddings = FrameEmbeddings(config.clip_config.vision_config, config.depth)
        cross = config.cross_config
        cross._attn_implementation = self.config._attn_implementation  # a bare encoder does not choose by itself
        if config.head in ("seqLSTM", "seqTransf"):
            # The LSTM does not use its position table either, but it is in every file.
            self.frame_position_embeddings = nn.Embedding(cross.max_position_embeddings, cross.hidden_size)
        if config.head == "seqLSTM":
            self.lstm_visual = nn.LSTM(cross.hidden_size, cross.hidden_size, batch_first=True)
        if config.head == "seqTransf":
            self.transformerClip = CLIPEncoder(cross)
        if config.head == "tightTransf":
            self.cross = CrossModel(cross)
            self.similarity_dense = nn.Linear(cross.hidden_size, 1)
        self.post_init()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, L), padded with 0 -> (B, E), read at the largest id, which ends a text."""
        check_sizes("CLIP4Clip", input_ids, self.config.clip_config.text_config.max_position_embeddings)
        if attention_mask is None:
            attention_mask = (input_ids != 0).long()
        return self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def encode_video(self, video: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) -> (B, F, E)."""
        frames = video if self.config.depth > 1 else video.flatten(0, 1)
        vectors = self.clip.get_image_features(pixel_values=frames).pooler_output
        return vectors.view(*video.shape[:2], -1)

    def forward(self, input_ids: Tensor, video: Tensor, video_mask: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        """Similarities of all texts with all videos, (texts, videos).

        Args:
            input_ids: (T, L).
            video: (B, F, 3, H, W).
            video_mask: (B, F), 1 = a frame is there; None: all are.
            attention_mask: (T, L); None: where ids are not 0.
        """
        return self.compare(self.encode_text(input_ids, attention_mask), self.encode_video(video), video_mask)

    def compare(self, text: Tensor, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors (T, E), frames (B, F, E) and which are there (B, F) -> (T, B)."""
        if mask is None:
            mask = torch.ones(frames.shape[:2], dtype=torch.long, device=frames.device)
        if self.config.head == "tightTransf":
            return self._pairs(text, frames, mask)
        frames = F.normalize(self._in_time(frames, mask), dim=-1)
        there = mask[..., None].to(frames.dtype)
        video = (frames * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return self.clip.logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T

    def _in_time(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames that know their order, (B, F, E)."""
        if self.config.head == "seqLSTM":
            packed = pack_padded_sequence(frames, mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.lstm_visual(packed)[0], batch_first=True)
            # What is longer than the longest video stays as it is.
            return torch.cat([out, frames[:, out.shape[1] :]], dim=1) + frames
        if self.config.head == "seqTransf":
            x = frames + self.frame_position_embeddings.weight[: frames.shape[1]]
            return self.transformerClip(inputs_embeds=x, attention_mask=hide(mask, x)).last_hidden_state + frames
        return frames

    def _pairs(self, text: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        texts, videos = len(text), len(frames)
        text = text[:, None, None].expand(-1, videos, 1, -1)  # (T, B, 1, E)
        tokens = torch.cat([text, frames[None].expand(texts, -1, -1, -1)], dim=2)  # (T, B, 1 + F, E)
        mask = torch.cat([mask.new_ones(videos, 1), mask], dim=1)[None].expand(texts, -1, -1)
        pooled = self.cross(tokens.flatten(0, 1), mask.flatten(0, 1))
        return self.similarity_dense(pooled).view(texts, videos)


def symmetric_loss(similar: Tensor) -> Tensor:
    """Mean of the cross entropies of (B, B) similarities by rows and by columns; pairs stand on the diagonal."""
    target = torch.arange(len(similar), device=similar.device)
    return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2


AutoConfig.register(Clip4ClipConfig.model_type, Clip4ClipConfig)
