"""Training from the activation cache, by a recipe: what of a task's step is frozen is cached, the rest is trained.

    rows --collate--> the whole step, once a view --> cache (`methods/tune/cache.py`)
    cache --> the same step, without what was cached (`methods/tune/frozen.py`) --> loss

What is cached is found by watching the step (`methods/tune/watching.py`), for any backbone, task and method: all of a
tower beside which side networks stand or behind which a head is trained, the blocks before the first that is trained,
one tower of two. A method, task or backbone of which no block stays the same is refused with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trimtab.data import draws
from trimtab.data.augment import Augmentation
from trimtab.experiments import collation
from trimtab.experiments.collation import SOME, Collation, longer, table_print, tensors_print
from trimtab.files import cache_dir
from trimtab.methods.saved import configuration
from trimtab.methods.tune import cache
from trimtab.methods.tune.cache import ActivationCache, Column, Precision
from trimtab.methods.tune.frozen import Playing, Recording
from trimtab.methods.tune.leaves import Plan
from trimtab.methods.tune.listener import Listener
from trimtab.methods.tune.watching import Example, Watcher
from trimtab.tasks.base import TaskModel

LENGTHS = "batch.lengths"


def listeners_of(methods: Sequence[Any]) -> dict[str, Listener]:
    """The listeners of all side networks, by tower: methods that read the same of it share a cache. Where several
    listen to one tower, by method and tower."""
    found = [(m.name, tower, x) for m in methods for tower, x in getattr(m, "listeners", {}).items()]
    alone = len({tower for _, tower, _ in found}) == len(found)
    return {tower if alone else f"{name}.{tower}": x for name, tower, x in found}


class TableCache(ActivationCache):
    """Cached activations of a table under a task's collation.

    Args:
        model: with its methods attached, and nothing trained yet.
        methods: those that are attached.
        table: rows of the task's schema.
        folder: where shards are, or will be; None: in the cache folder, by its key.
        precision: of maps; see `ActivationCache`.
        views: how many collations of the table are kept.
        seed: of what the collation and the augmentation draw.
        augmentation: how pictures are changed, anew in every view; None for not at all.
        autocast: the type in which the model runs in mixed precision, as in training; None for its own.

    Raises:
        ValueError: if the folder holds another cache (with the difference), or no block of the model stays the same in
            training.
    """

    def __init__(
        self,
        model: TaskModel,
        methods: Sequence[Any],
        table: Any,
        folder: Path | None,
        precision: Precision = "fp16",
        views: int = 1,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        autocast: torch.dtype | None = None,
    ):
        if not model.backbone.pictures.fixed:
            raise ValueError(
                f"cache: {model.backbone.name!r} keeps the shape of pictures, so that their numbers of tokens differ: "
                "use `backbone.pictures: squash`"
            )
        self.model, self.listeners = model, listeners_of(methods)
        for x in self.listeners.values():
            if x.memory is not None and not any(p.requires_grad for p in x.memory.side.parameters()):
                raise ValueError(
                    f"cache: the side network of {x.memory.tower.name!r}, whose result that of {x.tower.name!r} reads, "
                    "is frozen: what it makes is not recorded; train it too, or train without `training.cache`"
                )
        self.collation = Collation(model, table, views, seed, augmentation)
        self.device = next(model.parameters()).device
        self.around = _around(self.device, autocast)
        self._plan(autocast)
        self.prints: dict[int, dict[str, str]] = {}  # of what should be the same in all views, by its first row
        key = {
            "precision": precision, "views": views, "seed": seed, "draws": draws.VERSION, "rows": len(table),
            "layers": {n: [list(x.maps), str(x.place)] for n, x in self.listeners.items()}, "task": model.task.name,
            "table": table_print(self.collation.table), "augmentation": str(augmentation) if augmentation else None,
            "forward": str(autocast) if autocast else None, "backbone": self._frozen_print(),
            "leaves": self.plan.told(), "inputs": tensors_print(sorted(self.example.items())),
            "rows of inputs": self.collation.inputs_print, "configuration": configuration(model.backbone.model),
        }  # fmt: skip
        if folder is None:
            name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
            folder = cache_dir() / "activations" / name
        super().__init__(folder, key, len(table), views, self._columns(), self._computed, precision)

    # --- what is stored -------------------------------------------------------------------------------------------

    def _plan(self, autocast: torch.dtype | None) -> None:
        """Watch a step on a few rows."""
        batch, grown, short = self.collation.example()
        self.example = batch
        here, more, less = (None if b is None else self._there(b) for b in (batch, grown, short))
        assert here is not None
        texts = self.collation.text_keys
        length = batch[texts[0]].shape[1] if texts and grown else None
        redrawn = self.collation.redrawn(batch)
        again = None if redrawn is None else self._there(redrawn)
        example = Example(here, torch.tensor(SOME), more, length, less, again)
        watcher = Watcher(self.model, self.listeners, example, self.around, 1e-5 if autocast is None else 3e-2)
        self.plan = watcher.find()
        self._check_holds(watcher)
        self.idle = watcher.idle(self.plan, here) if self.collation.views > 1 else set()
        self.leaves = {x.name: x for x in self.plan.kept()}

    def _there(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in batch.items()}

    def _check_holds(self, watcher: Watcher) -> None:
        """ValueError unless a block of the backbone need not run any more."""
        anatomy = self.model.backbone.anatomy
        where = {id(m): path for path, m in self.model.named_modules()}
        blocks = [where[id(self.model.backbone.model.get_submodule(b.path))] for b in anatomy.blocks()]
        held = [b for b in blocks if _covers(self.plan, b)]
        self.held = len(held), len(blocks)
        if not held:
            why = next((f"'{b}': {watcher.why[b]}" for b in blocks if b in watcher.why), "the loss reads no block")
            raise ValueError(
                f"cache: no block of {self.model.backbone.name!r} stays the same in training ({why}): "
                "`training.cache` is for what trains beside or behind frozen blocks (linear-probe, partial, unipt, "
                "lst, side-tuning, sherl); train it without"
            )

    def _columns(self) -> dict[str, Column]:
        found = {}
        for name, leaf in self.leaves.items():
            assert leaf.axis is not None
            shape = list(leaf.stored(torch.empty(leaf.shape, device="meta")).shape)
            for axis in leaf.text_axes:
                shape[axis] += self._longest - self.plan.length  # type: ignore[operator]
            drawn = leaf.drawn or self.collation.views == 1
            found[name] = Column(tuple(shape[1:]), leaf.dtype, leaf.packed, drawn)
            if self.plan.cut and leaf.texts:
                before = leaf.shape[leaf.texts[0]] - self.plan.length  # type: ignore[operator]
                found[name] = found[name]._replace(axis=leaf.text_axes[0] - 1, before=before)
        if self.plan.cut:
            found[LENGTHS] = Column((), torch.long)
        return found

    @property
    def _longest(self) -> int:
        """Of the table's texts."""
        return self.collation.ragged[self.collation.text_keys[0]].longest

    def _frozen_print(self) -> str:
        """A hash of all that is frozen, which training does not change; of heads and side networks that which has been
        recorded, for what starts random in them differs from seed to seed."""
        # A side network of which nothing is trained is a part of what is frozen: what is recorded may depend on it.
        sides = [x.side for x in self.listeners.values() if any(p.requires_grad for p in x.side.parameters())]
        beside = {id(m) for part in (*sides, self.model.head) for m in part.modules()}
        found = []
        for path, module in self.model.named_modules():
            if id(module) in beside and not _covers(self.plan, path):
                continue
            own = dict(module.named_parameters(recurse=False))
            buffers = () if any(p.requires_grad for p in own.values()) else module.named_buffers(recurse=False)
            found += [(f"{path}.{n}", t) for n, t in own.items() if not t.requires_grad]
            found += [(f"{path}.{n}", t) for n, t in buffers]
        return tensors_print(found)

    # --- filling --------------------------------------------------------------------------------------------------

    def _computed(self, view: int, start: int, stop: int) -> dict[str, Tensor]:
        """One shard's tensors: the model runs on its rows, a few at a time."""
        was = self.model.training
        self.model.eval()
        names = {n for n, c in self.columns.items() if c.drawn or not view} - {LENGTHS}
        recording = Recording(self.model, self.listeners, self.plan, names, self.idle if view else None)
        parts = []
        for first in range(start, stop, collation.RUN_ROWS):  # of which a shard holds whole groups
            batch = self.collation.group(view, first, min(first + collation.RUN_ROWS, stop))
            lengths = batch.pop("lengths", None)
            self._check_same(view, first, batch)
            if not self.plan.cut:
                batch = {k: self.collation.padded(k, v) for k, v in batch.items()}
            take = functools.partial(Tensor.to, device="cpu", copy=True)
            with self.around():
                found = recording.run(self._there(batch), take)
            parts.append({n: self._whole(n, v.cpu()) for n, v in found.items()})
            if LENGTHS in self.columns and lengths is not None:
                parts[-1][LENGTHS] = lengths
        self.model.train(was)
        return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}

    def _whole(self, name: str, value: Tensor) -> Tensor:
        """As long as the longest text of the table."""
        axis, before = self.columns[name].axis, self.columns[name].before
        if axis is None:
            return value
        known = self.collation.ragged.get(name.removeprefix("batch.")) if name.startswith("batch.") else None
        return longer(value, axis + 1, before + self._longest, known.pad if known else 0)

    def _check_same(self, view: int, first: int, batch: dict[str, Tensor]) -> None:
        """ValueError if what is stored for the first view alone is another in this one."""
        drawn = {x.name for x in self.plan.batch if x.drawn}
        for key in (k for k in batch if view and f"batch.{k}" not in drawn):
            if first not in self.prints:
                again = self.collation.group(0, first, first + len(batch[key]))
                self.prints[first] = {k: tensors_print([(k, v)]) for k, v in again.items() if f"batch.{k}" not in drawn}
            if self.prints[first][key] != tensors_print([(key, batch[key])]):
                raise ValueError(
                    f"cache: '{key}' of rows {first} and following is another in view {view}, though some rows showed "
                    "none: set `training.cache_views` to 1"
                )

    # --- reading --------------------------------------------------------------------------------------------------

    def batch(self, indices: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """See `ActivationCache.batch`; texts without the padding that all have."""
        length = self._longest_of(indices) if LENGTHS in self.columns else length
        out = super().batch(indices, length)
        out.pop(LENGTHS, None)
        return out

    def _longest_of(self, indices: Sequence[int]) -> int:
        """Of the texts of some samples."""
        per_view, size = -(-self.rows // cache.SHARD_ROWS), cache.SHARD_ROWS
        places = (divmod(int(i), self.rows) for i in indices)
        return max(int(self.shards[view * per_view + row // size].tensors[LENGTHS][row % size]) for view, row in places)


def _covers(plan: Plan, path: str) -> bool:
    """Whether a module is, or is within, one whose call is played back."""
    names = path.split(".")
    outer = {".".join(names[:i]) for i in range(1, len(names) + 1)}
    return any(called in outer for called, _ in plan.calls)


def _around(device: torch.device, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager]:
    """In what a step runs."""
    if dtype is None:
        return nullcontext
    return functools.partial(torch.autocast, device.type, dtype)


class CachedModel(nn.Module):
    """A task's model that trains from cached samples: `forward(**cache.batch(indices))` gives `{"loss": scalar}`.

    It shares what is trained with the whole model, under the same names, and holds nothing else of it as its own.
    """

    def __init__(self, cache: TableCache):
        super().__init__()
        whole = cache.model
        self._whole = (whole,)  # in a tuple: not a part of this module
        self._playing = (Playing(whole, cache.listeners, cache.plan),)
        _share(self, whole)

    @property
    def task(self) -> Any:
        return self._whole[0].task

    def train(self, mode: bool = True) -> CachedModel:
        """As of the whole model; trainers ask for it at every step, and it is carried out when it changes."""
        if self._whole[0].training != mode or self.training != mode:
            super().train(mode)
            self._whole[0].train(mode)
        return self

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return self._playing[0].run(batch, len(next(iter(batch.values()))))


class OfWhole(TrainerCallback):
    """Methods' callbacks in training from a cache: they are given the whole model, to which the methods belong."""

    def __init__(self, callbacks: Sequence[TrainerCallback], whole: nn.Module):
        self.callbacks, self.whole = callbacks, whole

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(*args: Any, **kwargs: Any) -> None:
            for callback in self.callbacks:  # they change the trainer's control in place
                getattr(callback, name)(*args, **{**kwargs, "model": self.whole})

        return event


def _share(into: nn.Module, of: nn.Module) -> None:
    """Give a module those parts of another that hold trained parameters of their own, under the same names."""
    for name, child in of.named_children():
        if not any(p.requires_grad for p in child.parameters()):
            continue
        if any(p.requires_grad for p in child.parameters(recurse=False)):
            into.add_module(name, child)
        else:
            held = nn.Module()
            into.add_module(name, held)
            _share(held, child)
