"""Searches, plans and budgets of the skip lever, on losses that are known; whole models only where they must be."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
import torch
from torch import nn
from transformers import ViltConfig, ViltModel

from tests.comparisons.skip import fusion_block
from trimtab import Anatomy
from trimtab.anatomy import Block, Sublayer, Tap, Tower
from trimtab.counting import count_inside, count_macs, time_inside
from trimtab.experiments import assembly, recipe, run, training
from trimtab.experiments import folder as folder_of_runs
from trimtab.methods import METHODS
from trimtab.methods.skip import budget
from trimtab.methods.skip.adapters import RoutedAdapter, Skipped, Switch, add_adapters
from trimtab.methods.skip.budget import BlockCosts, Goal, parse
from trimtab.methods.skip.plan import Plan, PlanError
from trimtab.methods.skip.search.bandit import BanditSettings, bandit, log_probability, log_probability_of_set
from trimtab.methods.skip.search.das import DAS, Gates
from trimtab.methods.skip.search.evaluate import Evaluator, PlanLosses, SearchError, choose
from trimtab.methods.skip.search.exhaustive import exhaustive
from trimtab.methods.skip.search.greedy import greedy
from trimtab.methods.skip.search.influence import block_influence
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.linear import LinearSettings, belief, best_plan, linear

COSTS = [0.9, 0.1, 0.5, 0.8, 0.2, 0.7, 0.6, 0.4]  # what skipping each block adds to the loss
BEST = (1, 4, 7)


def losses(plans):
    return [1 + sum(COSTS[i] for i in plan) for plan in plans]


# --- targets and budgets ----------------------------------------------------------------------------------------------


def test_a_number_of_blocks_is_a_target_whose_plans_are_the_sets_of_that_size():
    goal = Goal.count(5, 2)
    assert list(goal.plans()) == list(combinations(range(5), 2)) and goal.number() == 10
    assert goal.fill([3, 1, 0]) == (1, 3)


def test_plans_of_a_budget_are_enough_and_hold_no_block_too_many():
    goal = Goal((5.0, 1.0, 2.0, 4.0), 6.0, "macs")
    plans = list(goal.plans())
    assert plans == [(0, 1), (0, 2), (0, 3), (2, 3)]
    for plan in plans:
        assert goal.enough(plan) and not any(goal.enough([j for j in plan if j != i]) for i in plan)
    assert goal.fill([1, 0, 3]) == (0, 1)
    assert goal.fill([1, 2, 3]) == (2, 3), "block 1 turned out not to be needed"


def test_a_budget_is_a_share_of_the_dense_model_adapters_included():
    costs = BlockCosts("macs", dense=100, total=110, blocks=(30,) * 3, kept=(32,) * 3, skipped=(2,) * 3)
    goal = costs.goal(0.2)  # 30 of 110 must go to reach 80
    assert goal.needed == 30 and goal.fill([0, 1, 2]) == (0,)
    assert costs.of((0,)) == 80
    assert costs.goal(0.25).fill([2, 1, 0]) == (1, 2)
    with pytest.raises(ValueError, match=r"60% macs cannot be saved .* it is 50.0%"):
        costs.goal(0.6)


@pytest.mark.parametrize("text", ["30 macs", "130% macs", "30% flops", "0% macs", "-3% params"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="expected how much less of what"):
        parse(text)


def test_budgets_as_people_write_them():
    assert parse("30% macs") == (0.3, "macs")
    assert parse(" 12.5 % fewer params ") == (0.125, "params")


# --- searches ---------------------------------------------------------------------------------------------------------


def test_greedy_and_exhaustive_find_the_best_plan_where_blocks_add_up():
    goal = Goal.count(8, 3)
    assert greedy(losses, goal).plan == BEST
    found = exhaustive(losses, goal)
    assert found.plan == BEST
    assert sorted(range(8), key=lambda i: -found.scores[i]) == sorted(range(8), key=lambda i: COSTS[i])
    with pytest.raises(ValueError, match="56 plans for 8 blocks, the limit is 10"):
        exhaustive(losses, goal, limit=10)


def test_greedy_asks_for_one_block_after_the_other():
    evaluator = Evaluator(losses, [str(i) for i in range(8)])
    greedy(evaluator, Goal.count(8, 3))
    assert evaluator.evaluations == 8 + 7 + 6


def test_plackett_luce_is_the_probability_of_draws_without_replacement():
    theta = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    plans = list(combinations(range(4), 2))
    total = sum(log_probability_of_set(theta, p).exp() for p in plans)
    assert float(total) == pytest.approx(1)
    torch.manual_seed(0)
    drawn = torch.multinomial(theta.exp().expand(20000, -1), 2)
    for plan in plans:
        share = float((drawn.sort(1).values == torch.tensor(plan)).all(1).double().mean())
        assert share == pytest.approx(float(log_probability_of_set(theta, plan).exp()), abs=0.015)
    ordered = float(log_probability(theta, (2, 0)).exp())
    p = theta.softmax(0)
    assert ordered == pytest.approx(float(p[2] * p[0] / (1 - p[2])))


def test_the_bandit_climbs_the_expected_reward():
    """Its step, averaged over many draws, is the gradient of the expected reward by the policy."""
    from trimtab.methods.skip.search.bandit import _draw, _step

    theta = torch.tensor([0.2, -0.3, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    plans = list(combinations(range(4), 2))
    cost = torch.tensor([COSTS[a] + COSTS[b] for a, b in plans], dtype=torch.float64)
    expected = -(torch.stack([log_probability_of_set(theta, p).exp() for p in plans]) * cost).sum()
    (want,) = torch.autograd.grad(expected, theta)
    generator, goal = torch.Generator().manual_seed(0), Goal.count(4, 2)
    known = {p: float(c) for p, c in zip(plans, cost, strict=True)}
    settings = BanditSettings(draws=4, evaluations=100)
    got = torch.zeros(4, dtype=torch.float64)
    spread = float(torch.tensor(list(known.values()), dtype=torch.float64).std())
    for _ in range(400):
        orders = _draw(theta.detach(), goal, generator, settings, known)
        found = [known[tuple(sorted(o))] for o in orders]
        got += (_step(theta.detach(), orders, found, list(known.values()), 1.0) - theta.detach()) * spread / 400
    torch.testing.assert_close(got, want, atol=0.04, rtol=0.1)


def test_the_bandit_finds_the_best_plan_pays_once_and_stops():
    hits = 0
    for seed in range(10):
        evaluator = Evaluator(losses, [str(i) for i in range(8)])
        settings = BanditSettings(skip=3, evaluations=40)
        found = bandit(evaluator, Goal.count(8, 3), torch.Generator().manual_seed(seed), settings, COSTS)
        assert evaluator.evaluations <= 40
        hits += found.plan == BEST
        assert evaluator.known[found.plan] == min(evaluator.known[p] for p in evaluator.asked)
    assert hits == 10
    assert evaluator.evaluations < 20, "with a prior that is right it settles early"


def test_the_linear_bandit_finds_the_best_plan_pays_once_and_stops():
    for seed in range(5):
        evaluator = Evaluator(losses, [str(i) for i in range(8)])
        settings = LinearSettings(skip=3, evaluations=20)
        found = linear(evaluator, Goal.count(8, 3), torch.Generator().manual_seed(seed), settings)
        assert found.plan == BEST and evaluator.evaluations <= 20
        assert sorted(range(8), key=lambda i: -found.scores[i])[:3] == [1, 4, 7]
    informed = Evaluator(losses, [str(i) for i in range(8)])
    linear(informed, Goal.count(8, 3), torch.Generator().manual_seed(0), LinearSettings(patience=3), COSTS)
    assert next(iter(informed.asked)) == BEST, "the prior's own answer is the first question"
    assert informed.evaluations < 20, "it stops when it is sure"


def test_the_belief_is_what_the_losses_say():
    """With all plans known and little noise it is the least-squares solution: the true costs, up to scale."""
    known = {p: losses([p])[0] for p in combinations(range(8), 3)}
    settings = LinearSettings(noise=1e-6, pairs=1e-4)
    mean, covariance = belief(torch.zeros(8, dtype=torch.float64), known, settings)
    spread = float(torch.tensor(list(known.values()), dtype=torch.float64).std())
    want = torch.tensor(COSTS, dtype=torch.float64)
    torch.testing.assert_close(mean[:8] * spread, want - want.mean(), atol=1e-3, rtol=0)
    assert float(mean[8:].abs().max()) < 0.01 and float(covariance.diagonal().max()) < 1


def test_the_linear_bandit_sees_that_two_blocks_do_the_same_work():
    """Each of 2 and 5 alone is free, both together are dear; sums of single costs would take them both."""

    def redundant(plans):
        return [losses([p])[0] - 4 * len({2, 5} & set(p)) + 9 * ({2, 5} <= set(p)) for p in plans]

    plans = list(combinations(range(8), 3))
    known = {p: redundant([p])[0] for p in plans[::2]}
    for pairs, both in ((0.6, False), (1e-4, True)):
        mean, _ = belief(torch.zeros(8, dtype=torch.float64), known, LinearSettings(skip=3, pairs=pairs))
        assert ({2, 5} <= set(best_plan(mean, Goal.count(8, 3)))) == both
    third = sorted(redundant(plans))[2]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found = linear(redundant, Goal.count(8, 3), generator, LinearSettings(skip=3, evaluations=20))
        assert redundant([found.plan])[0] <= third


def test_the_bandit_starts_even_without_influence():
    hits = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        plan = bandit(losses, Goal.count(8, 3), generator, BanditSettings(skip=3, evaluations=40), None).plan
        hits += sum(losses([plan])) <= sorted(losses(combinations(range(8), 3)))[2]
    assert hits >= 8


def test_searches_take_a_budget():
    goal = Goal((3.0, 1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0), 4.0, "macs")
    best = min(goal.plans(), key=lambda p: losses([p])[0])
    assert best == exhaustive(losses, goal).plan
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        plan = bandit(losses, goal, generator, BanditSettings(evaluations=30), COSTS).plan
        assert goal.enough(plan) and losses([plan])[0] <= losses([best])[0] + 0.3
        plan = linear(losses, goal, generator, LinearSettings(evaluations=30), COSTS).plan
        assert goal.enough(plan) and losses([plan])[0] <= losses([best])[0] + 0.3
    gates = Gates(8, goal, generator=torch.Generator().manual_seed(0))
    for subset in gates.subsets(5):
        assert goal.enough(subset)
    assert goal.enough(gates.best())


def test_gates_draw_from_their_own_generator():
    one, two = (Gates(8, 3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    drawn = [one.draw() for _ in range(5)]
    torch.rand(7)
    assert [two.draw() for _ in range(5)] == drawn


# --- asking for losses ------------------------------------------------------------------------------------------------


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


def test_plans_are_compared_under_the_same_dropout():
    model, batch = Toy(), {"x": torch.randn(3, 8)}
    common = PlanLosses(model, list(model.layers), [batch], dropout=True)
    assert common([(1,), (2,)]) == common([(1,), (2,)])
    own = PlanLosses(model, list(model.layers), [batch], dropout=True, common=False)
    assert own([(1,)]) != own([(1,)])


# --- plans ------------------------------------------------------------------------------------------------------------


def vilt(count: int = 4, width: int = 32) -> ViltModel:
    config = ViltConfig(hidden_size=width, num_hidden_layers=count, num_attention_heads=4, intermediate_size=64,
                        vocab_size=50, image_size=16, patch_size=8)  # fmt: skip
    return ViltModel(config)


def plan_of(model: nn.Module, *skipped: int) -> Plan:
    anatomy = Anatomy.of(model)
    return Plan.of(model, anatomy, list(anatomy.blocks()), skipped, [0.5, -0.25, 0.0, 1.0], method="das")


def test_a_plan_is_saved_read_printed_and_used_again(tmp_path):
    model = vilt()
    plan = plan_of(model, 0, 3)
    plan.save(tmp_path / "plan.json", updates=[])
    state = json.loads((tmp_path / "plan.json").read_text())
    methods = [{"name": "lora", "lever": "tune", "state": {}}, {"name": "das", "lever": "skip", "state": state}]
    (tmp_path / "fit.json").write_text(json.dumps({"methods": methods}))
    assert Plan.read(tmp_path / "plan.json") == plan == Plan.read(tmp_path)
    text = str(plan)
    assert "das for ViltModel: 2 of 4 blocks skipped" in text
    rows = [line for line in text.splitlines() if "encoder.layer" in line]
    assert [("skipped" in r, "kept" in r) for r in rows] == [(True, False), (False, True), (False, True), (True, False)]
    assert "-0.2500" in rows[1] and "fusion" in rows[1]
    method = DAS(plan=str(tmp_path))
    method.assume(model, Anatomy.of(model))
    assert method.state["skip"] == ["encoder.layer.0", "encoder.layer.3"]


def test_the_course_of_a_search_is_drawn(tmp_path, capsys):
    from trimtab import cli

    plan = plan_of(vilt(), 0, 3)
    updates = [{"step": s, "gates": [0.1 * s, -0.1, 0, 0.2 * s]} for s in (1, 2, 3)]
    plan.save(tmp_path / "plan.json", updates=updates)
    assert cli.main(["plan", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "gates.png")]) == 0
    assert "encoder.layer.3" in capsys.readouterr().out
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    plan.save(tmp_path / "plan.json")
    assert cli.main(["plan", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "gates.png")]) == 2
    assert "no course of a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vilt(3), r"skips 'encoder.layer.3', which is no block of this ViltModel .*it has 3, the plan knows 4"),
        (lambda: vilt(5), r"knows 4 blocks, this ViltModel has 5 \('encoder.layer.4' is not in the plan\)"),
        (lambda: vilt(4, 64), r"'encoder.layer.0' is 32 wide in the plan and 64 in this ViltModel"),
        (lambda: type("Other", (ViltModel,), {})(vilt().config), "made for a ViltModel, this is a Other"),
    ],
)
def test_a_plan_of_another_model_is_refused(other, message, tmp_path):
    plan_of(vilt(), 0, 3).save(tmp_path / "plan.json")
    model = other()
    with pytest.raises(PlanError, match=message):
        DAS(plan=str(tmp_path / "plan.json")).assume(model, Anatomy.of(model))


def test_a_plan_itself_is_used_and_told_by_its_paths():
    model = vilt(2)
    plan = Plan.of(model, Anatomy.of(model), list(Anatomy.of(model).blocks()), (1,))
    method = DAS(plan=plan)  # two blocks, as many as the default `skip` would take
    left = method.attach(model, Anatomy.of(model))
    assert [b.path for b in left.blocks()] == ["encoder.layer.0"] and method.plan == plan
    assert method.describe()["plan"] == ("encoder.layer.1",)
    with pytest.raises(PlanError, match=r"das: plan: skips 'encoder.layer.1', which is no block"):
        DAS(plan=plan).attach(vilt(1), Anatomy.of(vilt(1)))


def test_without_a_plan_nothing_is_attached():
    model = vilt()
    with pytest.raises(ValueError, match=r"das: there is no plan yet: call `prepare\(session\)`"):
        DAS().attach(model, Anatomy.of(model))


def test_a_folder_in_which_nothing_is_skipped_holds_no_plan(tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps({"methods": [{"name": "lora", "lever": "tune", "state": {}}]}))
    with pytest.raises(PlanError, match=r"fit.json: no blocks are skipped there \(found lora\)"):
        Plan.read(tmp_path)


def test_a_damaged_journal_is_named(tmp_path):
    journal = Journal(tmp_path / "search")
    journal.begin()
    for name, read in (("found.json", journal.read), ("found.safetensors", journal.tensors)):
        (tmp_path / "search" / name).write_text("{")
        with pytest.raises(ValueError, match=rf"{name}: cannot be read .*delete .*search to search from the start"):
            read("found")


@pytest.mark.parametrize(("form", "trains"), [("none", False), ("parallel", True)])
def test_heads_train_beside_adapters_only(form, trains):
    model = vilt().requires_grad_(False)
    anatomy = Anatomy.of(model)
    method = DAS(plan=("encoder.layer.1",), adapters=form)
    method.attach(model, anatomy)
    assert any(p.requires_grad for p in model.pooler.parameters()) == trains
    assert any(p.requires_grad for p in model.parameters()) == (method.trains == "added") == trains


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 7}', '{"format": 1, "model": "x", "blocks": [1]}']
)
def test_a_file_that_is_no_plan_is_named(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=str(file)):
        Plan.read(file)


# --- blocks with two streams, influence, routing ----------------------------------------------------------------------


class Paired(nn.Module):
    """A layer that takes and returns two streams, each with a part of its own (as LXMERT's)."""

    def __init__(self, width: int):
        super().__init__()
        self.text_norm, self.text = nn.LayerNorm(width), nn.Linear(width, width)
        self.image_norm, self.image = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, text, text_mask, image, image_mask=None):
        mixed = image.mean(1, keepdim=True)
        return text + self.text(self.text_norm(text)) + mixed, image + self.image(self.image_norm(image))


class PairedModel(nn.Module):
    def __init__(self, width: int = 16, count: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Paired(width) for _ in range(count))

    def forward(self, text, image):
        for layer in self.layers:
            text, image = layer(text, None, image)
        return text, image


def paired_anatomy(width: int = 16, count: int = 3) -> Anatomy:
    blocks = []
    for i in range(count):
        path = f"layers.{i}"
        parts = tuple(
            Sublayer("mlp", Tap(f"{path}.{n}_norm", "input"), Tap(f"{path}.{n}"), stream=s)
            for s, n in enumerate(("text", "image"))
        )
        blocks.append(Block(path, width, parts, stream="text", also=("image",)))
    return Anatomy((Tower("fusion", "fusion", tuple(blocks), ("layers",), Tap(f"layers.{count - 1}")),))


def test_a_block_of_two_streams_is_skipped_in_both():
    model, text, image = PairedModel(), torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    anatomy = paired_anatomy()
    without = DAS(plan=("layers.1",), adapters="none")
    without.assume(model, anatomy)
    without.attach(model, anatomy)
    first = PairedModel().layers[0](text, None, image)
    wanted = PairedModel().layers[2](first[0], None, first[1])
    assert all(map(torch.equal, model(text, image), wanted)), "both streams went on as they were"

    model = PairedModel()
    method = DAS(plan=("layers.1",))
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    out = model(text, image)
    assert out[0].shape == text.shape and out[1].shape == image.shape
    (out[0].sum() + out[1].sum()).backward()
    skipped = model.layers[1]
    assert skipped.adapter.down.weight.grad.abs().sum() > 0 and skipped.others[0].down.weight.grad.abs().sum() > 0
    widths = [a.down.out_features for a in (skipped.adapter, skipped.others[0], model.layers[0].das_0)]
    assert widths == [2, 2, 2], "one part a stream, so each skip adapter is as wide as one"


def test_text_and_image_layers_that_read_each_other_are_skipped_one_by_one():
    """METER's layout: a text layer takes (text, image) and returns (text,); the image layer the other way round."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, hidden_states, other, mask=None):
            return (hidden_states + self.out(self.norm(hidden_states)) + other.mean(1, keepdim=True),)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.text, self.image = (nn.ModuleList(Cross() for _ in range(2)) for _ in range(2))

        def forward(self, text, image):
            for t, i in zip(self.text, self.image, strict=True):
                text, image = t(text, image)[0], i(image, text)[0]
            return text, image

    def tower(name, memory):
        blocks = tuple(
            Block(f"{name}.{i}", 16, (Sublayer("mlp", Tap(f"{name}.{i}.norm", "input"), Tap(f"{name}.{i}.out")),),
                  returns_tuple=True) for i in range(2)
        )  # fmt: skip
        return Tower(name, "fusion", blocks, (name,), Tap(f"{name}.1"), memory=memory)

    model, x, y = Model(), torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    anatomy = Anatomy((tower("text", "image"), tower("image", "text")))
    method = DAS(plan=("text.0", "image.1"), adapters="none")
    method.assume(model, anatomy)
    assert len(method.state["candidates"]) == 4 and method.state["candidates"][0] == "text.0"
    method.attach(model, anatomy)
    whole = Model()
    image = whole.image[0](y, x)[0]
    text = whole.text[1](x, image)[0]
    assert all(map(torch.equal, model(x, y), (text, image)))


def test_influence_is_one_less_the_cosine_of_input_and_output():
    class Turn(nn.Module):
        def __init__(self, degrees):
            super().__init__()
            a = math.radians(degrees)
            self.turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, hidden_states):
            return hidden_states @ self.turn.T * 3

    model = nn.Sequential(Turn(60), Turn(0), Turn(90))
    wrapped = nn.Module()
    wrapped.layers = model
    wrapped.forward = lambda x: model(x)
    blocks = [Block(f"layers.{i}", 2) for i in range(3)]
    found = block_influence(wrapped, wrapped, blocks, {"x": torch.randn(4, 5, 2)})
    assert found == pytest.approx([0.5, 0, 1], abs=1e-5)


def test_routing_is_decided_by_the_first_token_and_remembered():
    torch.manual_seed(0)
    adapter = RoutedAdapter(8, 4).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    whole = adapter(x)
    adapter.begin = False
    torch.testing.assert_close(adapter(x[:, 3:4]), whole[:, 3:4])
    adapter.begin = True
    assert not torch.allclose(adapter(x[:, 3:4]), whole[:, 3:4])


# --- published counts -------------------------------------------------------------------------------------------------


def adapters_without_norms(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".norm." not in n)


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_vilt_has_as_many_adapter_parameters_as_published_whatever_is_skipped(k):
    """3.56M of ViLT-B/32 (12 blocks, 768 wide), LayerNorms not counted; with them 3.597M to 3.587M."""
    with torch.device("meta"):
        model = ViltModel(ViltConfig(), add_pooling_layer=False).requires_grad_(False)
        method = DAS(skip=k)
        anatomy = Anatomy.of(model)
        method.assume(model, anatomy)
        method.attach(model, anatomy)
    assert adapters_without_norms(model) == pytest.approx(3.56e6, abs=0.005e6)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted - adapters_without_norms(model) == (24 - k) * 2 * 768


@pytest.mark.parametrize(("k", "net"), [(0, 0.853), (1, -0.942), (2, -2.737)])
def test_vilt_saves_as_many_macs_as_published(k, net):
    """241 tokens: adapters cost +0.85 G, one skipped block nets -0.94 G, each further one -1.795 G more."""
    with torch.device("meta"):
        x = torch.randn(1, 241, 768)

        def macs(skip):
            model = ViltModel(ViltConfig(), add_pooling_layer=False).eval()
            if skip is not None:
                method, anatomy = DAS(skip=skip), Anatomy.of(model)
                method.assume(model, anatomy)
                method.attach(model, anatomy)
            return count_macs(lambda: model.encoder(x))

        assert (macs(k) - macs(None)) / 1e9 == pytest.approx(net, abs=0.001)


def test_meter_saves_as_many_macs_as_published():
    """577 image and 40 text tokens: 2 text and 2 image fusion layers skipped, adapters kept, net -11.18 G, which of the
    93.12 G that METER takes is -12.0 %, the abstract's -11.97 %."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(is_decoder=True, add_cross_attention=True)  # 768 wide, 12 heads
    net = 0
    with torch.device("meta"):
        text, image = torch.randn(1, 40, 768), torch.randn(1, 577, 768)
        for x, other in ((text, image), (image, text)):
            for kind in ("kept", "skipped"):
                model = nn.Module()
                model.layer = BertLayer(config, layer_idx=0).eval()
                block = fusion_block("layer", 768)
                dense = count_macs(lambda m=model, x=x, o=other: m.layer(x, encoder_hidden_states=o))
                if kind == "kept":
                    add_adapters(model, block, 96)
                else:
                    model.layer = Skipped(model, block, 96)
                after = count_macs(lambda m=model, x=x, o=other: m.layer(x, encoder_hidden_states=o))
                net += (after - dense) * (4 if kind == "kept" else 2)
    assert net / 1e9 == pytest.approx(-11.18, abs=0.01)
    assert 100 * net / 93.12e9 == pytest.approx(-11.97, abs=0.1)


# --- whole runs -------------------------------------------------------------------------------------------------------


def session_of(tiny_raw, method: dict, folder=None, **changes) -> tuple:
    raw = tiny_raw("tiny-vilt", "vqa", [method], **changes)
    r = recipe.expand(raw, "test")[0]
    parts = assembly.assemble(r)
    tables = [parts.source.load("vqa", split) for split in ("train", "validation")]
    parts.model.backbone.requires_grad_(False)
    return parts, training.TrainingSession(parts.model, *tables, r.training, r.seed, "test", folder)


def prepared(tiny_raw, method: dict, folder=None, **changes) -> dict:
    parts, session = session_of(tiny_raw, method, folder, **changes)
    parts.methods[0].prepare(session)
    return parts.methods[0].state


@pytest.mark.parametrize("name", ["das", "linear-skip", "block-influence"])
def test_no_block_skipped_is_adapters_everywhere_and_no_search(name, tiny_raw):
    state = prepared(tiny_raw, {"name": name, "skip": 0})
    assert state["skip"] == [] and len(state["candidates"]) == 8 and "updates" not in state
    with pytest.raises(ValueError, match="skip must be at least 0"):
        DAS(skip=-1)


def test_one_block_must_be_left(tiny_raw):
    parts, session = session_of(tiny_raw, {"name": "das", "skip": 8})
    for name, kind in METHODS.items():
        for skip in (8, 12) if kind.lever == "skip" else ():
            with pytest.raises(ValueError, match=rf"{name}: {skip} of 8 skippable blocks .* skip at most 7"):
                kind(skip=skip).prepare(session)
    with pytest.raises(ValueError, match="das: 8 of 8 skippable blocks"):
        parts.methods[0].assume(session.plain, session.anatomy)


def test_a_validation_split_smaller_than_a_batch_is_refused(tiny_raw):
    for name in ("das", "greedy-skip", "block-influence"):
        with pytest.raises(ValueError, match=r"validation split has 32 rows, but a batch of it takes 40"):
            prepared(tiny_raw, {"name": name, "skip": 2, **({"search_steps": 2} if name != "block-influence" else {})},
                     batch_size=40)  # fmt: skip


def test_a_search_that_updates_no_gate_is_refused(tiny_raw):
    with pytest.raises(ValueError, match="never update a gate"):
        prepared(tiny_raw, {"name": "das", "search_steps": 4, "warmup": 1.0})


def test_a_budget_finds_how_many_blocks_go(tiny_raw, monkeypatch):
    state = prepared(tiny_raw, {"name": "random-skip", "budget": "30% macs"})
    plan = Plan.from_dict(state)
    assert plan.macs <= 0.7 * plan.dense_macs < plan.macs + min(b.saved for b in plan.blocks)
    fewer = Plan.from_dict(prepared(tiny_raw, {"name": "random-skip", "budget": "10% params"}))
    assert 0 < len(fewer.skipped) < len(plan.skipped)
    monkeypatch.setattr(budget, "time_inside", count_inside)  # time itself decides no test
    assert prepared(tiny_raw, {"name": "random-skip", "budget": "30% latency"})["skip"] == state["skip"]


def test_milliseconds_of_parts_are_within_those_of_the_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    whole, parts = time_inside(list(model), lambda: model(torch.ones(8, 64)), repeats=3)
    assert len(parts) == 2 and min(parts) > 0 and whole > 0


def test_macs_of_a_plan_are_those_of_the_model_with_it(tiny_raw):
    parts, session = session_of(tiny_raw, {"name": "random-skip", "skip": 3})
    method = parts.methods[0]
    one = parts.model.example(1)
    parts.model.eval()
    dense = count_macs(lambda: parts.model(**one))
    method.prepare(session)
    parts.attach()
    plan = Plan.from_dict(method.state)
    assert plan.dense_macs == dense and plan.macs == count_macs(lambda: parts.model.eval()(**one))


@pytest.mark.slow
def test_das_that_is_interrupted_goes_on_with_the_same_gates(tiny_raw, tmp_path, monkeypatch):
    method = {"name": "das", "skip": 2, "search_steps": 6, "turn": 1, "warmup": 0.2, "gate_rate": 5.0}
    whole = prepared(tiny_raw, method, tmp_path / "whole", save_every=2)
    from trimtab.methods.skip.search import das

    update = das._Search.update

    def fail(self, step):
        if step == 5:
            raise KeyboardInterrupt
        update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(das._Search, "update", fail)
        with pytest.raises(KeyboardInterrupt):
            prepared(tiny_raw, method, tmp_path / "cut", save_every=2)
    assert (tmp_path / "cut" / "search" / "gates-4.json").exists()
    steps = []
    monkeypatch.setattr(das._Search, "update", lambda self, step: steps.append(step) or update(self, step))
    resumed = prepared(tiny_raw, method, tmp_path / "cut", save_every=2)
    assert steps == [5, 6], "the first four steps were not done again"
    assert resumed == whole and resumed["updates"][-1]["gates"] == whole["updates"][-1]["gates"]
    steps.clear()
    assert prepared(tiny_raw, method, tmp_path / "cut", save_every=2) == whole and not steps, "it is found already"


def test_nothing_is_taken_from_a_search_with_other_settings(tiny_raw, tmp_path):
    one = prepared(tiny_raw, {"name": "block-influence", "skip": 1}, tmp_path)
    stale = tmp_path / "search" / "checkpoint-1"
    stale.mkdir()
    assert prepared(tiny_raw, {"name": "block-influence", "skip": 1}, tmp_path) == one and stale.exists()
    assert len(prepared(tiny_raw, {"name": "block-influence", "skip": 2}, tmp_path)["skip"]) == 2
    assert not stale.exists()


@pytest.mark.slow
def test_a_search_on_trained_adapters_goes_on_where_it_was(tiny_raw, tmp_path, monkeypatch):
    from trimtab.methods.skip.search import searched

    method = {"name": "greedy-skip", "skip": 1, "search_steps": 2}
    whole = prepared(tiny_raw, method, tmp_path / "run")
    (tmp_path / "run" / "search" / "found.json").unlink()  # as if it had been interrupted while plans were compared

    def never(*args, **kwargs):
        raise AssertionError("neither trained nor evaluated again")

    monkeypatch.setattr(training.TrainingSession, "fit", never)
    monkeypatch.setattr(searched.PlanLosses, "__call__", never)
    assert prepared(tiny_raw, method, tmp_path / "run") == whole


def test_a_loss_that_is_no_number_stops_das_and_keeps_the_plan(tiny_raw, tmp_path, monkeypatch):
    from trimtab.methods.skip.search import das

    monkeypatch.setattr(das.PlanLosses, "__call__", lambda self, plans: [1.0, math.nan, 2.0])
    with pytest.raises(SearchError, match=r"das: the loss with vilt.encoder.layer.\d, .* skipped is nan.*so_far.json"):
        prepared(tiny_raw, {"name": "das", "skip": 2, "search_steps": 3, "turn": 1, "warmup": 0.1}, tmp_path)
    assert len(Plan.read(tmp_path / "search" / "so_far.json").skipped) == 2


def test_a_loss_that_is_no_number_stops_other_searches_and_keeps_the_plan(tiny_raw, tmp_path, monkeypatch):
    from trimtab.methods.skip.search import searched

    answers = iter([2.0, 1.0, math.inf])
    monkeypatch.setattr(searched.PlanLosses, "__call__", lambda self, plans: [next(answers) for _ in plans])
    message = r"linear-skip: the loss with vilt.encoder.layer.\d, .* skipped is inf.*so_far.json"
    with pytest.raises(SearchError, match=message):
        prepared(tiny_raw, {"name": "linear-skip", "skip": 2, "search_steps": 1}, tmp_path)
    paid = json.loads((tmp_path / "search" / "losses.json").read_text())["losses"]
    so_far = Plan.read(tmp_path / "search" / "so_far.json")
    best = next(plan for plan, loss in paid if loss == 1.0)
    assert so_far.skipped == [so_far.blocks[i].path for i in best]


@pytest.mark.slow
def test_a_run_without_adapters_is_exported_as_an_ordinary_shorter_model(tiny_raw, tmp_path):
    from trimtab import load

    methods = [{"name": "block-influence", "skip": 3, "adapters": "none"}, "full"]
    r = recipe.expand(tiny_raw("tiny-vilt", "vqa", methods), "test")[0]
    folder = run.run(r, tmp_path / "run", measure_costs=False)
    assert not (folder / "search").exists()
    again = load(folder_of_runs.export(folder, tmp_path / "out"))
    assert again.model.config.num_hidden_layers == 5 and len(again.model.vilt.encoder.layer) == 5
    trained = folder_of_runs.load(folder).eval()
    batch = {k: v for k, v in trained.example(2).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again.eval().pair(**batch).tokens, trained.backbone.pair(**batch).tokens)


def test_every_search_is_registered_under_its_name():
    names = {"das", "random-skip", "greedy-skip", "exhaustive-skip", "block-influence", "bandit-skip", "linear-skip"}
    assert {n for n, m in METHODS.items() if m.lever == "skip"} == names
