"""Skipping blocks at random: what a search must beat."""

from __future__ import annotations

import torch

from trimtab.anatomy import Block
from trimtab.methods.base import METHODS, Session
from trimtab.methods.skip.das import Skipping, SkipSettings


@METHODS.register("random-skip")
class RandomSkip(Skipping):
    """k blocks drawn evenly with `plan_seed`; adapters and retraining as in DAS."""

    name = "random-skip"
    Settings = SkipSettings

    def search(self, session: Session, candidates: list[Block]) -> None:
        generator = torch.Generator().manual_seed(self.settings.plan_seed)
        order = torch.randperm(len(candidates), generator=generator).tolist()
        self.set_plan(candidates, sorted(order[: self.settings.skip]))
