"""Lever 1: remove weights."""

from trimtab.methods.prune import baselines, multiflow, snip, wanda  # noqa: F401
