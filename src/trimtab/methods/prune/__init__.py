"""Lever 1: remove weights."""

from trimtab.methods.prune import baselines, chita, multiflow, snip, sparsegpt, tamt, wanda  # noqa: F401
