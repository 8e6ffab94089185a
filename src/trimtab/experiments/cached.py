"""Training from the activation cache, by a recipe: which rows are cached under a task, and a model that trains on them.

    rows --collate--> frozen backbone --> cache (`methods/tune/cache.py`) --> side networks --> head --> loss

A tower of a dual backbone without a side network hands on what was cached of its result, so that heads alone
(`linear-probe`) train from a cache too. Captions of several and crops of pictures are drawn once for each view; what a
dual backbone makes of pictures that are not cropped is the same in all views and stored in the first alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.description import Modality
from trimtab.backbones.base import Encoded
from trimtab.data import draws
from trimtab.data.augment import Augmentation
from trimtab.data.images import blanked, encoded
from trimtab.methods.tune import cache
from trimtab.methods.tune.beside import Beside, slot
from trimtab.methods.tune.cache import ActivationCache, Precision, record, replay, stands_for_vector
from trimtab.methods.tune.listener import Listener
from trimtab.storage.learned import fingerprint
from trimtab.tasks.base import TaskModel

RUN_ROWS = 64


def cache_key(
    model: TaskModel,
    method: Beside | None,
    table: Any,
    precision: Precision = "fp16",
    views: int = 1,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    bf16: bool = False,
) -> dict[str, Any]:
    """To what a cache belongs: everything that its contents depend on, as plain JSON."""
    listeners = method.listeners if method else {}
    return {
        "precision": precision, "views": views, "seed": seed, "draws": draws.VERSION, "rows": len(table),
        "backbone": _backbone_print(model, method), "layers": {n: list(x.maps) for n, x in listeners.items()},
        "places": {n: str(x.place) for n, x in listeners.items()}, "task": model.task.name,
        "table": table_print(encoded(table)),
        "augmentation": str(augmentation) if augmentation else None, "forward": "bf16" if bf16 else None,
        "inputs": f"{model.backbone.pictures} {type(model.backbone.tokenizer).__name__} {model.backbone.max_text}",
    }  # fmt: skip


class TableCache(ActivationCache):
    """Cached activations of a table under a task's collation.

    Args:
        model: with side networks attached to every tower that the task reads.
        method: the attached method with side networks; None for a frozen backbone whose head alone is trained.
        table: rows of the task's schema.
        folder: where shards are, or will be.
        precision: of hidden maps; see `ActivationCache`.
        views: how many collations of the table are kept.
        seed: of what the collation and the augmentation draw.
        augmentation: how pictures are changed, anew in every view; None for not at all.
        bf16: the backbone runs in mixed precision, as it does in training with `precision: bf16`.

    Raises:
        ValueError: if the folder holds another cache (with the difference), or the model needs more of its backbone
            than the cache holds.
    """

    def __init__(
        self,
        model: TaskModel,
        method: Beside | None,
        table: Any,
        folder: Path,
        precision: Precision = "fp16",
        views: int = 1,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        bf16: bool = False,
    ):
        _check_fits(model, method)
        self.model, self.method, self.table = model, method, encoded(table)
        self.seed, self.augmentation, self.bf16, self.longest = seed, augmentation, bf16, 0
        key = cache_key(model, method, self.table, precision, views, seed, augmentation, bf16)
        super().__init__(folder, key, len(self.table), views, self._computed, precision)

    def _collated(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.model.task.collate(self.model.backbone, rows, True)

    def _rows(self, view: int, start: int, stop: int) -> list[dict[str, Any]]:
        """Rows of a view, for which the same is drawn as in training's epoch of that number."""
        return [draws.placed(self.table[i], draws.Place(self.seed, view, i)) for i in range(start, stop)]

    def _longest(self) -> int:
        """Tokens of the longest text: all are padded to it, so that every sample has one layout."""
        longest = 1
        for start in range(0, len(self), cache.SHARD_ROWS):
            for view in range(self.views):
                rows = self._rows(view, start, min(start + cache.SHARD_ROWS, len(self)))
                batch = self._collated([blanked(row) for row in rows])
                longest = max(longest, batch["input_ids"].shape[1])
        return longest

    def _computed(self, view: int, start: int, stop: int) -> dict[str, Tensor]:
        """One shard's tensors: the backbone runs on its rows, a few at a time."""
        self.longest = self.longest or self._longest()
        was = self.model.training
        self.model.eval()
        rows = self._rows(view, start, stop)
        batch = self._collated(self.augmentation(rows) if self.augmentation else rows)
        lengths = batch["attention_mask"].sum(dim=1)
        pad = self.model.backbone.tokenizer.pad_token_id or 0
        more = (0, self.longest - batch["input_ids"].shape[1])
        batch["input_ids"] = nn.functional.pad(batch["input_ids"], more, value=pad)
        batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], more)
        device = next(self.model.parameters()).device
        order = lengths.argsort(stable=True)  # texts of like length run together
        parts: list[dict[str, Tensor]] = []
        for some in order.split(RUN_ROWS):
            part = {k: v[some].to(device) for k, v in batch.items()}
            looks = view == 0 or bool(self.augmentation)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                parts.append(self._dual(part, looks) if self.model.backbone.kind == "dual" else self._joint(part))
        self.model.train(was)
        back = order.argsort()
        out = {k: torch.cat([p[k] for p in parts])[back] for k in parts[0]}
        return out | {f"batch.{k}": v for k, v in batch.items() if k != "pixel_values"}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """See `ActivationCache.batch`; texts of a dual backbone without the padding that all have."""
        out = super().batch(indices)
        if self.model.backbone.kind != "dual":
            return out
        stored = out["batch.attention_mask"].shape[1]
        length = int(out["batch.attention_mask"].sum(dim=1).max())
        own = ("batch.", "features.text.", *(f"{n}." for n, x in self._listeners.items() if x.tower.modality == "text"))
        cut = {k for k, v in out.items() if k.startswith(own) and _has_tokens(k, v) and v.shape[1] == stored}
        return {k: v[:, :length] if k in cut else v for k, v in out.items()}

    @property
    def _listeners(self) -> dict[str, Listener]:
        return self.method.listeners if self.method else {}

    def _dual(self, batch: dict[str, Tensor], looks: bool) -> dict[str, Tensor]:
        """What the listeners of both towers see of a batch, and the results of towers without one; with `looks` also
        of pictures. Texts run without the padding that all have, and get it again."""
        backbone = self.model.backbone
        ids, mask = batch["input_ids"], batch["attention_mask"]
        length = int(mask.sum(dim=1).max())
        listeners = self._listeners
        heard = {x.tower.modality for x in listeners.values()}
        padded: dict[str, Tensor] = {}
        with record(listeners) as out:
            read = backbone.text(ids[:, :length], mask[:, :length])
            texts = {**out, **({} if "text" in heard else _result("text", read))}
            for name, value in texts.items():
                more = ids.shape[1] - length
                places = (0, 0) * (value.ndim - 2) + (0, more)
                padded[name] = nn.functional.pad(value, places) if _has_tokens(name, value) else value
            out.clear()
            if looks:
                seen = backbone.image(batch["pixel_values"])
                padded |= {**out, **({} if "vision" in heard else _result("vision", seen))}
        return padded

    def _joint(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the listeners of all towers see of a batch, and the features' mask."""
        assert self.method is not None  # of joint backbones `_check_fits` asks for side networks
        words = (batch["input_ids"], batch["attention_mask"])
        with record(self.method.listeners) as out:
            features = self.model.backbone.pair(batch["pixel_values"], *words)
        if features.mask is not None:
            out["features.mask"] = features.mask.cpu()
        place = features.image_tokens
        span = (place.start, place.stop) if place else (0, 0)
        out["features.image_tokens"] = torch.tensor(span).expand(len(words[0]), 2)
        if features.grid is not None:
            out["features.grid"] = torch.tensor(features.grid).expand(len(words[0]), 2)
        return out


def _has_tokens(name: str, value: Tensor) -> bool:
    """Whether the second axis of what is cached under a name is tokens."""
    return value.ndim > 1 and (".map" in name or name.endswith(("mask", "input_ids")))


def _result(modality: Modality, encoded: Encoded) -> dict[str, Tensor]:
    """What a tower of a dual backbone hands on, by the names of the cache."""
    parts = {"pooled": encoded.pooled, "map": encoded.tokens, "mask": encoded.mask}
    return {f"features.{modality}.{k}": v.float().cpu() for k, v in parts.items() if v is not None}


class Replay(nn.Module):
    """Stands in for a backbone in training from a cache: side networks on what it holds, or what it holds itself."""

    def __init__(self, backbone: Any, method: Beside | None):
        super().__init__()
        self.kind, self.width, self.name = backbone.kind, backbone.width, backbone.name
        self.token_width = backbone.token_width
        self.model = nn.Module()  # so that parameters have the names that they have in the whole model
        if method is not None:
            self.model.add_module(slot(method.name), method.sides(backbone.model))
        self.listeners = method.listeners if method else {}
        self.towers = {x.tower.modality: n for n, x in self.listeners.items()}
        self.held: dict[str, Tensor] = {}

    def _side(self, modality: Modality) -> Tensor:
        name = self.towers[modality]
        return replay(name, self.listeners[name], self.held)

    def _handed(self, modality: Modality) -> Encoded:
        """What the backbone hands on of pictures or of texts."""
        mask = self.held.get(f"features.{modality}.mask")
        if modality not in self.towers:
            return Encoded(self.held[f"features.{modality}.pooled"], self.held.get(f"features.{modality}.map"), mask)
        value = self._side(modality)
        if stands_for_vector(self.listeners[self.towers[modality]]):
            return Encoded(value)
        # No vector is made of a side network's tokens here; `_check_fits` refuses a task that would read one.
        none = value.new_full((len(value), self.width), torch.nan)
        return Encoded(none, value, self.held.get(f"{self.towers[modality]}.mask"))

    def image(self, pixel_values: Tensor) -> Encoded:
        return self._handed("vision")

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self._handed("text")

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

    def __init__(self, model: TaskModel, method: Beside | None):
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


def _check_fits(model: TaskModel, method: Beside | None) -> None:
    """ValueError unless the side networks' results are all that the task reads of the backbone."""
    if method is not None and not method.cacheable:
        raise ValueError(f"cache: the side networks of {method.name!r} are not cached: use unipt")
    kind, task = model.backbone.kind, model.task
    if kind not in ("dual", "joint") or task.sees != "image" or task.name == "classification":
        raise ValueError(
            f"cache: holds what a dual or joint backbone computes of one picture and a text a row, task {task.name!r} "
            f"reads another thing of {model.backbone.name!r} ({kind}): train it without `training.cache`"
        )
    _check_sides(model, method.listeners if method else {})
    if not model.backbone.pictures.fixed:
        raise ValueError(
            f"cache: {model.backbone.name!r} keeps the shape of pictures, so that their numbers of tokens differ: use "
            "`backbone.pictures: squash`"
        )
    if task.name in ("matching", "reranking", "answer-ranking", "captioning", "entailment", "box-regression"):
        raise ValueError(f"cache: the task {task.name!r} reads more of the backbone than side networks hand on")
    sides = method.sides(model.backbone.model) if method else nn.Module()
    beside = {id(p) for p in sides.parameters()}
    wrong = [n for n, p in model.backbone.named_parameters() if p.requires_grad and id(p) not in beside]
    if wrong:
        raise ValueError(f"cache: '{wrong[0]}' of the backbone is trained, so that its outputs change: freeze it")


def _check_sides(model: TaskModel, listeners: dict[str, Listener]) -> None:
    """ValueError unless every side network gives what the task reads, and joint backbones have one."""
    kind = model.backbone.kind
    tokens = kind == "joint" or getattr(model.task, "pooling", "own") == "gpo"  # of a dual backbone's sides
    for name, listener in listeners.items():
        grid = tokens and listener.tower.layout == "grid"
        if listener.place is None or listener.memory or stands_for_vector(listener) == tokens or grid:
            form = "towers of tokens alone (`towers`)" if grid else f"UniPT's {'token' if tokens else 'vector'} form"
            raise ValueError(
                f"cache: the side network of tower {name!r} does not give what the task reads of a {kind} backbone: "
                f"use {form}"
            )
    have = {x.tower.modality for x in listeners.values()}
    if kind == "joint" and have != {"fusion"}:
        raise ValueError(f"cache: side networks on {sorted(have)}, the task reads ['fusion']: tune it")


def _backbone_print(model: TaskModel, method: Beside | None) -> str:
    """A fingerprint of the frozen part alone, which training does not change."""
    if method is None:
        return fingerprint(model.backbone.model)
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
