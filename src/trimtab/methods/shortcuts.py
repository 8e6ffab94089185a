"""One call a lever, for a model of one's own: `prune`, `skip`, `tune`, `shorten`. All return the handle.

A model that is adapted already keeps its handle, so that one call may follow another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, overload

from torch import Tensor, nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import unwrapped
from trimtab.methods.adapted import Adapted, adapt, handle_of
from trimtab.methods.base import METHODS
from trimtab.methods.patches import release
from trimtab.methods.prune.batches import calibration
from trimtab.methods.prune.masks import Masks
from trimtab.methods.session import Batch
from trimtab.methods.skip import shorten as shortening

Loss = Callable[[Any], Tensor]


def _handle(model: nn.Module, anatomy: Anatomy | None, with_task: nn.Module | None) -> Adapted:
    plain = unwrapped(model)
    fit = handle_of(plain)
    if fit is not None and not fit.methods:  # nothing is attached yet: as if it were not there
        release(plain)
        fit = None
    if fit is None:
        return adapt(model, anatomy=anatomy, with_task=with_task)
    if anatomy is not None or with_task not in (None, fit.with_task):
        raise ValueError(
            f"this {type(plain).__name__} is adapted already ({', '.join(fit)}), with a description and a model with "
            "task of its own: leave out `anatomy` and `with_task`"
        )
    return fit


@overload
def prune(model: nn.Module, method: str, sparsity: float | None = None, batches: Iterable[Batch] | None = None,
          anatomy: Anatomy | None = None, loss: Loss | None = None, with_task: nn.Module | None = None,
          **settings: Any) -> Adapted: ...  # fmt: skip
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
) -> Adapted | list[Masks]:
    """Prune a model in place; or find the masks for several sparsities and leave it as it is.

    In several processes (torch.distributed), each is given the same model and the same batches, computes its share of
    them, and ends with the same masks.

    Args:
        model: called as `model(**batch)`.
        method, batches, loss, settings: see `Adapted.prune`.
        sparsity: share of the prunable weights that go, in [0, 1); a sequence of such for one calibration of many
            masks.
        anatomy, with_task: see `adapt`.

    Returns:
        The handle (its masks are `fit.masks`); for several sparsities a list of masks, each for `fit.prune(masks=...)`
        or `masks.save(file)`.

    Raises:
        ValueError, AnatomyError: as `adapt` and `Adapted.prune`.
    """
    if sparsity is None or isinstance(sparsity, (int, float)):
        return _handle(model, anatomy, with_task).prune(method, sparsity, batches, loss, **settings)
    if not len(sparsity):
        raise ValueError("sparsity: expected a number in [0, 1) or several, found an empty sequence")
    plain = unwrapped(model)
    # Nothing is attached: a handle that is not left on the model.
    fit = handle_of(plain) or Adapted(plain, anatomy or Anatomy.of(plain), with_task)
    batches = fit.look(batches)
    pruner = [METHODS.make(method, lever="prune", sparsity=float(s), **settings) for s in sparsity][-1]
    return list(pruner.masks(calibration(fit, pruner, batches, loss, several=True), [float(s) for s in sparsity]))


def skip(model: nn.Module, method: str = "das", anatomy: Anatomy | None = None, with_task: nn.Module | None = None,
         **settings: Any) -> Adapted:  # fmt: skip
    """Skip the blocks that a task does not need, in place; see `Adapted.skip` for data and settings."""
    return _handle(model, anatomy, with_task).skip(method, **settings)


def tune(model: nn.Module, method: str = "unipt", anatomy: Anatomy | None = None, heads: bool | Sequence[str] = False,
         name: str = "default", with_task: nn.Module | None = None, **settings: Any) -> Adapted:  # fmt: skip
    """Freeze a model and attach a tuning method to it, in place; see `Adapted.tune`."""
    return _handle(model, anatomy, with_task).tune(method, heads, name, **settings)


def shorten(model: nn.Module, skip: Collection[str] = (), example: Mapping[str, Any] | None = None) -> Adapted:
    """Take blocks out of a model for good: their modules, weights, and their share of its configuration.

    What is left is an ordinary model of its class, which `save_pretrained` writes and `from_pretrained` reads: the base
    for whatever is done to it next. To keep the whole model as the base, use `Adapted.skip` with `adapters="none"`.

    Args:
        model: a model whose blocks stand in `nn.ModuleList`s; changed in place.
        skip: dotted paths of blocks to take out.
        example: keyword arguments of the model, a batch that runs through these blocks: what is left must compute what
            the whole model does with them passed by.

    Returns:
        The handle of the shorter model, with nothing attached.

    Raises:
        ValueError: see `trimtab.methods.skip.shorten.shorten`.
    """
    plain = unwrapped(model)
    if (fit := handle_of(plain)) is not None and not fit.methods:
        release(plain)
    return adapt(shortening.shorten(plain, skip, example))
