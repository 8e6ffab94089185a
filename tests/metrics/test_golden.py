"""Our metrics against the numbers of official evaluation code (tests/golden/metrics)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tests.comparisons  # noqa: F401  (fills the table of comparisons)
from tests import conformance

FOLDER = Path(__file__).parents[1] / "golden" / "metrics"
CASES = conformance.find(FOLDER)


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_gives_what_the_official_code_gives(case):
    report = conformance.line(case, conformance.compare(case))
    assert report["pass"], report
    assert "unknown" not in report and "skipped" not in report, report


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nlvr2", lambda d: d["official"].update(consistency=d["official"]["consistency"] + 2e-6)),
        ("retrieval_ties", lambda d: d["bounds"]["t2i"]["favourable"].update({"R@5": 81.0})),
        ("vqa_accuracy", lambda d: d["official"]["per_question"].update({"1026000": 90.0})),
        ("gqa", lambda d: d["predictions"].__setitem__(0, {"questionId": "0383443", "prediction": "green"})),
        ("captioning", lambda d: d["tokens"]["ptb"]["candidates"].update({"2625": "it's a well-lit horse"})),
        ("video_retrieval_ties", lambda d: d["official"]["t2v"]["cols"].pop()),
    ],
)
def test_the_comparison_sees_a_small_difference(name, change, tmp_path):
    fields = json.loads((FOLDER / f"{name}.json").read_text())
    change(fields)
    (tmp_path / "other_name.json").write_text(json.dumps(fields))
    (case,) = conformance.find(tmp_path)
    report = conformance.line(case, conformance.compare(case))
    assert report["pass"] is False, report
