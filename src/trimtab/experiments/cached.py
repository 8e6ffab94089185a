"""Training from the activation cache, by a recipe: which rows are cached under a task, and a model that trains on them.

    rows --collate--> frozen backbone --> cache (`methods/tune/cache.py`) --> side networks --> head --> loss

Captions of several and crops of pictures are drawn once for each view.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.description import Modality
from trimtab.backbones.base import Encoded
from trimtab.data.augment import Augmentation
from trimtab.data.images import blanked, encoded
from trimtab.methods.tune import cache
from trimtab.methods.tune.beside import Beside, slot
from trimtab.methods.tune.cache import ActivationCache, Precision, record, replay, stands_for_vector
from trimtab.storage.learned import fingerprint
from trimtab.tasks.base import TaskModel

RUN_ROWS = 64


def cache_key(model: TaskModel, method: Beside, table: Any, precision: Precision = "fp16", views: int = 1,
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


class TableCache(ActivationCache):
    """Cached activations of a table under a task's collation.

    Args:
        model: with side networks attached to every tower that the task reads.
        method: the attached method.
        table: rows of the task's schema.
        folder: where shards are, or will be.
        precision: of hidden maps; see `ActivationCache`.
        views: how many collations of the table are kept.
        seed: of what the collation and the augmentation draw.
        augmentation: how pictures are changed, anew in every view; None for not at all.

    Raises:
        ValueError: if the folder holds another cache (with the difference), or the model needs more of its backbone
            than the cache holds.
    """

    def __init__(self, model: TaskModel, method: Beside, table: Any, folder: Path, precision: Precision = "fp16",
                 views: int = 1, seed: int = 0, augmentation: Augmentation | None = None):  # fmt: skip
        _check_fits(model, method)
        self.model, self.method, self.table = model, method, encoded(table)
        self.seed, self.augmentation, self.longest = seed, augmentation, 0
        key = cache_key(model, method, self.table, precision, views, seed, augmentation)
        super().__init__(folder, key, len(self.table), views, self._computed, precision)

    def _collated(self, rows: list[dict[str, Any]], salt: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + salt)
            return self.model.task.collate(self.model.backbone, rows, True)

    def _rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        return [self.table[i] for i in range(start, stop)]

    def _longest(self) -> int:
        """Tokens of the longest text: all are padded to it, so that every sample has one layout."""
        longest = 1
        for start in range(0, len(self), cache.SHARD_ROWS):
            rows = self._rows(start, min(start + cache.SHARD_ROWS, len(self)))
            for view in range(self.views):
                batch = self._collated([blanked(row) for row in rows], view * len(self) + start)
                longest = max(longest, batch["input_ids"].shape[1])
        return longest

    def _computed(self, view: int, start: int, stop: int) -> dict[str, Tensor]:
        """One shard's tensors: the backbone runs on its rows, a few at a time."""
        self.longest = self.longest or self._longest()
        was = self.model.training
        self.model.eval()
        rows, salt = self._rows(start, stop), view * len(self) + start
        if self.augmentation:  # with a generator of its own, so that captions are those that `_longest` saw
            rows = self.augmentation(rows, torch.Generator().manual_seed(self.seed * 1_000_003 + salt))
        batch = self._collated(rows, salt)
        pad = self.model.backbone.tokenizer.pad_token_id or 0
        more = (0, self.longest - batch["input_ids"].shape[1])
        batch["input_ids"] = nn.functional.pad(batch["input_ids"], more, value=pad)
        batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], more)
        device = next(self.model.parameters()).device
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(rows), RUN_ROWS):
            part = {k: v[first : first + RUN_ROWS].to(device) for k, v in batch.items()}
            parts.append(self._run(part))
        self.model.train(was)
        out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return out | {f"batch.{k}": v for k, v in batch.items() if k != "pixel_values"}

    def _run(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the listeners of all towers see of a batch, and the features' mask."""
        backbone = self.model.backbone
        words = (batch["input_ids"], batch["attention_mask"])
        with record(self.method.listeners) as out:
            if backbone.kind == "dual":
                backbone.image(batch["pixel_values"])
                backbone.text(*words)
                return out
            features = backbone.pair(batch["pixel_values"], *words)
        if features.mask is not None:
            out["features.mask"] = features.mask.cpu()
        place = features.image_tokens
        span = (place.start, place.stop) if place else (0, 0)
        out["features.image_tokens"] = torch.tensor(span).expand(len(words[0]), 2)
        if features.grid is not None:
            out["features.grid"] = torch.tensor(features.grid).expand(len(words[0]), 2)
        return out


class Replay(nn.Module):
    """Stands in for a backbone in training from a cache: side networks on what `hold` was given."""

    def __init__(self, backbone: Any, method: Beside):
        super().__init__()
        self.kind, self.width, self.name = backbone.kind, backbone.width, backbone.name
        self.token_width = backbone.token_width
        self.model = nn.Module()  # so that parameters have the names that they have in the whole model
        self.model.add_module(slot(method.name), method.sides(backbone.model))
        self.listeners = method.listeners
        self.towers = {x.tower.modality: n for n, x in method.listeners.items()}
        self.held: dict[str, Tensor] = {}

    def _side(self, modality: Modality) -> Tensor:
        name = self.towers[modality]
        return replay(name, self.listeners[name], self.held)

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self._side("vision"))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self._side("text"))

    def pair(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self._side("fusion")
        start, stop = self.held["features.image_tokens"][0].tolist()
        shape = self.held.get("features.grid")
        grid = None if shape is None else (int(shape[0, 0]), int(shape[0, 1]))
        return Encoded(tokens[:, 0], tokens, self.held.get("features.mask"), slice(start, stop), grid)


class CachedModel(nn.Module):
    """A task's model that trains from cached samples: `forward(**cache.batch(indices))` gives `{"loss": scalar}`.

    It shares head and side networks with the whole model and holds nothing of the frozen backbone.
    """

    def __init__(self, model: TaskModel, method: Beside):
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


def _check_fits(model: TaskModel, method: Beside) -> None:
    """ValueError unless the side networks' results are all that the task reads of the backbone."""
    if not method.cacheable:
        raise ValueError(f"cache: the side networks of {method.name!r} are not cached: use unipt")
    kind, task = model.backbone.kind, model.task
    if kind not in ("dual", "joint") or task.sees != "image" or task.name == "classification":
        raise ValueError(
            f"cache: holds what a dual or joint backbone computes of one picture and a text a row, task {task.name!r} "
            f"reads another thing of {model.backbone.name!r} ({kind}): train it without `training.cache`"
        )
    for name, listener in method.listeners.items():
        if listener.place is None or listener.memory or stands_for_vector(listener) != (kind == "dual"):
            form = "vector" if kind == "dual" else "token"
            raise ValueError(
                f"cache: the side network of tower {name!r} does not give what a {kind} backbone hands on: use UniPT's "
                f"{form} form"
            )
    needed = {"vision", "text"} if kind == "dual" else {"fusion"}
    have = {x.tower.modality for x in method.listeners.values()}
    if have != needed:
        raise ValueError(f"cache: side networks on {sorted(have)}, the task reads {sorted(needed)}: tune them all")
    if not model.backbone.pictures.fixed:
        raise ValueError(
            f"cache: {model.backbone.name!r} keeps the shape of pictures, so that their numbers of tokens differ: use "
            "`backbone.pictures: squash`"
        )
    if task.name in ("matching", "reranking", "answer-ranking", "captioning", "entailment", "box-regression"):
        raise ValueError(f"cache: the task {task.name!r} reads more of the backbone than side networks hand on")
    sides = method.sides(model.backbone.model)
    beside = {id(p) for p in sides.parameters()}
    wrong = [n for n, p in model.backbone.named_parameters() if p.requires_grad and id(p) not in beside]
    if wrong:
        raise ValueError(f"cache: '{wrong[0]}' of the backbone is trained, so that its outputs change: freeze it")


def _backbone_print(model: TaskModel, method: Beside) -> str:
    """A fingerprint of the frozen part alone, which training does not change."""
    beside = method.sides(model.backbone.model)
    delattr(model.backbone.model, slot(method.name))
    try:
        return fingerprint(model.backbone.model)
    finally:
        model.backbone.model.add_module(slot(method.name), beside)


def table_print(table: Any) -> str:
    """A hash of a table's columns, length and rows: all columns of up to 256 rows, evenly spread."""
    digest = hashlib.sha256(f"{len(table)} {sorted(table.column_names)}".encode())
    for i in range(0, len(table), max(1, len(table) // 256)):
        row = table[i]
        for name in sorted(row):
            for value in row[name] if name == "images" else [row[name]]:
                raw = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
                digest.update(raw if isinstance(raw, bytes) else str(raw).encode())
    return digest.hexdigest()[:16]
