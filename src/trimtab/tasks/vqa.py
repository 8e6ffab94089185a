"""Visual question answering as classification over a fixed set of answers (ViLT, section 4.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch, Task


@TASKS.register("vqa")
class VQA(Task):
    """Columns `image`, `question`, `answer`; with a column `kind`, accuracy is given for each kind of question too.

    The head is ViLT's: two linear layers with LayerNorm and GELU between. It reads the first token itself and not the
    pooled feature: a pooler that was trained to match keeps what tells a match from none and little else. Where the
    pooled feature joins two streams (METER), whose first tokens know half each, it is read as published. An answer
    outside `answers` is never right, and no gradient comes from it.

    Args:
        answers: the classes; a recipe that leaves them out takes those of its data source.
    """

    columns = ("question", "answer")
    primary = "accuracy"
    kinds = ("joint",)
    first_token = True
    blank = {"answer": ""}

    def __init__(self, answers: Sequence[str]):
        self.answers = list(answers)
        self.index = {a: i for i, a in enumerate(self.answers)}

    @classmethod
    def settings_from(cls, source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """`answers` are the source's, unless they are given."""
        return dict(given) if "answers" in given else {**given, "answers": list(source.answers())}

    def head(self, backbone: Any) -> nn.Module:
        d = backbone.width
        return nn.Sequential(nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, len(self.answers)))

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        labels = torch.tensor([self.index.get(r["answer"], -100) for r in rows])
        return {
            **backbone.images([r["image"] for r in rows]),
            **backbone.texts([r["question"] for r in rows]),
            "labels": labels,
        }

    def example(self, backbone: Any, size: int) -> Batch:
        return {**backbone.example(size), "labels": torch.zeros(size, dtype=torch.long)}

    def _logits(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        encoded = backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        one_stream = backbone.token_width == backbone.width
        return head(encoded.tokens[:, 0] if one_stream else encoded.pooled).float()

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        total = F.cross_entropy(self._logits(backbone, head, batch), labels, reduction="sum")
        return total / (labels >= 0).sum().clamp(min=1)  # a batch without a known answer gives 0, not 0 / 0

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        best = self._logits(backbone, head, batch).argmax(dim=-1).tolist()
        return [{"answer": self.answers[i]} for i in best]

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        right = [r["answer"] == a for r, a in zip(records, rows["answer"], strict=True)]
        out = {"accuracy": sum(right) / len(right)}
        if "kind" in rows.column_names:
            total, hits = Counter(rows["kind"]), Counter(k for k, r in zip(rows["kind"], right, strict=True) if r)
            out |= {f"accuracy: {k}": hits[k] / n for k, n in sorted(total.items())}
        return out

    def chance(self, rows: Any) -> float | None:
        """Always giving the commonest answer."""
        return Counter(rows["answer"]).most_common(1)[0][1] / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": rows[i]["question"], "prediction": records[i]["answer"], "target": rows[i]["answer"],
             "correct": records[i]["answer"] == rows[i]["answer"]}
            for i in indices
        ]  # fmt: skip
