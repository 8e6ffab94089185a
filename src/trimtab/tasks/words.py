"""The head that predicts words: for masked ones (matching) and for next ones (captioning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # a label that counts for nothing


class Words(nn.Module):
    """BERT's head over the vocabulary; its decoder shares the word embeddings of the backbone.

    It starts as the backbone's own head where there is one.
    """

    def __init__(self, backbone: Any):
        super().__init__()
        width = backbone.token_width
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(len(backbone.model.get_input_embeddings().weight)))
        for mine, theirs in self._pairs(backbone):
            mine.data.copy_(theirs)

    def forward(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        return self.transform(tokens) @ embeddings.T + self.bias  # (..., D) -> (..., V)

    def _pairs(self, backbone: Any) -> list[tuple[Tensor, Tensor]]:
        if backbone.word_head is None:
            return []
        dense, norm, bias = backbone.word_head
        mine: Any = self.transform[0]
        own_norm: Any = self.transform[2]
        own_norm.eps = norm.eps
        return [(mine.weight, dense.weight), (mine.bias, dense.bias), (own_norm.weight, norm.weight),
                (own_norm.bias, norm.bias), (self.bias, bias)]  # fmt: skip

    @torch.no_grad()
    def fold(self, backbone: Any) -> None:
        """Write it back into the backbone's own head, if there is one."""
        for mine, theirs in self._pairs(backbone):
            theirs.copy_(mine)


def next_words(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Labels (B, L): at every token the one that follows, `IGNORED` where none does."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
    return labels
