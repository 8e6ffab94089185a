"""Errors for input that a metric cannot score: each names the id or the row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Some names for an error message, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + rest


def complete(predictions: Mapping[Any, Any], wanted: Collection[Any], what: str, extra: bool = False) -> None:
    """Every wanted id has a prediction, and no other id has one.

    Args:
        predictions: id -> anything.
        wanted: the ids that are scored.
        what: is predicted for, in the singular, for the error ("question").
        extra: predictions for other ids are let pass.

    Raises:
        ValueError: for nothing to score, a missing prediction, or a prediction for an unknown id; says so where the
            same id is there as a number in place of a string, or the other way round.
    """
    if not wanted:
        raise ValueError(f"there is no {what} to score: expected at least one")
    missing = [name for name in wanted if name not in predictions]
    if missing:
        first = missing[0]
        twins = {str(name): name for name in predictions}
        twin = twins.get(str(first))
        if twin is not None:
            raise ValueError(
                f"{what} {first!r}: its prediction is under {twin!r}: ids must be of one kind on both sides, expected "
                f"{type(first).__name__}, found {type(twin).__name__}"
            )
        raise ValueError(f"{what} without a prediction: {listed(missing)} ({len(missing)} of {len(wanted)})")
    if not extra and len(predictions) > len(wanted):
        known = set(wanted)
        unknown = [name for name in predictions if name not in known]
        raise ValueError(f"prediction for an unknown {what}: {listed(unknown)}")


def paired(first: Sequence[Any] | Tensor, second: Sequence[Any] | Tensor, names: tuple[str, str]) -> None:
    """Two lists are equally long and not empty.

    Raises:
        ValueError: if not, with both lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"expected as many {names[0]} as {names[1]}, found {len(first)} and {len(second)}")
    if not len(first):
        raise ValueError(f"there are no {names[0]} to score: expected at least one")


def matrix(scores: Any, what: str) -> Tensor:
    """A matrix of finite numbers; one of Python lists keeps double precision.

    Raises:
        ValueError: for another shape, or the row of the first number that is not finite.
    """
    scores = scores if isinstance(scores, Tensor) else torch.as_tensor(scores, dtype=torch.float64)
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"{what}: expected a matrix that is not empty, found shape {tuple(scores.shape)}")
    finite(scores, what)
    return scores


def finite(rows: Tensor, what: str) -> None:
    """Raises:
    ValueError: with the first row that holds an infinite number or none at all (NaN).
    """
    # The sum is finite for all ordinary rows, and costs no second matrix.
    bad = (~rows.flatten(1).double().sum(dim=1).isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{what}: row {int(bad[0])} holds a number that is not finite")
