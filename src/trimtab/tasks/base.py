"""A task: head, loss, prediction and metrics over rows of one schema. It knows neither methods nor model families.

rows --collate--> batch --loss--> scalar                      (training)
                        --predict--> one dict a row --score--> metrics   (evaluation)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.anatomy.structure import HANDLE
from trimtab.methods.modes import drop_again, frozen_in_evaluation
from trimtab.registry import Registry

Batch = dict[str, Tensor]
TASKS: Registry[Any] = Registry("task")


class Task(ABC):
    """One task.

    Attributes:
        name: registered name, which the registry sets.
        sees: the column of its tables that holds pictures: `image`, `images` (several a row) or `video` (a path).
        columns: columns that its tables must have beside it.
        schema: name of the task whose tables it takes; empty for its own.
        primary: the metric by which methods are compared; larger is better.
        kinds: which kinds of backbone it works on (`Backbone.kind`).
        blank: what stands for the target columns of a row whose answer is not known.
        causal: whether a word may be predicted from those before it only.
        first_token: whether it reads nothing but first tokens, itself or pooled.
        least: rows that a batch must have at least; costs of one sample are this many samples' share.
        together: whether what `collate` makes of a row depends on the other rows of its batch.
    """

    name: ClassVar[str]
    sees: ClassVar[str] = "image"
    columns: ClassVar[tuple[str, ...]]
    schema: ClassVar[str] = ""
    primary: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    blank: ClassVar[dict[str, Any]] = {}
    causal: ClassVar[bool] = False
    first_token: ClassVar[bool] = False
    least: ClassVar[int] = 1
    together: bool = False

    @classmethod
    def settings_from(cls, source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings `given`, and those that the task takes from its data source where they are left out."""
        return dict(given)

    @abstractmethod
    def head(self, backbone: Any) -> nn.Module:
        """The trainable module on top of the backbone's features."""

    @abstractmethod
    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        """Rows with decoded images -> tensors. The first axis of every tensor is the sample."""

    @abstractmethod
    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """One record a sample: what `score` and the gallery need."""

    def finish(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of a whole table with what is the same for all of them and so is computed once."""
        return records

    @abstractmethod
    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """Metrics over all records of a table, fractions in 0..1; the one named `primary` is among them.

        Where that is a mean over rows, each record gets `credit`, what its row gives to it; from these come intervals.
        """

    def fold(self, backbone: Any, head: nn.Module) -> None:  # noqa: B027 (most heads stay with their task)
        """Move into the backbone what its own architecture has a place for, before it is exported without the head."""

    def reached(self, anatomy: Any) -> Any:
        """What of a backbone's `Anatomy` the task runs: methods see no other tower."""
        return anatomy

    def example(self, backbone: Any, size: int) -> Batch:
        """A training batch of random inputs, to count operations and bytes without data."""
        return backbone.example(size)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        """For the given rows: query, prediction, target and whether it is right, as a person reads them."""
        return []

    def chance(self, rows: Any) -> float | None:
        """The primary metric of guessing, None if there is no simple figure."""
        return None

    def check_row(self, row: Mapping[str, Any], where: str) -> None:
        """Raise a ValueError if a row to be answered lacks what is asked about."""
        needed = [name for name in (self.sees, *self.columns) if name not in self.blank]
        if missing := [name for name in needed if row.get(name) is None]:
            raise ValueError(f"{where}: task {self.name!r} needs {missing}, found {sorted(row)}")

    def check(self, backbone: Any, table: Any) -> None:
        """Raise a ValueError unless the backbone is of a fitting kind and the table has the task's columns."""
        if backbone.kind not in self.kinds:
            raise ValueError(
                f"task {self.name!r} needs a {' or '.join(self.kinds)} backbone, {backbone.name!r} is {backbone.kind}"
            )
        missing = [c for c in (self.sees, *self.columns) if c not in table.column_names]
        if missing:
            raise ValueError(f"task {self.name!r} needs the columns {missing}, the table has {table.column_names}")

    def check_scored(self, table: Any) -> None:  # noqa: B027 (most tasks score any rows)
        """Raise a ValueError if a table to evaluate on cannot be scored, whatever is predicted. It is asked before
        training, so that nobody learns it hours later; `check` has passed, and pictures are not read."""

    def check_test(self, table: Any) -> None:
        """As `check_scored`, of the test rows, which may be asked for more than those by which training is watched."""
        self.check_scored(table)


class TaskModel(nn.Module):
    """A backbone with a task's head: what the trainer trains. `forward(**batch)` returns `{"loss": scalar}`."""

    def __init__(self, backbone: nn.Module, task: Task):
        super().__init__()
        self.backbone: Any = backbone
        self.task = task
        self.head: Any = task.head(backbone)

    def train(self, mode: bool = True) -> TaskModel:
        """As in torch, but modules without trainable parameters stay in evaluation mode (dropout, statistics)."""
        super().train(mode)
        # An adapted model has set its own modules; layers with gradient checkpointing are to stay in training mode.
        handled = [m for m in self.modules() if getattr(m, HANDLE, None) is not None]
        tuned = [m for m in handled if getattr(m, HANDLE).tuned]
        for module in (m for m in handled if m not in tuned):  # a policy alone may say what is trained
            (frozen_in_evaluation if mode else drop_again)(module)
        own = {id(part) for m in tuned for part in m.modules()}
        for module in (m for m in self.modules() if id(m) not in own) if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.task.loss(self.backbone, self.head, batch)}

    @torch.inference_mode()
    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predictions for rows as a person has them: an `image` and the text that the task asks for.

        Args:
            rows: `{"image": PIL image or path, "question": ...}` for VQA, `"phrase"` for grounding, `"captions"` for
                retrieval, `"statement"` for entailment, nothing more for classification; `{"images": [left, right],
                "statement": ...}` for pairs; `{"video": path, "captions": ...}` for video retrieval.

        Returns:
            One record a row: `answer`, or `label` and the `shares` of all labels, or `box` in pixels of the picture, or
            unit vectors `image` (D,) and `text`, one a caption (C, D), or `scores` of the captions (reranking), or
            `similar`, how well each of its captions fits the video, or a `caption`.

        Raises:
            ValueError: if a row lacks a picture or what is asked about it.
            ImageError: if a picture cannot be decoded.
        """
        for i, row in enumerate(rows):
            self.task.check_row(row, f"row {i}")
        if not rows:
            return []
        self.eval()
        device = next(self.parameters()).device
        batch = self.task.collate(self.backbone, [{**self.task.blank, **row} for row in rows], train=False)
        records = self.predict({k: v.to(device) for k, v in batch.items()})
        return self.task.finish(self.backbone, self.head, records)

    def example(self, size: int) -> Batch:
        return self.task.example(self.backbone, size)

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        return self.task.predict(self.backbone, self.head, batch)
