"""Tasks that also tell what each test row gives, so that two models are compared on the same rows.

Recipes of studies name them in the place of the tasks they extend; everything but `each` is as there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from trimtab.metrics.retrieval import ranks_of_embeddings
from trimtab.tasks.base import TASKS
from trimtab.tasks.matching import Matching
from trimtab.tasks.retrieval import Retrieval, owners


@TASKS.register("retrieval-each")
class RetrievalEach(Retrieval):
    """`each` holds what every picture of the table that was scored last gives to rSum: its own three recalls and the
    means of its captions', in percent; their mean over pictures with equally many captions is rSum."""

    schema = "retrieval"
    primary = "rsum"
    each: ClassVar[list[float]] = []

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        counts = [len(r["text"]) for r in records]
        images, texts = torch.stack([r["image"] for r in records]), torch.cat([r["text"] for r in records])
        found = ranks_of_embeddings(images, texts, owners(counts))
        pictures, captions = (
            (r[:, None] < torch.tensor([1, 5, 10])).double().sum(1) for r in (found.image_to_text, found.text_to_image)
        )
        own = pictures + torch.stack([part.mean() for part in captions.split(counts)])
        type(self).each = [round(100 * x, 1) for x in own.tolist()]
        return super().score(backbone, head, records, rows)


@TASKS.register("matching-each")
class MatchingEach(Matching):
    """`each` tells of every picture of the table that was scored last whether it finds its caption first."""

    schema = "matching"
    each: ClassVar[list[int]] = []

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        out = super().score(backbone, head, records, rows)
        captions = [c[0] for c in rows["captions"]]
        scored = len(records) - len(records) % self.pool
        type(self).each = [int(captions[r["best"]] == captions[i]) for i, r in enumerate(records[:scored])]
        return out
