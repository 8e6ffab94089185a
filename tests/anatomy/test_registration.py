"""Which description a model gets, and what a class gets that no description is for."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError, Block, Tap, Tower, describes, lookup


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    lookup._load_descriptions()
    monkeypatch.setattr(lookup, "_DESCRIPTIONS", dict(lookup._DESCRIPTIONS))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)


class Homemade(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.ModuleList(Layer() for _ in range(2))


class Child(Homemade):
    pass


def stack(name: str = "words") -> Anatomy:
    blocks = tuple(Block(f"stack.{i}", 8) for i in range(2))
    return Anatomy((Tower(name, "text", blocks, ("stack",), Tap("stack.1")),))


def test_a_class_and_its_children_are_described():
    describes("Homemade")(lambda model: stack())
    for model in (Homemade(), Child()):
        found = Anatomy.of(model)
        assert [t.name for t in found.towers] == ["words"] and found.source == "registered for Homemade"


def test_a_class_is_described_once():
    def other(model: Any) -> Anatomy:
        return stack()

    def describe(model: Any) -> Anatomy:
        return stack("first")

    describes("Homemade")(describe)
    with pytest.raises(AnatomyError, match=r"'Homemade' is described twice: by .*describe and by .*other; name in"):
        describes("Homemade")(other)
    with pytest.raises(AnatomyError, match=r"'ViltModel' is described twice: by trimtab.* and by .*other"):
        describes("Unheard", "ViltModel", packages=["transformers"])(other)
    assert "Unheard" not in dict(lookup.described())  # all of the names or none

    def describe(model: Any) -> Anatomy:  # the same once more, as a notebook's cell that is run again
        return stack("second")

    describes("Homemade")(describe)
    assert Anatomy.of(Homemade()).towers[0].name == "second"


def make_foreign(name: str, base: type = Homemade) -> type:
    return type(name, (base,), {"__module__": "elsewhere.models"})


def test_a_class_of_the_same_name_from_elsewhere_is_refused_with_the_way_out():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_foreign("ViltModel")()

    for model, where in ((make_foreign("ViltModel")(), "the model"), (Holder(), "'inner'")):
        with pytest.raises(AnatomyError) as error:
            Anatomy.of(model)
        message = str(error.value)
        assert message.startswith(f"{where} is of the class elsewhere.models.ViltModel")
        assert "transformers" in message and "@trimtab.describes('ViltModel', packages=['elsewhere'])" in message
    describes("ViltModel", packages=["elsewhere"])(lambda model: stack())
    assert [t.name for t in Anatomy.of(make_foreign("ViltModel")()).towers] == ["words"]
    assert "fusion" in [t.name for t in Anatomy.of(tiny_vilt()).towers]  # transformers' own goes on as before


def tiny_vilt(kind: type = hf.ViltModel) -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return kind(hf.ViltConfig(**size, image_size=16, patch_size=8, vocab_size=30))


def test_a_child_of_the_class_itself_is_described_whatever_its_own_name():
    found = Anatomy.of(tiny_vilt(make_foreign("ViltModel", hf.ViltModel)))
    assert [t.name for t in found.towers] == ["fusion"]


def test_a_name_that_trimtab_describes_needs_its_package():
    with pytest.raises(AnatomyError, match=r"by trimtab.* and by .*packages=\['mypackage'\]"):
        describes("ViltModel")(lambda model: stack())


@pytest.mark.parametrize("wrong", [lambda m: m.layers, lambda m: {}["layers"], lambda m: [][0]])
def test_a_description_that_fails_is_named_with_its_class(wrong):
    describes("Homemade")(wrong)
    with pytest.raises(AnatomyError, match=r"description .*<lambda> does not fit the model, a .*Homemade: .*Error: "):
        Anatomy.of(Homemade())


@pytest.mark.parametrize("names", [("a.b",), ("a", "a"), ("",)])
def test_names_of_towers_can_hold_modules(names):
    towers = tuple(t for name in names for t in stack(name).towers)
    with pytest.raises(AnatomyError, match="expected names that differ, without dots"):
        Anatomy(towers).check(Homemade())


def test_a_tower_without_blocks_is_named():
    empty = Tower("more", "text", (), ("other",), Tap("stack"))
    with pytest.raises(AnatomyError, match="tower 'more' of the anatomy .given. has no block"):
        Anatomy((*stack().towers, empty)).check(Homemade())
