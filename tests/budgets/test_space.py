"""The candidates of a search, and what they cost."""

from __future__ import annotations

import pytest

from trimtab.budgets.limits import Budget, parse
from trimtab.budgets.prices import Part, Prices
from trimtab.budgets.space import ADAPTERS, Candidate, Space
from trimtab.experiments import estimate
from trimtab.experiments.recipe import expand
from trimtab.methods import METHODS


def recipe():
    raw = {
        "backbone": {"name": "tiny-clip", "pretrained": False}, "task": "retrieval",
        "data": {"name": "pictograms", "train": 64, "test": 24, "validation": 32}, "training": {"batch_size": 8},
    }  # fmt: skip
    return expand(raw, "fit")[0]


def test_every_candidate_is_a_list_of_methods_that_exist():
    space = Space()
    for candidate in space:
        levers = [METHODS[entry["name"]].lever for entry in space.methods(candidate)]
        assert levers == sorted(levers, key=("prune", "skip", "tune").index) and len(levers) == len(set(levers))
        assert bool(candidate.sparsity) == ("prune" in levers) and bool(candidate.skip) == ("skip" in levers)
    assert not any(c.tune == ADAPTERS and not c.skip for c in space)


def test_levers_and_methods_are_pinned_and_left_out():
    space = Space()
    assert {c.levers for c in space.narrowed(only=["lora-8"])} == {"lora-8"}
    only = space.narrowed(only=["prune", "lora"])
    assert {c.skip for c in only} == {0} and {c.tune for c in only} == {"lora-2", "lora-8", "lora-32"}
    assert set(only.sparsities) == set(space.sparsities)
    without = space.narrowed(without=["skip", "full"])
    assert {c.skip for c in without} == {0} and ADAPTERS not in without.tunes and "full" not in without.tunes
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        space.narrowed(only=["lorra"])
    with pytest.raises(ValueError, match="no way to tune is left"):
        space.narrowed(only=["lora"], without=["lora"])


def test_composed_costs_are_those_that_are_counted():
    """What is composed from parts equals what the candidate itself is counted to cost."""
    space = Space(sparsities=(0.5, 0.75), skips=(1,)).narrowed(only=["prune", "skip", "lora-2"])
    prices = Prices(recipe(), space)
    prices.count_all()
    for candidate in (Candidate(0.75, 0, "lora-2"), Candidate(0.75, 1, "lora-2")):
        exact = prices.exact(candidate)
        composed = prices(candidate)
        assert composed is not None and not prices.predicted(candidate)
        assert composed.pop("nonzero_params") == pytest.approx(exact.pop("nonzero_params"), abs=2)
        assert composed == exact
    assert prices.bases["full"]["trainable_params"] == estimate.estimate(recipe_of("full"))["trainable_params"]


def recipe_of(method):
    from dataclasses import replace

    return replace(recipe(), methods=({"name": method},))


def fake(counts):
    """A count that is a line in the number of skipped blocks, and refuses LoRA on a pruned model and skipping all."""

    def count(recipe):
        names = [m["name"] for m in recipe.methods]
        if "multiflow" in names and "lora" in names:
            raise ValueError("these do not go together")
        skip = next((m["skip"] for m in recipe.methods if "skip" in m), 0)
        counts.append((tuple(names), skip))
        if skip == 5:
            raise ValueError("no block is left")
        size = 1000 - 100 * skip
        zeros = 0.5 * 800 if "multiflow" in names else 0
        return {
            "params": size, "nonzero_params": size - zeros, "trainable_params": 10, "macs": 50 * size,
            "saved_activation_bytes": size, "training_peak_bytes": 2 * size, "checkpoint_bytes": 40,
            "dense_macs": 50_000, "dense_params": 1000,
        }  # fmt: skip

    return count


def test_numbers_of_blocks_in_the_middle_are_predicted_when_time_is_over(tmp_path):
    counts: list = []
    space = Space(sparsities=(0.5,), skips=(1, 2, 3, 4)).narrowed(only=["prune", "skip", "lora-2", "bitfit"])
    prices = Prices(recipe(), space, tmp_path / "prices.json", seconds=0.0, count=fake(counts))
    prices.count_all()
    assert {skip for names, skip in counts if "bitfit" in names} == {0, 1, 4}
    middle = Candidate(0.0, 3, "bitfit")
    assert prices.predicted(middle) and prices(middle)["macs"] == 50 * 700
    assert prices(Candidate(0.5, 3, "lora-2")) is None
    assert prices.refused[Part(True, 1, "lora-2")] == "these do not go together"
    known = len(counts)
    again = Prices(recipe(), space, tmp_path / "prices.json", seconds=0.0, count=fake(counts))
    again.count_all()
    assert len(counts) == known + 2 and again(middle) == prices(middle)  # two: what the bases cost


def test_if_the_largest_number_of_blocks_is_refused_the_next_is_counted():
    counts: list = []
    space = Space(sparsities=(), skips=(1, 2, 3, 4, 5)).narrowed(only=["skip", "bitfit"])
    prices = Prices(recipe(), space, seconds=0.0, count=fake(counts))
    prices.count_all()
    assert [skip for names, skip in counts if "bitfit" in names] == [0, 1, 5, 4]
    assert prices(Candidate(0.0, 5, "bitfit")) is None and prices(Candidate(0.0, 2, "bitfit"))["macs"] == 50 * 800


def test_what_cannot_be_folded_has_no_exported_bytes():
    space = Space(sparsities=(0.5,), skips=(1,)).narrowed(only=["prune", "skip", "lora-2", "unipt"])
    prices = Prices(recipe(), space, count=fake([]))
    assert prices(Candidate(0.0, 0, "unipt-4"))["export_bytes"] is None
    assert prices(Candidate(0.0, 0, "lora-2"))["export_bytes"] == 4 * 990
    assert prices(Candidate(0.0, 1, "lora-2"))["export_bytes"] == 4 * 890
    budget = Budget.of(parse("export <= -5%"), prices.bases)
    fits = [str(c) for c in space if (p := prices(c)) and not budget.over(p)]
    assert fits == ["skip 1 + lora-2"]


def test_the_export_is_counted_with_the_blocks_that_go():
    """Two towers of other widths: which block goes decides how many bytes are left."""

    def count(recipe):
        plan = next((m["plan"] for m in recipe.methods if "plan" in m), None)
        found = fake([])(recipe)
        gone = {"narrow.0": 50, "wide.0": 300}[plan[0]] if plan else 0
        return {**found, "params": found["params"] - gone, "nonzero_params": found["nonzero_params"] - gone}

    space = Space(sparsities=(0.5,), skips=(1,)).narrowed(only=["prune", "skip", "lora-2", "bitfit"])
    prices = Prices(recipe(), space, count=count)
    assert prices(Candidate(0.0, 1, "bitfit"))["export_bytes"] == 4 * 890  # the block that was assumed
    assert prices.exact(Candidate(0.0, 1, "bitfit"), {1: ["narrow.0"]})["export_bytes"] == 4 * 940
    assert prices.exact(Candidate(0.0, 1, "bitfit"), {1: ["wide.0"]})["export_bytes"] == 4 * 690
    assert prices.exact(Candidate(0.5, 1, "bitfit"), {1: ["wide.0"]})["export_bytes"] == 4 * (690 - 400) + 100
