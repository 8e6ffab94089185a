"""Trying plans: the loss of the model with a plan's blocks skipped, on a batch that is the same for all plans.

    reward = exp(-loss)                                           (DAS, section 3.2)

A loss is asked for once: it is kept in memory, and in a journal if there is a folder for one, so that an interrupted
search runs again from the start at no cost, with the same draws and the same scores, until it is where it was.

Plans that begin alike compute alike: a block's output depends on the batch and on which of the blocks *before* it are
skipped. While a list of plans is tried in the order of their decisions, each block's last output is kept and given
back as long as nothing before it has changed (`studies/skip_search.py` measures what that is worth).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trimtab.divided import divided
from trimtab.methods.fitting import evaluating
from trimtab.methods.session import own_loss
from trimtab.methods.skip.budget import Indices
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.skipped import Switch
from trimtab.progress import progress
from trimtab.randomness import drawn_aside


class SearchError(ValueError):
    """A search that cannot go on.

    Attributes:
        plan: what it would have answered so far, by indices; None if it knew nothing yet.
    """

    def __init__(self, message: str, plan: Indices | None = None):
        super().__init__(message)
        self.plan = plan


def choose(switches: Sequence[Switch], plan: Sequence[int]) -> None:
    """Skip the blocks of a plan and no others."""
    for i, switch in enumerate(switches):
        switch.skip = i in plan


def mean_over_processes(losses: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each number over all processes, so that all of them go on with the same."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return list(losses)
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")  # joins the processes if the trainer has not done so yet
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


class PlanLosses:
    """The losses of plans on fixed batches, computed by a model with switches.

    Args:
        model: with switches in it.
        switches: the candidates, in the order of the indices.
        batches: the fixed batches; the loss of a plan is the mean over them.
        dropout: leave the model in the mode in which it trains, as METER's and ViLT's code does; else it evaluates.
        common: with dropout, give every plan the same random numbers, so that only its blocks tell it from another.
        reuse: give back what plans share instead of computing it again; never with dropout.
        loss: of a batch, a scalar; None takes what the model's output says.
    """

    def __init__(self, model: nn.Module, switches: Sequence[Switch], batches: Sequence[dict[str, Tensor]],
                 dropout: bool = False, common: bool = True, reuse: bool = True,
                 loss: Callable[[dict[str, Tensor]], Tensor] | None = None):  # fmt: skip
        self.model, self.switches, self.batches, self.common = model, switches, batches, common
        self.dropout, self.reuse = dropout, reuse and not dropout
        self.loss = loss or (lambda batch: own_loss(model(**batch)))
        self.order = list(range(len(switches)))  # of computation, once it is known
        self.computed = 0  # block calls that were computed, and not given back

    @torch.no_grad()
    def __call__(self, plans: Sequence[Indices]) -> list[float]:
        try:
            with divided(), nullcontext() if self.dropout else evaluating(self.model):
                losses = self._losses(plans)
        finally:
            for switch in self.switches:
                switch.before = switch.after = None
        return mean_over_processes(losses, next(self.model.parameters()).device)

    def _losses(self, plans: Sequence[Indices]) -> list[float]:
        # In the order of computation, so that neighbours share as long a beginning as they can.
        order = sorted(range(len(plans)), key=lambda p: [i in plans[p] for i in self.order])
        losses = [0.0] * len(plans)
        with progress("trying plans", len(plans) * len(self.batches), "pass") as job:
            for batch in self.batches:
                memory = _Memory(self.switches) if self.reuse else None
                for p in order:
                    choose(self.switches, plans[p])
                    losses[p] += self._loss(batch, memory) / len(self.batches)
                    job.add()
                if memory is not None:
                    self.order, self.computed = memory.order, self.computed + memory.computed
                    memory.close()
                else:
                    self.computed += len(self.switches) * len(plans)
        return losses

    def _loss(self, batch: dict[str, Tensor], memory: _Memory | None) -> float:
        if memory is not None:
            memory.start()
        if not (self.dropout and self.common):
            return float(self.loss(batch))
        with drawn_aside(seed=0):
            return float(self.loss(batch))


class _Memory:
    """The last output of every switch, given back while no decision up to it has changed since, and no later block
    has written into it."""

    def __init__(self, switches: Sequence[Switch]):
        self.switches = switches
        self.order: list[int] = []
        self.known: dict[int, tuple[tuple[bool, ...], Any, list[int]]] = {}
        self.decisions: list[bool] = []
        self.computed = 0
        for i, switch in enumerate(switches):
            switch.before = lambda i=i: self._before(i)
            switch.after = lambda out, i=i: self._after(i, out)

    def start(self) -> None:
        """Before each pass of the model."""
        self.decisions = []

    def _before(self, i: int) -> Any:
        if len(self.order) < len(self.switches) and i not in self.order:
            self.order.append(i)
        self.decisions.append(self.switches[i].skip)
        key, out, versions = self.known.get(i, (None, None, []))
        return out if key == tuple(self.decisions) and versions == _versions(out) else None

    def _after(self, i: int, out: Any) -> None:
        self.known[i] = (tuple(self.decisions), out, _versions(out))
        self.computed += 1

    def close(self) -> None:
        for switch in self.switches:
            switch.before = switch.after = None
        self.known.clear()
        self.order += [i for i in range(len(self.switches)) if i not in self.order]


def _versions(out: Any) -> list[int]:
    """How often each tensor was written into."""
    return [leaf._version for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


class Evaluator:
    """What searches ask: losses of plans, each paid for once.

    Args:
        losses: computes the losses of plans.
        paths: of the candidates, for messages.
        journal: where the losses so far are kept, and read if they are there. None keeps none.
        model: what tells the model that they are of; losses of another one are not used.
    """

    def __init__(self, losses: Callable[[Sequence[Indices]], list[float]], paths: Sequence[str],
                 journal: Journal | None = None, model: str = ""):  # fmt: skip
        self.losses, self.paths, self.journal, self.model = losses, list(paths), journal or Journal(None), model
        self.known: dict[Indices, float] = {}
        self.asked: dict[Indices, None] = {}  # of this search, in order: with a journal it starts empty again
        kept = self.journal.read("losses")
        if kept is not None and kept["model"] == model:
            self.known = {tuple(plan): loss for plan, loss in kept["losses"]}

    @property
    def evaluations(self) -> int:
        """How many different plans the search has asked for."""
        return len(self.asked)

    def __call__(self, plans: Sequence[Sequence[int]]) -> list[float]:
        """Losses of plans, in their order.

        Raises:
            SearchError: if one is not finite; the blocks of the plan are named.
        """
        wanted: list[Indices] = [tuple(sorted(p)) for p in plans]
        fresh = list(dict.fromkeys(p for p in wanted if p not in self.known))
        if fresh:
            found = self.losses(fresh)
            self.known |= {p: loss for p, loss in zip(fresh, found, strict=True) if math.isfinite(loss)}
            self.journal.write("losses", {"model": self.model, "losses": list(self.known.items())})
            check_finite(fresh, found, self.paths, self.best())
        self.asked |= dict.fromkeys(wanted)
        return [self.known[p] for p in wanted]

    def best(self) -> Indices | None:
        """The plan with the lowest loss of all that the search has asked for."""
        return min(self.asked, key=lambda p: (self.known[p], p), default=None)


def check_finite(plans: Sequence[Sequence[int]], losses: Sequence[float], paths: Sequence[str],
                 so_far: Sequence[int] | None) -> None:  # fmt: skip
    """Raise a SearchError that names the blocks of the first plan whose loss is no number."""
    for plan, loss in zip(plans, losses, strict=True):
        if not math.isfinite(loss):
            blocks = ", ".join(paths[i] for i in plan) or "nothing"
            raise SearchError(
                f"the loss with {blocks} skipped is {loss}: lower the learning rate, or train in full precision",
                None if so_far is None else tuple(so_far),
            )
