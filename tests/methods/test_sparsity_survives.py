"""Zeros stay zeros: through weight decay, momentum, accumulation, mixed precision, a scheduler, and LoRA's merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from tests.methods.small import Stack, check_zeros
from trimtab import Masks
from trimtab.methods.tune.lora import LoRA


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, accumulate: int = 1, autocast: bool = False) -> None:
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    for step in range(6 * accumulate):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


OPTIMIZERS = {
    "AdamW with weight decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "SGD with Nesterov momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_step_revives_a_weight(kind, autocast, accumulate):
    torch.manual_seed(0)
    model = Stack()
    optimizer = OPTIMIZERS[kind](model.parameters())
    trained(optimizer, model)  # moments of every weight, from before they were pruned
    masks = trimtab.prune(model, "omp", 0.63, anatomy=model.anatomy()).masks
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks.keep(model, optimizer)
    trained(optimizer, model, accumulate, autocast)
    check_zeros(model, masks)
    assert all(not torch.equal(before[path], model.state_dict()[path]) for path in masks), "nothing was trained"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_being_kept_they_come_back(kind):
    """The test above can fail."""
    torch.manual_seed(0)
    model = Stack()
    optimizer = OPTIMIZERS[kind](model.parameters())
    masks = trimtab.prune(model, "omp", 0.63, anatomy=model.anatomy()).masks
    for handle in masks.keep(model, optimizer):
        handle.remove()
    trained(optimizer, model)
    with pytest.raises(AssertionError, match="blocks.0"):
        check_zeros(model, masks)


def test_moments_of_pruned_weights_stay_zero():
    torch.manual_seed(0)
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    masks = trimtab.prune(model, "omp", 0.63, anatomy=model.anatomy()).masks
    masks.keep(model, optimizer)
    trained(optimizer, model)
    parameters = dict(model.named_parameters())
    for path, mask in masks.items():
        state = optimizer.state[parameters[path]]
        assert not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any() and state["exp_avg"].any()


def test_only_gradients_of_pruned_weights_are_cleared():
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.ones(2)
    Masks({"weight": torch.tensor([[True, False], [False, True]])}).before_step(model)
    assert model.weight.grad.tolist() == [[3, 0], [0, 3]] and model.bias.grad.tolist() == [1, 1]


def test_loras_merge_multiplies_its_update_by_the_mask():
    torch.manual_seed(0)
    model = Stack()
    anatomy = model.anatomy()
    masks = trimtab.prune(model, "omp", 0.63, anatomy=anatomy).masks
    pruned = {k: v.clone() for k, v in model.state_dict().items()}
    lora = LoRA(rank=2, targets=("query",))
    model.requires_grad_(False)
    lora.attach(model, anatomy)
    trained(torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2), model)
    update = model.blocks[0].query.get_delta_weight("default").detach().clone()
    assert (update != 0).all()
    lora.fold(model)
    with pytest.raises(AssertionError, match=r"blocks.0.query"):
        check_zeros(model, masks)  # a plain merge fills the zeros
    masks.enforce(model)
    check_zeros(model, masks)
    mask = masks["blocks.0.query.weight"]
    wanted = (pruned["blocks.0.query.weight"] + update) * mask
    torch.testing.assert_close(model.blocks[0].query.weight.data, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.blocks[0].value.weight, pruned["blocks.0.value.weight"])
