"""Lever 1: remove weights."""

from trimtab.methods.prune import baselines, multiflow  # noqa: F401
