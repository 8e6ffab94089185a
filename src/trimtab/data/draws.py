"""What is drawn for a row of training: from (seed, epoch, row) and what it is drawn for, from nothing else.

    (seed, epoch) --order--> the rows of an epoch, each with its place --generator--> caption, crop, wrong caption, ...

Each draw has a generator made for it. So neither worker processes, nor batches that are fetched ahead, nor a resume,
nor another draw (of augmentation, say) can change it, and torch's global generator, from which dropout draws, is left
alone. A row without a place, of a loop that calls a task's `collate` by itself, draws from the global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PLACE = "__place__"  # the key under which a row carries its place
VERSION = 1  # of how draws are made; what is stored of draws names it


class Place(NamedTuple):
    """Where a row stands in training: the seed, how often the table was seen before, and its number in the table."""

    seed: int
    epoch: int
    row: int


def placed(row: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The row with its place, from which everything is drawn for it."""
    return {**row, PLACE: place}


def generator(row: Mapping[str, Any], what: str) -> torch.Generator:
    """A generator for one draw of a row: `what` names it, so that two draws of a row do not depend on each other."""
    place = row.get(PLACE)
    if place is None:
        return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    return _made(*place, what)


def _made(*parts: int | str) -> torch.Generator:
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def choose(row: Mapping[str, Any], what: str, options: Sequence[T]) -> T:
    """One of the options, each as likely.

    Raises:
        ValueError: if there is none.
    """
    if not len(options):
        raise ValueError(f"nothing to draw a {what} from: {described(row)} has none")
    return options[int(torch.randint(len(options), (), generator=generator(row, what)))]


def coin(row: Mapping[str, Any], what: str) -> bool:
    """True in one of two cases."""
    return bool(torch.rand((), generator=generator(row, what)) < 0.5)


def uniform(row: Mapping[str, Any], what: str, count: int) -> Tensor:
    """So many numbers from 0 to 1, (count,)."""
    return torch.rand(count, generator=generator(row, what))


def shuffled(row: Mapping[str, Any], what: str, count: int) -> Iterator[int]:
    """The numbers below `count` in a drawn order, and in another one again, without end."""
    drawn = generator(row, what)
    while count:
        yield from torch.randperm(count, generator=drawn).tolist()


def order(rows: int, seed: int, epoch: int, buffer: int | None = None) -> list[int]:
    """The numbers of all rows in the order of an epoch.

    Args:
        rows: how many there are.
        seed: of the training.
        epoch: how often all rows were seen before.
        buffer: rows that are mixed at a time: 16 drawn blocks of neighbours. Slow disks read those much faster than
            rows from everywhere. None mixes all.
    """
    drawn = _made(seed, epoch, "order")
    if buffer is None or buffer >= rows:
        return torch.randperm(rows, generator=drawn).tolist()
    blocks = torch.arange(rows).split(max(1, buffer // 16))
    turn = torch.randperm(len(blocks), generator=drawn).tolist()
    mixed = [torch.cat([blocks[i] for i in turn[start : start + 16]]) for start in range(0, len(turn), 16)]
    return torch.cat([some[torch.randperm(len(some), generator=drawn)] for some in mixed]).tolist()


def windowed(parts: Sequence[int], window: int, seed: int, epoch: int) -> list[int]:
    """The numbers of all rows of streams in the order of an epoch: the streams in a drawn order, in each one window
    after another, and each window mixed.

    Args:
        parts: rows of each stream.
        window: rows that are mixed at a time.
        seed: of the training.
        epoch: how often all rows were seen before.
    """
    drawn = _made(seed, epoch, "order")
    firsts = [0, *accumulate(parts)]
    found = []
    for part in torch.randperm(len(parts), generator=drawn).tolist():
        for start in range(0, parts[part], window):
            count = min(window, parts[part] - start)
            found.append(torch.randperm(count, generator=drawn) + firsts[part] + start)
    return torch.cat(found).tolist()


def described(row: Mapping[str, Any]) -> str:
    """A row as a message names it."""
    place = row.get(PLACE)
    return "a row of the batch" if place is None else f"row {place.row} of the training table"
