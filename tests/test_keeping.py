"""Trainings that end with the weights of the best score: these are the weights that were there, resumed or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import trimtab
from tests.small_run import PRUNE, made_in, recipe, same_weights, told
from trimtab.experiments import training
from trimtab.experiments.run import run
from trimtab.experiments.schema import RecipeError

BEST: dict[str, Any] = {"load_best_model_at_end": True, "evaluate_every": 2, "steps": 8, "learning_rate": 1e-2}
SCORES = {2: 0.3, 4: 0.7, 6: 0.7, 8: 0.1}  # the first of equal ones is kept
METHODS = [([PRUNE, "full"], {}), (["linear-probe"], {"cache": "fp32"})]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return made_in(tmp_path_factory.mktemp("keeping"))


@pytest.fixture
def scored(monkeypatch):
    """Gives evaluations in training these scores, by step."""
    evaluate = training._Trainer.evaluate

    def give(scores: dict[int, float]) -> None:
        def known(self, *args, **kwargs):
            measure = self.judge.measure
            with monkeypatch.context() as patch:
                patch.setattr(self.judge, "measure", lambda: {**measure(), "accuracy": scores[self.state.global_step]})
                return evaluate(self, *args, **kwargs)

        monkeypatch.setattr(training._Trainer, "evaluate", known)

    return give


class Seen(TrainerCallback):
    """The weights of a model after each step."""

    def __init__(self, model):
        self.model, self.at = model, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.at[state.global_step] = {n: p.detach().clone() for n, p in self.model.named_parameters()}


@pytest.mark.parametrize(("methods", "settings"), METHODS, ids=["pruned", "cached"])
def test_the_weights_of_the_best_score_are_kept(methods, settings, place, tmp_path, scored):
    scored(SCORES)
    seen: list[Seen] = []

    def watch(model, validation):
        seen.append(Seen(model))
        return seen[0]

    folder = run(recipe(place, methods, **BEST, **settings), tmp_path / "run", watch=watch)
    found = told(folder)["validation"]
    assert found["kept_step"] == found["best_step"] == 4
    now, at = dict(seen[0].model.named_parameters()), seen[0].at
    assert now.keys() == at[4].keys() and all(torch.equal(value, now[name]) for name, value in at[4].items())
    assert not all(torch.equal(value, now[name]) for name, value in at[8].items())
    metrics = training.evaluate(trimtab.load_run(folder), _test_rows(place), 4)[0]
    assert metrics == told(folder)["test"]  # what is saved is what was tested


def _test_rows(place: Path) -> Any:
    from trimtab.experiments.assembly import assemble
    from trimtab.experiments.run import tables

    made = recipe(place, [], steps=0)
    return tables(made, assemble(made))[2]


@pytest.mark.parametrize("step", [3, 5, 7], ids=["before the best", "between two checkpoints", "before the end"])
def test_a_run_that_is_killed_keeps_the_same(step, place, tmp_path, scored, monkeypatch):
    scored(SCORES)
    settings = {**BEST, "save_every": 3}
    whole = run(recipe(place, [PRUNE, "full"], **settings), tmp_path / "whole")
    assert told(whole)["validation"]["kept_step"] == 4
    train = training._Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(place, [PRUNE, "full"], **settings), tmp_path / "run")
    run(recipe(place, [PRUNE, "full"], **settings), tmp_path / "run")
    assert told(tmp_path / "run") == told(whole) and same_weights(tmp_path / "run", whole)


def test_weights_that_a_checkpoint_counts_on_are_not_deleted_before_it(place, tmp_path, scored, monkeypatch):
    """A better score comes between two checkpoints, and the run is killed: the earlier best is the checkpoint's."""
    scored({2: 0.3, 4: 0.2, 6: 0.5, 8: 0.1})
    train = training._Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    settings = {**BEST, "save_every": 5}
    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(place, ["full"], **settings), tmp_path / "run")
    files = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("best-*"))
    assert files == ["best-2.safetensors", "best-6.safetensors"]
    (tmp_path / "run" / "checkpoints" / files[0]).unlink()
    with pytest.raises(RecipeError, match="best-2.safetensors: the weights with the best score so far are missing"):
        run(recipe(place, ["full"], **settings), tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("methods", "settings"), METHODS, ids=["pruned", "cached"])
def test_the_last_look_and_the_test_score_the_same_rows_alike(methods, settings, precision, place, tmp_path):
    made = recipe(place, methods, steps=6, evaluate_every=3, learning_rate=1e-2, precision=precision, **settings)
    made = replace(made, data={**made.data, "validation": made.data["test"]})
    found = told(run(made, tmp_path / "run"))
    assert {k: found["validation"]["scores"][-1][k] for k in found["test"]} == found["test"]
