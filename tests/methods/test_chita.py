"""CHITA beside a plain computation of one round, written from the paper and the published code's division in pieces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import conformance
from tests.comparisons.prune import LOSS, Toy
from trimtab.methods import METHODS
from trimtab.methods.prune.chita import _blocks
from trimtab.methods.prune.prunable import prunable

GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES, RIDGE, BLOCK = 3, 0.01, 100


def published(sizes: list[int], block: int) -> list[tuple[int, int]]:
    """First and last weight of every piece: equal steps through a tensor, the last boundary moved to its end."""
    found, start = [], 0
    for n in sizes:
        ends = [start, start + n]
        if n >= block:
            ends = list(range(start, start + n + 1, n // (n // block)))
            ends[-1] = start + n
        found += list(itertools.pairwise(ends))
        start += n
    return found


def top(b: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(b), bool)
    mask[np.argsort(-np.abs(b), kind="stable")[:count]] = True
    return mask


def step(a: np.ndarray, w: np.ndarray, slope: np.ndarray, ridge: float, b: np.ndarray, count: int) -> np.ndarray | None:
    """A step of hard thresholding from b on 1/2 |A w - A b|^2 + ridge |b - w|^2 + slope . b; None: none lowers it."""

    def f(x: np.ndarray) -> float:
        rest = a @ w - a @ x
        return rest @ rest / 2 + ridge * (x - w) @ (x - w) + slope @ x

    support = top(b, count)
    gradient = a.T @ (a @ b - a @ w) + slope + 2 * ridge * (b - w)
    along = a @ (gradient * support)
    size = (gradient * support) @ gradient / (along @ along + 2 * ridge * (gradient * support) @ gradient)

    def leads(t: float) -> bool:
        moved = np.abs(b - t * gradient)
        return support.all() or moved[support].max() >= moved[~support].max() - 1e-10

    if leads(size):
        return (b - size * gradient) * support
    size /= 2
    for _ in range(100):
        if leads(size):
            break
        size /= 2
    best, lowest = None, f(b * support)
    for _ in range(10):
        moved = b - size * gradient
        moved = moved * top(moved, count)
        if f(moved) >= lowest:
            break
        best, lowest, size = moved, f(moved), 2 * size
    return best


def plain(a: np.ndarray, w: np.ndarray, slope: np.ndarray, ridge: float, count: int, pieces) -> np.ndarray:
    """The weights after one round."""
    everywhere = step(a, w, slope, ridge, w, count)
    out = np.zeros_like(w)
    for first, last in pieces:
        part = slice(first, last)
        own, kept = a[:, part], int((everywhere[part] != 0).sum())
        b = step(own, w[part], slope[part], ridge, everywhere[part], kept) if kept else None
        if b is None:  # the published code sets the piece to zero
            continue
        s = np.flatnonzero(top(b, kept)) + first
        right = a[:, s].T @ (own @ w[part]) + 2 * ridge * w[s] - slope[s]
        out[s] = np.linalg.solve(2 * ridge * np.eye(len(s)) + a[:, s].T @ a[:, s], right)
    return out


@pytest.mark.parametrize(
    ("sizes", "block"), [([252, 144, 360], 100), ([299, 99, 100, 1], 100), ([240, 5], 10_000), ([37, 11, 7], 3)]
)
def test_a_tensor_is_cut_into_the_published_pieces(sizes, block):
    assert [(p.start, p.stop) for p in _blocks(sizes, block)] == published(sizes, block)


def test_pieces_are_a_little_larger_than_the_block_size():
    assert [p.stop - p.start for p in _blocks([252, 144, 360], 100)] == [126, 126, 144, 120, 120, 120]


def test_a_round_in_pieces_is_that_of_the_plain_computation():
    toy = Toy(conformance.Case("b1_model", json.loads((GOLDEN / "b1_model.json").read_text()), GOLDEN))
    method = METHODS["chita"](ridge=RIDGE, block_size=BLOCK, faithful=True)
    calibration = toy.calibration(toy.batches(LOSS), BATCHES)
    weights = prunable(toy.model, calibration.anatomy)
    f = method.quadratic(calibration, weights, next(calibration.rounds()), torch.ones(1))
    a, w, slope = (t.double().numpy() for t in (f.rows, f.weights, f.slope))
    sizes = [t.numel() for t in weights.values()]
    count = int((1 - 0.63) * sum(sizes))
    (masks,) = method.find(calibration, [0.63])
    found = np.concatenate([masks.weights[x.path].flatten().double().numpy() for x in weights])
    wanted = plain(a, w, slope, BATCHES * RIDGE / 2, count, published(sizes, BLOCK))
    assert ((found != 0) == (wanted != 0)).all() and np.abs(found - wanted).max() < 1e-5
    exact = [(i, min(i + BLOCK, end)) for end, n in zip(np.cumsum(sizes), sizes, strict=True)
             for i in range(end - n, end, BLOCK)]  # fmt: skip
    other = plain(a, w, slope, BATCHES * RIDGE / 2, count, exact)
    assert ((found != 0) != (other != 0)).sum() > 20  # pieces of exactly the block size are another computation
