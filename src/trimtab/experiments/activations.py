"""The activation cache: what a frozen backbone computes is written once, then side networks train without it.

    rows --collate--> frozen backbone --taps--> hidden maps, masks, vectors --> shards on disk   (once, for each view)
    indices --------> shards (memory-mapped) --> side networks --> head --> loss                 (every training step)

A frozen backbone gives the same activations for the same input in every epoch. UniPT reads only these, so that from the
second epoch on no block runs. Random choices (a caption of several, a crop of the picture) are fixed in a view; `views`
of them are cached and taken in turn. Shards are written whole or not at all, so that an interrupted fill goes on where
it stopped. A folder belongs to one backbone, anatomy, choice of layers, table and preparation of inputs (`key.json`);
anything else is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.backbones.base import Encoded
from trimtab.data.augment import Augmentation
from trimtab.data.images import encoded
from trimtab.files import replace_file
from trimtab.methods.tune.beside import Listener, Seen
from trimtab.methods.tune.unipt import UniPT
from trimtab.storage.learned import fingerprint
from trimtab.tasks.base import TaskModel

Precision = Literal["fp32", "fp16", "int8"]
SHARD_ROWS, RUN_ROWS = 512, 64


def cache_key(model: TaskModel, method: UniPT, table: Any, precision: Precision = "fp16", views: int = 1,
              seed: int = 0, augmentation: Augmentation | None = None) -> dict[str, Any]:  # fmt: skip
    """To what a cache belongs: everything that its contents depend on, as plain JSON."""
    listeners = method.listeners
    return {
        "precision": precision, "views": views, "seed": seed, "rows": len(table),
        "backbone": _backbone_print(model, method), "layers": {n: list(x.maps) for n, x in listeners.items()},
        "places": {n: str(x.place) for n, x in listeners.items()}, "task": model.task.name,
        "table": table_print(encoded(table)),
        "augmentation": str(augmentation) if augmentation else None,
        "inputs": f"{model.backbone.pictures} {type(model.backbone.tokenizer).__name__} {model.backbone.max_text}",
    }  # fmt: skip


class ActivationCache:
    """Cached activations of a table under a task's collation.

    Args:
        model: with UniPT attached to every tower that the task reads.
        method: the attached UniPT.
        table: rows of the task's schema.
        folder: where shards are, or will be.
        precision: of hidden maps; `int8` has a scale a channel and shard. Vectors and masks stay as they are.
        views: how many collations of the table are kept.
        seed: of what the collation and the augmentation draw.
        augmentation: how pictures are changed, anew in every view; None for not at all.

    Raises:
        ValueError: if the folder holds another cache (with the difference), or the model needs more of its backbone
            than the cache holds.
    """

    def __init__(self, model: TaskModel, method: UniPT, table: Any, folder: Path, precision: Precision = "fp16",
                 views: int = 1, seed: int = 0, augmentation: Augmentation | None = None):  # fmt: skip
        _check_fits(model, method)
        self.model, self.method, self.table, self.folder = model, method, encoded(table), Path(folder)
        self.precision, self.views, self.seed, self.augmentation = precision, views, seed, augmentation
        self.key = cache_key(model, method, self.table, precision, views, seed, augmentation)
        file = self.folder / "key.json"
        if file.is_file():
            self._check_key(json.loads(file.read_text()), file)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as partial:
                partial.write_text(json.dumps(self.key, indent=1) + "\n")
        self.shards: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.table)

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
        written, longest = 0, None
        starts = [(v, s) for v in range(self.views) for s in range(0, len(self.table), SHARD_ROWS)]
        was = self.model.training
        self.model.eval()
        for view, start in starts:
            file = self._shard(view, start)
            if file.is_file():
                continue
            longest = self._longest() if longest is None else longest
            rows = [self.table[i] for i in range(start, min(start + SHARD_ROWS, len(self.table)))]
            tensors = self._compute(rows, view * len(self.table) + start, longest)
            with replace_file(file) as partial:
                save_file(tensors, partial)
            written += 1
        self.model.train(was)
        self.shards = [load_file(self._shard(v, s)) for v, s in starts]  # mapped: read when they are looked at
        return written

    def _collated(self, rows: list[dict[str, Any]], salt: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + salt)
            return self.model.task.collate(self.model.backbone, rows, True)

    def _longest(self) -> int:
        """Tokens of the longest text: all are padded to it, so that every sample has one layout."""
        from PIL import Image

        blank, longest = Image.new("RGB", (8, 8)), 1
        for start in range(0, len(self.table), SHARD_ROWS):
            rows = [self.table[i] for i in range(start, min(start + SHARD_ROWS, len(self.table)))]
            for salt in range(self.views):
                batch = self._collated([{**row, "image": blank} for row in rows], salt * len(self.table) + start)
                longest = max(longest, batch["input_ids"].shape[1])
        return longest

    def _compute(self, rows: list[dict[str, Any]], salt: int, longest: int) -> dict[str, Tensor]:
        """One shard's tensors: the backbone runs on its rows, a few at a time."""
        if self.augmentation:  # with a generator of its own, so that captions are those that `_longest` saw
            rows = self.augmentation(rows, torch.Generator().manual_seed(self.seed * 1_000_003 + salt))
        batch = self._collated(rows, salt)
        pad = self.model.backbone.tokenizer.pad_token_id or 0
        more = (0, longest - batch["input_ids"].shape[1])
        batch["input_ids"] = nn.functional.pad(batch["input_ids"], more, value=pad)
        batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], more)
        device = next(self.model.parameters()).device
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(rows), RUN_ROWS):
            part = {k: v[start : start + RUN_ROWS].to(device) for k, v in batch.items()}
            parts.append(self._run(part))
        out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        out |= {f"batch.{k}": v for k, v in batch.items() if k != "pixel_values"}
        packed: dict[str, Tensor] = {}
        for name, value in out.items():
            packed |= pack(name, value, self.precision) if ".map" in name else {name: value.contiguous()}
        return packed

    def _run(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the listeners of all towers see of a batch, and the features' mask."""
        out: dict[str, Tensor] = {}
        listeners = self.method.listeners
        kept = {name: listener.compute for name, listener in listeners.items()}

        def record(name: str, listener: Listener, seen: Seen) -> Tensor:
            out.update({f"{name}.map{i}": m.cpu() for i, m in enumerate(seen.maps)})
            parts = {"mask": seen.mask, "position": seen.position}
            if listener.place == listener.tower.pooled:
                parts["value"] = seen.value
            out.update({f"{name}.{k}": v.cpu() for k, v in parts.items() if v is not None})
            return seen.value

        try:
            for name, listener in listeners.items():
                listener.compute = functools.partial(record, name, listener)
            backbone = self.model.backbone
            words = (batch["input_ids"], batch["attention_mask"])
            if backbone.kind == "dual":
                backbone.image(batch["pixel_values"])
                backbone.text(*words)
            else:
                features = backbone.pair(batch["pixel_values"], *words)
                if features.mask is not None:
                    out["features.mask"] = features.mask.cpu()
                place = features.image_tokens
                span = (place.start, place.stop) if place else (0, 0)
                out["features.image_tokens"] = torch.tensor(span).expand(len(words[0]), 2)
        finally:
            for name, listener in listeners.items():
                listener.compute = kept[name]
        return out

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Cached samples by number, view after view: 0 .. views * rows - 1. The first axis is the sample."""
        per_view = -(-len(self.table) // SHARD_ROWS)
        found: dict[int, list[int]] = {}
        for order, index in enumerate(indices):
            view, row = divmod(int(index), len(self.table))
            found.setdefault(view * per_view + row // SHARD_ROWS, []).append(order)
        pieces: list[dict[str, Tensor]] = []
        for shard, orders in found.items():
            rows = torch.tensor([int(indices[o]) % len(self.table) % SHARD_ROWS for o in orders])
            pieces.append(unpack(self.shards[shard], rows))
        back = torch.tensor([o for orders in found.values() for o in orders]).argsort()
        return {k: torch.cat([p[k] for p in pieces])[back] for k in pieces[0]}

    @property
    def bytes_a_sample(self) -> float:
        """Bytes on disk, by samples of all views."""
        files = self.folder.glob("view-*.safetensors")
        return sum(f.stat().st_size for f in files) / (len(self.table) * self.views)


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


class Replay(nn.Module):
    """Stands in for a backbone in training from a cache: side networks on what `hold` was given."""

    def __init__(self, backbone: Any, method: UniPT):
        super().__init__()
        self.kind, self.width, self.name = backbone.kind, backbone.width, backbone.name
        self.token_width = backbone.token_width
        self.model = nn.Module()  # so that parameters have the names that they have in the whole model
        self.model.add_module("unipt", method.sides(backbone.model))
        self.places = {n: x.place == x.tower.pooled for n, x in method.listeners.items()}
        self.towers = {x.tower.modality: n for n, x in method.listeners.items()}
        self.compute = {n: x.compute for n, x in method.listeners.items()}
        self.held: dict[str, Tensor] = {}

    def _side(self, name: str) -> Tensor:
        held, count = self.held, sum(k.startswith(f"{name}.map") for k in self.held)
        maps = [held[f"{name}.map{i}"] for i in range(count)]
        value = held.get(f"{name}.value", maps[-1])
        return self.compute[name](Seen(maps, held.get(f"{name}.mask"), value, held.get(f"{name}.position")))

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self._side(self.towers["vision"]))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self._side(self.towers["text"]))

    def pair(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self._side(self.towers["fusion"])
        start, stop = self.held["features.image_tokens"][0].tolist()
        return Encoded(tokens[:, 0], tokens, self.held.get("features.mask"), slice(start, stop))


class CachedModel(nn.Module):
    """A task's model that trains from cached samples: `forward(**cache.batch(indices))` gives `{"loss": scalar}`.

    It shares head and side networks with the whole model and holds nothing of the frozen backbone.
    """

    def __init__(self, model: TaskModel, method: UniPT):
        super().__init__()
        self.backbone = Replay(model.backbone, method)
        self.task, self.head = model.task, model.head

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        own = {k.removeprefix("batch."): v for k, v in batch.items() if k.startswith("batch.")}
        self.backbone.held = {k: v for k, v in batch.items() if not k.startswith("batch.")}
        own["pixel_values"] = own["input_ids"]  # handed on by the task, looked at by nobody
        try:
            return {"loss": self.task.loss(self.backbone, self.head, own)}
        finally:
            self.backbone.held = {}


def _check_fits(model: TaskModel, method: UniPT) -> None:
    """ValueError unless the side networks' results are all that the task reads of the backbone."""
    kind = model.backbone.kind
    for name, listener in method.listeners.items():
        vector = listener.place is not None and listener.place == listener.tower.pooled
        if listener.place is None or listener.memory is not None or vector != (kind == "dual"):
            form = "vector" if kind == "dual" else "token"
            raise ValueError(
                f"cache: the side network of tower {name!r} does not give what a {kind} backbone hands on: use UniPT's "
                f"{form} form"
            )
    needed = {"vision", "text"} if kind == "dual" else {"fusion"}
    have = {x.tower.modality for x in method.listeners.values()}
    if have != needed:
        raise ValueError(f"cache: side networks on {sorted(have)}, the task reads {sorted(needed)}: tune them all")
    if model.task.name == "matching":
        raise ValueError("cache: the task 'matching' reads the backbone's pooler, which is not cached")
    sides = method.sides(model.backbone.model)
    beside = {id(p) for p in sides.parameters()}
    wrong = [n for n, p in model.backbone.named_parameters() if p.requires_grad and id(p) not in beside]
    if wrong:
        raise ValueError(f"cache: '{wrong[0]}' of the backbone is trained, so that its outputs change: freeze it")


def _backbone_print(model: TaskModel, method: UniPT) -> str:
    """A fingerprint of the frozen part alone, which training does not change."""
    beside = method.sides(model.backbone.model)
    delattr(model.backbone.model, "unipt")
    try:
        return fingerprint(model.backbone.model)
    finally:
        model.backbone.model.add_module("unipt", beside)


def table_print(table: Any) -> str:
    """A hash of a table's columns, length and rows: all columns of up to 256 rows, evenly spread."""
    digest = hashlib.sha256(f"{len(table)} {sorted(table.column_names)}".encode())
    for i in range(0, len(table), max(1, len(table) // 256)):
        row = table[i]
        for name in sorted(row):
            value = row[name]
            raw = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            digest.update(raw if isinstance(raw, bytes) else str(raw).encode())
    return digest.hexdigest()[:16]
