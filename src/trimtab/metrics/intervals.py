"""Intervals over rows: how far a mean, or a difference between two means on the same rows, may be off.

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) of scipy: rows are drawn
again with replacement. It tells what another set of rows might have given, not what another seed might.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
DRAWS = 2000


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of what each row gives.

    Args:
        values: one a row, in any unit.

    Returns:
        Its ends, the same for the same values; both the mean where all are equal, or there is one.

    Raises:
        ValueError: for no values, or one that is no finite number.
    """
    rows = np.asarray(values, dtype=float)
    if not rows.size or not np.isfinite(rows).all():
        finite = int(np.isfinite(rows).sum())
        raise ValueError(f"expected finite numbers, one a row, found {rows.size} numbers, {finite} of them finite")
    if rows.min() == rows.max():
        return float(rows[0]), float(rows[0])
    from scipy.stats import bootstrap  # takes a second to import

    batch = max(1, 2**24 // rows.size)  # so many draws at a time: 128 MiB
    found = bootstrap((rows,), np.mean, n_resamples=DRAWS, confidence_level=LEVEL, batch=batch, method="percentile",
                      rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `values` less that of `reference` on the same rows, and its 95 % interval.

    Raises:
        ValueError: if they are not of as many rows, or as of `interval`.
    """
    if len(values) != len(reference):
        raise ValueError(f"expected the same rows, found {len(values)} and {len(reference)}")
    gaps = np.subtract(values, reference)
    return float(gaps.mean()), *interval(gaps.tolist())
