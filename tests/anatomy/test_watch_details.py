"""Watching: what is easily taken for something else, such as a mask of hidden tokens for one of valid tokens."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.anatomy.test_watch import BOTH, GROUPED, IDS, MASK, Layer, Mixing, TwoStacks
from trimtab.anatomy import Anatomy, Tap
from trimtab.anatomy.seen.record import record


class Stack(nn.Module):
    """Blocks that are told which tokens are valid, or which are hidden: as truth values, or as what is added."""

    def __init__(self, way: str):
        super().__init__()
        self.layers, self.way = nn.ModuleList(Mixing(12, False) for _ in range(2)), way

    def forward(self, x, seen):
        valid = seen if self.way == "valid" else seen == 0
        for layer in self.layers:
            x = layer(valid[:, None].float()[:, 0], x)
        return x


class Longer(nn.Module):
    """Words are followed by padding of the model's own, as a model of windows has it."""

    def __init__(self, way: str):
        super().__init__()
        self.words, self.stack, self.head = nn.Embedding(10, 12), Stack(way), nn.Linear(12, 4)

    def forward(self, words, valid):
        x, seen = self.words(nn.functional.pad(words, (0, 2))), nn.functional.pad(valid, (0, 2))
        given = {"valid": seen, "hidden": seen == 0, "added": torch.where(seen == 0, -1e9, 0.0)}
        return self.head(self.stack(x, given[self.stack.way]))[:, :-2]


@pytest.mark.parametrize("way", ["valid", "hidden", "added"])
def test_what_says_which_tokens_are_hidden_is_read_the_other_way_round(way):
    (tower,) = Anatomy.of(Longer(way), {"words": IDS, "valid": MASK}).towers
    assert tower.mask == Tap("stack", "input", "seen", padding=way != "valid")


class Sized(TwoStacks):
    """Blocks of pictures that say how many patches there are, and the model counts on it."""

    def forward(self, pictures):
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        for layer in self.text_layers:
            x, size = layer(x)
            assert size == (2, 2)
        return self.head[-1](self.norm(x).mean(1).repeat(1, 3)[:, :20])


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(8) for _ in range(2))

    def forward(self, x):
        made = []
        for _ in range(20):
            x[:, 0, 0].clone()  # its memory is free again
            made.append(torch.tensor([1.0, 2.0]))
        return made


def test_numbers_made_into_a_tensor_come_from_no_input():
    found = record(Constants(), {"x": torch.randn(2, 3, 8)}, set())
    assert [t.origins >> found.inputs["x"] & 1 for t in found.output] == [0] * 20


def test_numbers_that_blocks_return_are_not_made_up():
    model = Sized()
    for layer in model.text_layers:
        layer.forward = lambda x, own=layer.forward: (own(x), (2, 2))
    (tower,) = (found := Anatomy.of(model, {"pictures": BOTH["pictures"]})).towers
    assert "element 1 of what it returns is no tensor but numbers" in dict(tower.blocks[0].unknown)["skip"]
    with pytest.raises(ValueError, match="`skip` of block 'text_layers.0' is unknown"):
        trimtab.METHODS.make("das", skip=1).candidates(found)


def test_several_words_may_end_a_sentence():
    config = hf.LlamaConfig(**GROUPED, eos_token_id=[1, 2])
    (tower,) = Anatomy.of(hf.LlamaForCausalLM(config)).towers
    assert tower.causal and tower.knows("causal")
