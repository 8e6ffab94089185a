"""N:M patterns: every group exact, from any score, and what does not fit is refused."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import trimtab
from trimtab import Masks
from trimtab.methods import METHODS
from trimtab.methods.prune.selection import largest_of_each
from trimtab.methods.prune.sparsegpt import reconstruct

NO_PATTERN = {"chita", "chita++", "tamt"}
PRUNERS = sorted(n for n, m in METHODS.items() if m.lever == "prune" and n not in NO_PATTERN)


class Model(nn.Module):
    """Attention with fused projections, plain linears and transposed ones, all of widths that 4 and 8 divide."""

    def __init__(self, width: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 24, batch_first=True) for _ in range(2))
        self.mix = nn.ModuleList(nn.Sequential(Conv1D(24, width), nn.ReLU(), Conv1D(width, 24)) for _ in range(2))

    def forward(self, x):
        for layer, mix in zip(self.layers, self.mix, strict=True):
            x = mix(layer(x))
        return {"loss": x.square().mean()}


@pytest.fixture
def model() -> Model:
    return Model().eval()


def batches(width: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 5, width, generator=generator)} for _ in range(4)]


def groups(path: str, mask: torch.Tensor, size: int) -> torch.Tensor:
    """How many of each group are kept; a transposed linear's inputs are its rows."""
    mask = mask.t() if path.startswith("mix") else mask
    return mask.reshape(len(mask), -1, size).sum(dim=-1)


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("name", PRUNERS)
def test_every_group_keeps_exactly_n(name, kept, size, model, tmp_path):
    settings = {"steps": 3} if name == "itersnip" else {}
    masks = trimtab.prune(model, name, batches=batches(), pattern=f"{kept}:{size}", **settings).masks
    assert len(masks) == 2 * 4 + 2 * 2
    for path, mask in masks.items():
        assert (groups(path, mask, size) == kept).all(), path
        assert torch.equal(model.get_parameter(path) != 0, mask), path
    assert masks.sparsity == pytest.approx(1 - kept / size)
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.read(tmp_path / "masks.safetensors", model)
    assert all(torch.equal(again[path], mask) for path, mask in masks.items())


def test_the_largest_scores_of_a_group_stay(model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = trimtab.prune(model, "omp", pattern="2:4").masks
    for path, mask in masks.items():
        weight = before[path].t() if path.startswith("mix") else before[path]
        mask = mask.t() if path.startswith("mix") else mask
        size = weight.abs().reshape(-1, 4)
        best = max(size[:, list(pair)].sum(dim=1).sum() for pair in combinations(range(4), 2))
        kept = size[mask.reshape(-1, 4)]
        assert torch.equal(kept.view(-1, 2).sort(dim=1).values, size.sort(dim=1).values[:, 2:]) and kept.sum() > best


def test_equal_scores_keep_the_first():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]])
    assert largest_of_each(scores, 4, 2).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]


def test_zeros_of_a_pattern_are_kept_in_training(model):
    masks = trimtab.prune(model, "wanda", batches=batches(), pattern="2:4").masks
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    masks.keep(model, optimizer)
    for batch in batches():
        model(**batch)["loss"].backward()
        optimizer.step()
    for path, mask in masks.items():
        assert (groups(path, model.get_parameter(path) != 0, 4) == 2).all(), path
        assert torch.equal(model.get_parameter(path) != 0, mask)


@pytest.mark.parametrize("block", [3, 4, 6, 128])
def test_sparsegpt_keeps_outputs_closer_than_zeroing_the_same_weights(block):
    torch.manual_seed(0)
    weight, x = torch.randn(12, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    mask, new = reconstruct(weight, x.t() @ x / 200, 0, block, 0.01, (2, 4))
    assert (mask.view(12, 4, 4).sum(dim=-1) == 2).all() and not new[~mask].any()
    error, plain = ((x @ (w - weight).t()).square().sum() for w in (new, weight * mask))
    assert error < 0.8 * plain
    if block == 4:  # blocks change when sums are made, not what is found; 3 is rounded up to 4
        torch.testing.assert_close(new, reconstruct(weight, x.t() @ x / 200, 0, 128, 0.01, (2, 4))[1])
        assert torch.equal(new, reconstruct(weight, x.t() @ x / 200, 0, 3, 0.01, (2, 4))[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "4:2"}, "expected 'n:m' with 0 < n < m, such as '2:4' (2 of 4 are kept), found '4:2'"),
        ({"pattern": "2/4"}, "found '2/4'"),
        ({"pattern": "0:4"}, "found '0:4'"),
        ({"pattern": "2:4", "sparsity": 0.63}, "pattern '2:4' sets the sparsity to 0.5, found sparsity: 0.63"),
        ({"pattern": "2:4", "sparsity": [0.5, 0.75]}, "found sparsity: 0.75"),
        ({"pattern": "2:4", "allocation": "global"}, "found allocation: 'global'; leave out one of them"),
        ({"pattern": "2:5"}, "'layers.0.self_attn.in_proj_weight' has 16 inputs, which groups of 5 do not divide"),
        ({}, "expected `sparsity`, a number in [0, 1), or `pattern`"),
        ({"name": "chita", "pattern": "2:4"}, "CHITA divides the weights itself, found '2:4'"),
        ({"name": "chita++", "pattern": "2:4"}, "CHITA divides the weights itself"),
        ({"name": "tamt", "pattern": "2:4"}, "TAMT learns which weights go, found '2:4'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message, model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    name = settings.pop("name", "omp")
    with pytest.raises(ValueError, match=re.escape(message)):
        trimtab.prune(model, name, **{"batches": batches(), **settings})
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_sparsity_that_agrees_is_allowed(model):
    assert trimtab.prune(model, "omp", 0.5, pattern="2:4").masks.sparsity == 0.5


def test_a_recipes_settings_say_what_is_meant():
    assert METHODS["wanda"]().settings.sparsity == 0.63
    assert METHODS["wanda"](sparsity=0.2).settings.sparsity == 0.2
    assert METHODS["wanda"](pattern="1:4").settings.sparsity == 0.75
