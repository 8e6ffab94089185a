"""The four models of the composition tests are what those tests take for granted."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models.four import FOUR, Tiny
from trimtab.anatomy import Anatomy


@pytest.fixture(params=FOUR, ids=lambda t: t.name)
def tiny(request) -> Tiny:
    return request.param


def test_two_models_are_the_same_bit_for_bit_and_so_are_two_calls(tiny):
    first, second = tiny.make(), tiny.make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        a, b = first.train()(**tiny.batch), second.eval()(**tiny.batch)
    assert torch.equal(tiny.loss(a), tiny.loss(b)) and torch.equal(tiny.loss(a), tiny.loss(first(**tiny.batch)))


def test_its_towers_are_described_and_every_parameter_but_the_idle_ones_gets_a_gradient(tiny):
    model = tiny.make()
    anatomy = Anatomy.of(model)
    assert "discovered" not in anatomy.source
    assert {t.name: len(t.blocks) for t in anatomy.towers} == tiny.towers
    tiny.loss(model(**tiny.batch)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in without if not n.startswith(tiny.idle or ("-",))] == []
    assert all(any(n.startswith(prefix) for n in without) for prefix in tiny.idle)


def test_it_can_be_saved_and_read_again(tiny, tmp_path):
    model = tiny.make()
    copy.deepcopy(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(tiny.loss(model(**tiny.batch)), tiny.loss(again(**tiny.batch)))
