"""A backbone's own pretraining on pairs: what it is pruned with before a task is known (MULTIFLOW, section 4.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.data.draws import choose
from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch, Task


@TASKS.register("pretraining")
class Pretraining(Task):
    """Columns `image`, `captions` (a list a row; training draws one, evaluation takes the first).

    There is no head beside the model's own. The metric is how often its matching head tells a picture's caption from
    that of the picture before it in the batch.
    """

    columns = ("captions",)
    primary = "told apart"
    kinds = ("joint",)
    blank = {"captions": [""]}
    least = 2  # a wrong text and a wrong picture are another pair's

    def head(self, backbone: Any) -> nn.Module:
        return nn.Identity()

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        told = [choose(r, "caption", r["captions"]) if train else r["captions"][0] for r in rows]
        return {**backbone.images([r["image"] for r in rows]), **backbone.texts(told)}

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        return backbone.pretraining_loss(**batch)

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        wrong = {**batch, "pixel_values": batch["pixel_values"].roll(1, dims=0)}
        own, other = (backbone.match(backbone.pair(**b)) for b in (batch, wrong))
        return [{"own": float(a), "other": float(b)} for a, b in zip(own, other, strict=True)]

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        right = [(r["own"] > r["other"]) + 0.5 * (r["own"] == r["other"]) for r in records]
        for record, credit in zip(records, right, strict=True):
            record["credit"] = credit
        return {"told apart": sum(right) / len(right)}

    def chance(self, rows: Any) -> float | None:
        return 0.5
