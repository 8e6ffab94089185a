"""Our methods against numbers that the authors' released code computed (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.comparisons  # noqa: F401  (fills what `compare` looks up)
from tests import conformance

CASES = conformance.find(Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_gives_what_the_published_code_gives(case):
    results = conformance.compare(case)
    report = conformance.line(case, results)
    assert report["pass"], report
    assert "unknown" not in report, "every field of the case is taken, or known"
