"""Skipping blocks at random: what a search must beat."""

from __future__ import annotations

import torch

from trimtab.anatomy import Block
from trimtab.methods.base import METHODS, Session
from trimtab.methods.skip.das import Skipping, SkipSettings


@METHODS.register("random-skip")
class RandomSkip(Skipping):
    """k blocks drawn evenly; adapters and retraining as in DAS."""

    name = "random-skip"
    Settings = SkipSettings

    def search(self, session: Session, candidates: list[Block]) -> None:
        seed = session.seed if self.settings.plan_seed is None else self.settings.plan_seed
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(candidates), generator=generator).tolist()
        self.set_plan(candidates, sorted(order[: self.settings.skip]))
