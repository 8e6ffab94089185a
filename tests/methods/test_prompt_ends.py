"""Prompts are set before the first block and taken off after the last: a pass that goes around one is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trimtab
from tests.anatomy.test_watch import IDS, Mixing


class Branching(nn.Module):
    """Goes around one of its blocks where the first word is 9; may compute blocks again in the backward pass."""

    def __init__(self, around: int, again: bool = False):
        super().__init__()
        self.words, self.around, self.again = nn.Embedding(10, 12), around, again
        self.layers = nn.ModuleList(Mixing(12, False) for _ in range(3))

    def forward(self, words):
        x = self.words(words)
        for i, layer in enumerate(self.layers):
            if i != self.around or words[0, 0] != 9:
                x = checkpoint(layer, None, x, use_reentrant=False) if self.again else layer(None, x)
        return x


WORDS = torch.cat([torch.ones_like(IDS[:, :1]), IDS[:, 1:]], dim=1)
OTHER = torch.cat([torch.full_like(IDS[:, :1], 9), IDS[:, 1:]], dim=1)


@pytest.mark.parametrize(
    "around, expected", [(0, "'layers.1' ran, and the first"), (2, "'layers.2' did not run, after")]
)
@pytest.mark.parametrize("tune", ["deep-prompt", "shallow-prompt"])
def test_a_pass_around_the_first_or_the_last_block_is_named(tune, around, expected):
    model = Branching(around)
    trimtab.adapt(model, example={"words": WORDS}).tune(tune)
    before = model(WORDS)
    with pytest.raises(ValueError, match=f"{tune}: block {expected}"):
        model(OTHER)
    assert torch.equal(model(WORDS), before)  # the next pass is sound


def test_blocks_that_are_computed_again_find_their_prompts():
    torch.manual_seed(0)
    model = Branching(0, again=True)
    trimtab.adapt(model, example={"words": WORDS}).tune("deep-prompt")
    grads = []
    for model.again in (True, False):
        model.zero_grad()
        (model(WORDS).square().sum() + model(WORDS[:, :4]).sum()).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)
