"""The rows of a table as a cache collates them: always the same way, and padded to the longest of all.

A view is one collation of the table: captions of several, wordings and augmentation are drawn once in it. Entries of a
batch that are longer in one batch than in another (texts) are padded as the task itself pads them, which is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.data import draws
from trimtab.data.augment import Augmentation
from trimtab.data.images import blanked, encoded
from trimtab.data.shards import stamp
from trimtab.data.streams import WINDOW, Streamed
from trimtab.tasks.base import TaskModel

RUN_ROWS = 64
EXAMPLE, SOME = 5, (4, 1, 2)


@dataclass(frozen=True)
class Ragged:
    """An entry of a batch that is padded to the longest of the batch: the axis, with what, and the longest of all."""

    axis: int
    pad: float
    longest: int


class Collation:
    """A table's rows as batches.

    Args:
        model: with the task that collates.
        table: rows of the task's schema.
        views: how many collations there are.
        seed: of what is drawn.
        augmentation: how pictures are changed, anew in every view; None for not at all.

    Raises:
        ValueError: if a sample depends on the others of its batch, or entries are padded in a way that is not known.
    """

    def __init__(self, model: TaskModel, table: Any, views: int, seed: int, augmentation: Augmentation | None):
        self.model, self.table, self.views, self.seed = model, encoded(table), views, seed
        self.augmentation = augmentation
        if not len(self.table):
            raise ValueError("cache: the table has no rows")

    def rows(self, start: int, stop: int, view: int = 0) -> list[dict[str, Any]]:
        return [self.row(i, view) for i in range(start, stop)]

    def collated(self, rows: list[dict[str, Any]], augmented: bool = True) -> dict[str, Tensor]:
        """A batch as the task makes it, of rows with their places."""
        if self.augmentation and augmented:
            rows = self.augmentation(rows)
        return self.model.task.collate(self.model.backbone, rows, True)

    def row(self, number: int, view: int = 0) -> dict[str, Any]:
        """A row, for which the same is drawn as in training's epoch of the view's number."""
        number %= len(self.table)
        return draws.placed(self.table[number], draws.Place(self.seed, view, number))

    def group(self, view: int, start: int, stop: int) -> dict[str, Tensor]:
        """A group of rows in a view, padded to its own longest; `lengths` is that of each row's text."""
        batch = self.collated(self.rows(start, stop, view))
        return batch | ({"lengths": self._lengths(batch)} if self.text_keys else {})

    def _lengths(self, batch: dict[str, Tensor]) -> Tensor:
        """Of each row's text: up to the last place where an entry is no padding."""
        found = torch.ones(len(next(iter(batch.values()))), dtype=torch.long)
        for key in self.text_keys:
            there = batch[key] != self.ragged[key].pad
            there = there.flatten(2).any(dim=2) if there.ndim > 2 else there
            places = torch.arange(1, there.shape[1] + 1)
            found = torch.maximum(found, (there * places).amax(dim=1))
        return found

    def padded(self, key: str, value: Tensor) -> Tensor:
        """An entry as long as the longest of the table."""
        if (known := self.ragged.get(key)) is None:
            return value
        return longer(value, known.axis, known.longest, known.pad)

    # --- what is ragged -------------------------------------------------------------------------------------------

    @property
    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        return self._looked_at[0]

    @property
    def inputs_print(self) -> str:
        """A hash of what the task makes of all rows but their pictures: words as they are cut and padded, targets."""
        return self._looked_at[1]

    @cached_property
    def _looked_at(self) -> tuple[list[dict[str, tuple[int, ...]]], str]:
        """Shapes of all batches of all views, and of single rows; a hash of all but pictures in these batches."""
        found, count, digest = [], len(self.table), hashlib.sha256()
        for view in range(self.views):
            for start in range(0, count, RUN_ROWS):
                rows = [blanked(row) for row in self.rows(start, min(start + RUN_ROWS, count), view)]
                batch = self.collated(rows, augmented=False)
                found.append({k: tuple(v.shape[1:]) for k, v in batch.items()})
                digest.update(tensors_print(sorted((k, v) for k, v in batch.items() if v.ndim < 4)).encode())
        least = self.model.task.least
        for i in {(i * count) // 8 for i in range(8)}:
            rows = [blanked(self.row(i + j)) for j in range(least)]
            found.append({k: tuple(v.shape[1:]) for k, v in self.collated(rows, augmented=False).items()})
        return found, digest.hexdigest()[:16]

    @cached_property
    def ragged(self) -> dict[str, Ragged]:
        """Entries whose length differs from batch to batch."""
        found = {}
        for key in self._shapes[0]:
            sizes = {s[key] for s in self._shapes}
            if len(sizes) == 1:
                continue
            axes = [i for i in range(len(next(iter(sizes)))) if len({s[i] for s in sizes}) > 1]
            if len(axes) > 1:
                raise ValueError(
                    f"cache: '{key}' of a batch of task {self.model.task.name!r} differs from batch to batch in "
                    "several axes: train it without `training.cache`"
                )
            found[key] = Ragged(axes[0] + 1, self._pad(key, axes[0] + 1), max(s[axes[0]] for s in sizes))
        return found

    def _pad(self, key: str, axis: int) -> float:
        """With what the task pads an entry: what follows a short row when a long one stands behind it."""
        count, least = len(self.table), self.model.task.least
        for i in range(min(count, 512)):
            rows = [blanked(self.row(i + j)) for j in range(least + 1)]
            few = self.collated(rows[:least], augmented=False)[key]
            more = self.collated(rows, augmented=False)[key][:least]
            size = few.shape[axis]
            if more.shape[axis] == size:
                continue
            rest = more.narrow(axis, size, more.shape[axis] - size)
            if not torch.equal(more.narrow(axis, 0, size), few) or len(rest.unique()) > 1:
                break
            return rest.flatten()[0].item()
        raise ValueError(
            f"cache: '{key}' of a batch of task {self.model.task.name!r} is padded in a way that cannot be seen "
            "(expected one value behind the shorter rows): train it without `training.cache`"
        )

    @cached_property
    def text_keys(self) -> list[str]:
        """Entries that are as long as the text: all those that are ragged, if they are always of one length."""
        keys = list(self.ragged)
        lengths = {tuple(s[k][self.ragged[k].axis - 1] for k in keys) for s in self._shapes}
        return keys if all(len(set(x)) == 1 for x in lengths) and all(self.ragged[k].axis == 1 for k in keys) else []

    # --- examples -------------------------------------------------------------------------------------------------

    def example(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """A batch of a few rows; the same with longer texts, if there are longer ones; the same with less padding, if
        all batches have to be padded to one length."""
        count, step = len(self.table), max(1, len(self.table) // EXAMPLE)
        chosen = [[(offset + i * step) % count for i in range(EXAMPLE)] for offset in range(4)]
        self._check_alone([self.row(i) for i in chosen[0]])
        if self.text_keys and len(short := self._short_rows()) > 2:
            chosen.append([short[i % len(short)] for i in range(EXAMPLE)])
        for places in chosen:
            batch = self.collated([self.row(i) for i in places])
            grown = {}
            for key in self.text_keys:
                length, known = batch[key].shape[1], self.ragged[key]
                more = min(3, known.longest - length)
                if more > 0:
                    grown[key] = longer(batch[key], 1, length + more, known.pad)
            if grown:
                return batch, {**batch, **grown}, None
        first = self.collated(self.rows(0, min(RUN_ROWS, count)))
        batch = {k: v[[i % len(v) for i in range(EXAMPLE)]] for k, v in first.items()}
        return {k: self.padded(k, v) for k, v in batch.items()}, None, batch if self.ragged else None

    def _short_rows(self) -> list[int]:
        """Some rows whose texts are not the longest."""
        key = self.text_keys[0]
        found: list[int] = []
        for i in range(min(len(self.table), 256)):
            row = blanked(self.row(i))
            size = self.collated([row] * self.model.task.least, augmented=False)[key].shape[1]
            if size < self.ragged[key].longest:
                found.append(i)
            if len(found) == EXAMPLE:
                break
        return found

    def _check_alone(self, rows: list[dict[str, Any]]) -> None:
        """ValueError if what is collated of a sample depends on the samples beside it."""
        name, least = self.model.task.name, max(2, self.model.task.least)
        rows = [blanked(r) for r in rows]
        mine, others = rows[:least], [blanked(self.row(i * 7 + 3)) for i in range(3)]
        try:
            alone = self.collated(mine[:1] if self.model.task.least == 1 else mine, augmented=False)
            a, b = (self.collated([*mine, *rest], augmented=False) for rest in (rows[least:], others))
        except ValueError as error:
            raise ValueError(f"cache: rows of task {name!r} cannot be collated in batches of any size ({error}): train "
                             "it without `training.cache`") from error  # fmt: skip
        for key in a:
            for one, two in ((a[key], b[key]), (alone[key], a[key])):
                shape = [min(x) for x in zip(one[:least].shape, two[:least].shape, strict=True)]
                one, two = (x[tuple(slice(n) for n in shape)] for x in (one, two))
                if not torch.equal(one, two):
                    raise ValueError(
                        f"cache: '{key}' of a sample of task {name!r} is made from other rows of its batch: train it "
                        "without `training.cache`"
                    )

    def redrawn(self, batch: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The example with other draws in place of its own: what is drawn is taken from the next row. None if there is
        one view."""
        if self.views == 1:
            return None
        same = self.same_in_all_views(batch)
        return {k: v if k in same else v.roll(1, dims=0) for k, v in batch.items()}

    def same_in_all_views(self, batch: dict[str, Tensor]) -> set[str]:
        """Entries that are not drawn, as far as some rows show it; `fill` looks at all of them."""
        if self.augmentation:
            return set()
        count = len(self.table)
        some = [i * max(1, count // 4) for i in range(4)]
        tries = [self.collated([self.row(i, view) for i in some]) for view in range(8)]
        return {k for k in batch if batch[k].dtype.is_floating_point
                and all(t[k].shape == tries[0][k].shape and torch.equal(t[k], tries[0][k]) for t in tries)}  # fmt: skip


def longer(value: Tensor, axis: int, length: int, with_: float) -> Tensor:
    """A tensor padded at the end of an axis."""
    more = length - value.shape[axis]
    if more < 0:
        raise ValueError(f"cache: a batch of {value.shape[axis]} tokens, the longest was {length}")
    return pad(value, (0, 0) * (value.ndim - axis - 1) + (0, more), value=with_) if more else value


def table_print(table: Any) -> str:
    """A hash of a table's columns and all its rows; of a picture or video in a file or a shard its path, size and time.
    Of a stream its files with their sizes and times, or where it does not come from files the rows of its first
    window."""
    streamed = isinstance(table, Streamed)
    if streamed and table.told:
        return hashlib.sha256(f"{len(table)} {table.told}".encode()).hexdigest()[:16]
    digest = hashlib.sha256(f"{len(table)} {sorted(table.column_names)}".encode())
    for i in range(min(len(table), WINDOW) if streamed else len(table)):
        row = table[i]
        for name in sorted(row):
            for value in row[name] if name == "images" else [row[name]]:
                raw = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
                digest.update(raw if isinstance(raw, bytes) else stamp(raw).encode())
    return digest.hexdigest()[:16]


def tensors_print(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """A hash of tensors under their names."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()[:16]
