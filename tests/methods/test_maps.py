"""Towers of maps, (B, H, W, D), channels last: adapters and skipping take them, what sets tokens in a row does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from trimtab.anatomy import Anatomy

D = 16


class Block(nn.Module):
    """As ConvNeXt's: a convolution reads the turned stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x):
        y = self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.down(self.up(self.norm(y)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, D, 2, 2), nn.Linear(D, 5)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, pictures):
        x = self.patches(pictures).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


def batch(side: int = 10) -> dict:
    return {"pictures": torch.randn(2, 3, side, side + 4, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("pictures", [batch(), {"pictures": torch.randn(2, 3, 2 * D, 2 * D)}])
def test_the_axis_of_channels_is_seen_where_its_length_does_not_tell_it(pictures):
    (tower,) = (found := Anatomy.of(Net(), pictures)).towers
    assert (tower.layout, tower.blocks[0].width, found.unknown()) == ("map", D, [])
    assert [p.kind for p in tower.blocks[0].sublayers] == ["attention"]


@pytest.mark.parametrize("lever", ["adapter", "parallel-adapter", "skip"])
def test_adapters_on_maps_learn_and_keep_rows_apart(lever, tmp_path):
    torch.manual_seed(0)
    model, given = Net(), batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fit = trimtab.adapt(model, example=given)
    fit.skip(plan=["layers.1"]) if lever == "skip" else fit.tune(lever)
    model(**given).square().sum().backward()
    added = {n: p for n, p in model.named_parameters() if p.requires_grad and "layers" in n}
    assert added and all(p.grad.any() for p in added.values())
    with torch.no_grad():
        for p in added.values():
            p += 0.1 * torch.randn_like(p)
        out, alone = model.eval()(**given), model(given["pictures"][:1])
    torch.testing.assert_close(out[:1], alone)
    fit.save(tmp_path / "fit")
    again = Net()
    again.load_state_dict(state)
    trimtab.adapt(again, tmp_path / "fit", example=given)
    with torch.no_grad():
        assert torch.equal(again.eval()(**given), out)


@pytest.mark.parametrize("tune", ["unipt", "lst", "sherl", "side-tuning", "deep-prompt"])
def test_what_needs_tokens_refuses_a_map(tune):
    with pytest.raises(ValueError, match=f"{tune}: .*tower 'vision' is a map tower"):
        trimtab.adapt(Net(), example=batch()).tune(tune)


def test_routed_adapters_refuse_a_map():
    with pytest.raises(ValueError, match="weigh by the first token, and tower 'vision' is a map"):
        trimtab.adapt(Net(), example=batch()).skip(plan=["layers.1"], adapters="routed")
