"""X-VLM's two vision towers: Swin and CLIP's ViT, which also encode regions of an image.

A region is a set of patches; regions come as a pair (atts, images): `atts` (R, 1 + P), 1 = the token belongs to it, and
`images` (R,), the image of the batch of which it is a region. Every tower gives (B, 1 + P, D), token 0 for the whole.
Asked for regions, it gives two such results: of the regions, and of the full images. Swin averages its patches inside
the region; in CLIP's ViT the last blocks run on a copy of the image that attends to those patches alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionModel, SwinModel


class SwinTower(SwinModel):
    """Swin; token 0 is the mean over patches."""

    config: Any
    encoder: Any

    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)

    def forward(self, pixel_values: Tensor, regions: tuple[Tensor, Tensor] | None = None):
        """(B, 3, S, S) -> (B, 1 + P, D), or with regions those (R, 1 + P, D) and the images."""
        check_pixels(pixel_values, self.config.image_size)
        x, (height, width) = self.embeddings(pixel_values)
        for stage in self.encoder.layers:  # transformers' own loop wants attention weights from every block
            for block in stage.blocks:
                x = block(x, (height, width))[0]
            if stage.downsample is not None:
                x = stage.downsample(x, (height, width))
                height, width = (height + 1) // 2, (width + 1) // 2
        x = self.layernorm(x)
        images = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        if regions is None:
            return images
        atts, of = regions
        x, weights = x[of], atts[:, 1:, None].to(x.dtype)  # the patches themselves stay as they are
        mean = (weights * x).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        return torch.cat([mean, x], dim=1), images


class ClipTower(CLIPVisionModel):
    """CLIP's ViT with its last norm on all tokens; the last `config.local_layers` blocks see regions apart."""

    config: Any

    def forward(self, pixel_values: Tensor, regions: tuple[Tensor, Tensor] | None = None):
        """(B, 3, S, S) -> (B, 1 + P, D), or with regions those (R, 1 + P, D) and the images."""
        check_pixels(pixel_values, self.config.image_size)
        x, mask = self.pre_layrnorm(self.embeddings(pixel_values)), None
        first_local = len(self.encoder.layers) - self.config.local_layers
        for i, layer in enumerate(self.encoder.layers):
            if regions is not None and i == first_local:
                atts, of = regions
                seen = torch.cat([atts.to(x.dtype), x.new_ones(x.shape[:2])])
                x = torch.cat([x[of], x])  # (R + B, 1 + P, D)
                mask = ((1 - seen) * -10000.0)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
            x = layer(x, mask)
        x = self.post_layernorm(x)
        return x if regions is None else (x[: len(regions[1])], x[len(regions[1]) :])


def check_pixels(pixel_values: Tensor, side: int) -> None:
    """Raise a ValueError unless images have the size for which the table of positions was made."""
    if pixel_values.shape[-2:] != (side, side):
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"images of {height} x {width} pixels, but this X-VLM is built for {side} x {side}: resize them, or load "
            f"the checkpoint with image_size={height}"
        )


def resize_bias(table: Tensor, window: int) -> Tensor:
    """A table of relative positions for another window, as BEiT and X-VLM resize it.

    The known offsets are put at distances that grow geometrically, such that the furthest lands at the edge of the new
    window (the ratio is at most 1.5); between them a cubic spline gives the new, beyond them the outermost value holds.

    Args:
        table: ((2 old - 1)^2, heads).
        window: patches on a side of the new window.

    Returns:
        ((2 window - 1)^2, heads), or the table itself if its window stays.
    """
    old, new = math.isqrt(len(table)), 2 * window - 1
    if old == new:
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1.0 - ratio ** (old // 2)) / (1.0 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum(ratio ** np.arange(old // 2))  # 1, 1 + q, 1 + q + q^2, ...
    places = np.concatenate([-steps[::-1], [0.0], steps])
    wanted = np.clip(np.arange(new) - new // 2, places[0], places[-1])
    spline = torch.from_numpy(_spline(places, wanted))  # (new, old)
    grid = table.double().T.reshape(-1, old, old)  # (heads, old, old)
    return (spline @ grid @ spline.T).flatten(1).T.to(table.dtype).contiguous()


def _spline(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The matrix that takes values at the knots `x` to those of their cubic spline at `at`, (len(at), len(x)).

    The spline is the one without a knot at the second and last but one place, as scipy and FITPACK interpolate.
    """
    n, h = len(x), np.diff(x)
    # Second derivatives m at the knots from the values: left @ m = right.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    left[0, :3] = h[1], -h[0] - h[1], h[0]  # the third derivative does not jump there
    left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
    second = np.linalg.solve(left, right)
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, n - 2)
    a, b = (x[k + 1] - at) / h[k], (at - x[k]) / h[k]
    rows, eye = np.arange(len(at)), np.eye(n)
    out = np.zeros((len(at), n))
    out[rows] = a[:, None] * eye[k] + b[:, None] * eye[k + 1]
    curve = ((a**3 - a) * h[k] ** 2 / 6)[:, None] * second[k] + ((b**3 - b) * h[k] ** 2 / 6)[:, None] * second[k + 1]
    return out + curve
