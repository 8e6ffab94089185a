"""How each kind of reference case is compared: importing this fills `tests.conformance.COMPARISONS`."""

from tests.comparisons import blip, clip_vil, meter, prune, skip, tune, vilt  # noqa: F401
