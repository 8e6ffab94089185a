"""What tasks have in common that give a row one label of a fixed list."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.tasks.base import Batch, Task

UNKNOWN = -100


def classifier(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """The head of ViLT and METER for classes of a pair."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))


def own_or(backbone: Any, task: str, outputs: int, fresh: nn.Module) -> nn.Module:
    """A copy of the model's own head for a task, or a fresh one if it has none.

    Raises:
        ValueError: if its own has another number of outputs.
    """
    own = backbone.own_head(task)
    if own is None:
        return fresh
    last = [m for m in own.modules() if isinstance(m, nn.Linear)][-1]
    if last.out_features != outputs:
        raise ValueError(f"task {task!r} asks for {outputs} outputs, the head of {backbone.name!r} has "
                         f"{last.out_features}")  # fmt: skip
    return copy.deepcopy(own)


class Labelled(Task):
    """One of `names` a row, from a column `label`; rows whose label is the empty string count neither in training nor
    in the metrics. Cross-entropy; accuracy.

    Attributes:
        names: the labels, in the order of the head's outputs.
    """

    primary = "accuracy"
    blank = {"label": ""}
    first_token = True
    names: Sequence[str]

    @abstractmethod
    def logits(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        """(B, labels)."""

    def labels(self, rows: list[dict[str, Any]]) -> Tensor:
        """Numbers of the rows' labels, (B,); `UNKNOWN` where it is not known.

        Raises:
            ValueError: if a label is none of the names.
        """
        labels = [row["label"] for row in rows]
        self._check_names(labels)
        index = {name: i for i, name in enumerate(self.names)}
        return torch.tensor([index[label] if label else UNKNOWN for label in labels])

    def _check_names(self, labels: Iterable[str | None]) -> None:
        for label in labels:
            if label and label not in self.names:
                shown = ", ".join(list(self.names)[:10])
                raise ValueError(f"task {self.name!r}: label {label!r} is none of its {len(self.names)}: {shown}")

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        total = F.cross_entropy(self.logits(backbone, head, batch).float(), labels, reduction="sum")
        return divided.mean(total, (labels >= 0).sum())  # a batch without a known label gives 0, not 0 / 0

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        return self.records(self.logits(backbone, head, batch))

    def records(self, logits: Tensor) -> list[dict[str, Any]]:
        """`label`, and `shares`: label -> probability."""
        shares = logits.float().softmax(dim=-1).cpu()
        best = shares.argmax(dim=-1).tolist()
        return [{"label": self.names[i], "shares": dict(zip(self.names, row.tolist(), strict=True))}
                for i, row in zip(best, shares, strict=True)]  # fmt: skip

    def check_scored(self, table: Any) -> None:
        if not any(table["label"]):
            raise ValueError(f"task {self.name!r}: no row of the table has a label, so that nothing can be scored")
        self._check_names(dict.fromkeys(table["label"]))

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """Over the rows whose label is known; ValueError if none is."""
        Labelled.check_scored(self, rows)
        known = [(record, label) for record, label in zip(records, rows["label"], strict=True) if label]
        right = [float(record["label"] == label) for record, label in known]
        for (record, _), credit in zip(known, right, strict=True):
            record["credit"] = credit
        return {"accuracy": sum(right) / len(right)}

    def chance(self, rows: Any) -> float | None:
        """Always giving the commonest label."""
        counts = Counter(label for label in rows["label"] if label)
        return max(counts.values()) / sum(counts.values()) if counts else None

    def query(self, row: dict[str, Any]) -> str:
        """What is asked of a row, for the gallery."""
        return row["statement"]

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": self.query(rows[i]), "prediction": records[i]["label"], "target": rows[i]["label"],
             "correct": records[i]["label"] == rows[i]["label"]}
            for i in indices
        ]  # fmt: skip

    def fold(self, backbone: Any, head: nn.Module) -> None:
        """The head goes where the model has one of its own."""
        if (own := backbone.own_head(self.name)) is not None:
            own.load_state_dict(head.state_dict())
