"""Pruning in one call, for a model and a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy
from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.calibration import Batch, Calibration, own_loss
from trimtab.methods.prune.masks import Masks
from trimtab.registry import unknown

Loss = Callable[[Any], Tensor]


@overload
def prune(model: nn.Module, method: str, sparsity: float | None = None, batches: Iterable[Batch] | None = None,
          anatomy: Anatomy | None = None, loss: Loss | None = None, with_task: nn.Module | None = None,
          **settings: Any) -> Masks: ...  # fmt: skip
@overload
def prune(model: nn.Module, method: str, sparsity: Sequence[float], batches: Iterable[Batch] | None = None,
          anatomy: Anatomy | None = None, loss: Loss | None = None, with_task: nn.Module | None = None,
          **settings: Any) -> list[Masks]: ...  # fmt: skip
def prune(
    model: nn.Module,
    method: str,
    sparsity: float | Sequence[float] | None = None,
    batches: Iterable[Batch] | None = None,
    anatomy: Anatomy | None = None,
    loss: Loss | None = None,
    with_task: nn.Module | None = None,
    **settings: Any,
) -> Masks | list[Masks]:
    """Prune a model in place; or find the masks for several sparsities and leave it as it is.

    `masks.keep(model, optimizer)` keeps the zeros through training. In several processes (torch.distributed), each is
    given the same model and the same batches, computes its share of them, and ends with the same masks.

    Args:
        model: called as `model(**batch)`.
        method: name of a pruner: `multiflow`, `wanda`, `omp` and so on (`trimtab list methods`).
        sparsity: share of the prunable weights that go, in [0, 1); a sequence of such for one calibration of many
            masks. Left out if `pattern="2:4"` or the like is among the settings, which sets it.
        batches: calibration data, dictionaries of the model's keyword arguments, all of which are used; pruners that
            work in steps divide them among the steps. Tensors are moved to the model's device. Not needed by pruners of
            weights alone.
        anatomy: the model's description; None: the registered one of its class, or one discovered.
        loss: from the model's output to a scalar, for pruners that need gradients; None: the output's own `loss`.
        with_task: what is called with the batches in place of the model, which it holds, such as `PretrainingLoss`.
        settings: of the method, as in a recipe.

    Returns:
        The masks that were applied; for several sparsities a list of masks, to `apply` or `save`.

    Raises:
        ValueError: if a name or setting is unknown, the pruner needs data and there are none, the data end early or are
            not finite, a whole tower would be emptied, or processes cannot work together.
        AnatomyError: if no anatomy is given and none can be found.
    """
    several = sparsity is not None and not isinstance(sparsity, (int, float))
    if sparsity is None and settings.get("pattern") is None:
        raise ValueError(f"{method}: expected `sparsity`, a number in [0, 1), or `pattern`, such as '2:4'; found none")
    asked = list(sparsity) if several else [sparsity]  # type: ignore[arg-type]
    pruner = _pruner(method, asked, settings)
    wanted = [pruner.settings.sparsity if s is None else float(s) for s in asked]
    calibration = Calibration(
        with_task or model, model, anatomy or Anatomy.of(model), lambda: [], None, loss or own_loss,
        pruner.settings.precision,
    )  # fmt: skip
    if pruner.rounds:
        if batches is None:
            raise ValueError(
                f"{method!r} needs calibration data: pass `batches`, dictionaries of the model's arguments"
            )
        once = pruner.rounds == 1 and not (several and type(pruner).find is not Pruner.find)
        data = batches if once or hasattr(batches, "__len__") else list(batches)
        device = next(model.parameters()).device
        calibration.source = lambda: _Moved(data, device)
    found = list(pruner.masks(calibration, wanted))
    if several:
        return found
    found[0].apply(model)
    return found[0]


def _pruner(method: str, sparsities: list[float | None], settings: dict[str, Any]) -> Pruner:
    """The method with its settings, which are checked for each sparsity."""
    names = [n for n, m in METHODS.items() if m.lever == "prune" and m.finds]
    if method not in names:
        raise ValueError(unknown("pruner", method, sorted(names)))
    kind = METHODS[method]
    fields = [f for f in kind.Settings.__dataclass_fields__ if f not in ("sparsity", "batches", "batch_size")]
    for name in settings:
        if name not in fields:
            raise ValueError(f"{method}: {unknown('setting', name, fields)}")
    if not sparsities:
        raise ValueError("sparsity: expected a number in [0, 1) or several, found an empty sequence")
    return [kind(sparsity=s, **settings) for s in sparsities][-1]


class _Moved:
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
