"""Searches that compare plans after training, and not during it.

    train      adapters and head for `search_steps` steps, while plans drawn evenly are skipped (DAS's warm-up)
    compare    plans, by their loss on one fixed validation batch, in evaluation mode: the same plan has the same loss

Each search is a function of losses alone, so that it can be tried without a model (`studies/skip_search.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from trimtab.anatomy import Block
from trimtab.methods.session import Session
from trimtab.methods.skip.base import Skipping, SkipSettings
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.evaluate import Evaluator, PlanLosses, choose
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.supernet import Supernet

Losses = Callable[[Sequence[Indices]], list[float]]


@dataclass(frozen=True)
class SearchedSettings(SkipSettings):
    """Settings of searches on a trained model."""

    search_steps: int = 100
    """Training steps before plans are compared, in which plans drawn evenly are skipped (DAS's warm-up)."""
    rows: int | None = None
    """Validation rows on which plans are compared; None: as many as a training batch has."""


@dataclass
class Found:
    """What a search answers.

    Attributes:
        plan: indices of the blocks to skip.
        scores: one a candidate, larger for more redundant; None if the search has none.
        trace: what happened, as plain JSON.
    """

    plan: Indices
    scores: list[float] | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)


class Searched(Skipping):
    """Train while plans drawn evenly are skipped, then compare plans on a fixed batch."""

    Settings: ClassVar[type] = SearchedSettings
    settings: SearchedSettings
    teaches = True

    def compare(self, losses: Losses, goal: Goal, session: Session, candidates: list[Block],
             generator: torch.Generator) -> Found:  # fmt: skip
        """The search itself; `losses` pays for each plan once."""
        raise NotImplementedError

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, goal: Goal, journal: Journal
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        batch = next(session.batches("validation", self.settings.rows))
        train_evenly(self, session, supernet, goal, journal)
        losses = PlanLosses(supernet.with_task, supernet.switches, [batch], loss=supernet.loss)
        evaluator = Evaluator(losses, [b.path for b in candidates], journal, _print(supernet))
        found = self.compare(evaluator, goal, session, candidates, torch.Generator().manual_seed(session.seed))
        compared = [{"plan": list(p), "loss": evaluator.known[p]} for p in evaluator.asked]
        return found.plan, found.scores, evaluator.evaluations, {"updates": found.trace, "compared": compared}


def train_evenly(method: Searched, session: Session, supernet: Supernet, goal: Goal,
                 journal: Journal | None = None) -> None:  # fmt: skip
    """Train the supernet's adapters and heads while plans drawn evenly are skipped; what they learned is kept."""
    from transformers import TrainerCallback

    journal = journal or Journal(None)
    if (known := journal.tensors("supernet")) is not None:
        _restore(supernet, known)
        return
    generator = torch.Generator()

    class Skip(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            generator.manual_seed(1_000_003 * session.seed + state.global_step)  # the same after resuming
            order = torch.randperm(len(supernet.switches), generator=generator).tolist()
            choose(supernet.switches, goal.fill(order))

    session.fit(supernet.with_task, method.settings.search_steps, [Skip()])
    journal.keep("supernet", _learned(supernet))


def _learned(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu().contiguous() for n, p in supernet.with_task.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(supernet: Supernet, known: dict[str, torch.Tensor]) -> None:
    """Take the trained parameters of an interrupted run."""
    own = dict(supernet.with_task.named_parameters())
    for name, value in known.items():
        own[name].copy_(value)


def _print(supernet: Supernet) -> str:
    """A hash of the trained parameters, on which losses depend."""
    digest = hashlib.sha256()
    for name, value in sorted(_learned(supernet).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()
