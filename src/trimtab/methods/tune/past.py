"""What a side network keeps of the tokens before, so that a causal tower may go on from a key-value cache.

    step 1    [prompt]    -> the tower's keys and values, and the side network's own layers    into the cache
    step 2    [new token] -> both go on from there

The side network's part lies in the model's cache as one more layer: what `generate` does to the cache (beams change
places, answers are repeated, tokens are taken back) is done to it as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Past:
    """A side network's part of a cache.

    Args:
        cache: transformers' `DynamicCache`.
        owner: name of the side network, by which it finds its part again.
    """

    def __init__(self, cache: Any, owner: str):
        self.cache, self.owner = cache, owner

    @property
    def _layer(self) -> Any:
        return next((layer for layer in self.cache.layers if getattr(layer, "side_of", None) == self.owner), None)

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        layer = self._layer
        return 0 if layer is None else layer.get_seq_length()

    def add(self, new: Tensor) -> Tensor:
        """Keep what the side network made of new tokens (B, N, q, d); that of all tokens (B, N, L, d)."""
        layer = self._layer
        if layer is None:
            from transformers.cache_utils import DynamicLayer

            layer = DynamicLayer()
            layer.side_of = self.owner  # type: ignore[attr-defined]
            self.cache.layers.append(layer)  # the tower's own layers stand before it: its blocks have run
        return layer.update(new, new[..., :0])[0]  # in the place of keys; there are no values


def growing(args: tuple, kwargs: dict) -> Any:
    """The cache with which a block is called, if it is one that grows token by token (`DynamicCache`); else None."""
    caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
    if not caches:
        return None
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own = [c.self_attention_cache if isinstance(c, EncoderDecoderCache) else c for c in caches]
    return own[0] if len(own) == 1 and isinstance(own[0], DynamicCache) else None


def length(cache: Any) -> int | None:
    """How many tokens the tower's own part of a cache holds; None if it does not count them (states of Mamba)."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None
