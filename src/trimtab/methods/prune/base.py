"""Pruning = score, allocate, act; and the calibration that scores need.

    score(weight, evidence) -> (out, in)                   how much each weight matters            scores.py
    allocate(scores, weights, sparsity) -> counts          how many weights each tensor gives      allocations.py
    act                                                    the smallest scores of each tensor go; zeros are kept

Most pruners are a score and an allocation by name. Those that repeat this in steps, learn the masks, or change the
weights that they keep, override `find`. Allocations can be exchanged in any of them where that makes sense.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Anatomy, Weight
from trimtab.methods.base import Method
from trimtab.methods.prune.allocations import ALLOCATIONS
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence, collect, rows_and_columns
from trimtab.methods.prune.masks import VALUES, Masks, clear_weights, keep_zeros, largest_of_each, smallest
from trimtab.methods.prune.scores import SCORES, matrix, parameter
from trimtab.methods.session import Session
from trimtab.storage.bits import pack

if TYPE_CHECKING:
    from transformers import TrainerCallback


DEFAULT_SPARSITY = 0.63


@dataclass(frozen=True)
class PruneSettings:
    """Settings of every pruner."""

    sparsity: float | None = None
    """Share of the prunable weights that become zero, in [0, 1); None: 0.63, or what the pattern says."""
    pattern: str | None = None
    """`n:m`, such as 2:4: exactly n of every m inputs of an output that follow each other are kept; None: any."""
    allocation: str | None = None
    """How many weights each tensor gives: uniform, global, modality, multimodal or ecoflap; None: the pruner's own."""
    batches: int = 32
    """Calibration batches, for pruners that need them; a step's, for those that work in steps."""
    batch_size: int = 32
    """Rows a calibration batch."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of passes over calibration data; `auto`: bf16 where the device multiplies it natively. Sums are in fp32."""
    convolutions: bool = False
    """Whether convolutions are pruned too, as matrices (out, in * kh * kw / groups) over the patches they read."""
    allow_empty_tower: bool = False
    """Whether all the weights of a tower may go; otherwise that is an error."""

    def __post_init__(self) -> None:
        share = DEFAULT_SPARSITY
        if self.n_of_m:
            share = 1 - self.n_of_m[0] / self.n_of_m[1]
            self._check_pattern(share)
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", share)  # from here on it is a number
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), found {self.sparsity}")
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches and batch_size must be at least 1, found {self.batches} and {self.batch_size}")
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"precision must be one of fp32, bf16, auto, found {self.precision!r}")
        if self.allocation is not None:
            ALLOCATIONS[self.allocation]

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """The pattern as numbers; None without one."""
        if self.pattern is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        n, m = map(int, found.groups()) if found else (0, 0)
        if not 0 < n < m:
            raise ValueError(
                f"pattern: expected 'n:m' with 0 < n < m, such as '2:4' (2 of 4 are kept), found {self.pattern!r}"
            )
        return n, m

    def _check_pattern(self, share: float) -> None:
        if self.sparsity is not None and abs(self.sparsity - share) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern!r} sets the sparsity to {share:g}, found sparsity: {self.sparsity}; "
                "leave out one of them"
            )
        if self.allocation is not None:
            raise ValueError(
                f"pattern {self.pattern!r} says how many weights each tensor gives, found allocation: "
                f"{self.allocation!r}; leave out one of them"
            )


@dataclass(frozen=True)
class StepSettings(PruneSettings):
    """Settings of pruners that approach the sparsity in steps."""

    steps: int = 4
    """How many times to prune a little more; the papers take 60."""
    schedule: str = "exponential"
    """Sparsity after step i of n: `exponential` 1 - (1 - s)^(i/n), or `linear` s i/n."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, found {self.steps}")
        if self.schedule not in ("exponential", "linear"):
            raise ValueError(f"schedule must be 'exponential' or 'linear', found {self.schedule!r}")

    def levels(self, sparsity: float) -> list[float]:
        """The sparsity after each step; the last is the one asked for."""
        shares = [(i + 1) / self.steps for i in range(self.steps)]
        if self.schedule == "linear":
            return [sparsity * share for share in shares]
        return [1 - (1 - sparsity) ** share for share in shares]


class Pruner(Method):
    """The lever that every pruner shares: masks found once, applied to the weights, and kept while training.

    Attributes:
        score: name of its score in `SCORES`.
        allocation: name of its own allocation in `ALLOCATIONS`.
        rounds: how often it goes over calibration data for one sparsity; 0 if it needs none.
        changes_weights: whether it gives kept weights new values.
        shares: whether several processes can share its calibration data.
        finds: whether it finds masks, rather than being given them.
    """

    lever = "prune"
    trains = "nothing"
    changes = "values"
    Settings = PruneSettings
    settings: PruneSettings
    score: ClassVar[str]
    allocation: ClassVar[str]
    changes_weights: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    finds: ClassVar[bool] = True

    @property
    def rounds(self) -> int:
        return 1 if SCORES[self.score].needs else 0

    # --- finding masks ---

    def masks(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        """What `find` finds, checked, and the same in every process.

        Raises:
            ValueError: beside what `find` raises, if the pattern does not fit a weight, a tower is emptied, or the
                processes of a group cannot work together: models differ, or the pruner does not share its data.
        """
        plain, anatomy = calibration.plain, calibration.anatomy
        _, group = self.settings.n_of_m or (1, 1)
        for weight in anatomy.weights(plain, self.settings.convolutions):
            _, inputs = rows_and_columns(plain, weight)
            if inputs % group:
                raise ValueError(
                    f"pattern {self.settings.pattern!r}: '{weight.path}' has {inputs} inputs, which groups of "
                    f"{group} do not divide: choose another pattern, or name '{weight.module}' in the `heads` of an "
                    "anatomy of your own, which leaves it whole"
                )
        _, size = processes.world()
        if size > 1 and self.rounds and not self.shares:
            raise ValueError(
                f"{self.name} cannot share its calibration among processes, found {size}: "
                "prune in one process, save the masks, and load them in all"
            )
        if size > 1:
            prints = processes.weights_print(self.prunable(calibration).values())
            processes.same(prints, f"the {size} processes hold different models: load the same checkpoint in all")
        for found in self.find(calibration, sparsities):
            self.check(found, anatomy)
            yield found.from_first_process()

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        """Masks for one sparsity after another; the model is afterwards as before.

        Here: one calibration, one score for each weight, and an allocation for each sparsity.
        """
        weights = self.prunable(calibration)
        score = SCORES[self.score]
        evidence = {w: [Evidence(len(t))] for w, t in weights.items()}
        if score.needs:
            evidence = collect(calibration, weights, score.needs, next(calibration.rounds()))
        scores = {}
        for weight, tensor in weights.items():
            scores[weight] = score(tensor, evidence.pop(weight))
        for sparsity in sparsities:
            yield found_masks(self.cut(scores, weights, sparsity))

    def prunable(self, calibration: Calibration) -> dict[Weight, Tensor]:
        """The prunable matrices (out, in) of the calibrated model, convolutions among them if the settings say so."""
        return prunable(calibration.plain, calibration.anatomy, self.settings.convolutions)

    def counts(self, scores: dict[Weight, Tensor], weights: dict[Weight, Tensor], sparsity: float) -> dict[Weight, int]:
        """How many weights each tensor gives, by the allocation that was set or the pruner's own."""
        return ALLOCATIONS[self.settings.allocation or self.allocation](scores, weights, sparsity)

    def cut(self, scores: dict[Weight, Tensor], weights: dict[Weight, Tensor], sparsity: float) -> dict[Weight, Tensor]:
        """Masks (out, in), True = kept, from scores of every weight.

        With a pattern n:m every group keeps as many as the sparsity asks for, rounded up: n at the pattern's own, more
        in the first steps of a pruner that works in steps.
        """
        if self.settings.n_of_m:
            _, group = self.settings.n_of_m
            kept = math.ceil(group * (1 - sparsity) - 1e-6)
            return {w: largest_of_each(s, group, kept) for w, s in scores.items()}
        counts = self.counts(scores, weights, sparsity)
        return {w: self.remove(s, counts[w]) for w, s in scores.items()}

    def remove(self, scores: Tensor, count: int) -> Tensor:
        """The mask (out, in) of one tensor that gives `count` weights."""
        return smallest(scores, count)

    def check(self, masks: Masks, anatomy: Anatomy) -> None:
        """Raise a ValueError if a whole tower is gone, unless the settings allow it."""
        empty = [name for name, tower in summary(masks, anatomy)["towers"].items() if not tower["kept"]]
        if empty and not self.settings.allow_empty_tower:
            raise ValueError(
                f"{self.name}: no weight of the tower {empty[0]!r} is left at a sparsity of {masks.sparsity:.4f}: "
                "lower the sparsity, keep some of each tensor (allocation uniform) or modality (multimodal, "
                "modality), or set allow_empty_tower: true"
            )

    # --- the lever ---

    def prepare(self, session: Session) -> None:
        calibration = Calibration.of(session, self.settings.batches, self.settings.batch_size, self.settings.precision)
        started = time.perf_counter()
        masks = next(self.masks(calibration, [self.settings.sparsity]))
        self.tensors = masks.packed()
        self.state = {"pruner": self.name, **summary(masks, session.anatomy)}
        self.state["seconds"] = round(time.perf_counter() - started, 2)

    def assume(self, model: nn.Module, anatomy: Anatomy, session: Session | None = None) -> None:
        """Masks that keep everything, of the size of real ones: zeros change no cost but the number of non-zeros."""
        convolutions = getattr(self.settings, "convolutions", False)  # masks that are only given have no such setting
        found = {w.path: parameter(model, w) for w in _matrices(model, anatomy, convolutions)}
        shapes = {path: p.shape for path, p in found.items()}
        total = sum(shape.numel() for shape in shapes.values())
        self.tensors = {path: pack(torch.ones(shape, dtype=torch.bool)) for path, shape in shapes.items()}
        if self.changes_weights:
            self.tensors |= {path + VALUES: p.detach().flatten().clone() for path, p in found.items()}
        self.state = {"prunable": total, "kept": total - int(total * self.settings.sparsity)}

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        # Convolutions too: the masks that there are say which weights were pruned.
        found = {w.path: parameter(model, w) for w in anatomy.weights(model, convolutions=True)}
        masks = Masks.unpacked(self.tensors, {path: p.shape for path, p in found.items()})
        masks.apply(model)
        self.masked = [(found[path], mask.to(found[path].device)) for path, mask in masks.items()]
        return anatomy

    def callbacks(self) -> list[TrainerCallback]:
        return [keep_zeros(self.masked)]

    def finish(self, model: nn.Module) -> None:
        clear_weights(self.masked)

    def fold(self, model: nn.Module) -> None:
        self.finish(model)  # an update that a later method merged is multiplied by the mask


def summary(masks: Masks, anatomy: Anatomy) -> dict[str, Any]:
    """How many weights there are and stay, in all and in each tower, as a run keeps it."""
    towers: dict[str, dict[str, int]] = {}
    for path, mask in masks.items():
        owner = anatomy.owner(path)
        counts = towers.setdefault(owner.name if owner else "rest", {"prunable": 0, "kept": 0})
        counts["prunable"] += mask.numel()
        counts["kept"] += int(mask.sum())
    return {"prunable": masks.prunable, "kept": masks.kept, "sparsity": masks.sparsity, "towers": towers}


def prunable(model: nn.Module, anatomy: Anatomy, convolutions: bool = False) -> dict[Weight, Tensor]:
    """The prunable matrices (out, in) of a model; ValueError if there is none, or one is not finite."""
    weights = _matrices(model, anatomy, convolutions)
    for weight, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weight '{weight.path}' is not finite (NaN or infinite): check the checkpoint")
    return weights


def _matrices(model: nn.Module, anatomy: Anatomy, convolutions: bool) -> dict[Weight, Tensor]:
    weights = {w: matrix(model, w) for w in anatomy.weights(model, convolutions)}
    if not weights:
        kinds = "linear layer or convolution" if convolutions else "linear layer"
        stay = "embeddings stay whole" if convolutions else "embeddings stay whole, convolutions without `convolutions`"
        raise ValueError(
            f"nothing to prune: the towers of this anatomy ({anatomy.source}) hold no {kinds} "
            f"(scopes: {', '.join(p for t in anatomy.towers for p in t.scope)}); {stay}"
        )
    return weights


def found_masks(masks: dict[Weight, Tensor], weights: dict[Weight, Tensor] | None = None) -> Masks:
    """Masks, and changed weights, from matrices (out, in)."""
    changed = {w.path: w.stored(t) for w, t in (weights or {}).items()}
    return Masks({w.path: w.stored(m) for w, m in masks.items()}, changed)
