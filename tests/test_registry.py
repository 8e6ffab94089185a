from __future__ import annotations

from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser

from trimtab.data.sources import SOURCES
from trimtab.methods import METHODS
from trimtab.methods.base import Method
from trimtab.registry import Registry, unknown
from trimtab.settings import SettingsError, build, within
from trimtab.tasks import TASKS


@pytest.fixture
def animals() -> Registry[object]:
    registry: Registry[object] = Registry("animal")
    for name in ("tiger", "horse", "mouse"):
        registry.register(name)(name.upper())
    return registry


def test_register_keeps_the_decorated_thing():
    registry: Registry[type] = Registry("animal")

    @registry.register("cat")
    class Cat:
        pass

    assert registry["cat"] is Cat
    assert Cat.__name__ == "Cat" and Cat.name == "cat"


def test_lookup_membership_and_order(animals):
    assert animals["horse"] == "HORSE"
    assert "mouse" in animals and "cow" not in animals
    assert list(animals) == ["tiger", "horse", "mouse"]
    assert dict(animals.items()) == {"tiger": "TIGER", "horse": "HORSE", "mouse": "MOUSE"}


def test_a_name_is_taken_once(animals):
    with pytest.raises(ValueError, match="animal 'tiger' is registered twice"):
        animals.register("tiger")("another")
    assert animals["tiger"] == "TIGER"


def test_unknown_name_suggests_the_nearest_and_lists_all(animals):
    with pytest.raises(ValueError) as error:
        animals["hores"]
    assert str(error.value) == "unknown animal 'hores': did you mean 'horse'? valid: horse, mouse, tiger"


@pytest.mark.parametrize(
    ("name", "valid", "message"),
    [
        ("moose", ["mouse", "house"], "did you mean 'mouse' or 'house'? valid: mouse, house"),
        ("zzz", ["mouse"], "unknown animal 'zzz': valid: mouse"),
        ("zzz", [], "valid: none"),
        (7, ["mouse"], "unknown animal 7: valid: mouse"),
    ],
)
def test_message(name, valid, message):
    assert unknown("animal", name, iter(valid)).endswith(message)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("lora",), {"rnk": 2}, "lora: unknown setting 'rnk': did you mean 'rank'"),
        (("lora",), {"rank": "many"}, "lora: .*rank.*many"),
        (("multiflow",), {"sparsity": 1.5}, "multiflow: sparsity"),
        (("loar",), {}, "unknown method 'loar': did you mean 'lora'"),
        (("multifow", "prune"), {}, "unknown pruner 'multifow': did you mean 'multiflow'"),
        (("lora", "prune"), {}, "unknown pruner 'lora'"),
        (("dsa", "skip"), {}, "unknown search 'dsa': did you mean 'das'"),
        (("unitp", "tune"), {}, "unknown tuning method 'unitp': did you mean 'unipt'"),
    ],
)
def test_a_method_that_cannot_be_made_says_why(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS.make(*arguments, **settings)


def test_a_method_is_made_from_plain_values():
    made = METHODS.make("lora", rank=2, targets=["query", "value"])
    assert isinstance(made, Method) and (made.name, made.lever) == ("lora", "tune")
    assert made.settings.rank == 2 and made.settings.targets == ("query", "value")
    assert made.settings.dropout == METHODS["lora"].Settings().dropout


def test_settings_that_are_missing_are_named():
    class Point:
        def __init__(self, x: int, y: int = 0):
            self.x, self.y = x, y

    assert build(Point, {"x": 2}, "here").x == 2
    with pytest.raises(SettingsError, match="here: .*x"):
        build(Point, {"y": 1}, "here")
    with pytest.raises(SettingsError, match="here: unknown key 'z'"):
        build(Point, {"z": 1}, "here", "key")


def test_a_null_is_refused_where_the_type_has_none():
    class Point:
        def __init__(self, x: int, y: int | None = 0, z: Any = 0, way: Literal["up", "down"] = "up"):
            self.all = x, y, z, way

    assert build(Point, {"x": 1, "y": None, "z": None}, "here").all == (1, None, None, "up")
    for name, wanted in (("x", "int"), ("way", r"Literal\['up', 'down'\]")):
        with pytest.raises(SettingsError, match=f"here: {name}: expected {wanted}, found null: leave it out for its"):
            build(Point, {"x": 1, name: None}, "here")


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "message"),
    [
        ("[1, inf)", (1, 7, None), (0, -1), "n must be at least 1, found"),
        ("(0, inf)", (0.1,), (0, 0.0), "n must be above 0, found"),
        ("[0, 1)", (0, 0.5), (-0.1, 1), r"n must lie in \[0, 1\), found"),
        ("(0, 1]", (1,), (0, 1.1), r"n must lie in \(0, 1\], found"),
        ("[0, inf)", (0,), (float("nan"), float("inf")), r"n must lie in \[0, inf\), found"),
    ],
)
def test_numbers_lie_within_their_intervals(interval, inside, outside, message):
    for value in inside:
        within({"n": value, "m": "of no matter"}, n=interval)
    for value in outside:
        with pytest.raises(ValueError, match=f"{message} {value}"):
            within({"n": value}, n=interval)


@pytest.mark.parametrize(
    ("registry", "name", "settings", "message"),
    [
        (SOURCES, "pictograms", {"train": -3}, "train must be at least 1, found -3"),
        (SOURCES, "pictograms", {"validation": None}, "validation: expected int, found null"),
        (SOURCES, "easy-vqa", {"train": -3}, "train must be at least 1, found -3"),
        (SOURCES, "flickr8k", {"root": "f", "rows": 0}, "rows must be at least 1, found 0"),
        (SOURCES, "flickr8k", {"root": None}, "root: expected Path, found null"),
        (TASKS, "retrieval", {"margin": -1.0}, "margin must be at least 0, found -1"),
        (TASKS, "captioning", {"longest": 5, "shortest": 6}, r"shortest must lie in \[0, 5\], found 6"),
        (METHODS, "lora", {"alpha": 0.0}, "alpha must be above 0, found 0"),
        (METHODS, "wanda", {"sparsity": float("nan")}, r"sparsity must lie in \[0, 1\), found nan"),
        (METHODS, "wanda", {"batches": None}, "batches: expected int, found null"),
        (METHODS, "das", {"subsets": 1}, "subsets must be at least 2, found 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(registry, name, settings, message):
    with pytest.raises(SettingsError, match=f"here: {message}"):
        build(registry[name].Settings if registry is METHODS else registry[name], settings, "here")


def test_thousands_of_texts_are_taken_as_they_stand_and_one_that_is_no_text_is_refused(monkeypatch):
    answers = [f"answer {i}" for i in range(3000)]
    parse, given = ArgumentParser.parse_object, []
    monkeypatch.setattr(ArgumentParser, "parse_object", lambda s, v, *a: given.append(v) or parse(s, v, *a))
    task = build(TASKS["vqa"], {"answers": ["3", "true", *answers]}, "task")
    assert task.answers == ["3", "true", *answers]
    assert len(given[-1]["answers"]) == 1  # jsonargparse copies all texts for each of them
    with pytest.raises(SettingsError, match="answers.*Expected a <class 'str'>"):
        build(TASKS["vqa"], {"answers": ["a", 1]}, "task")
