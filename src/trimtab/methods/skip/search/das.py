"""DAS (Wu et al., NeurIPS 2023): find the blocks that a task does not need, put small adapters in their place.

    search    every block has a gate g (0 at first) and can be switched to its skip adapter
              each training step skips k blocks drawn without replacement, in proportion to p = sigmoid(g)
              every `turn` steps, after warm-up: `subsets` distinct draws s on one validation batch,
                  r_s = exp(-loss with s skipped),   g_i += lr * sum over s holding i of (r_s - mean r) p_i (1 - p_i)
    plan      the k blocks with the largest gates (they were missed least)
    retrain   from the pretrained weights: kept blocks get a parallel adapter a sublayer (width b), skipped blocks are
              gone and one residual adapter as wide as theirs together (b * sublayers) stands in their place, so that
              trained parameters hardly change with k

Sections 3.2-3.3 of the paper, `meter_module_search.py` and `vilt_module_search.py`. The indices of gates are those of
the candidates, in the order of `towers`: METER's code has its six text layers first and then its six image layers, and
prints the two labels the wrong way round; here a gate carries its block's path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Block
from trimtab.methods.base import METHODS
from trimtab.methods.session import Session
from trimtab.methods.skip.base import Skipping, SkipSettings
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.evaluate import PlanLosses, check_finite, choose
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.supernet import Supernet
from trimtab.settings import within


@dataclass(frozen=True)
class DASSettings(SkipSettings):
    """Settings of DAS."""

    search_steps: int = 300
    """Training steps of the search (published: 3 epochs)."""
    warmup: float = 1 / 3
    """Share of them before the first gate update (published: 1 of 3 epochs)."""
    turn: int = 10
    """Training steps between gate updates (published: 10; LLaVA-DAS: 3)."""
    subsets: int = 3
    """Distinct plans compared at an update (published: 3; LLaVA-DAS: 5)."""
    gate_rate: float = 1.0
    """Learning rate of the gates: 1.0 is what ran (METER's code defines 0.1 and never applies it); LaVIN 0.05."""
    dropout_in_rewards: bool = True
    """Leave the model in training mode for rewards, as METER's and ViLT's code does; False evaluates, as LaVIN's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # a plan is judged against the mean of the others: one alone tells nothing
        within(vars(self), search_steps="[1, inf)", warmup="[0, 1]", turn="[1, inf)", subsets="[2, inf)",
               gate_rate="(0, inf)")  # fmt: skip


class Gates:
    """The search itself, free of models: one gate a candidate, drawing, and the update.

    Args:
        candidates: number of blocks that may be skipped.
        skip: how many are, or what a plan must save.
        rate: learning rate of the gates.
        generator: of the draws; None takes torch's global one.
    """

    def __init__(self, candidates: int, skip: int | Goal, rate: float = 1.0,
                 generator: torch.Generator | None = None):  # fmt: skip
        self.values = torch.zeros(candidates)
        self.goal = Goal.count(candidates, skip) if isinstance(skip, int) else skip
        self.rate, self.generator = rate, generator

    @property
    def probabilities(self) -> Tensor:
        return self.values.sigmoid()

    def draw(self) -> list[int]:
        """Candidates without replacement, in proportion to their probabilities, until they are enough."""
        most = self.goal.sizes()[-1]
        order = torch.multinomial(self.probabilities, most, generator=self.generator).tolist()
        return order if self.goal.unit == "blocks" else list(self.goal.fill(order))

    def subsets(self, count: int) -> list[list[int]]:
        """Distinct draws, each sorted; ValueError if there are not that many."""
        if len(list(islice(self.goal.plans(), count))) < count:
            raise ValueError(
                f"{len(self.values)} blocks have fewer than {count} distinct plans that skip {self.goal.needed:g} "
                f"{self.goal.unit}: lower `subsets`"
            )
        found: list[list[int]] = []
        while len(found) < count:
            subset = sorted(self.draw())
            if subset not in found:
                found.append(subset)
        return found

    def update(self, subsets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Raise the gates of blocks that were missed less than average, lower the others."""
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64))
        p = self.probabilities.clone()
        slope = p * (1 - p)
        for subset, advantage in zip(subsets, (rewards - rewards.mean()).tolist(), strict=True):
            self.values[list(subset)] += self.rate * advantage * slope[list(subset)]

    def best(self) -> list[int]:
        """The plan of the largest gates; among equals the last, as a stable ascending sort has them."""
        order = self.values.sort(stable=True).indices.tolist()
        return list(self.goal.fill(order[::-1]))


@METHODS.register("das")
class DAS(Skipping):
    """Searched skipping, retrained with adapters."""

    teaches = True
    Settings = DASSettings
    settings: DASSettings

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, goal: Goal, journal: Journal
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        s = self.settings
        generator = torch.Generator().manual_seed(session.seed)
        gates = Gates(len(candidates), goal, s.gate_rate, generator)
        gates.subsets(s.subsets)  # complains now, not after the warm-up
        generator.manual_seed(session.seed)
        if s.search_steps < (first := max(s.turn, int(s.warmup * s.search_steps) + 1)):
            raise ValueError(
                f"das: {s.search_steps} search_steps with a turn of {s.turn} and a warm-up of {s.warmup:g} never "
                f"update a gate: the first update comes after {first}"
            )
        search = _Search(supernet, gates, s, session, journal)
        session.fit(supernet.with_task, s.search_steps, [search.callback()])
        evaluations = sum(len(u["subsets"]) for u in search.trace)
        return tuple(gates.best()), gates.values.tolist(), evaluations, {"updates": search.trace}


class _Search:
    """What happens around the training steps: a plan before each, and every `turn` of them an update of the gates."""

    def __init__(self, supernet: Supernet, gates: Gates, settings: DASSettings, session: Session, journal: Journal):
        self.supernet, self.gates, self.settings, self.journal = supernet, gates, settings, journal
        self.batches = session.batches("validation")
        self.trace: list[dict[str, Any]] = []
        self.count = 0  # training steps since the last update

    def update(self, step: int) -> None:
        """Compare plans on the next validation batch."""
        s, gates, net = self.settings, self.gates, self.supernet
        losses_of = PlanLosses(net.with_task, net.switches, [next(self.batches)], s.dropout_in_rewards, common=False,
                               loss=net.loss)  # fmt: skip
        subsets = gates.subsets(s.subsets)
        losses = losses_of([tuple(x) for x in subsets])
        check_finite(subsets, losses, [b.path for b in net.candidates], gates.best())
        gates.update(subsets, losses)
        values = [round(g, 6) for g in gates.values.tolist()]
        self.trace.append({"step": step, "subsets": subsets, "losses": losses, "gates": values})

    def save(self, step: int) -> None:
        """Beside the checkpoint of that step, and before it is written: what resuming needs of the search."""
        assert self.gates.generator is not None
        state = {"gates": self.gates.values.tolist(), "count": self.count, "trace": self.trace,
                 "generator": self.gates.generator.get_state().numpy().tobytes().hex()}  # fmt: skip
        self.journal.write(f"gates-{step}", state)

    def load(self, step: int) -> None:
        """Go on from a checkpoint: the same gates, the same draws to come, the next validation batch.

        Raises:
            ValueError: if the gates of that step were not kept.
        """
        assert self.gates.generator is not None
        state = self.journal.read(f"gates-{step}")
        if state is None:
            raise ValueError(f"das: training goes on from step {step}, but the gates of that step were not kept in "
                             f"{self.journal.folder}: delete the checkpoints to search from the start")  # fmt: skip
        self.gates.values.copy_(torch.tensor(state["gates"]))
        self.count, self.trace[:] = state["count"], state["trace"]
        numbers = torch.frombuffer(bytearray.fromhex(state["generator"]), dtype=torch.uint8)
        self.gates.generator.set_state(numbers)
        for _ in self.trace:
            next(self.batches)

    def callback(self) -> Any:
        from transformers import TrainerCallback

        search = self

        class Searching(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                if state.global_step:
                    search.load(state.global_step)

            def on_step_begin(self, args, state, control, **kwargs):
                choose(search.supernet.switches, search.gates.draw())

            def on_step_end(self, args, state, control, **kwargs):
                search.count += 1
                if (
                    search.count >= search.settings.turn
                    and state.global_step > search.settings.warmup * state.max_steps
                ):
                    search.count = 0
                    search.update(state.global_step)
                if control.should_save:
                    search.save(state.global_step)

        return Searching()
