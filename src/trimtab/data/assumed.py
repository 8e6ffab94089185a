"""What stands for a source of data that is not there yet, where nothing but sizes is asked for (`trimtab cost`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.data.reading import DataError


class Assumed:
    """A source as a task asks it for settings: where its folder is not there, names stand for the right number.

    The number is the published one (`Published.sizes`), or the one that a recipe states (`data.count`). It is never
    used where a model is trained or evaluated.

    Attributes:
        notes: what was assumed, a sentence each.
    """

    def __init__(self, source: Any):
        self.source = source
        self.notes: list[str] = []

    def answers(self) -> Sequence[str]:
        return self._names("answers")

    def classes(self) -> Sequence[str]:
        return self._names("classes")

    def _names(self, what: str) -> Sequence[str]:
        """The names that the source has, or as many as it is known to have.

        Raises:
            DataError: if the source cannot be read though its folder is there, or nothing says how many there are.
        """
        try:
            return list(getattr(self.source, what)())
        except (DataError, FileNotFoundError) as error:
            place = getattr(self.source, "needs", None)
            if place is None or Path(place).exists() or getattr(self.source, "answer_list", None) is not None:
                raise
            count, why = self.source.known_count(what)
            if count is None:
                raise DataError(
                    f"{place}: there is no such file or folder, and a model's size depends on how many {what} its rows "
                    f"have: {why}"
                ) from error
        self.notes.append(f"{count:,} {what}, {why}, since '{place}' is not there")
        return [f"{what} {i}" for i in range(count)]
