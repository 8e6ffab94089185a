"""Visual question answering by ranking answers: the model's own decoder says how likely each of a list is.

picture, question --fuse--> tokens (B, L, D) --decoder--> the next word of an answer        (BLIP, X-VLM)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.vqa import VQA


@TASKS.register("answer-ranking")
class AnswerRanking(VQA):
    """Columns and metrics of `vqa`; needs a backbone with a decoder of answers (BLIP or X-VLM with `task: vqa`).

    There is no head beside the model's own. In training every answer of a row counts with its weight: `weights` if the
    table has them, else its share of the row's `answers`, else 1 for `answer`. Answers are not limited to the list
    there. In evaluation the k answers of the list whose first words are likeliest are scored whole.

    Args:
        answers: the list; a recipe that leaves them out takes those of its data source.
        k: answers that are scored whole, as published 128; all of a shorter list.
        pairs: questions with answers in one pass of the decoder.

    Raises:
        ValueError: for a number that cannot be, or answers that repeat.
    """

    schema = "vqa"
    first_token = False
    causal = True

    def __init__(self, answers: Sequence[str], k: int = 128, pairs: int = 1024):
        super().__init__(answers)
        if k < 1 or pairs < 1:
            raise ValueError(f"answer-ranking: expected k >= 1 and pairs >= 1, found {k} and {pairs}")
        self.k, self.pairs = k, pairs

    def head(self, backbone: Any) -> nn.Module:
        return nn.Identity()

    def check(self, backbone: Any, table: Any) -> None:
        super().check(backbone, table)
        try:
            backbone.answers(self.answers[:1])
        except NotImplementedError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        batch = {**backbone.images([r["image"] for r in rows]), **backbone.texts([r["question"] for r in rows])}
        if not train:
            return batch
        told = [weighted(r) for r in rows]
        most = max(1, *map(len, told))
        flat = backbone.answers([answer for row in told for answer in [*row, *[""] * (most - len(row))]])
        weights = [[*row.values(), *[0.0] * (most - len(row))] for row in told]
        return batch | {
            "answer_ids": flat["input_ids"].view(len(rows), most, -1),  # (B, M, A)
            "answer_mask": flat["attention_mask"].view(len(rows), most, -1),
            "answer_weights": torch.tensor(weights),  # (B, M)
        }

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        return batch | {
            "answer_ids": batch["input_ids"][:, None, :4], "answer_mask": batch["attention_mask"][:, None, :4],
            "answer_weights": torch.ones(size, 1),
        }  # fmt: skip

    def _questions(self, backbone: Any, batch: Batch) -> Tensor:
        return backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).tokens

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        """The answers' losses times their weights, summed over a row's answers; the mean over rows."""
        told = batch["answer_weights"] > 0  # (B, M)
        row = told.nonzero()[:, 0]
        tokens = self._questions(backbone, batch)
        if not len(row):
            return tokens.sum() * 0
        loss = backbone.answer_loss(
            tokens[row], batch["attention_mask"][row], batch["answer_ids"][told], batch["answer_mask"][told]
        )
        return (batch["answer_weights"][told] * loss.float()).sum() / len(told)

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        tokens, mask = self._questions(backbone, batch), batch["attention_mask"]
        listed = {name: values.to(tokens.device) for name, values in backbone.answers(self.answers).items()}
        k = min(self.k, len(self.answers))
        best: list[int] = []
        for start in range(0, len(tokens), max(1, self.pairs // k)):
            part = slice(start, start + max(1, self.pairs // k))
            best += backbone.rank_answers(
                tokens[part], mask[part], listed["input_ids"], listed["attention_mask"], k
            ).tolist()
        return [{"answer": self.answers[i]} for i in best]


def weighted(row: dict[str, Any]) -> dict[str, float]:
    """The answers of a row with their weights, each once; none if the answer is not known.

    Raises:
        ValueError: if there are not as many weights as answers.
    """
    told = list(row.get("answers") or ())
    if not told:
        return {row["answer"]: 1.0} if row["answer"] else {}
    weights = row.get("weights") or [1 / len(told)] * len(told)
    if len(weights) != len(told):
        raise ValueError(f"expected a weight an answer, found {len(weights)} weights and {len(told)} answers: {told}")
    out: dict[str, float] = {}
    for answer, weight in zip(told, weights, strict=True):
        out[answer] = out.get(answer, 0.0) + weight
    return out
