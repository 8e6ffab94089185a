"""Lever 2: remove blocks. One file a search; `base.py` is what they share, `shorten.py` what makes a model shorter."""

from trimtab.methods.skip.search import bandit, das, exhaustive, greedy, influence, linear, random  # noqa: F401
