"""Our backbones against numbers that their authors' released code computed (tests/golden/backbones)."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.comparisons  # noqa: F401 (fills conformance.COMPARISONS)
from tests import conformance

CASES = conformance.find(Path(__file__).parents[1] / "golden" / "backbones")


def test_there_are_cases():
    xvlm = {f"xvlm_clipvit {stage}" for stage in ("pretrain", "mlm", "region", "retrieval", "bbox")}
    assert {c.name for c in CASES} == xvlm | {
        "meter pretrain", "meter mlm", "meter irtr", "clip_vil pretrain", "clip_vil vqa", "vse_infty butd_region",
        "mdetr pretrain",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_computes_what_the_published_code_computes(case):
    results = conformance.compare(case)
    assert results and all(isinstance(r, conformance.Check) for r in results), "nothing is left out"
    assert not [c for c in results if not c.passed]
