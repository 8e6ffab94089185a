"""Searches that compare plans after training, and not during it.

    train      adapters and head for `search_steps` steps, while plans drawn evenly are skipped (DAS's warm-up)
    compare    plans, by their loss on one fixed validation batch, in evaluation mode: the same plan has the same loss

Each search is a function of losses alone, so that it can be tried without a model (`studies/skip_search.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.anatomy import Block
from trimtab.files import replace_file
from trimtab.methods.base import Session
from trimtab.methods.skip.base import Skipping, SkipSettings, Supernet, search_folder, search_key
from trimtab.methods.skip.budget import Indices, Target
from trimtab.methods.skip.search.evaluate import Evaluator, PlanLosses, choose

Losses = Callable[[Sequence[Indices]], list[float]]


@dataclass(frozen=True)
class SearchedSettings(SkipSettings):
    """Settings of searches on a trained model."""

    search_steps: int = 100
    """Training steps before plans are compared, in which plans drawn evenly are skipped (DAS's warm-up)."""
    rows: int | None = None
    """Validation rows on which plans are compared; None takes a training batch."""


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

    Settings: type = SearchedSettings

    def look(self, losses: Losses, target: Target, session: Session, candidates: list[Block],
             generator: torch.Generator) -> Found:  # fmt: skip
        """The search itself; `losses` pays for each plan once."""
        raise NotImplementedError

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, target: Target
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        batch = validation_batch(session, self.settings.rows, self.name)
        train_evenly(self, session, candidates, supernet, target)
        folder = search_folder(session)
        losses = PlanLosses(supernet.with_task, supernet.switches, [batch])
        evaluator = Evaluator(losses, [b.path for b in candidates], None if folder is None else folder / "losses.json",
                              _trained(supernet))  # fmt: skip
        found = self.look(evaluator, target, session, candidates, torch.Generator().manual_seed(session.seed))
        compared = [{"plan": list(p), "loss": evaluator.known[p]} for p in evaluator.asked]
        return found.plan, found.scores, evaluator.evaluations, {"updates": found.trace, "compared": compared}


def validation_batch(session: Session, rows: int | None, name: str) -> dict[str, torch.Tensor]:
    """The one batch on which plans are compared.

    Raises:
        ValueError: if the validation split has fewer rows than a batch.
    """
    return next(session.batches("validation", rows))


def train_evenly(method: Skipping, session: Session, candidates: list[Block], supernet: Supernet,
                 target: Target) -> None:  # fmt: skip
    """Train the supernet's adapters and head while plans drawn evenly are skipped; kept in the run's search folder."""
    from transformers import TrainerCallback

    folder = search_folder(session)
    file = None if folder is None else folder / "supernet.safetensors"
    key = hashlib.sha256(search_key(method, session, candidates).encode()).hexdigest()
    if file is not None and _restore(supernet, file, key):
        return
    generator = torch.Generator()

    class Skip(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            generator.manual_seed(1_000_003 * session.seed + state.global_step)  # the same after resuming
            order = torch.randperm(len(candidates), generator=generator).tolist()
            choose(supernet.switches, target.fill(order))

    session.fit(supernet.with_task, method.settings.search_steps, [Skip()])
    if file is not None:
        with replace_file(file) as partial:
            save_file(_learned(supernet), partial, metadata={"key": key})


def _learned(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {n: p.detach().cpu().contiguous() for n, p in supernet.with_task.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(supernet: Supernet, file: Path, key: str) -> bool:
    """Take the trained parameters of an interrupted run, if they are of this search."""
    from safetensors import safe_open

    if not file.exists():
        return False
    with safe_open(file, "pt") as opened:
        if (opened.metadata() or {}).get("key") != key:
            return False
    own = dict(supernet.with_task.named_parameters())
    for name, value in load_file(file).items():
        own[name].copy_(value)
    return True


def _trained(supernet: Supernet) -> str:
    """A hash of the trained parameters, on which losses depend."""
    digest = hashlib.sha256()
    for name, value in sorted(_learned(supernet).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()
