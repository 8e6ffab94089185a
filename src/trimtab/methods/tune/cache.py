"""The activation cache: what a frozen model computes is written once, then side networks train without it.

    samples --> frozen model --taps--> hidden maps, masks, vectors --> shards on disk   (once, for each view)
    numbers --> shards (memory-mapped) --> side networks --> loss                       (every training step)

A frozen model gives the same activations for the same input in every epoch, and side networks read only these, so that
from the second epoch on no block runs. Random choices in the preparation of inputs are fixed in a view; several views
are cached and taken in turn. Shards are written whole or not at all, so that an interrupted fill goes on where it
stopped. A folder belongs to what its `key.json` says; anything else is refused.

Nothing here knows a backbone or a task: a cache is given a function that makes one shard's tensors, with `record` for
what the listeners see while the model runs, and `replay` computes side networks on what was cached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.files import replace_file
from trimtab.methods.tune.listener import Listener, Seen
from trimtab.progress import progress

Precision = Literal["fp32", "fp16", "int8"]
SHARD_ROWS = 512


class ActivationCache:
    """Cached activations of rows in several views.

    Args:
        folder: where shards are, or will be.
        key: everything that the contents depend on, as plain JSON.
        rows: how many there are.
        views: how many times each is kept.
        compute: view, first and last row (beyond the last) -> one shard's tensors, whose first axis is the row; those
            with `.map` in their name are packed.
        precision: of hidden maps; `int8` has a scale a channel and shard. Vectors and masks stay as they are.

    Raises:
        ValueError: if the folder holds another cache, with the difference.
    """

    def __init__(self, folder: Path, key: dict[str, Any], rows: int, views: int,
                 compute: Callable[[int, int, int], dict[str, Tensor]], precision: Precision = "fp16"):  # fmt: skip
        self.folder, self.key, self.rows, self.views = Path(folder), key, rows, views
        self.compute, self.precision = compute, precision
        file = self.folder / "key.json"
        if file.is_file():
            self._check_key(json.loads(file.read_text()), file)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as partial:
                partial.write_text(json.dumps(self.key, indent=1) + "\n")
        self.shards: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return self.rows

    def _check_key(self, found: dict[str, Any], file: Path) -> None:
        for name, value in self.key.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{file}: a cache of another {name}: {str(found.get(name))[:80]}, needed is {str(value)[:80]}; "
                    "delete the folder, or name another"
                )

    def _shard(self, view: int, start: int) -> Path:
        return self.folder / f"view-{view}-row-{start:08d}.safetensors"

    @torch.no_grad()
    def fill(self) -> int:
        """Write the shards that are not there, and open all; returns how many were written."""
        written = 0
        starts = [(v, s) for v in range(self.views) for s in range(0, self.rows, SHARD_ROWS)]
        missing = [(v, s) for v, s in starts if not self._shard(v, s).is_file()]
        with progress("cache", len(starts), "shard", len(starts) - len(missing)) as job:
            for view, start in missing:
                packed: dict[str, Tensor] = {}
                for name, value in self.compute(view, start, min(start + SHARD_ROWS, self.rows)).items():
                    packed |= pack(name, value, self.precision) if ".map" in name else {name: value.contiguous()}
                with replace_file(self._shard(view, start)) as partial:
                    save_file(packed, partial)
                written += 1
                job.add()
        self.shards = [load_file(self._shard(v, s)) for v, s in starts]  # mapped: read when they are looked at
        return written

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Cached samples by number, view after view: 0 .. views * rows - 1. The first axis is the sample."""
        per_view = -(-self.rows // SHARD_ROWS)
        found: dict[int, list[int]] = {}
        for order, index in enumerate(indices):
            view, row = divmod(int(index), self.rows)
            found.setdefault(view * per_view + row // SHARD_ROWS, []).append(order)
        pieces: list[dict[str, Tensor]] = []
        for shard, orders in found.items():
            rows = torch.tensor([int(indices[o]) % self.rows % SHARD_ROWS for o in orders])
            first = self.shards[shard % per_view]  # of the same rows: what is the same in all views stands there alone
            pieces.append(unpack({**first, **self.shards[shard]}, rows))
        back = torch.tensor([o for orders in found.values() for o in orders]).argsort()
        return {k: torch.cat([p[k] for p in pieces])[back] for k in pieces[0]}

    @property
    def bytes_a_sample(self) -> float:
        """Bytes on disk, by samples of all views."""
        files = self.folder.glob("view-*.safetensors")
        return sum(f.stat().st_size for f in files) / (self.rows * self.views)


def pack(name: str, maps: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Hidden maps (B, L, D) or (B, C, H, W) as they are stored; `int8` with a scale for each channel of the shard."""
    if precision != "int8":
        stored = maps.to(torch.float16 if precision == "fp16" else torch.float32).contiguous()
        if not bool(stored.isfinite().all()):
            largest = float(maps.abs().max())
            raise ValueError(f"cache: {name} has values up to {largest:g}, too large for {precision}: use int8 or fp32")
        return {name: stored}
    channel = 2 if maps.ndim == 3 else 1
    others = [i for i in range(maps.ndim) if i != channel]
    scale = maps.float().abs().amax(dim=others, keepdim=True).clamp(min=1e-12) / 127
    return {name: (maps / scale).round().to(torch.int8).contiguous(), f"{name}.scale": scale}


def unpack(shard: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The rows of a shard; maps in int8 become float32."""
    out = {k: v[rows] for k, v in shard.items() if not k.endswith(".scale")}
    return {k: v * shard[f"{k}.scale"] if v.dtype == torch.int8 else v for k, v in out.items()}


# --- what listeners see -----------------------------------------------------------------------------------------------


class _Recorder(nn.Module):
    """Stands in for a side network: notes what its tower shows, and hands on what the tower does."""

    def __init__(self, name: str, listener: Listener, into: dict[str, Tensor]):
        super().__init__()
        self.name, self.into = name, into
        self.side = listener.side  # not called; its precision is that in which masks and values come
        self.vector = stands_for_vector(listener)

    def forward(self, seen: Seen) -> Tensor:
        self.into |= {f"{self.name}.map{i}": m.cpu() for i, m in enumerate(seen.maps)}
        parts = {"mask": seen.mask, "position": seen.position, "value": seen.value if self.vector else None}
        self.into |= {f"{self.name}.{k}": v.cpu() for k, v in parts.items() if v is not None}
        return seen.value


@contextmanager
def record(listeners: dict[str, Listener]) -> Iterator[dict[str, Tensor]]:
    """While this is open, the listeners fill the dictionary with what they see, and the model computes as if frozen."""
    out: dict[str, Tensor] = {}
    sides = {name: listener.side for name, listener in listeners.items()}
    try:
        for name, listener in listeners.items():
            listener.side = _Recorder(name, listener, out)
        yield out
    finally:
        for name, listener in listeners.items():
            listener.side = sides[name]


def replay(name: str, listener: Listener, held: dict[str, Tensor]) -> Tensor:
    """What a side network makes of what was cached of its tower."""
    count = sum(k.startswith(f"{name}.map") for k in held)
    maps = [held[f"{name}.map{i}"] for i in range(count)]
    value = held.get(f"{name}.value", maps[-1])
    return listener.side(Seen(maps, held.get(f"{name}.mask"), value, held.get(f"{name}.position")))


def stands_for_vector(listener: Listener) -> bool:
    """Whether a side network takes the place of its tower's one vector."""
    return listener.place is not None and listener.place == listener.tower.pooled
