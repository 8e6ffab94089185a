"""Published sets that have no split for validation, or none at all: some training rows are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.data.base import Published, Split
from trimtab.data.reading import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class HeldOut(Published):
    """A set whose official splits are `train` and perhaps `test`."""

    validation: int = 500
    """Rows taken from the end of the training rows: searches draw their rewards from them. A set without a test split
    is tested on them too."""

    def official(self, split: Split) -> tuple[str, ...]:
        return ("test",) if split == "test" and "test" in self.splits else ("train",)

    def load(self, task: str, split: Split) -> Dataset:
        """As `Published.load`.

        Raises:
            DataError: if `validation` leaves no training row, or takes none where rows are asked for.
        """
        table = super().load(task, split)
        if self.official(split) != ("train",):
            return table
        if not 0 <= self.validation < len(table) or (split != "train" and not self.validation):
            raise DataError(
                f"{self}: expected 'validation' to be from {int(split != 'train')} to {len(table) - 1} of the "
                f"{len(table)} training rows, found {self.validation}; set data.validation"
            )
        cut = len(table) - self.validation
        return table.select(range(cut) if split == "train" else range(cut, len(table)))
