"""A policy for every parameter: ordered patterns, the first that matches decides.

    policy:
      - {match: "@vision", do: frozen}              a tower: its parameters, and its side network's
      - {match: "@text", do: method, rate: 0.5}     as the methods left it, at half the learning rate
      - {match: "*.bias", do: train}                a glob on the whole name
      - {match: "head.*", do: train, rate: 4}
      - {match: "*", do: method}

A parameter that no pattern matches is an error, and so is a pattern that decides about no parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from trimtab.registry import unknown
from trimtab.settings import within

if TYPE_CHECKING:  # recipes are read, and refused, before torch is there
    from torch import nn

    from trimtab.anatomy import Anatomy


@dataclass(frozen=True)
class Rule:
    """One line of a policy."""

    match: str
    """A glob on a parameter's name (`backbone.model.*.bias`), or `@` and the name of a tower; `@heads` are the
    backbone's heads."""
    do: Literal["frozen", "train", "method"] = "method"
    """`frozen` and `train` decide; `method` leaves it to what the methods train."""
    rate: float = 1.0
    """Factor of the learning rate; the head's `head_multiplier` comes on top."""

    def __post_init__(self) -> None:
        if not self.match:
            raise ValueError("match: expected a pattern, found ''")
        within(vars(self), rate="[0, inf)")


class Row(NamedTuple):
    """What a rule came to: parameters (tensors) and numbers that it decides about, numbers trained, the first name."""

    match: str
    do: str
    rate: float
    parameters: int
    numbers: int
    trained: int
    first: str


@dataclass(frozen=True)
class Resolved:
    """A policy applied to a model.

    Attributes:
        rates: factors of the learning rate by parameter name.
        rows: the table, a row a rule.
        names: the parameters that each rule decides about.
        idle: parameters that would be trained, but that no loss reaches: they stay frozen.
    """

    rates: Mapping[str, float]
    rows: Sequence[Row]
    names: Sequence[Sequence[str]]
    idle: Sequence[str] = ()

    def without(self, idle: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> Resolved:
        """The same when parameters were frozen that no loss reaches."""
        trained = [sum(parameters[n].numel() for n in own if parameters[n].requires_grad) for own in self.names]
        rows = [row._replace(trained=count) for row, count in zip(self.rows, trained, strict=True)]
        return replace(self, rows=rows, idle=idle)

    def table(self) -> str:
        """The table as text: a line a rule, in order."""
        head = Row("match", "do", "rate", "parameters", "numbers", "trained", "first")  # type: ignore[arg-type]
        cells = [[str(v) if not isinstance(v, float) else f"{v:g}" for v in row] for row in (head, *self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        if self.idle:
            lines.append(f"{len(self.idle)} tensors get no gradient and stay frozen: {', '.join(self.idle[:3])}, ...")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        return [row._asdict() for row in self.rows]


def apply(rules: Sequence[Rule], model: nn.Module, anatomy: Anatomy, prefix: str = "") -> Resolved:
    """Set `requires_grad` of every parameter as the rules say.

    Args:
        rules: in order; the first that matches a parameter decides.
        model: with its methods attached; what they train has `requires_grad`.
        anatomy: of the module at `prefix`, as it was before the methods.
        prefix: path of the described module inside the model (`backbone.model`).

    Raises:
        ValueError: if a parameter is matched by no rule, or a rule decides about none; with the nearest names.
    """
    names = [name for name, _ in model.named_parameters()]
    groups = {f"@{t.name}": t.name for t in anatomy.towers}
    for rule in rules:
        if rule.match.startswith("@") and rule.match != "@heads" and rule.match not in groups:
            raise ValueError(f"policy: {unknown('tower', rule.match, [*groups, '@heads'])}")
    owners = {name: _owner(name, anatomy, prefix) for name in names}
    decided: dict[str, Rule] = {}
    for name in names:
        first = next((r for r in rules if _matches(r.match, name, owners[name])), None)
        if first is None:
            covered = sum(any(_matches(r.match, n, owners[n]) for r in rules) for n in names)
            raise ValueError(
                f"policy: no pattern covers '{name}' ({covered} of {len(names)} parameters are covered; nearest "
                f"pattern: {_nearest(name, [r.match for r in rules])}): end the policy with {{match: '*', do: method}}"
            )
        decided[name] = first
    own: dict[int, list[str]] = {id(rule): [] for rule in rules}
    for name, rule in decided.items():
        own[id(rule)].append(name)
    for rule in rules:
        if not own[id(rule)]:
            raise ValueError(_idle(rule, names, owners))
    rates = {}
    for name, parameter in model.named_parameters():
        rule = decided[name]
        if rule.do != "method":
            parameter.requires_grad_(rule.do == "train")
        rates[name] = rule.rate
    parameters = dict(model.named_parameters())
    rows = []
    for rule in rules:
        mine = [(n, parameters[n]) for n in own[id(rule)]]
        trained = sum(p.numel() for _, p in mine if p.requires_grad)
        numbers = sum(p.numel() for _, p in mine)
        rows.append(Row(rule.match, rule.do, rule.rate, len(mine), numbers, trained, mine[0][0]))
    return Resolved(rates, rows, [own[id(rule)] for rule in rules])


def _owner(name: str, anatomy: Anatomy, prefix: str) -> str | None:
    """The tower to which a parameter belongs, itself or through the side network that bears its name; or `heads`."""
    if prefix and not name.startswith(prefix + "."):
        return None
    path = name.removeprefix(prefix + ".") if prefix else name
    # LoRA and the like put modules between a layer and its weight: the scope is a prefix all the same.
    tower = anatomy.owner(path)
    if tower is not None:
        return tower.name
    if any(path == h or path.startswith(h + ".") for h in anatomy.heads):
        return "heads"
    parts = path.split(".")
    return next((t.name for t in anatomy.towers if len(parts) > 1 and parts[1] == t.name), None)


def _matches(pattern: str, name: str, owner: str | None) -> bool:
    return owner == pattern[1:] if pattern.startswith("@") else fnmatchcase(name, pattern)


def _nearest(name: str, candidates: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, candidates, n=2, cutoff=0.0)
    return " or ".join(repr(n) for n in near) or "none"


def _idle(rule: Rule, names: Sequence[str], owners: Mapping[str, str | None]) -> str:
    """The message for a rule that decides about nothing."""
    matched = [n for n in names if _matches(rule.match, n, owners[n])]
    if matched:
        return f"policy: '{rule.match}' decides about nothing: earlier patterns take all {len(matched)} that it matches"
    return f"policy: '{rule.match}' matches no parameter: nearest names: {_nearest(rule.match, names)}"
