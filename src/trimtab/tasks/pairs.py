"""Image pairs: is a sentence true of two pictures (NLVR2: Suhr et al., ACL 2019).

Two ways, which the backbone brings with it: a model that reads both pictures at once (BLIP, section 4.4; X-VLM, section
3.3), or one that reads a picture, called on each of the two, whose pooled features are joined (ViLT, section 4.2;
METER, section 4).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.data.draws import coin
from trimtab.data.images import decode_rows
from trimtab.metrics import nlvr2
from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.labelled import Labelled, classifier, own_or


@TASKS.register("pairs")
class Pairs(Labelled):
    """Columns `images` (left, right), `statement`, `label` ("true" or "false"; empty where it is not known).

    The head is a copy of the model's own classifier where it has one, else that of ViLT and METER: two linear layers
    with LayerNorm and GELU between, twice as wide as one stream.

    Args:
        swap: in training exchange the two pictures of every second row, drawn at random, and the words "left" and
            "right" of its statement with them (BLIP's `nlvr_dataset.py`, which does it in evaluation too).
    """

    sees = "images"
    columns = ("statement", "label")
    kinds = ("joint", "pairs")
    names = ("false", "true")

    def __init__(self, swap: bool = False):
        self.swap = swap

    def head(self, backbone: Any) -> nn.Module:
        fresh = classifier(backbone.pair_width, 2 * backbone.token_width, len(self.names))
        return own_or(backbone, self.name, len(self.names), fresh)

    def check_scored(self, table: Any) -> None:
        super().check_scored(table)
        if twice := sorted(name for name, count in Counter(_identifiers(table)).items() if count > 1):
            raise ValueError(f"task {self.name!r}: expected each identifier once, found {twice[0]!r} more often")

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """Accuracy; with NLVR2's `identifier` also consistency, the share of sentences right on all their pairs.

        Raises:
            ValueError: if an identifier stands in two rows.
        """
        self.check_scored(rows)
        out = super().score(backbone, head, records, rows)
        names, labels = _identifiers(rows), list(rows["label"])
        if not names:
            return out
        known = {name: label for name, label in zip(names, labels, strict=True) if label}
        found = {n: r["label"] for n, r in zip(names, records, strict=True) if n in known}
        return out | {"consistency": nlvr2.evaluate(known, found)["consistency"]}

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        """As everywhere; the second picture's tensors are called `second_...`.

        Raises:
            ValueError: if a row has another number of pictures than two.
        """
        rows = decode_rows(rows)
        for row in rows:
            if len(row["images"]) != 2:
                raise ValueError(f"task {self.name!r} compares two pictures, a row has {len(row['images'])}: "
                                 f"{row.get('identifier', row['statement'])!r}")  # fmt: skip
        if train and self.swap:
            rows = [swapped(row) if coin(row, "swap") else row for row in rows]
        # All together, so that pictures that are padded are padded alike.
        both = backbone.images([row["images"][side] for side in (0, 1) for row in rows])
        first = {key: value[: len(rows)] for key, value in both.items()}
        second = {f"second_{key}": value[len(rows) :] for key, value in both.items()}
        return {**first, **second, **backbone.texts([row["statement"] for row in rows]), "labels": self.labels(rows)}

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        second = batch["pixel_values"].flip(0, -1)
        return {**batch, "second_pixel_values": second, "labels": torch.zeros(size, dtype=torch.long)}

    def logits(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        names = ("pixel_values", "second_pixel_values", "input_ids", "attention_mask")
        return head(backbone.pair_of(*(batch[name] for name in names)).pooled)


def _identifiers(rows: Any) -> list[str]:
    """NLVR2's identifiers of all rows; empty for a table of one's own, whose rows tell no sentence."""
    names = list(rows["identifier"]) if "identifier" in rows.column_names else []
    return names if all(name and re.fullmatch(r".+-\d+-\d+-\d+", name) for name in names) else []


SIDES = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its two pictures exchanged, and the words "left" and "right"."""
    statement = re.sub(rf"\b({'|'.join(SIDES)})\b", lambda found: SIDES[found[0]], row["statement"])
    return {**row, "images": row["images"][::-1], "statement": statement}
