"""How each kind of reference case is compared: importing this fills `tests.conformance.COMPARISONS`."""

from tests.comparisons import blip, clip4clip, clip_vil, mdetr, meter, prune, skip, tune, vilt, vse, xvlm  # noqa: F401
