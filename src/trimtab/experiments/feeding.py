"""How rows reach the model in training: in which order, read by whom, and what is said when one cannot be read.

    Order --places--> Feed: read, decode, augment, collate --batch--> model
                      in worker processes, a few batches ahead of the model, or in the training process

What is drawn for a row comes from its place (`data/draws.py`), so that a training gives the same numbers, to the bit,
with any number of workers. Workers are forked from the training process: they share its memory and start in a moment.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info
from transformers import Trainer

from trimtab.data import draws
from trimtab.data.draws import Place, placed
from trimtab.data.images import decode_rows, encoded
from trimtab.data.streams import order_of
from trimtab.experiments import many
from trimtab.experiments.schema import TrainingSpec
from trimtab.tasks.base import Batch, TaskModel

MOST = 256  # worker processes
FEW_STEPS = 10  # a shorter training is over before workers are worth their start
AHEAD = 2  # batches that each worker keeps ready
SHARED = "/dev/shm"  # through which workers hand over their batches

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class WorkerDied(RuntimeError):
    """A worker process that ended before its time; the message says at which row, and what to do."""


class Order(Sampler[Place]):
    """The places of a table's rows, in an order of its own in every epoch."""

    def __init__(self, rows: int, seed: int, order: Callable[[int, int], list[int]]):
        self.rows, self.seed, self.order, self.epoch = rows, seed, order, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Place]:
        return (Place(self.seed, self.epoch, i) for i in self.order(self.seed, self.epoch))


class Places(Dataset[Place]):
    """The dataset of a loader: it hands places on. `Feed` reads the rows, a batch at once."""

    def __init__(self, order: Order):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: Place) -> Place:
        return place

    def set_epoch(self, epoch: int) -> None:
        # accelerate reaches the dataset where it does not reach a sampler that is wrapped twice
        self.order.set_epoch(epoch)


class Failed(NamedTuple):
    """An error on its way from a worker process to the training process, which raises it."""

    error: Exception


FAILED = "__failed__"  # the key under which a batch that is cut carries an error


def failed_rows(error: Exception, parts: int) -> Batch:
    """An error as a batch of as many rows as there are parts: each process finds it in its own, (parts, bytes)."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # some errors cannot be made again from what they hold
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return {FAILED: torch.frombuffer(bytearray(content), dtype=torch.uint8).repeat(parts, 1)}


class Packed(NamedTuple):
    """A batch on its way from a worker process: its tensors in one, since each one that is handed over costs the
    training process a wait for the worker.

    Attributes:
        data: the bytes of all tensors, one after the other, (N,).
        layout: name, type, shape, and first byte of each.
        rest: what is no tensor.
    """

    data: Tensor
    layout: dict[str, tuple[torch.dtype, torch.Size, int]]
    rest: dict[str, Any]

    @staticmethod
    def of(batch: Batch) -> Packed:
        parts, layout, end = [], {}, 0
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and not v.is_sparse}
        for name, tensor in tensors.items():
            flat = tensor.contiguous().flatten().view(torch.uint8)
            layout[name] = (tensor.dtype, tensor.shape, end)
            parts += [flat, flat.new_zeros(-len(flat) % 16)]  # each begins where any type may
            end += sum(map(len, parts[-2:]))
        data = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
        return Packed(data, layout, {k: v for k, v in batch.items() if k not in tensors})

    def batch(self) -> Batch:
        found = dict(self.rest)
        for name, (dtype, shape, start) in self.layout.items():
            stop = start + shape.numel() * dtype.itemsize
            found[name] = self.data[start:stop].view(dtype).view(shape)
        return found


class Feed:
    """Makes batches of places. It runs in worker processes, where it notes which row it is at.

    Args:
        model: whose task collates.
        table: the rows.
        spec: how pictures are changed and decoded.
        cache: a filled `ActivationCache` of the table, which gives the batches instead.

    Attributes:
        workers: how many processes it runs in; 0: in the training process.
        together: samples are made from other rows of the batch, so that one of several processes has to make it.
        at: numbers of the rows that they are at, shared among them.
    """

    def __init__(self, model: TaskModel, table: Any, spec: TrainingSpec, cache: Any = None):
        self.model, self.augmentation, self.cache, self.buffer = model, spec.augmentation, cache, spec.buffer
        self.side: int | None = None  # what drafts of pictures have at least
        if spec.draft and cache is None and hasattr(model.backbone.pictures, "shape"):
            self.side = math.ceil(max(model.backbone.pictures.shape) / math.sqrt(spec.crop))
        self.table: Any = encoded(table) if cache is None else None
        self.rows = len(table) if cache is None else len(cache) * cache.views
        self.together = cache is None and model.task.together
        self.workers = 0
        self.at = multiprocessing.RawArray("q", [-1] * MOST)  # -1 for none

    def __call__(self, places: Sequence[Place]) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.batch(places, 0)
        cut = self.together and many.started() > 1  # by Accelerate into the processes' parts, so it is no parcel
        try:
            batch = self.batch(places, worker.id)
        except Exception as error:  # torch would wrap it into another one, with its traceback as its message
            return failed_rows(error, many.started()) if cut else Failed(error)
        return batch if cut else Packed.of(batch)

    def batch(self, places: Sequence[Place], worker: int) -> Batch:
        """The collated batch of some rows.

        Raises:
            ImageError: if a picture cannot be decoded, with its file or row.
        """
        if self.cache is not None:
            return self.cache.batch([place.row for place in places])
        rows = []
        for place in places:
            self.at[worker] = place.row
            row = placed(self.table[place.row], place)
            if row.get("image", 0) is not None:  # a row may be about no picture; the task says if it may not
                (row,) = decode_rows([row], None if "box" in row else self.side)  # a box is in whole pixels
            rows += self.augmentation([row])
        found = self.model.task.collate(self.model.backbone, rows, True)
        self.at[worker] = -1
        return many.dealt(found) if self.together else found

    def died(self, error: RuntimeError) -> WorkerDied:
        """What to say of a worker that ended without a word: it was killed, or a library crashed in it."""
        rows = [number for number in self.at if number >= 0]
        named = [f"row {number}{self._file(number)}" for number in rows] or ["no row"]
        return WorkerDied(
            f"a worker process that reads training data ended ({' '.join(str(error).split())[:160]}) while its "
            f"workers were at {', '.join(named)} of the training table. A file that crashes its decoder is left out "
            "with data.on_error=skip or data.drop_bad_images=true; where memory ran out (also that of "
            f"{SHARED}), take a smaller training.batch_size, or training.workers=0"
        )

    def _file(self, number: int) -> str:
        row = self.table[number] if self.table is not None else {}
        cells = [row.get("image") or row.get("video"), *(row.get("images") or ())]
        paths = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells if cell]
        return f" ({', '.join(map(str, paths))})" if any(paths) else ""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers of the rows in the order of an epoch."""
        if self.table is None:
            return draws.order(self.rows, seed, epoch, self.buffer)
        return order_of(self.table, seed, epoch, self.buffer)

    @property
    def bytes_a_row(self) -> int:
        """About how many bytes a row's tensors have."""
        if self.cache is not None:
            return math.ceil(4 * self.cache.bytes_a_sample)
        task, pictures = self.model.task, self.model.backbone.pictures
        if not hasattr(pictures, "shape"):  # a chat model's processor, which makes of each picture what it likes
            rows = [self.table[i % self.rows] for i in range(task.least)]
            batch = task.collate(self.model.backbone, rows, True)
            return sum(v.nbytes for v in batch.values() if isinstance(v, Tensor)) // len(rows)
        high, wide = pictures.shape
        count = {"images": 2, "video": getattr(task, "frames", 1)}.get(task.sees, 1)
        return 4 * 3 * high * wide * count


def workers_for(asked: int | None, steps: int, batch_bytes: int) -> int:
    """How many worker processes read ahead.

    Args:
        asked: so many; None for what fits: none in a short training, on one core, or where a process cannot be forked;
            else one beside a CPU, and up to four beside a GPU.
        steps: of the training.
        batch_bytes: about, of a batch, which go through shared memory.

    Raises:
        ValueError: if workers are asked for where processes cannot be forked.
    """
    forks = "fork" in multiprocessing.get_all_start_methods()
    if asked is not None:
        if asked > MOST:
            raise ValueError(f"training.workers: at most {MOST}, found {asked}")
        if asked and not forks:
            raise ValueError(f"training.workers: {asked} processes would be forked, which {sys.platform} cannot: use 0")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if steps < FEW_STEPS or cores < 2 or not forks or not sys.platform.startswith("linux"):
        return 0
    count = min(4, cores - 1) if torch.cuda.is_available() else 1
    room = shutil.disk_usage(SHARED).free // max(1, 2 * batch_bytes) if Path(SHARED).is_dir() else 0
    return min(count, room // (AHEAD + 1))


class Fed(_Base):
    """Part of a `Trainer` that takes its batches from a `Feed`."""

    feed: Feed
    _loader: Any = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_dataset.order  # type: ignore[union-attr]

    def get_train_dataloader(self) -> Any:
        self._loader = super().get_train_dataloader()
        # A loader draws a seed for its workers: from the global generator it would shift what dropout draws.
        self._loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return self._loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(_arrived(epoch_iterator), *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; workers end with it.

        Raises:
            WorkerDied: if one of them ended before.
        """
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise self.feed.died(error) from error
            raise
        finally:
            self._end_workers()

    def _end_workers(self) -> None:
        """Else they live until the loader is collected, which an error's traceback may hold."""
        iterator = None if self._loader is None else self._loader.base_dataloader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader.base_dataloader._iterator = None


def _arrived(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Failed):
            raise batch.error
        if isinstance(batch, dict) and FAILED in batch:
            raise pickle.loads(batch[FAILED][0].cpu().numpy().tobytes())
        yield batch.batch() if isinstance(batch, Packed) else batch
