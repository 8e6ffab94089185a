"""Block influence (ShortGPT, Men et al. 2024, equation 1): how much a block turns the stream that passes through it.

    BI_i = 1 - mean over tokens of cos(input of block i, output of block i)

The blocks with the least influence are skipped. It needs one forward pass of the pretrained model and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Block, pick
from trimtab.methods.base import METHODS
from trimtab.methods.fitting import evaluating
from trimtab.methods.session import Session
from trimtab.methods.skip.base import Skipping, SkipSettings
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.evaluate import SearchError, mean_over_processes
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.supernet import Supernet


@torch.no_grad()
def block_influence(with_task: nn.Module, plain: nn.Module, blocks: Sequence[Block], batch: dict[str, Tensor]
                    ) -> list[float]:  # fmt: skip
    """Influence of blocks on a batch, in evaluation mode; all tokens count, padding too, as in the paper's code.

    Args:
        with_task: what is called with the batch.
        plain: the plain model in it, to which the blocks' paths belong.
    """
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)
    handles = []
    for i, block in enumerate(blocks):

        def measure(module: nn.Module, args: tuple, kwargs: dict, out: Any, i: int = i, block: Block = block) -> None:
            stream = block.stream_of(module, args, kwargs)
            similarity = F.cosine_similarity(stream.float(), pick(out, 0).float(), dim=-1)
            sums[i] += float((1 - similarity).sum())
            counts[i] += similarity.numel()

        handles.append(plain.get_submodule(block.path).register_forward_hook(measure, with_kwargs=True))
    try:
        with evaluating(with_task):
            with_task(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [b.path for b, n in zip(blocks, counts, strict=True) if not n]:
        raise ValueError(f"block '{missing[0]}' did not run on this batch: its influence is not known; check `towers`")
    found = [s / n for s, n in zip(sums, counts, strict=True)]
    return mean_over_processes(found, next(with_task.parameters()).device)


def costs_at_first(influence: Sequence[float] | None, count: int) -> Tensor:
    """What skipping each block is believed to cost before anything is measured, (count): the logarithms of their
    influence, with mean 0 and spread 1. Zeros if influence is not known, or of one block alone."""
    if influence is None or count < 2:
        return torch.zeros(count, dtype=torch.float64)
    x = torch.tensor(influence, dtype=torch.float64).clamp(min=1e-9).log()
    return (x - x.mean()) / x.std().clamp(min=1e-9)


@dataclass(frozen=True)
class InfluenceSettings(SkipSettings):
    """Settings of skipping by block influence."""

    rows: int | None = None
    """Validation rows on which influence is measured; None: as many as a training batch has."""


@METHODS.register("block-influence")
class BlockInfluence(Skipping):
    """Blocks that turn the stream least (ShortGPT): no training, one forward pass."""

    Settings = InfluenceSettings
    settings: InfluenceSettings

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, goal: Goal, journal: Journal
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        batch = next(session.batches("validation", self.settings.rows))
        found = block_influence(session.with_task, session.plain, candidates, batch)
        for block, value in zip(candidates, found, strict=True):
            if not value == value or value in (float("inf"), float("-inf")):
                raise SearchError(f"{self.name}: the influence of '{block.path}' is {value}: its stream is not finite")
        order = sorted(range(len(candidates)), key=lambda i: (found[i], i))
        return goal.fill(order), [-x for x in found], 0, {}
