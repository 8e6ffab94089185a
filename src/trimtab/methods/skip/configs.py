"""What a configuration may say of a list of blocks, and what that becomes when some of them are gone.

Everything happens in the configuration as it is written to `config.json`, where a setting is any value in it. Names
only order what is tried; what decides is the class, which is built from the changed configuration and compared with the
shortened model (`finding.Search`):

    count      how many blocks a list has: an integer, or one entry of `depths`
    each       a list with one entry a block (`layer_types`, Gemma 3n's `activation_sparsity_pattern`): it is cut
    numbers    blocks that are named by number: of another `kind` (`fullatt_block_indexes`), `read` behind the block
               (`deepstack_visual_indexes`), or a hidden state, of which the first comes before all blocks
               (`vision_feature_layer`)
    bound      the first or last so many blocks are of another kind (`first_k_dense_replace`, `num_kv_shared_layers`)

A setting that no built class shows, and whose meaning is not known here, needs an example to be settled by.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from trimtab.methods.skip.proof import Cut

Where = tuple[str, ...]  # path of a dict in the written configuration
Written = dict[str, Any]

# Settings that name blocks by number, and what they say: see the head of this file.
_NUMBERED = {
    "fullatt_block_indexes": "kind", "window_block_indices": "kind", "residual_block_indices": "kind",
    "global_attn_indexes": "kind", "moe_layers": "kind", "mlp_only_layers": "kind", "cross_attention_layers": "kind",
    "deepstack_visual_indexes": "read", "intermediate_layers_indices": "state", "vision_feature_layer": "state",
    "vision_feature_layers": "state", "out_indices": "state",
}  # fmt: skip
_COUNTED_BY = {"intermediate_layers_indices": "num_hidden_layers"}  # where a configuration counts several lists
_STATES = "vision_feature_layer"
_TOWERS = ("vision_config", "video_config")  # whose hidden states a parent's `vision_feature_layer` names
LAYERS = re.compile(r"layer|depth|block|stage")
_NUMBERS = re.compile(r"layers?$|indexes$|indices$|idxs?$|layer_ids?$|_at$")
_ONE_NUMBER = re.compile(r"(?<!per)_layer$|layer_(idx|index|id)$")
_BOUNDS = re.compile(r"layer|first_k")


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
    return as_read(config, config.to_json_string(use_diff=False))


def as_read(config: Any, text: str) -> Written:
    """A written configuration as its class reads it: infinity is written in a form of its own."""
    decode = getattr(type(config), "_decode_special_floats", None)
    return json.loads(text) if decode is None else decode(json.loads(text))


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


def changed(values: Written, changes: dict[Setting, Any]) -> Written:
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
    """Numbers of the blocks behind which the stream is read: one that is gone puts out what the one before it does."""
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
    if (meaning == "read" and min(new, default=0) < 0) or (distinct and len(set(new)) < len(new)):
        raise ValueError(
            f"shorten: {setting} reads the blocks {many} of '{cut.path}': what is left ({list(cut.kept)}) has no block "
            "of its own for each"
        )
    return new[0] if type(value) is int else new


def _numbers(value: Any, cut: Cut) -> bool:
    """Whether a value could be numbers of blocks, or of hidden states."""
    many = [value] if type(value) is int else value
    return isinstance(many, list) and bool(many) and all(type(v) is int and abs(v) <= cut.count for v in many)


def _speaks_of(setting: Setting, count: Setting) -> bool:
    """Whether a setting names blocks of the list that `count` counts: beside it, or for a reader of a vision tower."""
    if not setting.key.startswith(_STATES):
        return setting.where == count.where and _COUNTED_BY.get(setting.key, count.key) == count.key
    above = count.where[:-1]
    near = setting.where[: len(above)] == above and len(setting.where) <= len(above) + 1
    return near and setting.where != count.where and bool({*count.where[-1:]} & {*_TOWERS})


def is_each(setting: Setting, value: Any, cut: Cut) -> bool:
    """Whether a value could be a list with one entry a block."""
    return isinstance(value, list) and len(value) == cut.count and setting.key not in _NUMBERED


def _last(value: Any, new: Any, cut: Cut) -> bool:
    """Whether a hidden state becomes the last one: that may have gone through the norm behind the blocks."""
    pairs = zip(*([v] if type(v) is int else v for v in (value, new)), strict=True)
    return any((b in (-1, len(cut.kept))) and a not in (-1, cut.count) for a, b in pairs)


def _keyed(value: Any, cut: Cut) -> bool:
    """Whether a value has something for some blocks, under their numbers (Gemma 4's `per_layer_config`)."""
    return isinstance(value, dict) and bool(value) and all(k.isdigit() and int(k) < cut.count for k in map(str, value))


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
        aside = setting.key.startswith(_STATES)  # may stand beside the tower's own settings, in those of what reads it
        if (setting.where != count.where[: len(setting.where)] and not aside) or setting == count:
            continue
        value, key, beside = setting.of(values), setting.key, setting.where == count.where
        if key == "stage_names" and isinstance(value, list) and len(value) == cut.count + 1 and beside:
            yield Choice(setting, [value[: len(cut.kept) + 1]], True)
        elif key == "out_features":
            continue  # said by `out_indices` too
        elif beside and key != "id2label" and _keyed(value, cut):
            yield Choice(
                setting, [{str(cut.kept.index(int(k))): v for k, v in value.items() if int(k) in cut.kept}], True
            )
        elif key in _NUMBERED and _numbers(value, cut):
            meaning = _NUMBERED[key]
            if key == "out_indices" and len(values_at(values, setting.where).get("stage_names") or ()) != cut.count + 1:
                continue
            if not _speaks_of(setting, count):
                continue
            new = _as_meant(setting, value, cut, meaning)
            moved = meaning == "state" and _last(value, new, cut)
            yield Choice(setting, [new, value] if moved else [new], not moved)
        elif is_each(setting, value, cut):
            picked = [value[i] for i in cut.kept]
            if value == list(range(cut.count)):
                yield Choice(setting, [list(range(len(cut.kept))), picked, value], "layer" in key)
            elif beside or LAYERS.search(key):
                known = beside and bool(LAYERS.search(key))
                yield Choice(setting, [picked, value] if known else [value, picked], known)
        elif _numbers(value, cut) and (_ONE_NUMBER if type(value) is int else _NUMBERS).search(key):
            left = [value]
            for becomes in _MEANINGS.values():
                many = becomes([value] if type(value) is int else value, cut)
                left.append(many[0] if type(value) is int and many else many)
            yield Choice(setting, [v for i, v in enumerate(left) if v not in left[:i] and v != []], False)
        elif beside and type(value) is int and 0 < value < cut.count and _BOUNDS.search(key):
            below, last = sum(k < value for k in cut.kept), sum(k >= cut.count - value for k in cut.kept)
            yield Choice(setting, list(dict.fromkeys((value, below, last))), True)


def values_at(values: Written, where: Where) -> Written:
    for name in where:
        values = values[name]
    return values
