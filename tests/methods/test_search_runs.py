"""Searches in a whole small run: what is refused, and what is taken up again."""

from __future__ import annotations

import json
import math

import pytest

from tests.methods.skipping import prepared, session_of
from trimtab.experiments import training
from trimtab.methods import METHODS
from trimtab.methods.skip.plan import Plan
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.search.evaluate import SearchError


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
            prepared(tiny_raw, {"name": name, "skip": 2, **({"search_steps": 12} if name != "block-influence" else {})},
                     batch_size=40)  # fmt: skip


def test_a_search_that_updates_no_gate_is_refused(tiny_raw):
    with pytest.raises(ValueError, match="never update a gate"):
        prepared(tiny_raw, {"name": "das", "search_steps": 4, "warmup": 1.0})
    with pytest.raises(ValueError, match="9 search_steps with a turn of 10 .* the first update comes after 10"):
        prepared(tiny_raw, {"name": "das", "search_steps": 9})


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
