"""Visual entailment: does a picture entail a sentence, contradict it, or neither (SNLI-VE: Xie et al., 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.labelled import Labelled, classifier, own_or


@TASKS.register("entailment")
class Entailment(Labelled):
    """Columns `image`, `statement` (the hypothesis), `label`; with `premise`, a column `premise` too.

    The head reads the pooled feature: METER's, two linear layers with LayerNorm and GELU between (its
    `snli_classifier`), and a copy of the model's own where it has one.

    Args:
        premise: put the premise, the caption from which the hypothesis was written, before the hypothesis, with the
            tokenizer's separator between (a blank if it has none). The published models do not read it: the picture
            stands for it.
    """

    columns = ("statement", "label")
    kinds = ("joint",)
    names = ("contradiction", "neutral", "entailment")

    def __init__(self, premise: bool = False):
        self.premise = premise
        if premise:
            self.columns = ("premise", *self.columns)  # type: ignore[misc, assignment]

    def head(self, backbone: Any) -> nn.Module:
        fresh = classifier(backbone.width, 2 * backbone.token_width, len(self.names))
        return own_or(backbone, self.name, len(self.names), fresh)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        texts = [row["statement"] for row in rows]
        if self.premise:
            between = getattr(backbone.tokenizer, "sep_token", None)
            between = f" {between} " if between else " "
            texts = [row["premise"] + between + text for row, text in zip(rows, texts, strict=True)]
        return {**backbone.images([row["image"] for row in rows]), **backbone.texts(texts), "labels": self.labels(rows)}

    def example(self, backbone: Any, size: int) -> Batch:
        return {**backbone.example(size), "labels": torch.zeros(size, dtype=torch.long)}

    def logits(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        return head(backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).pooled)
