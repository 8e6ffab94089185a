"""Intervals over rows: how far a mean, or a difference between two means on the same rows, may be off.

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) of scipy: rows are drawn
again with replacement. It tells what another set of rows might have given, not what another seed might. `over_seeds`
tells both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LEVEL = 0.95
DRAWS = 2000
MANY = 20_000  # where a claim hangs on which side of 0 an end lies: it then moves by a fiftieth of a deviation


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


def over_seeds(values: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of `values` less that of `reference`, each of some seeds, and its 95 % interval over rows and seeds.

    The same rows are drawn again for both. Of n seeds n - 1 are drawn again, for each side by itself: the variance of
    their mean is then that of n seeds (Rao and Wu, JASA 83, 1988, section 2). Of one seed nothing can be drawn: what
    another one would have given is then not in the interval.

    Args:
        values: of each seed what every row gives; seeds need not be the same or as many as of the other.
        reference: the same of what they stand beside.

    Raises:
        ValueError: if they are not of as many rows, or not of finite numbers.
    """
    counts = {len(rows) for rows in (*values, *reference)}
    if len(counts) != 1 or not values or not reference:
        raise ValueError(f"expected the same rows of every seed, found {sorted(counts)} of them")
    sides = [np.asarray(side, dtype=float) for side in (values, reference)]  # (seeds, rows)
    if not all(np.isfinite(side).all() for side in sides):
        raise ValueError("expected finite numbers, one a row")
    draw, means = np.random.default_rng(0), []
    for side in sides:
        seeds = _drawn(side.shape[1]) @ side.T  # (draws, seeds)
        if len(side) > 1:
            some = draw.integers(len(side), size=(MANY, len(side) - 1))
            seeds = np.take_along_axis(seeds, some, axis=1)
        means.append(seeds.mean(axis=1))
    low, high = np.quantile(means[0] - means[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(sides[0].mean() - sides[1].mean()), float(low), float(high)


@lru_cache(maxsize=2)
def _drawn(rows: int) -> np.ndarray:
    """Shares of the rows in each draw, (draws, rows)."""
    counts = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=MANY)
    return (counts / rows).astype(np.float32)
