"""A GRU that is looked at once costs what it costs when it is run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from trimtab import counting, once
from trimtab.pooling import GPO
from trimtab.sizes import as_usual, sizes_only


def figures(kind: str, frozen: bool, graded: bool) -> tuple[int, counting.TrainingStep, list[bool]]:
    """Multiply-adds and one training step; which tensors get a gradient."""
    both = kind == "two layers"
    model = GPO() if kind.startswith("gpo") else nn.GRU(8, 16, 1 + both, batch_first=both, bidirectional=both)
    model.requires_grad_(not frozen)
    x = torch.empty(5, 3, 8).requires_grad_(graded)
    valid = torch.ones(5, 3, dtype=torch.bool) if kind == "gpo, padded" else None

    def loss() -> Tensor:
        y = model(x, valid) if isinstance(model, GPO) else model(x)[kind == "last state"]
        return (y * y).sum()

    reached = []
    if graded or not frozen:
        loss().backward()
        reached = [p.grad is not None and p.grad.shape == p.shape for p in (x, *model.parameters())]
    return counting.count_macs(loss), counting.training_step(loss, model), reached


@pytest.mark.parametrize("kind", ["gpo", "gpo, padded", "outputs", "two layers", "last state"])
@pytest.mark.parametrize(("frozen", "graded"), [(False, False), (True, True), (True, False)])
def test_all_figures_are_those_of_the_steps(kind, frozen, graded, monkeypatch):
    with sizes_only():
        at_once = figures(kind, frozen, graded)
    monkeypatch.setattr(once, "seen_once", nullcontext)
    with sizes_only():
        assert at_once == figures(kind, frozen, graded)
    assert at_once[0] > 0 and at_once[1].peak > 0 and (at_once[1].saved > 0) == (graded or not frozen)


def test_equal_calls_are_run_once(monkeypatch):
    run = []
    plain = torch._VF.gru
    monkeypatch.setattr(torch._VF, "gru", lambda *args: run.append(args) or plain(*args))
    with sizes_only():
        model, x = nn.GRU(6, 3), torch.empty(7, 2, 6)
        model(x)
        before = len(run)
        model(x), nn.GRU(6, 3)(x * 2)
        assert len(run) == before > 0
        model(torch.empty(7, 3, 6))
        assert len(run) == 2 * before
        with torch.no_grad():
            model(x)
        assert len(run) == 3 * before  # other figures


def test_values_and_wrong_sizes_are_left_to_torch():
    model, x = nn.GRU(6, 3), torch.ones(7, 2, 6)
    plain = model(x)[0]
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5]))
    with sizes_only():
        with as_usual():
            assert torch.equal(model(x)[0], plain)
            assert model(packed)[0].data.shape == (12, 3)
        with pytest.raises(RuntimeError, match="6, got 5"):
            nn.GRU(6, 3)(torch.empty(7, 2, 5))
    assert torch.equal(model(x)[0], plain)
