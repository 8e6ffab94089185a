"""How a search asks for the losses of plans: its journal, losses that are no number, what plans share."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from tests.methods.skipping import losses
from trimtab.anatomy import Block
from trimtab.methods.skip.budget import Goal
from trimtab.methods.skip.search.bandit import BanditSettings, bandit
from trimtab.methods.skip.search.evaluate import Evaluator, PlanLosses, SearchError, choose
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.linear import LinearSettings, linear
from trimtab.methods.skip.skipped import Skipped, Switch


@pytest.mark.parametrize("search", [bandit, linear])
def test_an_interrupted_search_goes_on_from_its_journal(search, tmp_path):
    paid: list = []

    def failing(plans):
        if len(paid) + len(plans) > 12:
            raise KeyboardInterrupt
        paid.extend(plans)
        return losses(plans)

    Journal(tmp_path, "search").begin()

    def play(ask):
        evaluator = Evaluator(ask, [str(i) for i in range(8)], Journal(tmp_path, "search"), model="model")
        generator = torch.Generator().manual_seed(3)
        kind = BanditSettings if search is bandit else LinearSettings
        settings = kind(skip=3, evaluations=30, patience=30)
        return search(evaluator, Goal.count(8, 3), generator, settings, None), generator

    with pytest.raises(KeyboardInterrupt):
        play(failing)
    asked = len(paid)
    assert asked >= 8
    again: list = []
    resumed, state = play(lambda plans: again.extend(plans) or losses(plans))
    assert not set(again) & set(paid), "what was paid for is not paid for again"
    (tmp_path / "losses.json").unlink()
    whole, other = play(losses)
    assert resumed.plan == whole.plan and resumed.scores == whole.scores and resumed.trace == whole.trace
    assert torch.equal(state.get_state(), other.get_state())
    assert len(again) + asked == len({p for u in whole.trace for p in map(tuple, u["subsets"])} | {whole.plan})


def test_a_journal_of_another_model_is_not_used(tmp_path):
    journal = Journal(tmp_path / "search", "one")
    journal.begin()
    Evaluator(losses, "abcdefgh", journal, model="one")([(1,), (2,)])
    assert len(Evaluator(losses, "abcdefgh", journal, model="one").known) == 2
    assert not Evaluator(losses, "abcdefgh", journal, model="two").known
    other = Journal(tmp_path / "search", "two")
    assert not Evaluator(losses, "abcdefgh", other, model="one").known, "of a search with other settings"
    other.begin()
    assert not (tmp_path / "search" / "losses.json").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_the_blocks_and_keeps_the_plan_so_far(bad, tmp_path):
    evaluator = Evaluator(lambda plans: [bad if 2 in p else losses([p])[0] for p in plans],
                          [f"layer.{i}" for i in range(8)], Journal(tmp_path))  # fmt: skip
    assert evaluator([(0, 1), (1, 4)]) == losses([(0, 1), (1, 4)])
    with pytest.raises(SearchError, match=rf"layer.2, layer.3 skipped is {bad}") as error:
        evaluator([(3, 4), (2, 3)])
    assert error.value.plan == (1, 4)
    kept = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert [plan for plan, _ in kept] == [[0, 1], [1, 4], [3, 4]]


class Toy(nn.Module):
    """A stack of blocks behind switches, with a scalar loss."""

    def __init__(self, count: int = 5, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.3))
                                    for _ in range(count))  # fmt: skip
        for i in range(count):
            block = Block(f"layers.{i}", width, stream="input")
            self.layers[i] = Switch(self.layers[i], Skipped(self, block, 2, "none"))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("dropout", [False, True])
def test_what_plans_share_is_given_back_and_changes_nothing(dropout):
    model = Toy()
    batch = {"x": torch.randn(3, 8)}
    plans = [p for k in (1, 2, 3) for p in combinations(range(5), k)]
    plain, reusing = (PlanLosses(model, list(model.layers), [batch], dropout, reuse=r) for r in (False, True))
    wanted = plain(plans)
    assert reusing(plans) == wanted and len(set(wanted)) == len(plans)
    if dropout:
        assert reusing.computed == plain.computed, "never with dropout"
    else:
        assert reusing.computed < 0.5 * plain.computed
        for plan, loss in zip(plans, wanted, strict=True):
            choose(list(model.layers), plan)
            assert float(model.eval()(**batch)["loss"].detach()) == loss


class WritesIntoItsInput(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        x += self.linear(x).tanh()
        return x


class InPlace(Toy):
    def __init__(self, count: int = 5):
        super().__init__(count)
        for switch in self.layers:
            switch.block = WritesIntoItsInput()

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def test_what_a_later_block_has_written_into_is_computed_again():
    model, batch = InPlace(), {"x": torch.randn(3, 8)}
    plans = [p for k in (1, 2, 3) for p in combinations(range(5), k)]
    plain, reusing = (PlanLosses(model, list(model.layers), [batch], reuse=r) for r in (False, True))
    assert reusing(plans) == plain(plans)


def test_plans_are_compared_under_the_same_dropout():
    model, batch = Toy(), {"x": torch.randn(3, 8)}
    common = PlanLosses(model, list(model.layers), [batch], dropout=True)
    assert common([(1,), (2,)]) == common([(1,), (2,)])
    own = PlanLosses(model, list(model.layers), [batch], dropout=True, common=False)
    assert own([(1,)]) != own([(1,)])


def test_a_damaged_journal_is_named(tmp_path):
    journal = Journal(tmp_path / "search")
    journal.begin()
    for name, read in (("found.json", journal.read), ("found.safetensors", journal.tensors)):
        (tmp_path / "search" / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name}: cannot be read .*delete .*search to search from the start"):
            read("found")
