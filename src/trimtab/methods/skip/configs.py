"""The configuration of a model that becomes shorter: numbers of layers, lists with one entry a layer, numbered layers.

Everything happens in the configuration as it is written to `config.json`, where a setting is any value in it. Names only
order what is tried; what decides is the class, which is built from the changed configuration and compared with the
shortened model (`proof.Promise`):

    count      how many blocks a list has: an integer, or one entry of `depths`
    each       a list with one entry a block (`layer_types`, Gemma 3n's `activation_sparsity_pattern`): it is cut
    numbers    blocks that are named by number: of another `kind` (`fullatt_block_indexes`), `read` behind the block
               (`deepstack_visual_indexes`), or read as a hidden state, the embeddings before it (`vision_feature_layer`)
    bound      the first or last so many blocks are of another kind (`first_k_dense_replace`, `num_kv_shared_layers`)

A setting that no built class shows, and whose meaning is not known here, needs an example to be settled by.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from trimtab.methods.skip.proof import Cut, Difference, Promise, build, tensors, within

Where = tuple[str, ...]  # path of a dict in the written configuration
Written = dict[str, Any]

# Settings that name blocks by number, and what they say: see the head of this file.
_NUMBERED = {
    "fullatt_block_indexes": "kind", "window_block_indices": "kind", "residual_block_indices": "kind",
    "global_attn_indexes": "kind", "moe_layers": "kind", "mlp_only_layers": "kind", "cross_attention_layers": "kind",
    "deepstack_visual_indexes": "read", "intermediate_layers_indices": "state", "vision_feature_layer": "state",
    "vision_feature_layers": "state", "out_indices": "state",
}  # fmt: skip
_TOWERS = ("vision_config", "video_config")  # whose hidden states a parent's `vision_feature_layer` names
_LAYERS = re.compile(r"layer|depth|block|stage")
_NUMBERS = re.compile(r"layers?$|indexes$|indices$|idxs?$|layer_ids?$|_at$")
_ONE_NUMBER = re.compile(r"(?<!per)_layer$|layer_(idx|index|id)$")
_BOUNDS = re.compile(r"layer|first_k")
_TRIALS = 60  # how many times a class is built at most to find one configuration


class Setting(NamedTuple):
    """One value in a written configuration."""

    where: Where
    key: str

    def __str__(self) -> str:
        return ".".join((*self.where, self.key))

    def of(self, written: Written) -> Any:
        for name in self.where:
            written = written[name]
        return written[self.key]


def written(config: Any) -> Written:
    """What stands in the `config.json` of a configuration, with everything that a default would give.

    Raises:
        ValueError: if it is no configuration that can be written and read.
    """
    if not hasattr(type(config), "from_dict") or not hasattr(config, "to_json_string"):
        raise ValueError(
            f"shorten: expected a configuration of transformers, which can be written and read, found a "
            f"{type(config).__name__}"
        )
    return json.loads(config.to_json_string(use_diff=False))


def read(like: Any, values: Written) -> Any:
    """A configuration from what is written; attention and experts are computed as by `like`."""
    config = type(like).from_dict(copy.deepcopy(values))
    _implemented_as(config, like)
    return config


def _implemented_as(config: Any, like: Any) -> None:
    for key, value in vars(like).items():
        if key.endswith("_implementation_internal"):
            vars(config)[key] = value
        elif hasattr(value, "to_dict") and hasattr(other := vars(config).get(key), "to_dict"):
            _implemented_as(other, value)


def settings(values: Written, where: Where = ()) -> Iterator[Setting]:
    """All settings, the outermost first."""
    for key in values:
        yield Setting(where, key)
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id") and all(isinstance(k, str) for k in value):
            yield from settings(value, (*where, key))


def _changed(values: Written, changes: dict[Setting, Any]) -> Written:
    new = copy.deepcopy(values)
    for setting, value in changes.items():
        node = new
        for name in setting.where:
            node = node[name]
        node[setting.key] = value
    return new


# --- what a setting can become ----------------------------------------------------------------------------------------


def kinds_left(value: Sequence[int], cut: Cut) -> list[int]:
    """Numbers of the blocks of a kind when the others are gone."""
    return [new for new, old in enumerate(cut.kept) if old in value]


def reads_left(value: Sequence[int], cut: Cut) -> list[int]:
    """Numbers of the blocks behind which the stream is read; one that is gone puts out what the block before it does."""
    return [sum(k <= i for k in cut.kept) - 1 for i in value]


def states_left(value: Sequence[int], cut: Cut) -> list[int]:
    """Numbers of hidden states, of which the first is what enters block 0; negative ones count from the end."""
    new = []
    for v in value:
        state = sum(k < (v if v >= 0 else cut.count + 1 + v) for k in cut.kept)
        new.append(state if v >= 0 else state - len(cut.kept) - 1)
    return new


_MEANINGS: dict[str, Callable[[Sequence[int], Cut], list[int]]] = {
    "kind": kinds_left, "read": reads_left, "state": states_left
}  # fmt: skip


def _as_meant(setting: Setting, value: Any, cut: Cut, meaning: str) -> Any:
    """A setting that names blocks by number, as it is with the others gone.

    Raises:
        ValueError: if two numbers would become one, or a stream is read before the first block that is left.
    """
    many = [value] if type(value) is int else list(value)
    new = _MEANINGS[meaning](many, cut)
    distinct = meaning == "read" or setting.key == "out_indices"
    if meaning == "read" and min(new, default=0) < 0 or distinct and len(set(new)) < len(new):
        raise ValueError(
            f"shorten: {setting} reads the blocks {many} of '{cut.path}': what is left ({list(cut.kept)}) has no block "
            "of its own for each"
        )
    return new[0] if type(value) is int else new


def _numbers(value: Any, cut: Cut) -> bool:
    """Whether a value could be numbers of blocks, or of hidden states."""
    many = [value] if type(value) is int else value
    return isinstance(many, list) and bool(many) and all(type(v) is int and abs(v) <= cut.count for v in many)


def _each(setting: Setting, value: Any, cut: Cut) -> bool:
    """Whether a value could be a list with one entry a block."""
    return isinstance(value, list) and len(value) == cut.count and setting.key not in _NUMBERED


def _last(value: Any, new: Any, cut: Cut) -> bool:
    """Whether a hidden state becomes the last one: that may have gone through the norm behind the blocks."""
    pairs = zip(*([v] if type(v) is int else v for v in (value, new)), strict=True)
    return any((b in (-1, len(cut.kept))) and a not in (-1, cut.count) for a, b in pairs)


class Choice(NamedTuple):
    """What one setting may become."""

    setting: Setting
    values: list[Any]
    known: bool  # whether the first value is right by what is known of the setting


def choices(values: Written, count: Setting, cut: Cut) -> Iterator[Choice]:
    """The settings beside or above the number of a list's blocks that may speak of its blocks, the likeliest first.

    Raises:
        ValueError: see `_as_meant`.
    """
    for setting in settings(values):
        if setting.where != count.where[: len(setting.where)] or setting == count:
            continue
        value, key, beside = setting.of(values), setting.key, setting.where == count.where
        if key == "stage_names" and isinstance(value, list) and len(value) == cut.count + 1 and beside:
            yield Choice(setting, [value[: len(cut.kept) + 1]], True)
        elif key == "out_features":
            continue  # said by `out_indices` too
        elif key in _NUMBERED and _numbers(value, cut):
            meaning = _NUMBERED[key]
            if key == "out_indices" and len(values_at(values, setting.where).get("stage_names") or ()) != cut.count + 1:
                continue
            tower = key.startswith("vision_feature_layer")
            if not (beside and not tower or tower and count.where[:-1] == setting.where and set(count.where[-1:]) & {*_TOWERS}):  # fmt: skip
                continue
            new = _as_meant(setting, value, cut, meaning)
            moved = meaning == "state" and _last(value, new, cut)
            yield Choice(setting, [new, value] if moved else [new], not moved)
        elif _each(setting, value, cut):
            picked = [value[i] for i in cut.kept]
            if value == list(range(cut.count)):
                yield Choice(setting, [list(range(len(cut.kept))), picked, value], "layer" in key)
            elif beside or _LAYERS.search(key):
                known = beside and bool(_LAYERS.search(key))
                yield Choice(setting, [picked, value] if known else [value, picked], known)
        elif _numbers(value, cut) and (_ONE_NUMBER if type(value) is int else _NUMBERS).search(key):
            left = [value]
            for meaning in _MEANINGS.values():
                many = meaning([value] if type(value) is int else value, cut)
                left.append(many[0] if type(value) is int and many else many)
            yield Choice(setting, [v for i, v in enumerate(left) if v not in left[:i] and v != []], False)
        elif beside and type(value) is int and 0 < value <= cut.count and _BOUNDS.search(key):
            below, last = sum(k < value for k in cut.kept), sum(k >= cut.count - value for k in cut.kept)
            yield Choice(setting, list(dict.fromkeys((value, below, last))), True)


def values_at(values: Written, where: Where) -> Written:
    for name in where:
        values = values[name]
    return values


# --- the search -------------------------------------------------------------------------------------------------------


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
            config = read(self.config, _consistent(_changed(self.values, changes)))
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
                             if _each(c.setting, c.setting.of(self.values), cut)}  # fmt: skip
            for more in (first, every, {}):
                changes = {**before, **more, count: value}
                if self._fits(changes, cut):
                    return count, changes
        if refused is not None:
            raise refused
        raise ValueError(
            f"shorten: no setting of {type(self.model).__name__}'s configuration gives '{cut.path}' {len(cut.kept)} "
            f"blocks (tried {', '.join(tried[:8]) or 'none'}), or its class cannot be built from it"
            f"{f' ({self.error})' if self.error else ''}; nothing was changed. Save its weights beside its class instead"
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
                    changed = {**changes, choice.setting: value}
                    left = self._left(changed)
                    if left is not None and len(left) < len(best):
                        changes, best, better = changed, left, True
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
        if within(d.path, self.cuts) or d.own is None or d.built is None:
            return False
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
        other = next((d for d in wrong if d.own is not None and d.built is None and not within(d.path, self.cuts)), None)
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
    found = [s for s in settings(values) if s not in before and type(v := s.of(values)) is int and v == cut.count]
    named = [s for s in found if _LAYERS.search(s.key)]
    stages = [int(n) for n in cut.path.split(".") if n.isdigit()]
    for setting in settings(values):
        value = before.get(setting, setting.of(values))
        for stage in stages:
            if isinstance(value, list) and stage < len(value) and type(value[stage]) is int and value[stage] == cut.count:
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
