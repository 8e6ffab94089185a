"""Score: how much each weight matters, from the weight and what calibration found out about it.

    score(weight, evidence) -> (out, in)     from a matrix (out, in) and its `Evidence`; the smallest scores go

A score says which evidence it needs, and calibration collects only that. Adding one is a function with `@score(...)`.
Scores are made tensor by tensor whenever they are looked at (`Scores`): a model's scores are never held together, but
for those that are dear to make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.anatomy import Weight
from trimtab.methods.prune.evidence import Evidence, Need
from trimtab.methods.prune.made import Made, as_stored, sizes
from trimtab.registry import Registry


@dataclass(frozen=True)
class Score:
    """A score function with the evidence that it needs.

    Attributes:
        function: (weight (out, in), evidence) -> scores (out, in).
        needs: fields of `Evidence` that it reads.
        held: whether the scores of all tensors are kept once they are made, since making them again costs too much.
        drawn: whether it draws from torch's global generator of the CPU.
        stored: whether it takes the weight in the precision in which it is stored, and needs no copy in a higher one.
    """

    function: Callable[[Tensor, Evidence], Tensor]
    needs: frozenset[Need]
    held: bool = False
    drawn: bool = False
    stored: bool = False

    def __call__(self, weight: Tensor, evidence: list[Evidence]) -> Tensor:
        """Scores of a matrix (out, in), whose rows are divided among the evidence of its parts."""
        if len(evidence) == 1:
            return self.function(weight, evidence[0])
        parts = weight.split([e.rows for e in evidence])
        return torch.cat([self.function(part, e) for part, e in zip(parts, evidence, strict=True)])


SCORES: Registry[Score] = Registry("score")


def score(
    name: str, *needs: Need, held: bool = False, drawn: bool = False, stored: bool = False
) -> Callable[[Callable], Callable]:
    """Register a score function under a name, with the evidence that it needs; the others as of `Score`."""

    def add(function: Callable[[Tensor, Evidence], Tensor]) -> Callable[[Tensor, Evidence], Tensor]:
        SCORES.register(name)(Score(function, frozenset(needs), held, drawn, stored))
        return function

    return add


class Scores(Made):
    """Scores (out, in) of all weights, made when they are looked at; the same at every look."""

    def __init__(self, score: Score, weights: Mapping[Weight, Tensor], evidence: Mapping[Weight, list[Evidence]]):
        look = partial(as_stored, weights) if score.stored else weights.__getitem__
        super().__init__(sizes(weights), lambda weight: score(look(weight), evidence[weight]))
        self.kept: dict[Weight, Tensor] | None = {} if score.held else None
        self.draws: dict[Weight, Tensor] = {}  # state of the generator before each weight's draw
        for weight in weights if score.drawn else ():
            self.draws[weight] = torch.get_rng_state()
            self.make(weight)

    def __getitem__(self, weight: Weight) -> Tensor:
        if self.kept is not None:
            if weight not in self.kept:
                self.kept[weight] = super().__getitem__(weight)
            return self.kept[weight]
        if weight not in self.draws:
            return super().__getitem__(weight)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.draws[weight])
            return super().__getitem__(weight)


def matrix(model: nn.Module, weight: Weight) -> Tensor:
    """A prunable weight as (out, in), detached and in at least single precision; a view where that needs no copy."""
    found = weight.matrix(weight.of(model).detach())
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


@contextmanager
def borrowed(model: nn.Module, weights: Iterable[Weight]) -> Iterator[dict[Weight, Tensor]]:
    """The weights as matrices (out, in) that may be written to meanwhile; afterwards the model has its own values
    again.

    Yields:
        Views of the parameters themselves, not of copies: what is written is what the model computes with.
    """
    weights = list(weights)
    parameters = {w.path: w.of(model) for w in weights}  # once, though several experts stand in it
    own = {path: p.detach().clone() for path, p in parameters.items()}
    kernels = {w.path for w in weights if w.kernel}
    held = {path: p.data for path, p in parameters.items() if path in kernels and not p.is_contiguous()}
    for path, data in held.items():  # channels last: (out, in * kh * kw) is no view of it
        parameters[path].data = data.contiguous()
    try:
        yield {w: w.matrix(parameters[w.path].detach()) for w in weights}
    finally:
        with torch.no_grad():
            for path, p in parameters.items():
                p.data = held.get(path, p.data)
                p.copy_(own[path])
