"""Pruning = score, allocate, act; and the calibration that scores need.

    score(weight, evidence) -> (out, in)                   how much each weight matters            scores.py
    allocate(scores, weights, sparsity) -> counts          how many weights each tensor gives      allocations.py
    act                                                    the smallest scores of each tensor go; zeros are kept

Most pruners are a score and an allocation by name. Those that repeat this in steps, learn the masks, or change the
weights that they keep, override `find`. Allocations can be exchanged in any of them where that makes sense.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab import processes
from trimtab.anatomy import Anatomy, Weight
from trimtab.anatomy.structure import under
from trimtab.anatomy.weights import SHARED, left_whole
from trimtab.memory import give_back
from trimtab.methods.base import Method
from trimtab.methods.prune.allocations import ALLOCATIONS, Matrices, floored
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence, Found, collect
from trimtab.methods.prune.given import check_settings, check_weights
from trimtab.methods.prune.made import Made, as_stored, sizes
from trimtab.methods.prune.masks import VALUES, Masks, keep_zeros, print_of
from trimtab.methods.prune.prunable import check_stored, left_out, matrices, prunable
from trimtab.methods.prune.scores import SCORES, Scores
from trimtab.methods.prune.selection import largest_of_each, smallest
from trimtab.methods.prune.settings import DEFAULT_SPARSITY, PruneSettings
from trimtab.methods.prune.settle import Settling, apart, told
from trimtab.methods.prune.totals import rows_and_columns
from trimtab.methods.session import Session
from trimtab.sizes import as_usual
from trimtab.storage.bits import Bits, pack

if TYPE_CHECKING:
    from transformers import TrainerCallback

_LARGE = 1 << 19  # numbers of a mask beside which it is worth a moment to give memory back


class Pruner(Method):
    """The lever that every pruner shares: masks found once, applied to the weights, and kept while training.

    Attributes:
        score: name of its score in `SCORES`.
        allocation: name of its own allocation in `ALLOCATIONS`.
        rounds: how often it goes over calibration data for one sparsity; 0 if it needs none.
        changes_weights: whether it gives kept weights new values.
        shares: whether several processes share its calibration data; if not, each goes over all of them.
    """

    lever = "prune"
    trains = "nothing"
    changes = "values"
    Settings: ClassVar[type] = PruneSettings
    settings: PruneSettings
    score: ClassVar[str]
    allocation: ClassVar[str]
    changes_weights: ClassVar[bool] = False
    shares: ClassVar[bool] = True

    settled: Sequence[Settling[Any]] = ()  # rounds of the calibration of the masks that were found last
    assumed = False  # whether the masks stand for those that data would give

    @property
    def rounds(self) -> int:
        return 1 if SCORES[self.score].needs else 0

    # --- finding masks ---

    def masks(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        """What `find` finds, checked, and the same in every process.

        Raises:
            ValueError: beside what `find` raises, if the pattern does not fit a weight, a tower is emptied, or the
                processes of a group cannot work together: models or batches differ.
        """
        plain, anatomy = calibration.plain, calibration.anatomy
        if self.settings.until is not None and not self.rounds:
            raise ValueError(f"until: {self.name} needs no calibration data; leave it out")
        _, group = self.settings.n_of_m or (1, 1)
        weights = list(self.prunable(calibration))
        self._warn(calibration, weights)
        for weight in weights:
            _, inputs = rows_and_columns(plain, weight)
            if inputs % group:
                raise ValueError(
                    f"pattern {self.settings.pattern!r}: '{weight.path}' has {inputs} inputs, which groups of "
                    f"{group} do not divide: choose another pattern, or name '{weight.module}' in the `heads` of an "
                    "anatomy of your own, which leaves it whole"
                )
        allocation = getattr(self.settings, "allocation", None) or self.allocation
        by_modality = self.settings.pattern is None and allocation in ("modality", "multimodal")
        if by_modality and len(anatomy.towers) > 1:
            for tower in anatomy.towers:
                tower.need(self.name, "modality")
        _, size = processes.world()
        if size > 1:
            calibration.alike = not self.shares  # then each process goes over all batches, which must be the same
            prints = processes.weights_print(self.prunable(calibration).values())
            processes.same(prints, f"the {size} processes hold different models: load the same checkpoint in all")
        for found in self.find(calibration, sparsities):
            self.check(found, anatomy)
            found.found_by = self.name
            found.calibration = told(self.settled)
            if found.weights:
                found.originals = {w.path: print_of(w.of(plain)) for w in weights if w.path in found.weights}
            yield found.from_first_process()

    def _warn(self, calibration: Calibration, weights: list[Weight]) -> None:
        """Warn of layers that share their weights with what is never pruned, and if much of the blocks stays whole."""
        whole = left_whole(calibration.anatomy, calibration.plain, {w.path for w in weights})
        if shared := next((kind for kind in whole if kind.what == SHARED), None):
            warnings.warn(
                f"{self.name}: {shared}, which are never pruned: they stay whole; to prune such a layer give it a "
                "parameter of its own",
                stacklevel=2,
            )
        share, first = left_out(calibration.plain, calibration.anatomy, weights)
        if share > 0.05:
            unseen = ""
            if calibration.blind:
                unseen = "; matrices that a module multiplies by itself are found where `batches` are given"
            convolutions = "" if self.settings.convolutions else "; for convolutions set `convolutions: true`"
            warnings.warn(
                f"{self.name}: {share:.0%} of the weights in the towers' blocks stay whole, the first is '{first}': "
                f"the sparsity is that of the others{unseen}{convolutions}",
                stacklevel=2,
            )

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        """Masks for one sparsity after another; the model is afterwards as before.

        Here: one calibration, one score for each weight, and an allocation for each sparsity. One tensor's scores and
        mask are in memory at a time.
        """
        weights = self.prunable(calibration)
        score = SCORES[self.score]
        _tidy(weights.sizes.values())
        evidence = {w: [Evidence(rows_and_columns(calibration.plain, w)[0])] for w in weights}
        if score.needs:
            settling = self.settling(lambda halves: max(self.apart(weights, halves, s) for s in sparsities), first=True)
            evidence = collect(calibration, weights, score.needs, next(calibration.rounds()), settling)
        scores = Scores(score, weights, evidence)
        for sparsity in sparsities:
            yield found_masks(self.cut(scores, weights, sparsity), weights.sizes)

    def settling(self, distance: Callable[[Any], float], first: bool = False) -> Settling[Any] | None:
        """What ends a round of calibration; None if it goes over all batches.

        Args:
            distance: of the masks of two halves, from what these are.
            first: the first round of calibration for the masks that are looked for.
        """
        if self.settings.until is None:
            return None
        own = Settling(self.name, self.settings.until, distance)
        self.settled = [own] if first else [*self.settled, own]
        return own

    def apart(self, weights: Matrices, halves: tuple[Found, Found], sparsity: float) -> float:
        """How far the masks of two halves' evidence are at a sparsity."""
        one, other = (self.cut(Scores(SCORES[self.score], weights, found), weights, sparsity) for found in halves)
        return apart(one, other)

    def prunable(self, calibration: Calibration) -> Made:
        """The prunable matrices (out, in) of the calibrated model, convolutions among them if the settings say so, and
        those that its first batch shows."""
        plain, anatomy, convolutions = calibration.plain, calibration.anatomy, self.settings.convolutions
        check_stored(plain, anatomy, convolutions)
        seen = calibration.seen(anatomy.weights(plain, convolutions))
        return prunable(plain, anatomy, convolutions, seen)

    def matrices(self, model: nn.Module, anatomy: Anatomy) -> list[Weight]:
        """What `prunable` finds without data, and without the values."""
        return matrices(model, anatomy, self.settings.convolutions)

    def counts(self, scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
        """How many weights each tensor gives, by the allocation that was set or the pruner's own, above the floor."""
        found = ALLOCATIONS[self.settings.allocation or self.allocation](scores, weights, sparsity)
        return floored(found, sizes(weights), self.settings.floor) if self.settings.floor else found

    def cut(self, scores: Matrices, weights: Matrices, sparsity: float) -> Iterator[tuple[Weight, Tensor]]:
        """The mask (out, in) of one weight after another, True = kept, from scores of all.

        With a pattern n:m every group keeps as many as the sparsity asks for, rounded up: n at the pattern's own, more
        in the first steps of a pruner that works in steps.
        """
        if self.settings.n_of_m:
            _, group = self.settings.n_of_m
            kept = math.ceil(group * (1 - sparsity) - 1e-6)
            yield from ((w, largest_of_each(scores[w], group, kept, as_stored(weights, w))) for w in scores)
            return
        counts = self.counts(scores, weights, sparsity)
        _tidy(sizes(scores).values())  # after thresholds over many tensors
        yield from ((w, self.remove(scores[w], counts[w], as_stored(weights, w))) for w in scores)

    def remove(self, scores: Tensor, count: int, weight: Tensor) -> Tensor:
        """The mask (out, in) of one tensor that gives exactly `count` weights: those of the smallest scores, of equal
        ones the smallest weights."""
        return smallest(scores, count, weight)

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
        """Find the masks, or read those that the setting `masks` names."""
        if self.settings.masks is not None:
            found = Masks.read(self.settings.masks, session.plain)
            self.take(found, session.anatomy, session.plain, self.settings.sparsity)
            self.state["from"] = self.settings.masks
            return
        s = self.settings
        once = 0 if s.until is None else getattr(s, "steps", 1)
        self.calibrate(Calibration.of(session, s.batches, s.batch_size, s.precision, once))

    def calibrate(self, calibration: Calibration) -> None:
        """Find the masks on a model and its data."""
        started = time.perf_counter()
        masks = next(self.masks(calibration, [self.asked]))
        self.take(masks, calibration.anatomy)
        self.state["seconds"] = round(time.perf_counter() - started, 2)

    @property
    def asked(self) -> float:
        """The sparsity that the settings ask for."""
        return DEFAULT_SPARSITY if self.settings.sparsity is None else self.settings.sparsity

    def take(self, masks: Masks, anatomy: Anatomy, given: nn.Module | None = None, asked: float | None = None) -> None:
        """Take masks over as what this pruner found, with the numbers that a run keeps.

        Args:
            masks: what was found.
            anatomy: of the model.
            given: the model to which they are given, if they were found before and not just now by this pruner: then
                the settings must not contradict them, and a prunable weight without a mask is warned of.
            asked: the sparsity that they should have.

        Raises:
            ValueError: if another pruner found them, or they are not what the settings say.
        """
        where = "masks" if self.settings.masks is None else f"masks: those of '{self.settings.masks}'"
        if masks.found_by not in ("", self.name):
            raise ValueError(f"{where} were found by {masks.found_by!r}, not by {self.name!r}: name {masks.found_by!r}")
        if given is not None:
            check_settings(masks, self.settings, asked, where)
            check_weights(masks, {w.path: w.of(given) for w in self.matrices(given, anatomy)}, where)
        self.tensors = masks.packed()
        shapes = {path: list(shape) for path, shape in masks.shapes.items()}
        self.state = {"pruner": masks.found_by, **summary(masks, anatomy), "shapes": shapes}
        if masks.calibration:
            self.state["calibration"] = masks.calibration
        if masks.originals:
            self.state["originals"] = masks.originals

    def assume(self, model: nn.Module, anatomy: Anatomy, session: Session | None = None) -> None:
        """Masks that keep everything, of the size of real ones: zeros change no cost but the number of non-zeros.

        Changed values are as many as will be kept; of a model of real tensors all, since masks that are applied must
        fit them.
        """
        share = self._assumed_share()
        found = {w.path: w.of(model) for w in self.matrices(model, anatomy)}
        made = torch.empty if isinstance(next(iter(found.values()), None), FakeTensor) else torch.ones
        self.tensors = {path: pack(made(p.shape, dtype=torch.bool)) for path, p in found.items()}
        for path, p in found.items() if self.changes_weights else ():
            kept = p.numel() - int(p.numel() * share) if isinstance(p, FakeTensor) else p.numel()
            self.tensors[path + VALUES] = p.detach().flatten()[:kept].clone()
        shapes = {path: list(p.shape) for path, p in found.items()}
        self.assumed = True
        total = sum(p.numel() for p in found.values())
        self.state = {"pruner": self.name, "prunable": total, "kept": total - self.zeros(total), "shapes": shapes}

    def _assumed_share(self) -> float:
        """The sparsity of the masks that the settings name, if they are there, else the one that is asked for."""
        given = self.settings.masks
        if given is None or not Path(given).exists():
            return self.asked
        with as_usual():  # what is in a file has values
            return Masks.read(given).sparsity

    def zeros(self, prunable: int) -> int:
        """How many of so many prunable weights are assumed to be zero."""
        return int(prunable * self._assumed_share())

    def costs_as(self) -> dict[str, Any]:
        """Pruners that prune the same matrices cost the same, but for the number of zeros; those that change weights
        store as many as they keep."""
        share = self._assumed_share() if self.changes_weights else None
        return {"lever": self.lever, "convolutions": self.settings.convolutions, "stores": share}

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Apply the masks.

        Raises:
            ValueError: if they are for another model, or a block of theirs was taken out before.
        """
        self.attached = Masks.unpacked(self.tensors, self.state["shapes"], self.state["pruner"])
        self.attached.calibration = self.state.get("calibration", {})
        self.attached.originals = self.state.get("originals", {})
        self.attached.apply(model)
        return anatomy

    def callbacks(self) -> list[TrainerCallback]:
        return [keep_zeros(self.attached)]

    def forget(self, paths: Collection[str], anatomy: Anatomy, model: nn.Module) -> None:
        """Let the masks of blocks go that were taken out; what is told of the sparsity is of what is left.

        A mask stays where a block that is left shares the weight.

        Args:
            paths: of the blocks.
            anatomy: of what is left.
            model: what is left.
        """
        share = self.state["kept"] / max(1, self.state["prunable"])
        left = self.attached.noted_on(model)
        self.attached = self.attached.without([p for p in self.attached if under(p, paths) and p not in left])
        self.tensors = self.attached.packed()
        shapes = {path: list(shape) for path, shape in self.attached.shapes.items()}
        if self.attached.originals:
            self.state["originals"] = self.attached.originals
        if self.assumed:  # the masks keep everything, see `assume`
            total = self.attached.prunable
            self.state |= {"prunable": total, "kept": round(share * total), "shapes": shapes}
        else:
            self.state |= {**summary(self.attached, anatomy), "shapes": shapes}

    def told(self) -> str:
        share = 1 - self.state["kept"] / max(1, self.state["prunable"])
        return f"{self.name}: {share:.1%} of {self.state['prunable']:,} prunable weights are zero"

    def fold(self, model: nn.Module) -> None:
        self.attached.enforce(model)  # an update that a later method merged is multiplied by the mask


def summary(masks: Masks, anatomy: Anatomy) -> dict[str, Any]:
    """How many weights there are and stay, in all and in each tower, as a run keeps it."""
    towers: dict[str, dict[str, int]] = {}
    for path, bits in masks.bits.items():
        owner = anatomy.owner(path)
        counts = towers.setdefault(owner.name if owner else "rest", {"prunable": 0, "kept": 0})
        counts["prunable"] += bits.shape.numel()
        counts["kept"] += bits.kept
    return {"prunable": masks.prunable, "kept": masks.kept, "sparsity": masks.sparsity, "towers": towers}


def found_masks(masks: Iterable[tuple[Weight, Tensor]], numbers: Mapping[Weight, int],
                weights: Mapping[Weight, Tensor] | None = None) -> Masks:  # fmt: skip
    """Masks, and changed weights, from matrices (out, in); the masks are taken and kept as bits one after another.

    Args:
        masks: each weight's, in their order.
        numbers: of elements of each weight. The room of all bits is taken before the first mask is asked for: small
            tensors that stay, among large ones that come and go, would keep an allocator from using their room again.
        weights: new values.
    """
    totals: dict[str, int] = {}
    for weight, number in numbers.items():
        totals[weight.path] = totals.get(weight.path, 0) + number
    room = {path: torch.empty(-(-number // 8), dtype=torch.uint8) for path, number in totals.items()}
    bits: dict[str, Bits] = {}
    _tidy(totals.values())  # after calibration
    for path, mask in _stored(masks):
        bits[path] = Bits(room[path].copy_(pack(mask)), mask.shape)
        if mask.numel() >= _LARGE:
            give_back()
    return Masks(bits, dict(_stored((weights or {}).items())))


def _tidy(numbers: Iterable[int]) -> None:
    """Give back what is free before something large comes, if a matrix is so large that it is worth a moment."""
    if max(numbers, default=0) >= _LARGE:
        give_back()


def _stored(matrices: Iterable[tuple[Weight, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Matrices (out, in) as their parameters store them, all experts of a parameter, which follow each other,
    together."""
    for path, members in groupby(matrices, lambda pair: pair[0].path):
        several = [(weight.expert, weight.stored(matrix)) for weight, matrix in members]
        yield path, several[0][1] if several[0][0] is None else torch.stack([piece for _, piece in several])
