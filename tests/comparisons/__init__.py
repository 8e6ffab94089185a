"""How each kind of reference case is compared: importing this fills `tests.conformance.COMPARISONS`."""

from tests.comparisons import (  # noqa: F401
    blip,
    clip4clip,
    clip_vil,
    data_broken,
    data_first,
    data_second,
    mdetr,
    meter,
    metrics,
    metrics_ranks,
    prune,
    skip,
    tune,
    vilt,
    vse,
    xvlm,
)
