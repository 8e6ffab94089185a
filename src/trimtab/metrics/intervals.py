"""Intervals over rows: how far a mean, or a difference between two means on the same rows, may be off.

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) of scipy: rows are drawn
again with replacement. It tells what another set of rows might have given, not what another seed might. `over_seeds`
tells both. Rows that stand together, such as questions about one picture, are drawn together: `groups` says which.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

LEVEL = 0.95
DRAWS = 2000
MANY = 20_000  # where a claim hangs on which side of 0 an end lies: it then moves by a fiftieth of a deviation


Groups = Sequence[Hashable]


def interval(values: Sequence[float], groups: Groups | None = None) -> tuple[float, float]:
    """The 95 % interval of the mean of what each row gives.

    Args:
        values: one a row, in any unit.
        groups: of each row the name of its group, such as its picture: groups are drawn whole (the cluster bootstrap of
            Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). None: each row by itself.

    Returns:
        Its ends, the same for the same values; both the mean where all are equal, or there is one row or group.

    Raises:
        ValueError: for no values, one that is no finite number, or as many groups as there are not rows.
    """
    rows = np.asarray(values, dtype=float)
    if not rows.size or not np.isfinite(rows).all():
        finite = int(np.isfinite(rows).sum())
        raise ValueError(f"expected finite numbers, one a row, found {rows.size} numbers, {finite} of them finite")
    if rows.min() == rows.max():
        return float(rows[0]), float(rows[0])
    from scipy.stats import bootstrap  # takes a second to import

    sums, sizes = _pooled(rows[None], groups)
    if sizes.size == 1:
        return float(rows.mean()), float(rows.mean())
    batch = max(1, 2**24 // sizes.size)  # so many draws at a time: 128 MiB
    found = bootstrap((sums[0], sizes), lambda s, n, axis=-1: s.sum(axis=axis) / n.sum(axis=axis), paired=True,
                      vectorized=True, n_resamples=DRAWS, confidence_level=LEVEL, batch=batch, method="percentile",
                      rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _pooled(rows: np.ndarray, groups: Groups | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the rows of each group, (seeds, groups), and how many rows it has, (groups,).

    Raises:
        ValueError: for as many groups as there are not rows.
    """
    if groups is None:
        return rows, np.ones(rows.shape[1])
    if len(groups) != rows.shape[1]:
        raise ValueError(f"expected a group of each of {rows.shape[1]} rows, found {len(groups)}")
    numbers: dict[Hashable, int] = {}
    place = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    sums = np.stack([np.bincount(place, weights=row) for row in rows])
    return sums, np.bincount(place).astype(float)


def difference(
    values: Sequence[float], reference: Sequence[float], groups: Groups | None = None
) -> tuple[float, float, float]:
    """Mean of `values` less that of `reference` on the same rows, and its 95 % interval.

    Raises:
        ValueError: if they are not of as many rows, or as of `interval`.
    """
    if len(values) != len(reference):
        raise ValueError(f"expected the same rows, found {len(values)} and {len(reference)}")
    gaps = np.subtract(values, reference)
    return float(gaps.mean()), *interval(gaps.tolist(), groups)


def over_seeds(
    values: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
    groups: Groups | None = None,
    draws: int = MANY,
) -> tuple[float, float, float]:
    """Mean of `values` less that of `reference`, each of some seeds, and its 95 % interval over rows and seeds.

    The same rows are drawn again for both. Of n seeds n - 1 are drawn again, for each side by itself: the variance of
    their mean is then that of n seeds (Rao and Wu, JASA 83, 1988, section 2). Of one seed nothing can be drawn: what
    another one would have given is then not in the interval.

    Args:
        values: of each seed what every row gives; seeds need not be the same or as many as of the other.
        reference: the same of what they stand beside.
        groups: as of `interval`.
        draws: how many; fewer for many rows, since they take a fifth of a microsecond a row and draw.

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
        sums, sizes = _pooled(side, groups)
        shares = _drawn(sizes.size, draws)
        seeds = shares @ sums.T  # (draws, seeds)
        if groups is not None:
            seeds /= (shares @ sizes)[:, None]
        if len(side) > 1:
            some = draw.integers(len(side), size=(draws, len(side) - 1))
            seeds = np.take_along_axis(seeds, some, axis=1)
        means.append(seeds.mean(axis=1))
    low, high = np.quantile(means[0] - means[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(sides[0].mean() - sides[1].mean()), float(low), float(high)


@lru_cache(maxsize=2)
def _drawn(many: int, draws: int) -> np.ndarray:
    """Shares of so many rows or groups in each draw, (draws, rows): the same for both sides."""
    counts = np.random.default_rng(0).multinomial(many, np.full(many, 1 / many), size=draws)
    return (counts / many).astype(np.float32)
