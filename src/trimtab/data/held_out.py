"""Published sets that have no split for validation, or none at all: some training rows are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.data.base import Published, Split
from trimtab.data.identity import apart
from trimtab.data.reading import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class HeldOut(Published):
    """A set whose official splits are `train` and perhaps `test`."""

    validation: int = 500
    """Rows taken from the end of the training rows: searches draw their rewards from them; 0 trains on all, and leaves
    searches none. No other row of their pictures is trained on. A set without a test split is tested on them too."""

    def official(self, split: Split) -> tuple[str, ...]:
        return ("test",) if split == "test" and "test" in self.splits else ("train",)

    def load(self, task: str, split: Split) -> Dataset:
        """As `Published.load`.

        Raises:
            DataError: if `validation` leaves no training row, or none to test a set on that has no test split.
        """
        table = super().load(task, split)
        if self.official(split) != ("train",):
            return table
        if not 0 <= self.validation < len(table) or (split == "test" and not self.validation):
            raise DataError(
                f"{self}: expected 'validation' to be from {int(split == 'test')} to {len(table) - 1} of the "
                f"{len(table)} training rows, found {self.validation}; set data.validation"
            )
        rest, held = apart(table, set(range(len(table) - self.validation, len(table))))
        if not rest:
            raise DataError(f"{self}: all training rows show pictures that the {self.validation} held out show too: "
                            "set data.validation to fewer")  # fmt: skip
        return table.select(rest if split == "train" else held)
