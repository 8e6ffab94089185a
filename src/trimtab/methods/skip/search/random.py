"""Skipping blocks at random: what a search must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.anatomy import Block
from trimtab.methods.base import METHODS
from trimtab.methods.session import Session
from trimtab.methods.skip.base import Skipping, SkipSettings
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.supernet import Supernet


@dataclass(frozen=True)
class RandomSettings(SkipSettings):
    """Settings of skipping at random."""

    plan_seed: int | None = None
    """Seed of the plan; None takes the recipe's."""


@METHODS.register("random-skip")
class RandomSkip(Skipping):
    """Blocks drawn evenly; adapters and retraining as in DAS."""

    Settings = RandomSettings
    settings: RandomSettings

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, goal: Goal, journal: Journal
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        seed = session.seed if self.settings.plan_seed is None else self.settings.plan_seed
        generator = torch.Generator().manual_seed(seed)
        return goal.fill(torch.randperm(len(candidates), generator=generator).tolist()), None, 0, {}
