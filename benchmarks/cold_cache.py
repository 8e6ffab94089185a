"""What a batch from the activation cache takes where the cache is larger than memory: bytes read, and seconds.

    python benchmarks/cold_cache.py [--rows 6000] [--batch 128] [--batches 20] [--out FILE]

Columns as UniPT beside MiniLM keeps them of a photograph with its caption (248 kB in fp16), in one view. The system
forgets the shards before every batch, as it does when others need the memory. `asked` reads as trimtab does, which asks
for a batch's rows first; `mapped` leaves it to the system what to read. They take turns; medians. How much a system
reads around a missing page is a setting of the disk (`/sys/block/<disk>/queue/read_ahead_kb`); results of each setting
are kept in the file. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from trimtab.methods.tune.cache import ActivationCache, Column
from trimtab.storage.mapped import Mapped

COLUMNS = {f"map{i}": Column((41, 384), torch.float16, packed=True) for i in range(7)}
COLUMNS |= {"grid": Column((1280, 3, 3), torch.float16, packed=True)}


class AsMapped(Mapped):
    """Reads what the system reads of mapped files."""

    def ask_for(self, *args: object) -> None:
        pass


class Unasked(ActivationCache):
    def _opened(self, file: Path) -> Mapped:
        return AsMapped(file)


def made(kind: type[ActivationCache], folder: Path, rows: int) -> ActivationCache:
    def compute(view: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {name: torch.full((stop - start, *c.shape), 0.5, dtype=c.dtype) for name, c in COLUMNS.items()}

    cache = kind(folder, {"of": "a benchmark"}, rows, 1, COLUMNS, compute)
    cache.fill()
    return cache


def forget(caches: Iterable[ActivationCache], folder: Path) -> None:
    """What was looked at in a mapped file is not forgotten, so they are opened anew."""
    for cache in caches:
        cache.shards = []
    for cache in caches:
        cache.fill()
    for file in folder.glob("view-*"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """That this process has had read from disks."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"])


def read_ahead(folder: Path) -> int:
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    disk = next(p for p in (block, *block.parents) if (p / "queue").is_dir())  # a partition's is its disk's
    return int((disk / "queue/read_ahead_kb").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("rows", 6000), ("batch", 128), ("batches", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        caches = {"asked": made(ActivationCache, folder, options.rows), "mapped": made(Unasked, folder, options.rows)}
        found: dict[str, list[tuple[float, int]]] = {how: [] for how in caches}
        for _ in range(options.batches):
            rows = draw.sample(range(options.rows), options.batch)
            for how, cache in caches.items():
                forget(caches.values(), folder)
                was, start = read_bytes(), time.perf_counter()
                size = sum(v.nbytes for v in cache.batch(rows).values())
                found[how].append((time.perf_counter() - start, read_bytes() - was))
        told = {how: {"seconds": round(statistics.median(s for s, _ in those), 3),
                      "megabytes": round(statistics.median(b for _, b in those) / 1e6, 1)}
                for how, those in found.items()}  # fmt: skip
        out = {f"read_ahead_kb {read_ahead(folder)}": {"batch_megabytes": round(size / 1e6, 1), **told}}
    print(json.dumps(out))
    if options.out:
        was = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**was, **out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
