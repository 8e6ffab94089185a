"""A safetensors file in place: nothing of it is read before it is looked at, and what is soon read can be asked for.

A system that misses a page of a mapped file reads its surroundings too, up to megabytes for a row of some kilobytes,
and safetensors' own `load_file` may read all. That is right for weights, and wrong for rows that lie scattered in files
larger than memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trimtab.storage.types import NAMES

_DTYPES = {name: dtype for dtype, name in NAMES.items() if name != "F4"}  # of which torch's elements hold two
PIECE = 128 * 1024  # bytes; of a larger piece Linux reads no more than its read-ahead, and drops the rest


class Mapped:
    """A file's tensors.

    Attributes:
        tensors: by name; writing to them changes this process's memory, not the file.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not a whole safetensors file.
    """

    def __init__(self, file: Path):
        self.file = file.resolve()
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            try:
                header = json.loads(opened.read(size))
                header.pop("__metadata__", None)
                entries = {name: (_DTYPES[told["dtype"]], told["shape"], *told["data_offsets"])
                           for name, told in header.items()}  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
                raise ValueError(f"no header of a safetensors file ({error!r})") from error
            start, found = 8 + size, opened.seek(0, 2)
            end = start + max((last for *_, last in entries.values()), default=0)
            if found != end:
                raise ValueError(f"expected {end} bytes by its header, found {found}")
        # An `mmap` of Python's would keep the file open, of which a process may have a thousand.
        self._whole = torch.from_file(str(file), shared=False, size=end, dtype=torch.uint8)
        self.tensors = {}
        for name, (dtype, shape, first, last) in entries.items():
            wanted = prod(shape) * dtype.itemsize
            if last - first != wanted or (start + first) % dtype.itemsize:
                raise ValueError(f"expected {wanted} bytes of {name!r} at a multiple of {dtype.itemsize}, found "
                                 f"{last - first} at {start + first}")  # fmt: skip
            self.tensors[name] = self._whole[start + first : start + last].view(dtype).reshape(shape)

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path]]:
        """To another process, which maps the file itself."""
        return Mapped, (self.file,)

    def ask_for(self, values: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Let the system read these rows, all at once and nothing else; what is in memory stays there.

        Args:
            values: of `tensors`, or parts that have all rows.
            rows: places on the first axis.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self.file.open("rb") as opened:  # advice, without which it works too
            for value in (v for v in values if v.numel()):
                first = value[0]
                start, stride = value.data_ptr() - self._whole.data_ptr(), value.stride(0) * value.itemsize
                size = value.itemsize * (1 + sum((n - 1) * s for n, s in zip(first.shape, first.stride(), strict=True)))
                for row in rows:
                    for at in range(0, size, PIECE):
                        begin, length = start + row * stride + at, min(PIECE, size - at)
                        os.posix_fadvise(opened.fileno(), begin, length, os.POSIX_FADV_WILLNEED)
