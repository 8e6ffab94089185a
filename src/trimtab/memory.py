"""Memory that is free inside the process but not for others."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], object] | None:
    """glibc's `malloc_trim`; None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Give room that was freed back to the system, where the C library can.

    glibc keeps up to twice the largest block that was ever freed, and every hole below a block that is in use.
    """
    if trim := _trim():
        trim(0)
