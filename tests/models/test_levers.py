"""The check of the census that all that is trained gets a gradient: it finds a fault, and takes no routing for one."""

from __future__ import annotations

import torch
from torch import nn

from tests.anatomy.test_watch_broken import Base, Block
from tests.models.census import verdict
from tests.models.levers import LEVERS, Case
from trimtab.methods.tune.bitfit import BitFit


class Routed(Block):
    """Each token goes to one of four experts, beside the block's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, bias=None):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            made[chosen == i] = weights[chosen == i][:, None] * expert(x[chosen == i])
        return super().forward(x + made, bias)


def routed(seed: int) -> Case:
    torch.manual_seed(seed)
    return Case.of("routed", Base(Routed).eval(), {"input_ids": torch.randint(2, 8, (2, 4))})


def test_an_expert_that_a_step_leaves_without_tokens_is_no_fault():
    for seed in range(4):
        assert verdict(LEVERS["bitfit"], routed(seed)).kind == "works"


def test_what_is_trained_and_never_used_is_one(monkeypatch):
    attach = BitFit.attach

    def attach_another(self, model, anatomy):
        anatomy = attach(self, model, anatomy)
        model.layers[0].register_parameter("unused_bias", nn.Parameter(torch.zeros(3)))
        return anatomy

    monkeypatch.setattr(BitFit, "attach", attach_another)
    found = verdict(LEVERS["bitfit"], routed(0))
    assert found.kind == "wrong" and "'layers.0.unused_bias'" in found.reason
