"""Visual question answering as classification over a fixed set of answers (ViLT, section 4.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data.images import decode_rows
from trimtab.metrics import vqa as official
from trimtab.metrics.answers import soft_targets
from trimtab.metrics.words import normalise_vilt
from trimtab.tasks.base import TASKS, Batch, Task


@TASKS.register("vqa")
class VQA(Task):
    """Columns `image`, `question`, `answer`; with a column `kind`, accuracy is given for each kind of question too.

    With a column `answers` (those of ten people, as written) the accuracy is the official one of VQA, also by
    `question_type` and `answer_type` where these columns are there. Without it an answer is right if it is `answer`;
    rows whose answer is not told do not count.

    The head is ViLT's: two linear layers with LayerNorm and GELU between. It reads the first token itself and not the
    pooled feature: a pooler that was trained to match keeps what tells a match from none and little else. Where the
    pooled feature joins two streams (METER), whose first tokens know half each, it is read as published. An answer
    outside the classes is never right, and no gradient comes from a row that has no other.

    Args:
        answers: the classes; a recipe that leaves them out takes those of its data source.
        loss: `binary` is the cross-entropy of every class by itself, summed over classes (ViLT, METER, CLIP-ViL),
            against 0, 0.3, 0.6, 0.9 or 1 for an answer that none, one, two, three or more people gave; 1 for `answer`
            in a table without `answers`, and for the answer of one person alone (Visual Genome). `one` is the
            cross-entropy of choosing `answer`. `auto` takes `binary` where a table has `answers`, else `one`.
        counting: `written` counts people's answers as they are, as ViLT and METER do; `normalised` first writes them as
            the classes are written, as LXMERT and CLIP-ViL do, which finds more of them.

    Raises:
        ValueError: for another word, or answers that repeat.
    """

    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    primary = "accuracy"
    kinds = ("joint",)
    first_token = True
    blank = {"answer": ""}

    def __init__(
        self,
        answers: Sequence[str],
        loss: Literal["auto", "one", "binary"] = "auto",
        counting: Literal["written", "normalised"] = "written",
    ):
        for field, found, known in (
            ("loss", loss, ("auto", "one", "binary")), ("counting", counting, ("written", "normalised"))
        ):  # fmt: skip
            if found not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, found {found!r}")
        self.answers = list(answers)
        self.index = {a: i for i, a in enumerate(self.answers)}
        if len(self.index) < len(self.answers):
            twice = [a for a, n in Counter(self.answers).items() if n > 1]
            raise ValueError(f"answers: {len(twice)} of them stand there twice, such as {twice[0]!r}")
        self.objective, self.counting = loss, counting

    @classmethod
    def settings_from(cls, source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """`answers` are the source's, unless they are given."""
        return dict(given) if "answers" in given else {**given, "answers": list(source.answers())}

    def head(self, backbone: Any) -> nn.Module:
        d = backbone.width
        return nn.Sequential(nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, len(self.answers)))

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        batch = {**backbone.images([r["image"] for r in rows]), **backbone.texts([r["question"] for r in rows])}
        if self.objective == "binary" or (self.objective == "auto" and "answers" in rows[0]):
            return batch | {"targets": torch.stack([self.targets(r) for r in rows])}
        return batch | {"labels": torch.tensor([self.index.get(r["answer"], -100) for r in rows])}

    def targets(self, row: Mapping[str, Any]) -> Tensor:
        """Soft targets of a row, (classes,)."""
        told = people(row)
        if len(row.get("answers") or ()) > 1:
            found = soft_targets(told, self.index, normalise_vilt if self.counting == "normalised" else None)
        else:
            only = told[0] if told else row["answer"]
            only = normalise_vilt(only) if self.counting == "normalised" and only not in self.index else only
            found = {self.index[only]: 1.0} if only in self.index else {}
        out = torch.zeros(len(self.answers))
        for index, target in found.items():
            out[index] = target
        return out

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        if self.objective == "binary":
            return {**batch, "targets": torch.ones(size, len(self.answers))}
        return {**batch, "labels": torch.zeros(size, dtype=torch.long)}

    def _logits(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        encoded = backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        one_stream = backbone.token_width == backbone.width
        return head(encoded.tokens[:, 0] if one_stream else encoded.pooled).float()

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        logits = self._logits(backbone, head, batch)
        if "targets" in batch:
            told = batch["targets"].any(dim=1)
            each = F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="none").sum(dim=1)
            return divided.mean(each.masked_fill(~told, 0).sum(), told.sum())
        labels = batch["labels"]
        # A batch without a known answer gives 0, not 0 / 0.
        return divided.mean(F.cross_entropy(logits, labels, reduction="sum"), (labels >= 0).sum())

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        best = self._logits(backbone, head, batch).argmax(dim=-1)
        records: list[dict[str, Any]] = [{"answer": self.answers[i]} for i in best.tolist()]
        if "targets" in batch:
            soft = batch["targets"].gather(1, best[:, None])[:, 0].tolist()
            records = [r | {"soft score": s} for r, s in zip(records, soft, strict=True)]
        return records

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """`soft score` is the mean target of the answers given, over all rows; ViLT prints it over rows whose answer is
        among the classes."""
        told = self._official(records, rows) if "answers" in rows.column_names else None
        if told is not None:
            out, right = told
        else:
            self._check_told(rows)
            right = [float(r["answer"] == a) if a else None for r, a in zip(records, rows["answer"], strict=True)]
            out = {"accuracy": _mean(right)}
            if "kind" in rows.column_names:
                by: dict[str, list[float | None]] = {}
                for kind, credit in zip(rows["kind"], right, strict=True):
                    by.setdefault(kind, []).append(credit)
                known = {k: v for k, v in sorted(by.items()) if any(c is not None for c in v)}
                out |= {f"accuracy: {k}": _mean(v) for k, v in known.items()}
        for record, credit in zip(records, right, strict=True):
            if credit is not None:
                record["credit"] = credit
        if records and all("soft score" in r for r in records):
            out["soft score"] = sum(r["soft score"] for r in records) / len(records)
        return out

    def check_scored(self, table: Any) -> None:
        if "answers" not in table.column_names or self._told(table) is None:
            self._check_told(table)

    def _check_told(self, rows: Any) -> None:
        if not any(rows["answer"]):
            raise ValueError(
                f"task {self.name!r}: no row of the table has an answer, so that nothing can be scored: choose another "
                "split to test on (answers of test splits are seldom published)"
            )

    def _told(self, rows: Any) -> dict[int, dict[str, Any]] | None:
        """What people answered, as VQA's files write it, by the row's number; None if no row has their answers.

        Raises:
            ValueError: if some rows have, and others not.
        """
        names = [n for n in ("answers", "weights", "question_type", "answer_type") if n in rows.column_names]
        columns = {n: rows[n] for n in names}
        annotations = {}
        for i in range(len(rows)):
            row = {n: columns[n][i] for n in names}
            annotations[i] = {**row, "answers": people(row)}
        empty = [i for i, a in annotations.items() if not a["answers"]]
        if len(empty) == len(annotations):
            return None
        if empty:
            raise ValueError(f"row {empty[0]}: no answers of people, which other rows have: VQA's accuracy is over all")
        if few := [i for i, a in annotations.items() if len(a["answers"]) < official.LEAST]:
            raise ValueError(
                f"row {few[0]}: {len(annotations[few[0]]['answers'])} in 'answers', expected those of ten people, "
                f"{official.LEAST} at least: VQA's accuracy asks for three others who say the same, and is below 1 for "
                "a right answer here; leave 'answers' out, then an answer is right if it is 'answer'"
            )
        return annotations

    def _official(self, records: list[dict[str, Any]], rows: Any) -> tuple[dict[str, float], list[float | None]] | None:
        """VQA's own accuracy, as shares, and that of each row; None if no row has people's answers."""
        annotations = self._told(rows)
        if annotations is None:
            return None
        found = official.evaluate(annotations, {i: r["answer"] for i, r in enumerate(records)})
        out = {"accuracy": found["overall"] / 100}
        for kind in ("answer_type", "question_type"):
            title = kind.replace("_", " ")
            out |= {f"accuracy, {title}: {k}": v / 100 for k, v in sorted(found[f"by_{kind}"].items())}
        return out, [found["by_question"][i] / 100 for i in annotations]

    def chance(self, rows: Any) -> float | None:
        """Always giving the commonest answer."""
        known = [answer for answer in rows["answer"] if answer]
        if not known:
            return None
        commonest, times = Counter(known).most_common(1)[0]
        if "answers" in rows.column_names and (out := self._official([{"answer": commonest}] * len(rows), rows)):
            return out[0]["accuracy"]
        return times / len(known)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        """With people's answers, right is what at least three of them say as well."""
        out = []
        for i in indices:
            row, answer = rows[i], records[i]["answer"]
            told = people(row)
            right = official.score(told, answer) >= 0.9 if len(told) > 1 else answer == row["answer"]
            out.append({"query": row["question"], "prediction": answer, "target": row["answer"], "correct": right})
        return out


def _mean(credits: Sequence[float | None]) -> float:
    known = [c for c in credits if c is not None]
    return sum(known) / len(known)


def people(row: Mapping[str, Any]) -> list[str]:
    """The answers of people to a row's question; one with a weight (a share of ten people, in the files of X-VLM and
    BLIP) as often as it stands for one of ten.

    Raises:
        ValueError: if there are not as many weights as answers.
    """
    told, weights = list(row.get("answers") or ()), row.get("weights")
    if not weights:
        return told
    if len(weights) != len(told):
        raise ValueError(f"expected a weight an answer, found {len(weights)} weights and {len(told)} answers: {told}")
    return [answer for answer, weight in zip(told, weights, strict=True) for _ in range(max(1, round(10 * weight)))]
