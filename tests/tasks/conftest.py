"""Backbones that the tests of tasks read."""

from __future__ import annotations

import pytest

from trimtab import backbones


@pytest.fixture(scope="module")
def vilt():
    """Only fed and read by these tests, never trained."""
    return backbones.load("tiny-vilt", pretrained=False).eval()


@pytest.fixture(scope="module")
def clip():
    return backbones.load("tiny-clip", pretrained=False).eval()
