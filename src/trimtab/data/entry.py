"""One object of a file, which knows where it stands, and the errors that say so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimtab.registry import unknown


class DataError(ValueError):
    """A file or row that cannot be read; the message begins with the file, and the row where there is one."""


class NotThere(DataError):
    """A file that a reader looks for and that is in none of the places."""


class RowError(DataError):
    """A fault of one row, which `on_error: skip` leaves out."""


class Entry:
    """One object of a file. A fault of it shows when a field is asked for, so that the rows after it can be read.

    Args:
        values: what the file holds at this place.
        file: path of the file.
        row: its place in the file, as a person finds it: `line 3`, `images[2]`.
        fault: what is wrong with it as a whole.
    """

    __slots__ = ("_fault", "_values", "file", "row")

    def __init__(self, values: Any, file: Path, row: str, fault: str = ""):
        self.file, self.row = file, row
        self._values, self._fault = values, fault
        if not fault and not isinstance(values, dict):
            self._fault = f"expected an object with named fields, found {short(values)}"

    @property
    def values(self) -> dict[str, Any]:
        """All fields.

        Raises:
            RowError: if this is no object.
        """
        if self._fault:
            raise self.error(self._fault)
        found: dict[str, Any] = self._values
        return found

    def error(self, message: str) -> RowError:
        """An error of this row."""
        return RowError(f"{self.file}, {self.row}: {message}")

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value of a field.

        Raises:
            RowError: if the field is missing or is not of the kind.
        """
        if name not in self.values:
            raise self.error(f"expected the field {name!r}, found {', '.join(map(repr, self.values)) or 'none'}")
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        number = isinstance(value, bool) and bool not in kinds and object not in kinds  # Python takes true for 1
        if not isinstance(value, kind) or number:
            names = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
            raise self.error(f"expected {name!r} to be {names}, found {short(value)}")
        return value

    def text(self, name: str, empty: bool = False) -> str:
        """A string, as it is written; one of blanks only is an error unless `empty`."""
        value: str = self.get(name, str)
        if not empty and not value.strip():
            raise self.error(f"expected {name!r} to hold words, found {value!r}")
        return value

    def id(self, name: str) -> str:
        """A string or a whole number, as a string: ids of data sets may begin with zeros."""
        return str(self.get(name, (str, int)))

    def number(self, name: str) -> int:
        """A whole number."""
        value: int = self.get(name, int)
        return value

    def one_of(self, name: str, valid: Iterable[str]) -> str:
        """A string that must be one of `valid`; the error names the nearest."""
        value = self.text(name)
        if value not in (valid := list(valid)):
            raise self.error(f"{name!r}: {unknown('value', value, valid)}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of at least one string."""
        values = self.get(name, list)
        if not values or not all(isinstance(v, str) for v in values):
            raise self.error(f"expected {name!r} to be a list of strings, found {short(values)}")
        return list(values)

    def inner(self, name: str) -> list[Entry]:
        """A list of objects, each of which knows its place in this one."""
        return [Entry(v, self.file, f"{self.row}, {name}[{i}]") for i, v in enumerate(self.get(name, list))]

    def part(self, name: str) -> Entry:
        """An object inside this one."""
        return Entry(self.get(name, dict), self.file, f"{self.row}, {name}")


_KINDS = {
    str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object", bool: "true or false",
}  # fmt: skip


def short(value: Any) -> str:
    """A value for a message, cut to 80 characters."""
    try:
        text = repr(value)
    except RecursionError:  # a damaged or hostile file
        text = f"a {type(value).__name__} in which values are nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."
