"""Our methods against numbers that the authors' released code computed (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import conformance

CASES = conformance.find(Path(__file__).parents[1] / "golden")


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_gives_what_the_published_code_gives(case):
    checks = [r for r in conformance.compare(case) if isinstance(r, conformance.Check)]
    assert checks
    assert not [c for c in checks if not c.passed]
