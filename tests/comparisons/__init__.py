"""How each kind of reference case is compared: importing this fills `tests.conformance.COMPARISONS`."""

from tests.comparisons import prune, skip, tune  # noqa: F401
