"""What the adapted model may cost: limits on axes, as a person writes them.

    macs <= -30%            30 % fewer than the dense model's
    train memory <= 2 GB    absolute
    trained <= 5% of full   of what full tuning trains

An axis that belongs to the model (macs, latency, parameters, bytes of the export) is relative to the dense model, one
that belongs to training or to what is learned is relative to full tuning; `of dense` and `of full` say it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab.registry import unknown

Base = Literal["dense", "full"]
Kind = Literal["count", "bytes", "ms", "seconds"]

UNITS: dict[str, dict[str, float]] = {
    "count": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12},
    "bytes": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "ms": {"us": 1e-3, "ms": 1, "s": 1e3},
    "seconds": {"s": 1, "m": 60, "min": 60, "h": 3600},
}


class BudgetError(ValueError):
    """A budget that cannot be understood or met; the message names the axis, what was found and the way out."""


@dataclass(frozen=True)
class Axis:
    """Something that a model costs.

    Attributes:
        name: as it stands in a budget.
        key: in the costs of a candidate.
        kind: of its values.
        base: what it is relative to.
        measured: taken on this device by running the candidate; the others are counted without weights.
    """

    name: str
    key: str
    kind: Kind
    base: Base
    about: str
    measured: bool = False


AXES = {
    axis.name: axis
    for axis in (
        Axis("trained", "trainable_params", "count", "full", "numbers that get a gradient"),
        Axis("train memory", "training_peak_bytes", "bytes", "full", "worst moment of a training step, counted"),
        Axis("saved", "saved_activation_bytes", "bytes", "full", "what a training batch keeps for backward"),
        Axis("disk", "checkpoint_bytes", "bytes", "full", "what is learned, as a file"),
        Axis("macs", "macs", "count", "dense", "multiply-adds of one sample"),
        Axis("params", "params", "count", "dense", "numbers in the model"),
        Axis("nonzeros", "nonzero_params", "count", "dense", "numbers that no mask makes zero"),
        Axis("export", "export_bytes", "bytes", "dense", "the exported model, in the sparse layout"),
        Axis("latency", "latency_ms", "ms", "dense", "one sample on this device", measured=True),
        Axis("train time", "training_seconds", "seconds", "full", "all training steps on this device", measured=True),
        Axis("measured memory", "peak_memory_bytes", "bytes", "full", "a training step on this GPU", measured=True),
    )
}


@dataclass(frozen=True)
class Limit:
    """One axis and the most that it may cost: `value`, or `share` of what the base costs."""

    axis: Axis
    value: float | None = None
    share: float | None = None
    base: Base | None = None

    def most(self, bases: Mapping[Base, Mapping[str, Any]]) -> float:
        """The most in the axis' own unit, given the costs of the dense model and of full tuning."""
        if self.value is not None:
            return self.value
        assert self.share is not None
        return self.share * float(bases[self.base or self.axis.base][self.axis.key])

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.axis.name} <= {shown(self.value, self.axis.kind)}"
        base = self.base or self.axis.base
        return f"{self.axis.name} <= {100 * (self.share or 0):g}% of {base}"


def shown(value: float, kind: Kind) -> str:
    """A value for a person: three digits and a unit."""
    if kind == "ms":
        return f"{value:.3g} ms"
    if kind == "seconds":
        return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"
    prefixes = ("", "k", "M", "G", "T") if kind == "bytes" else ("", "K", "M", "G", "T")
    i = 0
    while abs(value) >= 999.5 and i < len(prefixes) - 1:
        value, i = value / 1000, i + 1
    unit = f"{prefixes[i]}{'B' if kind == 'bytes' else ''}"
    return f"{value:.3g} {unit}".rstrip()


def parse(budget: str | Mapping[str, Any]) -> tuple[Limit, ...]:
    """The limits of a budget.

    Args:
        budget: `"macs <= -30%, train memory <= 2 GB"`, or `{"macs": "-30%", "train_memory": "2GB"}`.

    Raises:
        BudgetError: if there is no limit, an axis or a unit is unknown (with the nearest), a value cannot be read, or
            an axis stands twice.
    """
    if isinstance(budget, str):
        pairs = [_split(part) for part in re.split(r"[,;\n]", budget) if part.strip()]
    else:
        pairs = [(str(name), str(value)) for name, value in budget.items()]
    if not pairs:
        raise BudgetError(
            f"budget: expected at least one limit, such as 'macs <= -30%' or 'disk <= 5 MB'; axes: {', '.join(AXES)}"
        )
    found: dict[str, Limit] = {}
    for name, value in pairs:
        limit = _limit(name, value)
        if limit.axis.name in found:
            raise BudgetError(
                f"budget: '{limit.axis.name}' stands twice ({found[limit.axis.name]}; {limit}): keep the one that is "
                "meant"
            )
        found[limit.axis.name] = limit
    return tuple(found.values())


def _split(part: str) -> tuple[str, str]:
    name, sign, value = part.partition("<=")
    if not sign:
        name, sign, value = part.partition("=")
    if not sign or ">" in part:
        raise BudgetError(f"budget: expected 'AXIS <= VALUE', such as 'macs <= -30%', found '{part.strip()}'")
    return name, value


def _limit(name: str, text: str) -> Limit:
    plain = " ".join(name.replace("_", " ").lower().split())
    if plain not in AXES:
        raise BudgetError(f"budget: {unknown('axis', plain, AXES)}")
    axis = AXES[plain]
    match = re.fullmatch(r"\s*(-?[0-9][0-9_.e+]*)\s*(%?)\s*([a-z ]*?)\s*", text.lower())
    try:
        number = float(match[1].replace("_", "")) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise BudgetError(f"budget: {axis.name}: expected a value such as '-30%' or {_example(axis)}, found {text!r}")
    if match[2]:
        return _relative(axis, number, match[3], text)
    if number <= 0:
        raise BudgetError(f"budget: {axis.name}: expected more than 0, found {text!r}; '-30%' is 30 % less than before")
    unit = match[3].replace(" ", "")
    units = UNITS[axis.kind]
    if unit not in units:
        close = unknown("unit", unit or "(none)", [u for u in units if u])
        raise BudgetError(f"budget: {axis.name}: {close}; found {text.strip()!r}, expected {_example(axis)}")
    return Limit(axis, value=number * units[unit])


def _relative(axis: Axis, number: float, base: str, text: str) -> Limit:
    words = base.split()
    if words and (words[0] != "of" or words[1:] not in (["dense"], ["full"])):
        raise BudgetError(f"budget: {axis.name}: expected '% of dense' or '% of full', found {text.strip()!r}")
    own: Any = words[1] if words else None
    if own == "dense" and axis.base == "full":
        raise BudgetError(
            f"budget: {axis.name}: the dense model is not trained and so costs none of it: use '% of full', of full "
            "tuning"
        )
    share = 1 + number / 100 if number < 0 else number / 100
    if not share > 0 or (number < 0 and share >= 1):
        raise BudgetError(f"budget: {axis.name}: {text.strip()!r} leaves nothing")
    return Limit(axis, share=share, base=own)


def _example(axis: Axis) -> str:
    return {"count": "'5 M'", "bytes": "'2 GB'", "ms": "'20 ms'", "seconds": "'10 min'"}[axis.kind]


@dataclass(frozen=True)
class Budget:
    """Limits in absolute numbers.

    Attributes:
        limits: as they were asked for.
        most: the most of each axis, by the axis' name.
        bases: what the limits that are relative are relative to, by the axis' name.
    """

    limits: tuple[Limit, ...]
    most: Mapping[str, float]
    bases: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, limits: tuple[Limit, ...], bases: Mapping[Base, Mapping[str, Any]]) -> Budget:
        """The limits against the costs of the dense model and of full tuning."""
        relative = {x.axis.name: float(bases[x.base or x.axis.base][x.axis.key]) for x in limits if x.value is None}
        return cls(limits, {limit.axis.name: limit.most(bases) for limit in limits}, relative)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(limit.axis for limit in self.limits)

    def over(self, costs: Mapping[str, Any]) -> dict[str, float]:
        """By how much costs exceed each limit, as a share of it; axes that are held, or not known yet, are left out.

        A cost that cannot be had (`None`: a model that cannot be exported has no bytes) exceeds without end.
        """
        found = {}
        for axis in self.axes:
            if axis.key not in costs:
                continue
            value = costs[axis.key]
            excess = float("inf") if value is None else float(value) / self.most[axis.name] - 1
            if excess > 1e-9:
                found[axis.name] = excess
        return found

    def kept(self, costs: Mapping[str, Any]) -> bool | None:
        """Whether costs keep to all limits; None if they exceed none, and some are not known."""
        if self.over(costs):
            return False
        return True if all(axis.key in costs for axis in self.axes) else None

    def told(self, costs: Mapping[str, Any]) -> str:
        """The budgeted costs of a model in words: 'macs 105 M (-30 %), train memory 1.4 GB'; beside those whose limit
        is relative, how far they are from what it is relative to."""
        parts = []
        for axis in self.axes:
            value = costs.get(axis.key)
            text = "not known" if value is None else shown(float(value), axis.kind)
            if value is not None and axis.name in self.bases:
                far = round(100 * (float(value) / self.bases[axis.name] - 1))
                text += f" ({far:+d} %)" if far else ""
            parts.append(f"{axis.name} {text}")
        return ", ".join(parts)
