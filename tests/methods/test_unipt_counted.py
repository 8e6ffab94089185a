"""While memory alone is counted, UniPT's loops leave out what repeats; every figure stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab import counting, sizes
from trimtab.methods.tune.unipt import core
from trimtab.methods.tune.unipt.down import Target

LENGTH, WIDTH = 30, 8


def target() -> Target:
    return Target(*(nn.Parameter(torch.empty(shape)) for shape in ((9, LENGTH, WIDTH), WIDTH, WIDTH)))


def figures(causal: bool, masked: bool) -> tuple[int, counting.TrainingStep]:
    """Multiply-adds and one training step of attention on five layers of nine samples, three at a time."""
    anchor, *layers = (target() for _ in range(6))
    mask = torch.ones(9, LENGTH) if masked else None
    if mask is not None:
        mask[:4, 20:] = 0
        mask[8, 25:] = 0
    confidence = torch.empty(9, LENGTH if causal else 1, 5).requires_grad_()

    def loss() -> Tensor:
        return core.attend(anchor, layers, mask, 1e-6, True, causal, confidence, skip_padding=masked).sum()

    model = nn.ParameterList([t for x in (anchor, *layers) for t in x if t is not None])
    return counting.count_macs(loss), counting.training_step(loss, model)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_all_figures_are_those_of_the_whole_loop(causal, masked, monkeypatch):
    monkeypatch.setitem(core.CACHE_BYTES, "cpu", 4 * 3 * LENGTH * LENGTH)
    run = []
    plain = core._norm
    monkeypatch.setattr(core, "_norm", lambda *args: run.append(1) or plain(*args))
    with sizes.sizes_only():
        short, few = figures(causal, masked), len(run)
    monkeypatch.setattr(core, "unlike", lambda steps, alike: steps)
    with sizes.sizes_only():
        assert short == figures(causal, masked)
    assert short[0] > 0 and short[1].saved > 0 and not short[1].idle
    assert few < 0.8 * (len(run) - few)


def test_nothing_is_left_out_elsewhere():
    numbers = [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    alike = [1, 1, 2, 2, 1, 1]

    def kept() -> list[int]:
        return list(sizes.unlike(numbers, lambda number: number))

    assert kept() == numbers
    with counting.Alive([]):
        assert kept() == numbers  # on real tensors
    with sizes.sizes_only():
        assert kept() == numbers
        with counting.Alive([]):
            assert kept() == alike
            with FlopCounterMode(display=False):
                assert kept() == numbers  # multiply-adds are counted
            with sizes.as_usual():
                assert kept() == numbers
