"""GQA: questions that were made from programs over scene graphs, with the five metrics of its authors."""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.metrics import gqa as official
from trimtab.tasks.base import TASKS
from trimtab.tasks.vqa import VQA


@TASKS.register("gqa")
class GQA(VQA):
    """A `vqa` task that is scored as GQA is: over balanced questions, an answer right if it is the same string.

    Columns of `vqa`, and `question_id`, `balanced`, `structural`, `semantic`, `detailed`, `group`, `entailed`, `steps`.
    Metrics as shares: accuracy, of binary and open questions, by type; consistency where the table holds all questions
    that balanced ones entail; `distribution`, where less is better. Validity and plausibility need the choices file,
    which no table holds: `trimtab.metrics.gqa.evaluate` takes it.
    """

    columns = (
        "question", "answer", "question_id", "balanced", "structural", "semantic", "detailed", "group", "entailed",
        "steps",
    )  # fmt: skip

    def check_scored(self, table: Any) -> None:
        balanced = {name: q for name, q in self._questions(table).items() if q["isBalanced"]}
        if not balanced:
            raise ValueError(f"task 'gqa': none of {len(table)} questions is balanced: there is nothing to score")
        if untold := next((name for name, q in balanced.items() if not q["answer"]), None):
            raise ValueError(
                f"task 'gqa': question {untold!r} has no answer, so that nothing can be scored: choose another split "
                "to test on (answers of the test and challenge splits are not published)"
            )

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        questions = self._questions(rows)
        told = {name for name, q in questions.items() for name in q["entailed"] if q["isBalanced"]}
        predictions = {name: r["answer"] for name, r in zip(questions, records, strict=True)}
        found = official.evaluate(questions, predictions, consistency=told <= questions.keys(), extra=True)
        names = ("accuracy", "binary", "open", "consistency")
        out = {name: found[name] / 100 for name in names if found[name] is not None}
        if found["distribution"] is not None:
            out["distribution"] = found["distribution"]
        for kind in ("structural", "semantic"):
            by = sorted(found[f"by_{kind}_type"].items())
            out |= {f"accuracy, {kind}: {name}": share / 100 for name, (share, _) in by}
        return out

    def _questions(self, rows: Any) -> dict[str, dict[str, Any]]:
        """The rows as GQA's files write questions.

        Raises:
            ValueError: for an id that stands there twice.
        """
        columns = {name: rows[name] for name in self.columns}
        out: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(columns["question_id"]):
            row = {key: values[i] for key, values in columns.items()}
            if name in out:
                raise ValueError(f"row {i}: question {name!r} stands in the table twice")
            out[name] = {
                "question": row["question"], "answer": row["answer"], "isBalanced": row["balanced"],
                "types": {kind: row[kind] for kind in ("structural", "semantic", "detailed")},
                "groups": {"global": row["group"] or None}, "entailed": row["entailed"] or [],
                # The program itself is not in the table; so many steps stand for it.
                "semantic": [{"operation": "step", "argument": ""}] * (row["steps"] or 0),
            }  # fmt: skip
        return out

    def chance(self, rows: Any) -> float | None:
        """Always giving the commonest answer of the balanced questions."""
        balanced = [a for a, b in zip(rows["answer"], rows["balanced"], strict=True) if b]
        return max(balanced.count(a) for a in set(balanced)) / len(balanced) if balanced else None
