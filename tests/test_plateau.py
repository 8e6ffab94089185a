"""Scores while a run trains, and trainings that end when these stop rising."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from tests.small_run import PRUNE, made_in, recipe, same_weights, told
from trimtab.budgets import asking
from trimtab.experiments import run as carry
from trimtab.experiments import training
from trimtab.experiments.plateau import Cooldown, cooldown, of_fixed_length, undisturbed, warmup_steps
from trimtab.experiments.run import run
from trimtab.experiments.schema import RecipeError, TrainingSpec
from trimtab.report.watch import Watcher

PLATEAU: dict[str, Any] = {"schedule": "plateau", "evaluate_every": 2, "patience": 2, "steps": 20}
SPEC = TrainingSpec(schedule="plateau", evaluate_every=10, patience=2, steps=100)

# --- the rule ---


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [([], None), ([0.1], None), ([0.1, 0.1], None),
     ([0.1, 0.1, 0.1], Cooldown(30, 10, True)),  # ties are no rise; a quarter of 30 is less than an interval
     ([0.1, 0.3, 0.2, 0.25], Cooldown(40, 10, True)),  # above the last one, not above the best
     ([0.1, 0.3, 0.2, 0.31, 0.3, 0.29], Cooldown(60, 15, True)),
     ([0.0, -1.0, 0.1, 0.2, 0.3, 0.4, 0.5], None),
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], Cooldown(80, 20, False)),  # 4/5 of the steps are over
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6], Cooldown(80, 20, True)),
     ([0.1, 0.1, 0.1, 0.9, 0.9], Cooldown(30, 10, True))],  # what comes later changes nothing
)  # fmt: skip
def test_the_rate_falls_when_no_score_has_risen(scores, wanted):
    found = cooldown([(10 * (i + 1), score) for i, score in enumerate(scores)], SPEC)
    assert found == wanted and (found is None or found.end <= SPEC.steps)


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [([0.1, 0.1, 0.1], Cooldown(30, 10, True)),  # two looks are more than half of ten steps
     ([0.1, 0.2, 0.3, 0.4, 0.3, 0.3], Cooldown(60, 15, True)),  # two looks, and half of forty steps
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.5], None),
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.5, 0.5], Cooldown(90, 22, True)),
     ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.5, 0.7], None),  # as seen after 90 steps: the best score came late
     ([0.1] + 7 * [0.0] + 8 * [0.2], Cooldown(30, 10, True))],
)  # fmt: skip
def test_a_late_best_score_is_waited_for_longer(scores, wanted):
    spec = replace(SPEC, steps=400, patience_share=0.5)
    assert cooldown([(10 * (i + 1), score) for i, score in enumerate(scores)], spec) == wanted


def test_a_score_that_is_no_number_is_no_plateau():
    with pytest.raises(RecipeError, match="finite validation scores, found nan after 20 steps"):
        cooldown([(10, 0.1), (20, float("nan"))], SPEC)


@pytest.mark.parametrize("steps", range(40, 140, 7))
@pytest.mark.parametrize("every", [3, 10])
def test_it_ends_within_its_steps_wherever_the_plateau_comes(steps, every):
    spec = replace(SPEC, steps=steps, evaluate_every=every)
    for rises in range(1, steps // every + 1):
        scores = [(every * (i + 1), min(i, rises)) for i in range(steps // every)]
        found = cooldown(scores, spec)
        assert found is not None and found.end <= steps and found.steps >= every and found.start % every == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patience": 3}, "patience: is for 'schedule: plateau', found 3 with 'schedule: cosine'"),
     ({"schedule": "plateau", "patience": 3}, "evaluate_every: 'schedule: plateau' needs it"),
     ({"schedule": "plateau", "evaluate_every": 3}, "patience: 'schedule: plateau' needs it"),
     ({**PLATEAU, "steps": 7}, "steps: 7 are over before.* the earliest is after 6 steps.*give at least 8 steps"),
     ({**PLATEAU, "patience": 9, "steps": 24}, "the earliest is after 20 steps.*give at least 25 steps"),
     ({**PLATEAU, "warmup": 1.5}, r"warmup must lie in \[0, 1\], found 1.5"),
     ({**PLATEAU, "drops": (0.5,)}, "drops: 'schedule: step' needs them"),
     ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
     ({"patience_share": 0.5}, "patience_share: is for 'schedule: plateau', found it with 'schedule: cosine'"),
     ({**PLATEAU, "patience_share": -0.5}, "patience_share must be at least 0, found -0.5"),
     ({**PLATEAU, "patience": 0}, "patience must be at least 1"),
     ({"load_best_model_at_end": True}, "load_best_model_at_end: needs scores in training, found no evaluate_every")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        TrainingSpec(**settings)


def test_the_least_steps_that_an_error_names_suffice():
    assert TrainingSpec(**{**PLATEAU, "steps": 8}).latest_cooldown == 6
    assert TrainingSpec(**{**PLATEAU, "patience": 9, "steps": 25}).latest_cooldown == 20
    assert TrainingSpec(**{**PLATEAU, "steps": 0}).steps == 0  # which trains nothing, and so needs no plateau


def test_searches_and_budgets_have_steps_of_their_own():
    searching = of_fixed_length(replace(SPEC, warmup=0.25))
    assert (searching.schedule, searching.evaluate_every, searching.patience) == ("linear", None, None)
    assert warmup_steps(searching, 40) == 10 and warmup_steps(replace(SPEC, warmup=0.25), 100) == 5
    assert of_fixed_length(TrainingSpec(evaluate_every=5)) == TrainingSpec()
    assert of_fixed_length(replace(SPEC, patience_share=0.5, load_best_model_at_end=True)) == of_fixed_length(SPEC)
    settings = [f"training.{name}={value}" for name, value in PLATEAU.items()]
    with pytest.raises(ValueError, match=r"training.schedule: plateau: trials are compared after the same steps"):
        asking.recipe_of("tiny-clip", "retrieval", "pictograms", None, None, settings)
    with pytest.raises(ValueError, match=r"training.load_best_model_at_end: trials are compared by the weights"):
        settings = ["training.load_best_model_at_end=true", "training.evaluate_every=2"]
        asking.recipe_of("tiny-clip", "retrieval", "pictograms", None, None, settings)


def test_random_numbers_are_those_that_would_have_come():
    import numpy as np

    def numbers() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    hf.set_seed(3)
    wanted = numbers()
    hf.set_seed(3)
    inside = []
    for _ in range(2):
        with undisturbed():
            inside.append(numbers())
    assert numbers() == wanted and inside[0] == inside[1] != wanted


# --- runs ---


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return made_in(tmp_path_factory.mktemp("plateau"))


@pytest.mark.parametrize(("methods", "settings"), [
    ([PRUNE, "full"], {"accumulate": 2}),
    (["linear-probe"], {"cache": "fp32"}),
], ids=["pruned", "cached"])  # fmt: skip
def test_evaluations_in_between_change_nothing_of_what_is_trained(methods, settings, place, tmp_path, monkeypatch):
    evaluate = training.evaluate

    def drawing(model, table, size):
        _ = torch.rand(3), random.random()  # as tasks and models may
        return evaluate(model, table, size)

    monkeypatch.setattr(training, "evaluate", drawing)
    rate = {"learning_rate": 1e-2, **settings}
    plain = run(recipe(place, methods, **rate), tmp_path / "plain")
    scored = run(recipe(place, methods, evaluate_every=4, **rate), tmp_path / "scored")
    assert same_weights(plain, scored)
    a, b = told(plain), told(scored)
    assert a["history"] == b["history"] and a["test"] == b["test"]
    assert "validation" not in a and a["steps"] == b["steps"] == 6
    assert [s["step"] for s in b["validation"]["scores"]] == [4, 6]  # the last one at the end
    assert set(b["validation"]) == {"best_step", "scores"}


def test_the_last_score_is_that_of_the_trained_model(place, tmp_path):
    r = recipe(place, ["full"], evaluate_every=4, learning_rate=1e-2)
    r = replace(r, data={**r.data, "test": r.data["validation"]})
    found = told(run(r, tmp_path / "run"))
    assert found["validation"]["scores"][-1] == {"step": 6, **found["test"]}


@pytest.fixture(scope="module")
def level(place, tmp_path_factory) -> Path:
    """A run whose rate is so low that no score changes."""
    r = recipe(place, [PRUNE, "full"], **PLATEAU, learning_rate=1e-6, save_every=2, warmup=0.5)
    return run(r, tmp_path_factory.mktemp("level") / "run")


def test_a_run_ends_when_its_score_does_not_rise(level):
    found = told(level)
    assert found["steps"] == 8
    scores = found["validation"].pop("scores")
    assert [s["step"] for s in scores] == [2, 4, 6, 8] and len({s["accuracy"] for s in scores}) == 1
    assert found["validation"] == {"best_step": 2, "plateau": True, "cooldown_start": 6}
    rates = [1e6 * entry["learning_rate"] for entry in found["history"]]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.5])


def test_scores_are_in_the_log(level):
    entries = [json.loads(line) for line in (level / "log.jsonl").read_text().splitlines()]
    found = [{"step": e["step"], **e["metrics"]} for e in entries if e["event"] == "validation"]
    assert found == told(level)["validation"]["scores"]
    lines = [line for line in Watcher([level]).lines() if "validation" in line]
    assert len(lines) == 4 and "plateau default: step 2, validation: accuracy 0." in lines[0]


@pytest.mark.parametrize("step", [5, 7, 8], ids=["before the plateau", "while the rate falls", "after the last step"])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(step, level, place, tmp_path, monkeypatch):
    evaluate, train = training.evaluate, training._Trainer.training_step
    r = recipe(place, [PRUNE, "full"], **PLATEAU, learning_rate=1e-6, save_every=2, warmup=0.5)

    def stopped_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    def stopped_test(model, table, size):
        if len(table) == 5:
            raise KeyboardInterrupt
        return evaluate(model, table, size)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", stopped_step)
        patch.setattr(training, "evaluate", stopped_test)
        with pytest.raises(KeyboardInterrupt):
            run(r, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / f"checkpoint-{step // 2 * 2}"
    assert (last / "whole.json").is_file()
    run(r, tmp_path / "run")
    assert told(tmp_path / "run") == told(level) and same_weights(tmp_path / "run", level)


def test_a_score_that_rises_to_the_end_is_told(place, tmp_path, monkeypatch, capsys):
    evaluate, calls = training.evaluate, iter(range(100))

    def rising(model, table, size):
        metrics, records = evaluate(model, table, size)
        return {**metrics, "accuracy": next(calls) / 100}, records

    monkeypatch.setattr(training, "evaluate", rising)
    found = told(run(recipe(place, ["linear-probe"], **{**PLATEAU, "steps": 12}), tmp_path / "run"))
    assert found["steps"] == 10  # 4/5 of 12, rounded down to an evaluation, and an interval more
    assert found["validation"]["plateau"] is False and found["validation"]["cooldown_start"] == 8
    assert found["validation"]["best_step"] == 10
    assert "the rate fell from step 8 on, though the score still rose" in capsys.readouterr().out


def test_a_checkpoint_of_other_validation_rows_is_not_taken(place):
    def key(rows: Any) -> dict[str, Any]:
        judge = carry._judge(parts, rows, SPEC)
        return judge.key()

    checks = SimpleNamespace(check=lambda *args: None, check_scored=lambda *args: None, primary="accuracy")
    parts: Any = SimpleNamespace(task=checks, model=SimpleNamespace(backbone=None))
    rows = [carry.tables(recipe(place, [], steps=0), _source(place))[i] for i in (1, 2)]
    assert key(rows[0]) == key(rows[0]) != key(rows[1])


def _source(place: Path) -> Any:
    from trimtab.experiments.assembly import assemble

    return assemble(recipe(place, [], steps=0))


def test_without_validation_rows_there_is_no_score():
    with pytest.raises(RecipeError, match="evaluate_every: evaluates on the validation rows, found none"):
        carry._judge(SimpleNamespace(), [], SPEC)  # type: ignore[arg-type]
    assert carry._judge(SimpleNamespace(), [], replace(SPEC, steps=0)) is None  # type: ignore[arg-type]


def test_a_training_that_nothing_evaluates_is_refused():
    with pytest.raises(RecipeError, match="plateau: nothing evaluates in this training: pass `judge`"):
        training.fit(SimpleNamespace(), [], SPEC, 0)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="load_best_model_at_end: nothing evaluates in this training: pass `judge`"):
        training.fit(SimpleNamespace(), [], TrainingSpec(evaluate_every=2, load_best_model_at_end=True), 0)  # type: ignore[arg-type]
