"""What a model asks a block that is skipped: facts of its own, and those that its class states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab


class Block(nn.Module):
    kind = "full"

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, mask):
        return x + mask * self.down(self.up(self.norm(x)).relu())


class Sliding(Block):
    kind = "sliding"


class Model(nn.Module):
    """Gives each block the mask of its kind."""

    def __init__(self):
        super().__init__()
        self.enter, self.asked = nn.Linear(4, 8), []
        self.layers = nn.ModuleList([Block(), Sliding(), Block(), Sliding()])

    def forward(self, x):
        x, masks = self.enter(x), {"full": 1.0, "sliding": 0.5}
        self.asked = [layer.kind for layer in self.layers]
        for layer in self.layers:
            x = layer(x, masks[layer.kind])
        return x


def test_a_skipped_block_tells_what_its_class_states():
    torch.manual_seed(0)
    model, batch = Model().eval(), {"x": torch.randn(2, 5, 4)}
    fit = trimtab.adapt(model, example=batch)
    fit.skip(plan=["layers.1"], adapters="none")
    with torch.no_grad():
        assert model(**batch).shape == (2, 5, 8)
    assert model.asked == ["full", "sliding", "full", "sliding"]
    with pytest.raises(AttributeError):
        _ = model.layers[1].other
