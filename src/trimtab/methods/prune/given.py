"""Masks that were found before, and given to a pruner: they must be what its settings say, of the weights at hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from trimtab.methods.prune.masks import Masks, print_of
from trimtab.methods.prune.settings import PruneSettings


def check_settings(masks: Masks, settings: PruneSettings, asked: float | None, where: str) -> None:
    """Raise a ValueError unless masks are what settings say.

    Args:
        asked: the sparsity that they should have.
        where: what to call them in a message.
    """
    found, pattern = masks.sparsity, settings.n_of_m
    # Shares that are cut to integers, and groups of a pattern, give a little more or less than was asked for.
    if asked is not None and abs(found - asked) > 0.05:
        raise ValueError(f"{where} have the sparsity {found:.4f}, the settings say {asked}: leave out "
                         "`sparsity`, or name other masks")  # fmt: skip
    if named := next((k for k in ("allocation", "floor", "until") if getattr(settings, k)), None):
        raise ValueError(f"{named}: {where} have their shares already; leave out `{named}` or `masks`")
    for path, bits in masks.bits.items() if pattern else ():
        if pattern and not any(_in_groups(m, *pattern) for m in (bits.mask, bits.mask.transpose(-1, -2))):
            raise ValueError(f"pattern {settings.pattern!r}: {where} do not have it, first '{path}': leave out "
                             "`pattern`, or name other masks")  # fmt: skip


def check_weights(masks: Masks, weights: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError if masks bring new values, and the weights before were others than these; warn of weights
    without a mask.

    Args:
        weights: path -> what may be pruned. Where it is of another type, values cannot be compared.
        where: what to call the masks in a message.
    """
    for path, known in masks.originals.items():
        kind = known.split()[0]
        if path in weights and str(weights[path].dtype) == f"torch.{kind}" and print_of(weights[path]) != known:
            raise ValueError(
                f"{where} hold new values too, which {masks.found_by} made of other weights than those of this model, "
                f"first '{path}': prune this model anew, or take a pruner that changes no values"
            )
    if bare := [path for path in weights if path not in masks]:
        warnings.warn(
            f"{where}: {len(bare)} of {len(weights)} prunable weights have no mask and stay as they are, first "
            f"'{bare[0]}'; the sparsity that is told is of the others",
            stacklevel=4,
        )


def _in_groups(mask: Tensor, kept: int, size: int) -> bool:
    """Whether `kept` of every `size` neighbours along the last axis are True."""
    return mask.shape[-1] % size == 0 and bool((mask.reshape(-1, size).sum(dim=1) == kept).all())
