"""A matrix that two blocks share: its mask stays with it, whichever of the two is taken out or gets an update."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.methods.small import Stack

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def shared(module: bool = False) -> Stack:
    torch.manual_seed(0)
    model = Stack()
    if module:
        model.blocks[1].query = model.blocks[0].query
    else:
        model.blocks[1].query.weight = model.blocks[0].query.weight
    return model


@pytest.mark.parametrize("pruner", ["local-mp", "sparsegpt"])
@pytest.mark.parametrize("module", [False, True], ids=["a weight", "a layer"])
def test_a_mask_stays_when_the_block_of_its_path_is_skipped(module, pruner, tmp_path):
    fit = trimtab.adapt(shared(module), anatomy=Stack().anatomy())
    fit.prune(pruner, sparsity=0.5, batches=[{"x": X}] if pruner == "sparsegpt" else None)
    fit.skip("random-skip", plan=["blocks.0"], adapters="none")
    assert "blocks.0.query.weight" in fit.masks and "blocks.0.value.weight" not in fit.masks
    assert fit.methods[0].state["prunable"] == 4 * 256  # both values that are left, the shared queries, the last
    weight = fit.model.blocks[1].query.weight
    weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.5)
    fit.keep(optimizer)
    fit.model(X).square().mean().backward()
    optimizer.step()
    assert (weight == 0).float().mean() == 0.5
    weight.requires_grad_(False)
    fit.save(tmp_path / "fit")
    again = trimtab.adapt(shared(module), tmp_path / "fit", anatomy=Stack().anatomy())
    assert torch.equal(again.model(X), fit.model(X)) and again.masks == fit.masks


@pytest.mark.parametrize("targets", [("blocks.1.query",), ("query",), "all-linear"])
def test_an_update_of_any_layer_that_shares_a_pruned_weight_is_masked(targets):
    fit = trimtab.adapt(shared(), anatomy=Stack().anatomy()).prune("local-mp", sparsity=0.5)
    fit.tune("lora", rank=2, targets=targets)
    with torch.no_grad():
        for parameter in fit.parameters():
            parameter.normal_()
    plain = fit.folded()
    assert torch.allclose(plain(X), fit.model(X), rtol=1e-4, atol=1e-4)
    for block in plain.blocks:
        assert (block.query.weight == 0).float().mean() == 0.5
