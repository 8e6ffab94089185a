"""Calibration that ends when it is settled: when two halves of the data say the same.

    batches 1, 3, 5 ...  ->  their sums  ->  masks of one half
                                                                  distance = what one keeps and the other does not,
    batches 2, 4, 6 ...  ->  their sums  ->  masks of the other              as a share of what is kept

Looked at after 2, 4, 8 ... batches, and where the data end. Nothing of a batch is kept: sums of all batches go on as
without this, and beside them those of the first half; the second half's are the difference. So the masks that are found
in the end are those of one calibration on the batches that were taken. The halves are half as many batches each, and
the distance of masks of two halves is larger than that of the masks of all batches from those of endless data.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trimtab import processes
from trimtab.anatomy import Weight

Batch = dict[str, Any]
H = TypeVar("H")
log = logging.getLogger(__name__)


@dataclass
class Settling(Generic[H]):
    """When a round of calibration ends.

    Attributes:
        pruner: its name, for messages.
        until: distance of the halves' masks at which it ends.
        distance: of the masks, from what the two halves are.
        batches: how many were taken, in all processes together.
        reached: the distance at the last look; None before the first.
    """

    pruner: str
    until: float
    distance: Callable[[H], float]
    batches: int = 0
    reached: float | None = None

    @property
    def settled(self) -> bool:
        return self.reached is not None and self.reached <= self.until

    def over(self, batches: Iterable[Batch | None], halves: Callable[[], H]) -> Iterator[Batch | None]:
        """The same batches up to the one after which the masks are settled, each taken in before the next is asked for.

        Args:
            batches: of this process; None: it has none of the last group.
            halves: what the two halves are so far.

        Raises:
            ValueError: if there is only one batch.
        """
        look = 2
        for batch in batches:
            yield batch
            self.batches += sum(processes.everywhere(batch is not None))
            if self.batches < look:
                continue
            self._look(halves)
            if self.settled:
                return
            look = 2 << (self.batches.bit_length() - 1)
        self._ended(look, halves)

    def _look(self, halves: Callable[[], H]) -> None:
        """Measure the distance. What watches the model's tensors at work must not see how masks are made of them."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self.reached = self.distance(halves())
        log.info("%s: after %d calibration batches masks of the two halves differ by %.3f %% of the kept weights",
                 self.pruner, self.batches, 100 * self.reached)  # fmt: skip

    def _ended(self, look: int, halves: Callable[[], H]) -> None:
        """The data are at their end, and the masks were not settled when they were looked at last."""
        if not self.batches:
            return  # the round says that there are none
        if self.batches < 2:
            raise ValueError(
                f"{self.pruner}: `until` compares masks of two halves of the data and needs at least 2 calibration "
                "batches, found 1: give more, smaller ones, or leave `until` out"
            )
        if self.batches != look // 2:
            self._look(halves)
        if not self.settled:
            warnings.warn(
                f"{self.pruner}: the calibration data ended after {self.batches} batches, and the masks are not "
                f"settled: those of the two halves differ by {self.reached:.2%} of the kept weights, until asks for "
                f"{self.until:.2%}. Give more batches, or a larger until",
                stacklevel=2,
            )


def told(rounds: Sequence[Settling[Any]]) -> dict[str, Any]:
    """What calibration says of itself: the batches of all its rounds, and the largest distance among them."""
    if not rounds:
        return {}
    info: dict[str, Any] = {
        "until": rounds[0].until,
        "batches": sum(r.batches for r in rounds),
        "distance": round(max(r.reached or 0.0 for r in rounds), 6),
        "settled": all(r.settled for r in rounds),
    }
    if len(rounds) > 1:
        info["rounds"] = [[r.batches, round(r.reached or 0.0, 6)] for r in rounds]
    return info


Pairs = Iterable[tuple[Weight, Tensor]]


def apart(one: Pairs, other: Pairs) -> float:
    """The share of the weights that one mask keeps which the other does not, over all tensors; of both ways the larger.

    Args:
        one, other: masks of the same weights in the same order; one of each is looked at at a time.
    """
    kept = lost = more = 0
    for (_, a), (_, b) in zip(one, other, strict=True):
        kept += int(a.sum())
        lost += int((a & ~b).sum())
        more += int((b & ~a).sum())
    return max(lost, more) / max(kept, 1)
