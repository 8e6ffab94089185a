"""The calibration of a model on batches that a user has given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.calibration import Batch, Calibration
from trimtab.methods.session import own_loss

if TYPE_CHECKING:
    from trimtab.methods.stack import Stack

Loss = Callable[[Any], Tensor]


def calibration(fit: Stack, pruner: Any, batches: Iterable[Batch] | None, loss: Loss | None,
                several: bool = False) -> Calibration:  # fmt: skip
    """The model and the data for a pruner; ValueError if it needs data and there are none.

    Args:
        fit: the model.
        pruner: with its settings.
        batches: all that there are.
        loss: None: the output's own.
        several: masks for several sparsities are asked for.
    """
    source: Callable[[], Iterable[Batch]] = list
    if pruner.rounds and batches is None:
        raise ValueError(
            f"{pruner.name!r} needs calibration data: pass `batches`, dictionaries of the model's arguments"
        )
    if batches is not None:
        once = pruner.rounds <= 1 and not (several and type(pruner).find is not Pruner.find)
        data = batches if once or hasattr(batches, "__len__") else list(batches)
        source = partial(Moved, data, next(fit.model.parameters()).device)
    return Calibration(fit.with_task, fit.model, fit.anatomy, source, None, loss or own_loss, pruner.settings.precision)


class Moved:
    """Batches with their tensors on a device."""

    def __init__(self, batches: Iterable[Batch], device: torch.device):
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if isinstance(batch, Mapping):
                batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            yield batch
