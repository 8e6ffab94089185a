"""Settings from plain values: checked and converted by the signature of the class that defines them.

Recipes, the registry of methods and the shortcuts all build from values here, so that a wrong name or type gets the
same message everywhere. The types and defaults stand in the classes alone; jsonargparse reads them from there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from trimtab.registry import unknown


class SettingsError(ValueError):
    """A setting that is unknown, missing, or of a wrong type or value; the message says where and what is expected."""


@cache
def _parser(cls: type) -> Any:
    """jsonargparse's parser of a class; made once, since every run of a study asks for the same few."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, as_group=False, fail_untyped=False)
    return parser


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's settings by name; none where a type is one that only a checker of types imports."""
    try:
        # of a dataclass every field is looked up in the module that defines it
        return get_type_hints(cls if is_dataclass(cls) else cls.__init__)  # type: ignore[misc]
    except NameError:
        return {}


def _texts(cls: type) -> set[str]:
    """Settings of a class that are rows of texts and nothing else."""
    return {name for name, hint in _hints(cls).items() if hint == Sequence[str]}


def _no_nulls(cls: type, values: Mapping[str, Any], where: str) -> None:
    """SettingsError for a null where the type has none: jsonargparse lets it through."""
    for name, value in values.items():
        hint = _hints(cls).get(name, Any)
        if value is None and hint is not Any and not {None, type(None)} & {hint, *get_args(hint)}:
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise SettingsError(f"{where}: {name}: expected {wanted}, found null: leave it out for its default")


def build(cls: type, values: Mapping[str, Any], where: str, what: str = "setting") -> Any:
    """An instance of `cls` from plain values; a list becomes a tuple where the class asks for one.

    Args:
        cls: its signature gives names, types and defaults.
        values: settings by name; those left out keep their defaults.
        where: what the message of an error starts with.
        what: what a value is called in the message, `setting` or `key`.

    Raises:
        SettingsError: if a name is unknown (with the nearest), one is missing, or a value has the wrong type.
    """
    from jsonargparse import ArgumentError

    known = [n for n in inspect.signature(cls).parameters if n != "self"]
    for key in values:
        if key not in known:
            raise SettingsError(f"{where}: {unknown(what, key, known)}")
    _no_nulls(cls, values, where)
    # Texts are right as they stand. jsonargparse copies all of them for each of them: 5 s for 3,129 answers.
    texts = {k: list(v) for k, v in values.items() if k in _texts(cls) and _all_texts(v)}
    try:
        parsed = _parser(cls).parse_object({**values, **{k: v[:1] for k, v in texts.items()}})
        return cls(**{k: getattr(parsed, k) for k in known if hasattr(parsed, k)} | texts)
    except (ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {' '.join(str(error).split())}") from error


def within(values: Mapping[str, Any], **limits: str) -> None:
    """Check numbers against intervals, written as in mathematics: `within(vars(self), rank="[1, inf)")`.

    None is passed over: whether it may be is for the type to say. NaN and infinity lie in no interval.

    Raises:
        ValueError: that names the first number outside, and its interval.
    """
    for name, interval in limits.items():
        low, high = map(float, interval[1:-1].split(","))
        value, opens, closes = values[name], interval[0], interval[-1]
        if value is None or ((value >= low if opens == "[" else value > low)
                             and (value <= high if closes == "]" else value < high)):  # fmt: skip
            continue
        if math.isfinite(high) or not math.isfinite(value):
            raise ValueError(f"{name} must lie in {interval}, found {value}")
        raise ValueError(f"{name} must be {'at least' if opens == '[' else 'above'} {low:g}, found {value}")


def _all_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(text) is str for text in value)


def from_texts(texts: Iterable[str]) -> dict[str, Any]:
    """Settings of one thing from texts `key=value`, the value in YAML; `columns.captions=text` sets a key of a mapping.

    Raises:
        SettingsError: if a text has another form.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        *path, last = key.split(".")
        if not sign or not all([*path, last]):
            raise SettingsError(f"{text!r}: expected key=value, such as columns.captions=text")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise SettingsError(f"{text!r}: {part!r} has a value already, so nothing can stand below it")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"{text!r}: the value is not YAML: {error}") from error
    return found
