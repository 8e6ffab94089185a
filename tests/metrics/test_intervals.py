"""Intervals over rows, against what theory gives for shares."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest

from trimtab.metrics.intervals import difference, interval, over_seeds


@pytest.mark.parametrize(("share", "rows"), [(0.5, 400), (0.2, 1000)])
def test_the_interval_of_a_share_is_the_binomial_one(share, rows):
    values = [1.0] * round(share * rows) + [0.0] * round((1 - share) * rows)
    low, high = interval(values)
    half = 1.96 * math.sqrt(share * (1 - share) / rows)
    assert low == pytest.approx(share - half, abs=0.1 * half)
    assert high == pytest.approx(share + half, abs=0.1 * half)
    assert interval(values) == (low, high)


def test_equal_rows_have_no_width():
    assert interval([1.0] * 5) == (1.0, 1.0) and interval([0.3]) == (0.3, 0.3)


@pytest.mark.parametrize(("values", "message"), [([], "found 0 numbers"), ([1.0, math.nan], "1 of them finite")])
def test_what_has_no_mean_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        interval(values)


def test_a_difference_on_the_same_rows_is_narrower_than_two_intervals():
    draw = random.Random(0)
    hard = [float(draw.random() < 0.5) for _ in range(600)]
    better = [1.0 if draw.random() < 0.06 else x for x in hard]
    gap, low, high = difference(better, hard)
    assert gap == pytest.approx(fmean(better) - fmean(hard))
    assert 0 < low < gap < high
    assert interval(better)[0] < interval(hard)[1]  # the two alone would not tell
    assert difference(hard, hard) == (0, 0, 0)
    with pytest.raises(ValueError, match="the same rows, found 2 and 1"):
        difference([1.0, 0.0], [1.0])


def test_seeds_are_drawn_again_too():
    draw = np.random.default_rng(1)
    rows = draw.normal(size=400)
    seeds = [rows + shift for shift in (-3.0, 0.0, 3.0)]
    gap, low, high = over_seeds(seeds, [rows])
    assert gap == pytest.approx(0) and low == pytest.approx(-3.0) and high == pytest.approx(3.0)
    one, low, high = over_seeds([rows + 1], [rows])  # the same rows for both: nothing of their spread is left
    assert one == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)
    noise = draw.normal(size=400)
    wanted = difference((rows + noise).tolist(), rows.tolist())
    assert over_seeds([rows + noise], [rows]) == pytest.approx(wanted, abs=0.01)
    many = [np.full(50, x) for x in draw.normal(size=30)]
    _, low, high = over_seeds(many, [np.zeros(50)])
    spread = np.std([m[0] for m in many], ddof=1) / np.sqrt(30)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.05)
    with pytest.raises(ValueError, match=r"the same rows of every seed, found \[2, 3\]"):
        over_seeds([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="finite"):
        over_seeds([[1.0, math.nan]], [[1.0, 2.0]])


def test_groups_are_drawn_whole():
    draw = np.random.default_rng(2)
    pictures = (draw.random(300) < 0.4).astype(float)
    rows, groups = np.repeat(pictures, 4).tolist(), [f"picture {i // 4}" for i in range(1200)]
    assert interval(rows, groups) == interval(pictures.tolist())
    assert difference(rows, [0.0] * 1200, groups)[1:] == interval(pictures.tolist())
    wanted = over_seeds([pictures], [np.zeros(300)])
    assert over_seeds([rows], [[0.0] * 1200], groups) == pytest.approx(wanted, abs=1e-6)
    assert interval(rows, list(range(1200))) == interval(rows)
    assert interval([0.0, 1.0], ["one", "one"]) == (0.5, 0.5)
    uneven = interval([1.0] * 9 + [0.0], ["a"] * 9 + ["b"])  # a mean of rows, not of groups
    assert uneven == (0.0, 1.0)
    with pytest.raises(ValueError, match="a group of each of 1200 rows, found 3"):
        interval(rows, groups[:3])
