"""SNIP (Lee et al., ICLR 2019): the weights go whose removal changes the loss least, to first order.

    s_ij = |w_ij dL/dw_ij|      gradient averaged over calibration batches; one threshold over the model

IterSNIP (de Jorge et al., ICLR 2021) prunes a little more in each of several steps: every step computes gradients anew,
on batches of its own, where the weights that have gone are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner, found_masks
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence, collect
from trimtab.methods.prune.made import sizes
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.scores import SCORES, borrowed, score
from trimtab.methods.prune.settings import StepSettings


@score("sensitivity", "gradient")
def sensitivity(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w g|. SNIP divides by the sum over the model, a constant that changes no order."""
    return (weight * evidence.gradient).abs_()


@METHODS.register("snip")
class SNIP(Pruner):
    """Connection sensitivity |w g| at once."""

    score = "sensitivity"
    allocation = "global"


@METHODS.register("itersnip")
class IterSNIP(Pruner):
    """Connection sensitivity |w g| in steps, each on gradients of the model pruned so far."""

    score = "sensitivity"
    allocation = "global"
    Settings = StepSettings
    settings: StepSettings

    @property
    def rounds(self) -> int:
        return self.settings.steps

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        for sparsity in sparsities:
            *_, (_, last) = self.trace(calibration, sparsity)
            yield found_masks(last.items(), sizes(last))

    def trace(
        self, calibration: Calibration, sparsity: float
    ) -> Iterator[tuple[dict[Weight, Tensor], dict[Weight, Tensor]]]:
        """Scores and masks (out, in) after each step."""
        weights = self.prunable(calibration)
        score = SCORES[self.score]
        with borrowed(calibration.plain, weights) as current:
            levels = self.settings.levels(sparsity)
            for level, batches in zip(levels, calibration.rounds(len(levels)), strict=True):
                settling = self.settling(partial(self.apart, current, sparsity=level), first=level == levels[0])
                evidence = collect(calibration, weights, score.needs, batches, settling)
                scores = {w: score(t, evidence.pop(w)) for w, t in current.items()}
                masks = dict(self.cut(scores, current, level))
                for weight, tensor in current.items():
                    tensor.mul_(masks[weight])
                yield scores, masks
