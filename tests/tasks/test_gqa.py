"""GQA: a table's rows scored as the official program scores its files."""

from __future__ import annotations

import pytest
from datasets import Dataset

from trimtab.metrics import gqa as official
from trimtab.tasks.gqa import GQA

ROWS = [  # id, answer, balanced, structural, semantic, group, entailed, steps; what is predicted
    ("01", "yes", True, "verify", "attr", "color", ["02", "03"], 2, "yes"),
    ("02", "no", True, "verify", "attr", "color", [], 2, "yes"),
    ("03", "red", False, "query", "attr", None, [], 1, "red"),
    ("04", "dog", True, "query", "obj", "animal", ["04", "01"], 3, "dog"),
    ("05", "cat", True, "query", "obj", "animal", [], 3, "dog"),
]


def table(rows=ROWS) -> Dataset:
    names = ("question_id", "answer", "balanced", "structural", "semantic", "group", "entailed", "steps")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Dataset.from_dict(columns | {"question": ["what is it?"] * len(rows), "detailed": ["x"] * len(rows)})


def scored(rows=ROWS):
    return GQA(["yes", "no"]).score(None, None, [{"answer": row[-1]} for row in rows], table(rows))


def test_metrics_are_the_official_ones():
    """Right: 01, 03, 04. Entailed by 01: one of two; by 04, itself left out: 01."""
    found = scored()
    assert found["accuracy"] == pytest.approx(2 / 4) and found["binary"] == found["open"] == pytest.approx(1 / 2)
    assert found["consistency"] == pytest.approx((0.5 + 1) / 2)
    assert found["accuracy, structural: query"] == pytest.approx(1 / 2)
    # chi-square: color yes 2 for 1, no 0 for 1; animal dog 2 for 1, cat 0 for 1; weighted by size, over 100
    assert found["distribution"] == pytest.approx((2 * 2 + 2 * 2) / 4 / 100)
    questions = GQA(["yes"])._questions(table())
    assert [official.steps(q) for q in questions.values()] == [2, 2, 1, 3, 3]


def test_consistency_is_left_out_where_entailed_questions_are_not_there():
    assert "consistency" not in scored(ROWS[:1] + ROWS[3:])
    assert scored(ROWS[:1] + ROWS[3:])["accuracy"] == pytest.approx(2 / 3)


def test_an_id_twice_is_an_error_and_chance_is_over_balanced_questions():
    with pytest.raises(ValueError, match="row 5: question '01' stands in the table twice"):
        scored([*ROWS, ROWS[0]])
    assert GQA(["yes"]).chance(table()) == 1 / 4
