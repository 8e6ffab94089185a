"""The search for the configuration that stands for a shortened model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Any, NamedTuple

from torch import nn

from trimtab.methods.skip.configs import (
    LAYERS,
    Choice,
    Setting,
    Written,
    changed,
    choices,
    is_each,
    read,
    settings,
    values_at,
    written,
)
from trimtab.methods.skip.proof import Cut, Difference, Promise, build, tensors, within

_TRIALS = 60  # how many times a class is built at most to find one configuration


class Found(NamedTuple):
    """A configuration that stands for the shortened model as far as it can be built.

    Attributes:
        changes: setting -> new value.
        open: settings that no built class shows and whose meaning is not known: an example has to settle them.
    """

    changes: dict[Setting, Any]
    open: list[Choice]


class Search:
    """Finds what a configuration must become for a model whose lists have been cut.

    Args:
        model: the model, cut.
        config: its configuration, as it was.
        promise: what it decides.
        cuts: what was done.
    """

    def __init__(self, model: nn.Module, config: Any, promise: Promise, cuts: Sequence[Cut]):
        self.model, self.config, self.promise, self.cuts = model, config, promise, cuts
        self.values = written(config)
        self.error = ""  # of the last class that could not be built
        self.shapes = _shapes(model)

    def built(self, changes: dict[Setting, Any]) -> nn.Module | None:
        """The class from the changed configuration; None if it cannot be built."""
        try:
            config = read(self.config, _consistent(changed(self.values, changes)))
        except Exception as error:  # whatever a configuration's own checks raise
            self.error = f"{type(error).__name__}: {error}"
            return None
        fresh, self.error = build(self.model, config)
        return fresh

    def found(self) -> Found:
        """Search.

        Raises:
            ValueError: if no configuration stands for the model, with the first fact that it cannot give.
        """
        changes: dict[Setting, Any] = {}
        open_: dict[Setting, Choice] = {}
        for cut in self.cuts:
            if self._fits(changes, cut):
                continue  # another list's setting gives this one its blocks too
            count, changes = self._counted(changes, cut)
            for choice in choices(self.values, count, cut):
                open_.setdefault(choice.setting, choice)
        changes, wrong = self._climb(changes, list(open_.values()))
        if wrong:
            raise ValueError(self._told(wrong))
        unsettled = [c for c in open_.values() if not c.known and len(c.values) > 1 and not self._shown(changes, c)]
        return Found(changes, unsettled)

    def _counted(self, before: dict[Setting, Any], cut: Cut) -> tuple[Setting, dict[Setting, Any]]:
        """The setting that gives a list its blocks, and the changes with it."""
        tried: list[str] = []
        first_error = ""
        refused: ValueError | None = None
        for count, value in _counts(self.values, before, cut):
            tried.append(str(count))
            try:
                beside = list(choices(self.values, count, cut))
            except ValueError as error:
                if self._alone(count, value, before, cut):
                    refused = refused or error
                continue
            first = {c.setting: c.values[0] for c in beside if c.known}
            every = first | {c.setting: [c.setting.of(self.values)[i] for i in cut.kept] for c in beside
                             if is_each(c.setting, c.setting.of(self.values), cut)}  # fmt: skip
            done = {s for s, v in before.items() if v != s.of(self.values)}
            for more in _variants(first, every, beside):
                changes = {**before, **{s: v for s, v in more.items() if s not in done}, count: value}
                if self._fits(changes, cut):
                    return count, changes
                first_error = first_error or (self.error if more.keys() >= every.keys() else "")
        if refused is not None:
            raise refused
        raise ValueError(
            f"shorten: no setting of {type(self.model).__name__}'s configuration gives '{cut.path}' {len(cut.kept)} "
            f"blocks (tried {', '.join(tried[:8]) or 'none'}), or its class cannot be built from it"
            f"{f' ({first_error})' if first_error else ''}; nothing was changed. Save its weights beside its class"
        )

    def _alone(self, count: Setting, value: Any, before: dict[Setting, Any], cut: Cut) -> bool:
        """Whether a list's blocks may be counted by a setting, as far as can be said without what goes with it."""
        return self._fits({**before, count: value}, cut) or self.built({**before, count: value}) is None

    def _fits(self, changes: dict[Setting, Any], cut: Cut) -> bool:
        """Whether the class has as many blocks in a list as the model: blocks first, what is in them later."""
        if (fresh := self.built(changes)) is None:
            return False
        try:
            return len(fresh.get_submodule(cut.path)) == len(cut.kept)  # type: ignore[arg-type]
        except (AttributeError, TypeError):
            return False

    def _climb(self, changes: dict[Setting, Any], open_: list[Choice]) -> tuple[dict[Setting, Any], list[Difference]]:
        """Change one setting after the other as long as the class comes nearer to the model."""
        best, trials, better = self._left(changes), 0, True
        while best and better:
            better = False
            for choice in open_:
                for value in choice.values:
                    if value == changes.get(choice.setting, choice.setting.of(self.values)) or trials >= _TRIALS:
                        continue
                    trials += 1
                    trial = {**changes, choice.setting: value}
                    left = self._left(trial)
                    if left is not None and len(left) < len(best):
                        changes, best, better = trial, left, True
        return changes, best or []

    def _all(self, changes: dict[Setting, Any]) -> list[Difference] | None:
        fresh = self.built(changes)
        return None if fresh is None else list(self.promise.differences(self.model, fresh, self.cuts))

    def _left(self, changes: dict[Setting, Any]) -> list[Difference] | None:
        """Differences that cannot be put right in the model."""
        left = self._all(changes)
        return None if left is None else [d for d in left if not self.mendable(d)]

    def _shown(self, changes: dict[Setting, Any], choice: Choice) -> bool:
        """Whether another value for a setting makes another class, or none: then the class has settled it."""
        now = changes.get(choice.setting, choice.setting.of(self.values))
        own = self._left(changes)
        others = [v for v in choice.values if v != now]
        return all(self._left({**changes, choice.setting: v}) != own for v in others)

    def mendable(self, d: Difference) -> bool:
        """Whether a difference is one that the model may take over from its class: what a module outside the lists
        notes of their number or of a setting, or a tensor there with a part for each block."""
        if d.own is None or d.built is None:
            return False
        if within(d.path, self.cuts):  # a block may note how many there are, as a plain number
            return type(d.own) is int and any((d.own, d.built) == (c.count, len(c.kept)) for c in self.cuts)
        for cut in self.cuts:
            less = cut.count - len(cut.kept)
            if _per_block(d, cut):
                return True
            if type(d.own) is int and (d.own - d.built == less and abs(d.own - cut.count) <= 1):
                return True
            if isinstance(d.own, list) and isinstance(d.built, list):
                return len(d.own) - len(d.built) == less or self._is_setting(d)
        return self._is_setting(d)

    def _is_setting(self, d: Difference) -> bool:
        """Whether a module has taken a value over from a setting of the same name."""
        return any(s.key == d.key and s.of(self.values) == d.own for s in settings(self.values))

    def _told(self, wrong: list[Difference]) -> str:
        name = type(self.model).__name__
        first = min(wrong, key=lambda d: (d.key in self.shapes.get(d.path, ()), d.path))
        lists = {cut.path for cut in self.cuts}
        other = next(
            (d for d in wrong if d.own is not None and d.built is None and not within(d.path, self.cuts)), None
        )
        if other is not None and re.search(r"\.\d+(\.|$)", other.path):
            stack = re.split(r"\.\d+(?:\.|$)", other.path)[0]
            return (
                f"shorten: the setting that gives {', '.join(map(repr, sorted(lists)))} its blocks also decides "
                f"'{stack}', which would lose '{other.path}': a {name} cannot have fewer in one of them; take the same "
                "number out of both, or skip with adapters and keep the run. Nothing was changed"
            )
        return (
            f"shorten: a {name} built from the shortened configuration would not be this model: {first}. Its "
            "configuration has something for each layer that is not understood here; nothing was changed"
        )


def _variants(first: dict[Setting, Any], every: dict[Setting, Any], beside: list[Choice]) -> Iterator[dict]:
    """What may go with a number of blocks: some lists with one entry a block cut, or all, or none; and where the blocks
    of another kind begin, which a configuration may check by itself."""
    yield from (first, every, {})
    bounds = [c for c in beside if c.known and len(c.values) > 1]
    for values in islice(product(*(c.values for c in bounds)), 1, 8):
        yield {**every, **dict(zip((c.setting for c in bounds), values, strict=True))}


def _shapes(model: nn.Module) -> dict[str, set[str]]:
    return {path: set(tensors(m)) for path, m in model.named_modules()}


def _per_block(d: Difference, cut: Cut) -> bool:
    """Whether a shape, or a size, has a part for each block along one axis, and all parts are equally long."""
    own, built = ([v] if type(v) is int else v for v in (d.own, d.built))
    if not (isinstance(own, (tuple, list)) and isinstance(built, (tuple, list)) and len(own) == len(built)):
        return False
    apart = [(a, b) for a, b in zip(own, built, strict=True) if a != b]
    left = len(cut.kept)
    return len(apart) == 1 and all(type(v) is int for v in apart[0]) and (
        apart[0][0] % cut.count == 0 and apart[0][0] // cut.count * left == apart[0][1]
    )  # fmt: skip


def _counts(values: Written, before: dict[Setting, Any], cut: Cut) -> Iterator[tuple[Setting, Any]]:
    """Settings that may give a list its number of blocks, with what they become; those that are called so first."""
    left = len(cut.kept)
    found = [s for s in settings(values) if type(v := before.get(s, s.of(values))) is int and v == cut.count]
    named = [s for s in found if LAYERS.search(s.key)]
    stages = [int(n) for n in cut.path.split(".") if n.isdigit()]
    for setting in settings(values):
        value = before.get(setting, setting.of(values))
        for stage in stages:
            if (
                isinstance(value, list)
                and stage < len(value)
                and type(value[stage]) is int
                and value[stage] == cut.count
            ):
                yield setting, [left if i == stage else v for i, v in enumerate(value)]
    yield from ((s, left) for s in named)
    yield from ((s, left) for s in found if s not in named)


def _consistent(values: Written) -> Written:
    """The names of a backbone's features, as their numbers have become."""
    for setting in list(settings(values)):
        if setting.key == "out_indices" and setting.of(values) is not None:
            node = values_at(values, setting.where)
            names = node.get("stage_names")
            if names and node.get("out_features"):
                node["out_features"] = [names[i] for i in node["out_indices"]]
    return values
