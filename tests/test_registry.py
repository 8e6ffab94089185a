from __future__ import annotations

import pytest

from trimtab.registry import Registry, unknown


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
    assert Cat.__name__ == "Cat"


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
