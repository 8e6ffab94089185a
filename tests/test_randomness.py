"""Looking at a model draws no number that comes after, on a GPU neither."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.models.four import DUAL
from trimtab.randomness import drawn_aside


def test_what_is_drawn_aside_is_the_same_each_time_and_changes_nothing():
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    with drawn_aside(seed=0):
        first = torch.randn(2)
    with drawn_aside(seed=0):
        assert torch.equal(torch.randn(2), first)
    assert torch.equal(torch.randn(2), wanted)


def test_a_gpu_that_is_not_in_use_yet_is_not_seeded(monkeypatch: pytest.MonkeyPatch):
    """Torch would keep the seed for it, and nobody would take it back."""

    def never(*args: object) -> None:
        raise AssertionError("the seed of GPUs was changed")

    model = DUAL.make()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    fit = trimtab.adapt(model, example=DUAL.batch).skip("random-skip", skip=1).tune("lora")
    fit.cost(DUAL.batch)


def test_all_gpus_in_use_go_on_as_before(monkeypatch: pytest.MonkeyPatch):
    seeds, kept = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.append((state, device)))
    with drawn_aside(seed=5):
        pass
    assert seeds == [5] and kept == [(0, 0), (1, 1)]
