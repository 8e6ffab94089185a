"""Where the batches of a `BatchSession` come from: batches that are ready, or rows that are made into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch


class Ready:
    """Batches that are made already."""

    def __init__(self, split: str, source: Iterable[Any]):
        from torch.utils.data import Dataset

        if isinstance(source, Dataset) or hasattr(source, "column_names"):
            raise ValueError(
                f"{split}: a {type(source).__name__} gives single rows: pass `collate`, a function from a list of rows "
                "to a dict of the model's keyword arguments, or give batches (a DataLoader, a list of dicts)"
            )
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise ValueError(
                f"{split}: expected an iterable of batches, each a dict of the model's keyword arguments, found a "
                f"{type(source).__name__}" + (": put the one batch into a list" if isinstance(source, Mapping) else "")
            )
        self.split, self.source = split, source
        self.peeked: list[Any] = []  # of an iterator, which gives a batch but once

    def endless(self, size: int | None) -> Iterator[Any]:
        while True:
            count = 0
            for batch in self._once():
                count += 1
                yield batch
            if isinstance(self.source, Iterator):
                raise ValueError(
                    f"the {self.split} batches are used up: they came from an iterator ({type(self.source).__name__}), "
                    "which cannot start again; give a list, a DataLoader, or an iterator without an end"
                )
            if not count:
                raise ValueError(f"the {self.split} batches are empty: expected at least one")

    def _once(self) -> Iterator[Any]:
        while self.peeked:
            yield self.peeked.pop()
        yield from self.source

    def first(self) -> Any:
        """The first batch, which an iterator gives again."""
        batch = next(self.endless(None))
        if isinstance(self.source, Iterator):
            self.peeked.append(batch)
        return batch


class Rows:
    """A dataset, from which batches are made: its rows in an order drawn anew in every epoch, the same for a seed."""

    def __init__(self, split: str, rows: Any, collate: Callable[[list[Any]], Any], size: int, seed: int):
        if not len(rows):
            raise ValueError(f"the {split} dataset is empty: expected at least one row")
        self.split, self.rows, self.collate, self.size, self.seed = split, rows, collate, size, seed

    def endless(self, size: int | None) -> Iterator[Any]:
        size, count = size or self.size, len(self.rows)
        if count < size and self.split == "validation":
            raise ValueError(
                f"the validation dataset has {count} rows, but a batch of it takes {size}: give at least {size} rows, "
                "or lower `batch_size` (or the method's `rows`)"
            )
        size = min(size, count)
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(count, generator=generator).tolist()
            for start in range(0, count - size + 1, size):
                yield self.collate([self.rows[i] for i in order[start : start + size]])

    def first(self) -> Any:
        return next(self.endless(None))
