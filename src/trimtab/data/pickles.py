"""Data that was published as Python pickles, read without running what they ask for.

A pickle is a small program: it may name any function of any module and call it. The published pickles of refer, MSVD
and CIFAR hold lists, dictionaries, numbers, strings and (CIFAR) arrays, for which no function or three of numpy's are
enough. Every other name stops the reading before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.data.entry import DataError

# What reading a damaged pickle raises, whichever instruction the damage hits.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


@cache
def _arrays() -> dict[tuple[str, str], Any]:
    """(module, name) as a pickle of arrays writes them -> what they stand for; numpy 2 renamed `core` to `_core`."""
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core  # type: ignore[attr-defined]
    rebuild = core.multiarray._reconstruct
    return {
        ("numpy.core.multiarray", "_reconstruct"): rebuild, ("numpy._core.multiarray", "_reconstruct"): rebuild,
        ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
    }  # fmt: skip


class PickleRefused(DataError):
    """A pickle that asks for a function that no data need; the message names the file and the function."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows a few names and refuses all others."""

    def __init__(self, file: Any, path: Path, allowed: dict[tuple[str, str], Any], encoding: str):
        super().__init__(file, encoding=encoding)
        self.path, self.allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        known = ", ".join(f"{m}.{n}" for m, n in self.allowed) or "no function at all"
        raise PickleRefused(
            f"{self.path}: refused, it asks for '{module}.{name}', which could run code; expected a pickle of data "
            f"that asks for {known}. Fetch the file again from its authors"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise PickleRefused(
            f"{self.path}: refused, it asks for an object outside the file ({pid!r}); expected only data"
        )


def read(
    path: str | Path, arrays: bool = False, encoding: str = "utf-8", types: Collection[type] = (list, dict)
) -> Any:
    """What a pickle of data holds.

    Args:
        arrays: allow numpy arrays (three functions of numpy); without, the pickle may ask for no function.
        encoding: of Python 2's strings; `latin1` keeps the bytes of arrays and is needed for them.
        types: what the outermost object may be.

    Raises:
        FileNotFoundError: if there is no such file.
        PickleRefused: if it asks for any other function; nothing of it was called.
        DataError: if it is cut, damaged, or holds something else, with the file's name.
    """
    path = Path(path)
    try:
        found = _Reader(io.BytesIO(path.read_bytes()), path, _arrays() if arrays else {}, encoding).load()
    except PickleRefused:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{path}: expected a pickle of data, found a file that is cut, damaged or no pickle "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(found, tuple(types)):
        wanted = " or a ".join(t.__name__ for t in types)
        raise DataError(f"{path}: expected a pickle of a {wanted}, found a {type(found).__name__}")
    return found
