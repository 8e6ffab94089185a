"""Settings that pruners share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trimtab.methods.prune.allocations import ALLOCATIONS
from trimtab.settings import within

DEFAULT_SPARSITY = 0.63


@dataclass(frozen=True)
class PruneSettings:
    """Settings of every pruner."""

    sparsity: float | None = None
    """Share of the prunable weights that become zero, in [0, 1); None: 0.63, or what the pattern or the masks say."""
    pattern: str | None = None
    """`n:m`, such as 2:4: exactly n of every m inputs of an output that follow each other are kept; None: any."""
    allocation: str | None = None
    """How many weights each tensor gives: uniform, global, modality, multimodal or ecoflap; None: the pruner's own."""
    floor: float = 0.0
    """Every tensor keeps at least this share of its weights, whatever the allocation says; the others of its modality
    give what it keeps more. At most 1 - sparsity, which is the allocation uniform."""
    batches: int = 32
    """Calibration batches, for pruners that need them; a step's, for those that work in steps."""
    batch_size: int = 32
    """Rows a calibration batch."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of passes over calibration data; `auto`: bf16 where the device multiplies it natively. Sums are in fp32."""
    until: float | None = None
    """End calibration when masks of two halves of the batches differ by at most this share of the kept weights, looked
    at after 2, 4, 8 ... batches; `batches` is then the most that are taken. None: take all. A start: 0.005."""
    convolutions: bool = False
    """Whether convolutions are pruned too, as matrices (out, in * kh * kw / groups) over the patches they read."""
    allow_empty_tower: bool = False
    """Whether all the weights of a tower may go; otherwise that is an error."""
    masks: str | None = None
    """Masks that this pruner found before: a file, or the folder of a run or adapted model; nothing is calibrated.
    Until it is there, costs are counted with `sparsity`."""

    def __post_init__(self) -> None:
        share = DEFAULT_SPARSITY
        if self.n_of_m:
            share = 1 - self.n_of_m[0] / self.n_of_m[1]
            self._check_pattern(share)
        if self.masks is not None and not self.masks:
            raise ValueError("masks: expected the path of a file or folder, found an empty text; leave it out")
        if self.sparsity is None and (self.masks is None or self.n_of_m):
            object.__setattr__(self, "sparsity", share)  # from here on it is a number
        within(vars(self), sparsity="[0, 1)", batches="[1, inf)", batch_size="[1, inf)", until="(0, 1)")
        if self.until is not None and self.masks is not None:
            raise ValueError("until: masks that were found before are not calibrated; leave out `until` or `masks`")
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"precision must be one of fp32, bf16, auto, found {self.precision!r}")
        if self.allocation is not None:
            ALLOCATIONS[self.allocation]
        self._check_floor()

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

    def _check_floor(self) -> None:
        if self.floor and self.masks is not None:
            raise ValueError("floor: masks that were found before have their shares; leave out `floor` or `masks`")
        if self.floor and self.pattern is not None:
            raise ValueError(
                f"floor: pattern {self.pattern!r} leaves every tensor the same share, found {self.floor}; leave it out"
            )
        if self.sparsity is not None and not 0 <= self.floor <= 1 - self.sparsity + 1e-9:
            raise ValueError(
                f"floor must lie between 0 and the share that is kept of all weights, {1 - self.sparsity:.4g}, found "
                f"{self.floor}"
            )

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
        within(vars(self), steps="[1, inf)")
        if self.schedule not in ("exponential", "linear"):
            raise ValueError(f"schedule must be 'exponential' or 'linear', found {self.schedule!r}")

    def levels(self, sparsity: float) -> list[float]:
        """The sparsity after each step; the last is the one asked for."""
        shares = [(i + 1) / self.steps for i in range(self.steps)]
        if self.schedule == "linear":
            return [sparsity * share for share in shares]
        return [1 - (1 - sparsity) ** share for share in shares]
