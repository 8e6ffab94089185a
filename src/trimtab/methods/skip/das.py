"""DAS (Wu et al., NeurIPS 2023): find the blocks that a task does not need, put small adapters in their place.

    search    every block has a gate g (0 at first) and can be switched to its skip adapter
              each training step skips k blocks drawn without replacement, in proportion to p = sigmoid(g)
              every `turn` steps, after warm-up: `subsets` distinct draws s on one validation batch,
                  r_s = exp(-loss with s skipped),   g_i += lr * sum over s holding i of (r_s - mean r) p_i (1 - p_i)
    plan      the k blocks with the largest gates (they were missed least)
    retrain   from the pretrained weights: kept blocks get a parallel adapter a sublayer (width b), skipped blocks are
              gone and one residual adapter as wide as theirs together (b * sublayers) stands in their place, so that
              trained parameters hardly change with k

Sections 3.2-3.3 of the paper, `meter_module_search.py` and `vilt_module_search.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block
from trimtab.methods.base import METHODS, Method, Session
from trimtab.methods.skip.adapters import Skipped, Switch, add_parallel_adapters, replace_module
from trimtab.registry import unknown


@dataclass(frozen=True)
class SkipSettings:
    """Settings of every way to skip."""

    skip: int = 2
    """How many blocks are skipped (k)."""
    reduction: int = 8
    """In-block adapters are width / reduction wide (published: 768 / 8 = 96)."""
    towers: tuple[str, ...] | None = None
    """Towers whose blocks are candidates; None for all."""
    plan: tuple[str, ...] | None = None
    """Paths of the blocks to skip; given, nothing is searched."""
    plan_seed: int | None = None
    """Seed of a random plan (`random-skip` only); None takes the recipe's."""

    def __post_init__(self) -> None:
        if self.skip < 0 or self.reduction < 1:
            raise ValueError(
                f"skip must be at least 0 and reduction at least 1, found {self.skip} and {self.reduction}"
            )


@dataclass(frozen=True)
class DASSettings(SkipSettings):
    """Settings of DAS."""

    search_steps: int = 300
    """Training steps of the search (published: 3 epochs)."""
    warmup: float = 1 / 3
    """Share of them before the first gate update (published: 1 of 3 epochs)."""
    turn: int = 10
    """Training steps between gate updates."""
    subsets: int = 3
    """Distinct plans compared at an update."""
    gate_rate: float = 1.0
    """Learning rate of the gates (METER's code defines 0.1 and never applies it: 1.0 is what ran)."""
    dropout_in_rewards: bool = True
    """Leave the model in training mode for rewards, as METER's and ViLT's code does; False evaluates."""


class Gates:
    """The search itself, free of models: one gate a candidate, drawing, and the update.

    Args:
        candidates: number of blocks that may be skipped.
        skip: how many are.
        rate: learning rate of the gates.
    """

    def __init__(self, candidates: int, skip: int, rate: float = 1.0):
        self.values = torch.zeros(candidates)
        self.skip, self.rate = skip, rate

    @property
    def probabilities(self) -> Tensor:
        return self.values.sigmoid()

    def draw(self) -> list[int]:
        """`skip` candidates without replacement, in proportion to their probabilities."""
        return torch.multinomial(self.probabilities, self.skip).tolist()

    def subsets(self, count: int) -> list[list[int]]:
        """Distinct draws, each sorted; ValueError if there are not that many."""
        from math import comb

        if comb(len(self.values), self.skip) < count:
            raise ValueError(f"{len(self.values)} blocks have fewer than {count} distinct plans that skip {self.skip}")
        found: list[list[int]] = []
        while len(found) < count:
            subset = sorted(self.draw())
            if subset not in found:
                found.append(subset)
        return found

    def update(self, subsets: list[list[int]], losses: list[float]) -> None:
        """Raise the gates of blocks that were missed less than average, lower the others."""
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64))
        p = self.probabilities.clone()
        slope = p * (1 - p)
        for subset, advantage in zip(subsets, (rewards - rewards.mean()).tolist(), strict=True):
            self.values[subset] += self.rate * advantage * slope[subset]

    def best(self) -> list[int]:
        """The `skip` candidates with the largest gates; among equals the last, as a stable ascending sort has them."""
        order = self.values.sort(stable=True).indices.tolist()
        return sorted(order[len(order) - self.skip :])


class Skipping(Method):
    """What every way to skip shares: candidates, and a model without the plan's blocks."""

    lever = "skip"

    def candidates(self, anatomy: Anatomy) -> list[Block]:
        """Blocks that may be skipped, in order.

        Raises:
            ValueError: if a tower is unknown, or fewer blocks can go than are to be skipped.
        """
        s = self.settings
        towers = s.towers or tuple(t.name for t in anatomy.towers)
        found = [b for name in towers for b in anatomy.blocks(name) if b.keeps_shape and b.sublayers]
        if s.skip >= len(found):
            raise ValueError(f"{self.name}: {s.skip} of {len(found)} skippable blocks in {towers} cannot be skipped")
        return found

    def set_plan(self, candidates: list[Block], chosen: list[int], **more: Any) -> None:
        paths = [b.path for b in candidates]
        self.state = {"skip": [paths[i] for i in chosen], "candidates": paths, **more}

    def prepare(self, session: Session) -> None:
        candidates = self.candidates(session.anatomy)
        if self.settings.plan is None:
            self.search(session, candidates)
            return
        paths = [b.path for b in candidates]
        for path in self.settings.plan:
            if path not in paths:
                raise ValueError(f"{self.name}: plan: {unknown('block', path, paths)}")
        self.set_plan(candidates, [paths.index(p) for p in self.settings.plan])

    def search(self, session: Session, candidates: list[Block]) -> None:
        raise NotImplementedError

    def assume(self, model: nn.Module, anatomy: Anatomy) -> None:
        """The last k candidates: every block of a tower costs the same."""
        candidates = self.candidates(anatomy)
        chosen = list(range(len(candidates) - self.settings.skip, len(candidates)))
        if self.settings.plan is not None:
            chosen = [i for i, b in enumerate(candidates) if b.path in self.settings.plan]
        self.set_plan(candidates, chosen)

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        skipped = set(self.state["skip"])
        for block in self.candidates(anatomy):
            bottleneck = block.width // self.settings.reduction
            if block.path in skipped:
                wide = Skipped(block, bottleneck * len(block.sublayers)).to(_device(model, block.path))
                replace_module(model, block.path, wide)
            else:
                add_parallel_adapters(model, block, bottleneck)
        train_adapters(model, anatomy)
        towers = tuple(replace(t, blocks=tuple(b for b in t.blocks if b.path not in skipped)) for t in anatomy.towers)
        return replace(anatomy, towers=towers)


def train_adapters(model: nn.Module, anatomy: Anatomy) -> None:
    """What DAS trains in the model: adapters, and the heads (pooler and projections)."""
    heads = anatomy.heads
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if any(p.startswith("das_") or p in ("adapter", "replacement") for p in parts) or any(
            name.startswith(h + ".") for h in heads
        ):
            parameter.requires_grad_(True)


def _device(model: nn.Module, path: str) -> torch.device:
    return next(model.get_submodule(path).parameters()).device


@METHODS.register("das")
class DAS(Skipping):
    """Searched skipping, retrained with adapters."""

    name = "das"
    Settings = DASSettings

    def search(self, session: Session, candidates: list[Block]) -> None:
        s = self.settings
        model = copy.deepcopy(session.model)
        subject = session.locate(model)
        switches = []
        for block in candidates:
            bottleneck = block.width // s.reduction
            add_parallel_adapters(subject, block, bottleneck)
            module = subject.get_submodule(block.path)
            other = Skipped(block, bottleneck * len(block.sublayers)).to(_device(subject, block.path))
            switches.append(Switch(module, other))
            replace_module(subject, block.path, switches[-1])
        train_adapters(subject, session.anatomy)
        gates = Gates(len(candidates), s.skip, s.gate_rate)
        if s.skip:
            trace: list[dict[str, Any]] = []
            session.fit(model, s.search_steps, [_searching(model, switches, gates, s, session, trace)])
        else:
            trace = []
        gate_values = {b.path: round(g, 6) for b, g in zip(candidates, gates.values.tolist(), strict=True)}
        self.set_plan(candidates, gates.best(), gates=gate_values, updates=trace)


def _searching(model: nn.Module, switches: list[Switch], gates: Gates, s: DASSettings, session: Session, trace: list):
    """The callback that draws a plan before every step and updates the gates after every `turn`."""
    from transformers import TrainerCallback

    batches = session.batches("validation")

    def choose(subset: list[int]) -> None:
        for i, switch in enumerate(switches):
            switch.skip = i in subset

    @torch.no_grad()
    def rewards(batch: dict[str, Tensor], subsets: list[list[int]]) -> list[float]:
        losses = []
        for subset in subsets:
            choose(subset)
            losses.append(float(model(**batch)["loss"]))
        return losses

    class Searching(TrainerCallback):
        count = 0

        def on_step_begin(self, args, state, control, **kwargs):
            choose(gates.draw())

        def on_step_end(self, args, state, control, **kwargs):
            self.count += 1
            if self.count < s.turn or state.global_step <= s.warmup * state.max_steps:
                return
            self.count = 0
            if not s.dropout_in_rewards:
                model.eval()
            subsets = gates.subsets(s.subsets)
            losses = rewards(next(batches), subsets)
            model.train()
            gates.update(subsets, losses)
            values = [round(g, 6) for g in gates.values.tolist()]
            trace.append({"step": state.global_step, "subsets": subsets, "losses": losses, "gates": values})

    return Searching()
