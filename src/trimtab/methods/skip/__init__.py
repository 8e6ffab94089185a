"""Lever 2: remove blocks."""

from trimtab.methods.skip import das, random  # noqa: F401
