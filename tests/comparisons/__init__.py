"""How each kind of reference case is compared: importing this fills `tests.conformance.COMPARISONS`."""

from tests.comparisons import clip4clip, mdetr, prune, skip, tune, vse, xvlm  # noqa: F401
