"""Watching: blocks that run more than once in one pass, and models that note something of every pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from tests.anatomy.test_watch import IDS, MASK, Mixing
from trimtab.anatomy import Anatomy, Tap

PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class One(nn.Module):
    """One stack for words and for pictures, or for two texts; it notes how often it ran, and on what."""

    def __init__(self):
        super().__init__()
        self.words, self.patches = nn.Embedding(10, 12), nn.Conv2d(3, 12, 4, 4)
        self.layers = nn.ModuleList(Mixing(12, False) for _ in range(2))
        self.ran, self.seen, self.sum = 0, [], torch.zeros(12)

    def run(self, x, valid=None):
        for layer in self.layers:
            x = layer(valid, x)
        self.ran, self.last = self.ran + 1, x
        self.seen.append(x.shape)
        self.sum += x.detach().sum((0, 1))
        return x

    def forward(self, words, valid=None, others=None, unhidden=None, pictures=None):
        made = [] if pictures is None else [self.run(self.patches(pictures).flatten(2).mT)]
        made.append(self.run(self.words(words), valid))
        return made if others is None else [*made, self.run(self.words(others), unhidden)]


@pytest.mark.parametrize(
    "second, modality",
    [({"pictures": PICTURES}, "fusion"), ({"others": IDS.flip(1), "unhidden": MASK.flip(1)}, "text")],
)
@pytest.mark.parametrize("tune", ["unipt", "lst", "deep-prompt"])
def test_the_mask_of_one_run_is_not_that_of_another(second, modality, tune):
    model = One()
    fit = trimtab.adapt(model, example={"words": IDS, "valid": MASK, **second})
    (tower,) = fit.anatomy.towers
    assert tower.modality == modality and "'layers.0' runs again in one pass" in dict(tower.unknown)["causal"]
    with pytest.raises(ValueError, match=rf"{tune}: `mask` of tower '{modality}' is unknown.*with other masks"):
        fit.tune(tune)


def test_two_runs_with_one_mask_are_one_tower():
    (tower,) = Anatomy.of(One(), {"words": IDS, "valid": MASK, "others": IDS.flip(0), "unhidden": MASK}).towers
    assert not tower.knows("mask")  # two inputs, though they are the same here
    (tower,) = Anatomy.of(Pair(), {"words": IDS, "valid": MASK}).towers
    assert tower.mask == Tap("", "input", "valid") and tower.knows("mask", "causal")


class Pair(One):
    def forward(self, words, valid):
        return self.run(self.words(words), valid), self.run(self.words(words).flip(2), valid)


def test_what_a_model_notes_of_a_pass_is_as_before():
    model = One()
    seen, total = model.seen, model.sum
    Anatomy.of(model, {"words": IDS, "valid": MASK})
    assert (model.ran, model.seen, hasattr(model, "last")) == (0, [], False) and not model.sum.any()
    assert model.seen is seen and model.sum is total


def test_an_example_without_rows_is_named():
    with pytest.raises(ValueError, match=r"example: 'words' \(0, 5\) has no row; give two rows or more"):
        Anatomy.of(One(), {"words": IDS[:0, :5], "valid": MASK[:0, :5]})


class Parts(nn.Module):
    """The parts of its blocks stand in lists, which never run themselves."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 12)
        self.layers = nn.ModuleList(nn.ModuleList([Mixing(12, False), Mixing(12, False)]) for _ in range(2))
        self.idle = nn.ModuleList(Mixing(12, False) for _ in range(2))

    def forward(self, words):
        x = self.words(words)
        for one, two in self.layers:
            x = two(None, one(None, x))
        return x


def test_lists_in_a_list_did_run():
    assert Anatomy.of(Parts(), {"words": IDS}).idle == ("idle",)
