"""Sessions: the model with its task, the data, and a way to train, for methods that need them while they prepare.

`Session` is what methods ask for; `BatchSession` gives it for a model and data of one's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trimtab.anatomy import Anatomy
from trimtab.methods.fitting import Loop, again
from trimtab.methods.sources import Ready, Rows
from trimtab.settings import within

if TYPE_CHECKING:
    from transformers import TrainerCallback

Split = Literal["train", "validation"]
Batch = dict[str, Any]


class Session(Protocol):
    """What a method may ask for while it prepares: the model with its task, data, and a way to train.

    `folder` is the run's folder, where a method may keep under `search/` what an interrupted run needs to go on; it is
    deleted when the run is finished. None keeps nothing.
    """

    with_task: Any
    anatomy: Anatomy
    seed: int
    folder: Path | None

    @property
    def plain(self) -> nn.Module:
        """The plain model inside `with_task`, to which the anatomy's paths belong."""

    def batches(self, split: Split, size: int | None = None) -> Iterator[Batch]:
        """Endless batches of a split, on the model's device; `size` defaults to the training batch size."""

    def example(self) -> Batch | None:
        """One batch on which costs are counted; None if there are no data."""

    def made_of(self) -> Any:
        """What tells these data and this task from others, as plain values: a search goes on only with the same."""

    def loss(self, with_task: Any, batch: Batch) -> Tensor:
        """The loss of `with_task`, or of a copy of it, on a batch; a scalar."""

    def fit(self, with_task: Any, steps: int, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
        """Train what requires gradients, for another number of steps; returns the logged history."""

    def plain_in(self, with_task: Any) -> nn.Module:
        """The plain model inside a copy of `with_task`."""


def own_loss(output: Any) -> Tensor:
    """The loss that a model's output carries, as `output["loss"]` or `output.loss`; ValueError if it has none."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"a loss is needed, but the model's output ({type(output).__name__}) has no 'loss': give batches from "
            "which the model computes one (labels, return_loss), or pass `loss`, a function of the output"
        )
    return found


@dataclass(frozen=True)
class FitSpec:
    """How a `BatchSession` trains; a search is found again only with the same."""

    batch_size: int
    learning_rate: float
    weight_decay: float


class BatchSession:
    """The session of a model and data of one's own.

    Args:
        plain: the plain model, to which the anatomy's paths belong.
        anatomy: its description.
        train: batches, or rows with `collate`. Batches are dicts of the model's keyword arguments; their tensors are
            moved to the model's device. An iterable is gone through again and again; an iterator cannot be, and must
            have no end or enough batches. Rows are a dataset with `__len__` and `__getitem__`.
        validation: the same, of data that plans are compared on. None where a method needs none.
        with_task: what is called with the batches in place of the plain model, which it holds.
        loss: from the output to a scalar; None: the output's own `loss`.
        collate: from a list of rows to a batch. With it, what has `__len__` and `__getitem__` is a dataset: shuffled
            with `seed`, `batch_size` rows a batch. What has not is an iterable of batches all the same.
        batch_size: rows a batch, of datasets. Ready batches stay as they are.
        learning_rate: of AdamW, in the small training loop.
        weight_decay: of AdamW, for matrices.
        seed: of the order of rows and of what methods draw.
        folder: where a search keeps what it needs to go on after an interruption (in `search/`); None keeps nothing.
        trainer: how to train instead of the small loop: a function `trainer(with_task, steps, callbacks)`, or a
            `transformers.Trainer`, whose class, arguments, dataset and collator train the copy that a search works on.

    Raises:
        ValueError: if `plain` is no part of `with_task`, or the data are of no kind that is known.
    """

    def __init__(
        self,
        plain: nn.Module,
        anatomy: Anatomy,
        train: Any,
        validation: Any,
        *,
        with_task: nn.Module | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
        folder: str | Path | None = None,
        trainer: Any = None,
    ):
        within(locals(), batch_size="[1, inf)", learning_rate="[0, inf)", weight_decay="[0, inf)")
        self.with_task: Any = plain if with_task is None else with_task
        self.plain, self.anatomy, self.seed = plain, anatomy, seed
        self.folder = None if folder is None else Path(folder)
        self.spec = FitSpec(batch_size, learning_rate, weight_decay)
        self.trainer = trainer
        self._path = path_in(self.with_task, plain)
        self._of_output = loss or own_loss
        self._keys: dict[str, set[str]] = {}
        self._data: dict[str, Ready | Rows] = {}
        for split, data in (("train", train), ("validation", validation)):
            if data is None:
                continue
            rows = collate is not None and hasattr(data, "__len__") and hasattr(data, "__getitem__")
            self._data[split] = Rows(split, data, collate, batch_size, seed) if rows else Ready(split, data)  # type: ignore[arg-type]

    def plain_in(self, with_task: Any) -> nn.Module:
        """The plain model inside a copy of `with_task`."""
        return with_task.get_submodule(self._path)

    def batches(self, split: Split, size: int | None = None) -> Iterator[Batch]:
        """Endless batches of a split, on the model's device.

        Args:
            split: which data.
            size: rows a batch, of datasets. Ready batches cannot be cut or joined in general: each is given whole.

        Raises:
            ValueError: if the split was not given or is empty, an iterator is used up, a batch is no dict, or lacks
                what the first of its split had. The message names the split and the number of the batch.
        """
        return self._checked(split, self._of(split).endless(size))

    def example(self) -> Batch | None:
        """The first training batch (of validation, where there are no training data); None without any data."""
        if not self._data:
            return None
        split: Split = "train" if "train" in self._data else "validation"
        return next(self._checked(split, iter([self._of(split).first()])))

    def made_of(self) -> dict[str, int | None]:
        """How many batches or rows each split has; None where that is not known."""
        sources: dict[str, Any] = {s: d.rows if isinstance(d, Rows) else d.source for s, d in self._data.items()}
        return {split: len(source) if hasattr(source, "__len__") else None for split, source in sources.items()}

    def _of(self, split: Split) -> Ready | Rows:
        if split not in self._data:
            raise ValueError(f"{split}: no data were given: pass `{split}=`, an iterable of batches or a dataset")
        return self._data[split]

    def _checked(self, split: Split, source: Iterator[Any]) -> Iterator[Batch]:
        device = next(self.with_task.parameters()).device
        for number, batch in enumerate(source, 1):
            if not isinstance(batch, Mapping):
                raise ValueError(
                    f"{split} batch {number}: expected a dict of the model's keyword arguments, such as "
                    f"{{'pixel_values': ..., 'input_ids': ...}}, found {type(batch).__name__}"
                )
            first = self._keys.setdefault(split, set(batch))
            if missing := sorted(first - set(batch)):
                raise ValueError(
                    f"{split} batch {number}: lacks {', '.join(map(repr, missing))}, which the first batch had; "
                    "give the same keys in every batch"
                )
            yield tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, dict(batch))

    def loss(self, with_task: Any, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar; ValueError if there is none."""
        found = self._of_output(with_task(**batch))
        if not isinstance(found, Tensor) or found.numel() != 1:
            kind = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the loss: expected a scalar tensor, found {kind}; take its mean in `loss`")
        return found

    def fit(self, with_task: Any, steps: int, callbacks: list[TrainerCallback]) -> list[dict[str, float]]:
        """Train what requires gradients: in the small loop, or as `trainer` does.

        Where nothing requires gradients, callbacks are told of the steps and nothing else happens.

        Returns:
            Logged steps: `step`, `loss`, `learning_rate`, `grad_norm`; of a trainer of one's own what it returns.

        Raises:
            ValueError: if the loss is no finite number, there are several processes and no trainer that keeps them
                alike, or the given `Trainer` cannot be made again for another model.
        """
        trained = [p for p in with_task.parameters() if p.requires_grad]
        if self.trainer is None or not trained:
            if trained and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    "the small training loop is the work of one process, found WORLD_SIZE="
                    f"{os.environ['WORLD_SIZE']}: pass a `transformers.Trainer` as `trainer`"
                )
            return Loop(self, with_task, steps, callbacks).run()
        if callable(self.trainer):
            return self.trainer(with_task, steps, callbacks) or []
        return again(self.trainer, with_task, steps, callbacks)


def path_in(with_task: nn.Module, plain: nn.Module) -> str:
    """Path of the plain model inside the model with its task."""
    for path, module in with_task.named_modules():
        if module is plain:
            return path
    raise ValueError(
        f"`with_task` ({type(with_task).__name__}) does not hold the plain model ({type(plain).__name__}): give what "
        "is called with the batches and has that very model as one of its modules"
    )
