"""The modules of the dual encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 512


class DualEncoder(nn.Module):
    """A convolutional and a text tower, each pooled by its mean and projected to one width.

    Args:
        vision: an `EfficientNet` of efficientnet-lite-pytorch; its classifier is taken off.
        text: a `BertModel`; its pooler is taken off.
        width: of the common space.
        generator: of the projections; None draws from the global one.
    """

    def __init__(self, vision: Any, text: Any, width: int = WIDTH, generator: torch.Generator | None = None):
        super().__init__()
        channels = vision._fc.in_features
        vision._fc = nn.Identity()
        text.pooler = None
        self.vision = vision
        self.text = text
        # A name for the grid that is handed on: the package calls one activation module after the stem and at the end.
        self.grid = nn.Identity()
        self.visual_projection = nn.Linear(channels, width, bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, width, bias=False)
        for linear in (self.visual_projection, self.text_projection):
            # In double precision, so that the rounded result does not depend on threads or on the LAPACK in use.
            weight = torch.empty(linear.weight.shape, dtype=torch.float64)
            nn.init.orthogonal_(weight, generator=generator)
            with torch.no_grad():
                linear.weight.copy_(weight)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> vectors (B, width) and grid (B, 1280, H/32, W/32)."""
        grid = self.grid(self.vision.extract_features(pixel_values))
        return self.visual_projection(grid.mean(dim=(2, 3))), grid

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) each -> vectors (B, width) and tokens (B, L, D)."""
        tokens = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # a text of no tokens gives zeros
        return self.text_projection(mean), tokens

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of pictures and of texts, each (B, width)."""
        return self.encode_image(pixel_values)[0], self.encode_text(input_ids, attention_mask)[0]

    def set_attn_implementation(self, name: str) -> None:
        """transformers' attention implementation of the text tower (`eager`, `sdpa`)."""
        self.text.set_attn_implementation(name)
