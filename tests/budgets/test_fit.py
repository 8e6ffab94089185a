"""A search from budget to model, at the smallest size."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import trimtab
from trimtab.budgets import halving, measured, page, trial
from trimtab.budgets.limits import Budget, BudgetError, parse
from trimtab.budgets.space import TUNES, Candidate, Space
from trimtab.experiments import estimate
from trimtab.experiments.assembly import assemble
from trimtab.experiments.folder import load_assembly
from trimtab.experiments.recipe import expand, read
from trimtab.experiments.run import run
from trimtab.methods.saved import Saved

SPACE = Space(sparsities=(0.5,), skips=(1,), tunes={k: TUNES[k] for k in ("linear-probe", "lora-2")}, batches=2)
DATA = {"name": "pictograms", "train": 64, "test": 24, "validation": 32}
QUICK = ["backbone.pretrained=false", "training.steps=9", "training.batch_size=8"]


def search(out, **more):
    given = {"budget": "macs <= -3%, nonzeros <= -20%, disk <= 2 MB", "space": SPACE, "trials": 3, "overrides": QUICK,
             "reference": False, "tell": lambda line: None}  # fmt: skip
    return trimtab.fit("tiny-clip", "retrieval", DATA, out=out, **{**given, **more})


def trials_of(found):
    return [json.loads(file.read_text()) for file in sorted(found.folder.glob("trials/*/trial.json"))]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return search(tmp_path_factory.mktemp("fit") / "found")


def test_what_is_found_keeps_the_budget_and_computes_what_was_scored(found):
    parts = load_assembly(found.model)
    assert found.best.candidate.skip == 1 and found.best.candidate.sparsity == 0.5  # nothing else saves so much here
    assert found.budget.over(found.best.costs) == {}
    counted = estimate._counts(parts, parts.model.example(parts.task.least))
    for key in ("macs", "trainable_params", "nonzero_params"):
        assert counted[key] == found.best.costs[key]
    assert counted["macs"] <= 0.97 * estimate.dense(read(found.folder / "found.yaml")[0])["dense_macs"]
    written = (found.model / "weights.safetensors").stat().st_size
    assert written == pytest.approx(found.best.costs["checkpoint_bytes"], rel=0.02)
    assert found.test[found.primary] == found.best.test
    assert str(found).startswith(f"at {found.budget.told(found.best.costs)}")


def test_its_recipe_needs_nothing_else_and_gives_the_same_model(found, tmp_path):
    recipe = read(found.folder / "found.yaml")[0]
    assert not any("masks" in method for method in recipe.methods)
    run(replace(recipe, costs=False), tmp_path / "again")
    again, first = (load_assembly(folder).fit.stored() for folder in (tmp_path / "again", found.model))
    assert again.keys() == first.keys() and len(again) > 10  # masks among them, calibrated anew
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_page_names_the_best_trial_and_the_limits(found):
    page = (found.folder / "report" / "index.html").read_text()
    assert str(found.best.candidate) in page and "macs &le;" in page and "disk &le; 2 MB" in page
    told = json.loads((found.folder / "fit.json").read_text())
    assert told["sentence"] == str(found) and told["paid"] == found.paid
    assert found.paid == sum(t["steps"] for t in trials_of(found)) + 10  # and the search of plans


def test_a_search_goes_on_where_it_was_left(found, monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("a trial that was finished is not run again")

    monkeypatch.setattr(halving, "run", no)
    again = search(found.folder)
    assert again.best.candidate == found.best.candidate and again.paid == found.paid
    with pytest.raises(ValueError, match="holds a search with another space"):
        search(found.folder, space=replace(SPACE, batches=3))


def test_a_budget_that_nothing_meets_says_what_would_be_possible(found, tmp_path):
    with pytest.raises(BudgetError, match=r"no candidate meets.*macs: the least possible is .*nearest on all axes"):
        search(tmp_path / "found", budget="macs <= -60%", space=replace(SPACE, sparsities=()))
    assert not (tmp_path / "found" / "trials").exists()


def test_the_best_trial_keeps_this_budget_and_not_that_of_an_earlier_search(found):
    again, best = replace_search(found), found.best
    over = {key: 10 * value if isinstance(value, (int, float)) else value for key, value in best.costs.items()}
    again.done.append(trial.Trial(8, best.candidate, best.costs, status="whole", scores={100: 0.1}))
    again.done.append(trial.Trial(9, best.candidate, over, status="whole", scores={100: 1.0}, budget="a looser one"))
    assert again.best.number == 8


def test_a_trial_that_fails_is_kept_with_its_reason(found, monkeypatch):
    calls = []

    def fails(recipe, folder, **more):
        calls.append(folder)
        raise ValueError("the loss is not finite")

    monkeypatch.setattr(halving, "run", fails)
    again = replace_search(found)
    failing = trial.Trial(7, found.best.candidate, {}, budget=again._asked)
    again.carry_out(failing, lambda step, score: False)
    assert (failing.status, failing.reason) == ("failed", "the loss is not finite") and calls
    again.done = [failing]
    with pytest.raises(BudgetError, match="none of 1 trials came to its end; 1 because: the loss is not finite"):
        again._check()


def test_a_trial_that_goes_on_behind_its_last_step_is_scored(tmp_path, monkeypatch):
    only = {"space": replace(SPACE, sparsities=(), skips=(), tunes={"lora-2": TUNES["lora-2"]}), "trials": 1,
            "budget": "disk <= 2 MB", "overrides": [*QUICK, "training.save_every=3"]}  # fmt: skip
    evaluate = trial.training.evaluate

    def dies(model, rows, batch):
        if len(rows) == DATA["test"]:
            raise KeyboardInterrupt
        return evaluate(model, rows, batch)

    monkeypatch.setattr(trial.training, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "found", **only)
    monkeypatch.setattr(trial.training, "evaluate", evaluate)
    again = search(tmp_path / "found", **only)
    assert list(again.best.scores) == [9] and again.best.steps == again.paid == 9


def test_what_was_not_measured_is_not_said_to_keep_the_budget():
    budget = Budget.of(
        parse("train time <= -50%, macs <= -10%"), {"full": {"training_seconds": 100.0}, "dense": {"macs": 100}}
    )
    assert budget.kept({"macs": 80, "training_seconds": 40.0}) is True
    assert budget.kept({"macs": 80}) is None and budget.kept({"macs": 95}) is False
    full = trial.Trial(-1, Candidate(0.0, 0, "full"), {"macs": 90}, "whole", test=0.6)
    best = trial.Trial(0, Candidate(0.0, 2, "lora-8"), {"macs": 80, "training_seconds": 40.0}, "whole", test=0.5)
    rows = page._levers(SimpleNamespace(best=best, without={}, full=full, budget=budget))
    assert [row["fits"] for row in rows] == ["yes", "—"]


def test_full_tuning_is_measured_too_where_the_budget_names_time(tmp_path):
    found = search(tmp_path / "found", budget="train time <= 1h", reference=True, trials=1)
    assert found.full.costs["training_seconds"] > 0
    assert (
        search(tmp_path / "found", budget="train time <= 1h", reference=True, trials=1).full.costs == found.full.costs
    )


def test_a_cold_trial_that_was_cut_off_is_made_when_there_is_time(found, monkeypatch):
    again, tried = replace_search(found), []
    warm = replace(found.best, number=len(again.done), scores={9: 2.0}, start=0, budget=again._asked,
                   candidate=replace(found.best.candidate, multiple=1.5))  # fmt: skip
    again.done += [warm, replace(warm, number=warm.number + 1, status="cut", scores={}, start=None)]
    monkeypatch.setattr(again, "carry_out", lambda trial, judge: tried.append(trial.candidate))
    again._confirm()
    assert tried == [warm.candidate]


def test_the_first_of_each_way_to_tune_goes_on_to_the_second_rung(found, monkeypatch):
    again, told = replace_search(found), []
    asked = SimpleNamespace(report=lambda score, step: None, should_prune=lambda: True)
    study = SimpleNamespace(tell=lambda *args, **kwargs: None)
    monkeypatch.setattr(again, "carry_out", lambda _, judge: told.append([judge(rung, 0.5) for rung in again.rungs]))
    first = again.portfolio()[0]
    again._try(study, asked, first)
    again._try(study, asked, replace(first, multiple=3.0))
    assert told == [[False, True, True], [True, True, True]]


def replace_search(found):
    from trimtab.budgets.prices import Prices
    from trimtab.budgets.shared import Shared

    recipe = replace(read(found.folder / "found.yaml")[0], methods=())
    known = found.best.costs | {"dense_macs": 1, "dense_params": 1}
    prices = Prices(recipe, SPACE, found.folder / "prices.json", count=lambda _: known)
    shared = Shared(recipe, SPACE, found.folder / "shared")
    shared.find(set(), {1})
    return halving.Search(recipe, SPACE, found.budget, prices, shared, found.folder)


def test_a_warm_start_is_from_what_a_like_trial_learned(found, tmp_path):
    narrow = replace(SPACE, skips=(), tunes={"full": TUNES["full"]}, multiples=(1.0,))
    warm = search(tmp_path / "warm", space=narrow, budget="disk <= 200 MB", trials=2, warm=True)
    first, second, *_ = tried = trials_of(warm)
    assert (first["start"], second["start"]) == (None, 0) and (first["steps"], second["steps"]) == (9, 3)
    assert warm.best.start is None and warm.best.steps == 9  # the recipe of a warm trial would not be all of it
    assert (len(tried) == 3) == (second["scores"]["3"] > first["scores"]["9"])
    parent, child = warm.folder / "trials" / "000", load_assembly(warm.folder / "trials" / "001")
    assert not trial.warmed(child.model, found.model)  # has not all that is learned here
    assert trial.warmed(child.model, parent)
    own, theirs, gone = child.fit.current(), Saved.read(parent).learned, 0
    for name, value in own.items():
        kept = value != 0
        assert torch.equal(value[kept], theirs[name][kept])
        gone += int((theirs[name][~kept] != 0).sum())
    assert gone > 100_000 and not child.fit.masks.revived(child.fit.model)

    # Another budget in this folder: only the pruned candidate keeps to it, and its warm start is not enough.
    other = search(warm.folder, space=narrow, budget="nonzeros <= -20%", trials=1, warm=True)
    assert other.best.candidate.sparsity == 0.5 and [t["start"] for t in trials_of(other)] == [None, 0, None]
    assert other.paid == 9 + 3 + 9


def test_what_was_measured_once_is_kept_when_another_base_is_wanted(tmp_path, monkeypatch):
    counter = iter(range(100, 200))
    monkeypatch.setattr(measured, "measure", lambda model, recipe, keys: {key: next(counter) for key in keys})
    recipe = expand({"backbone": {"name": "tiny-clip", "pretrained": False}, "task": "retrieval", "data": DATA}, "x")[0]
    file = tmp_path / "measured.json"
    for budget in ("train time <= 50% of full", "train time <= 50% of full, latency <= 50% of full"):
        known = measured.measured_bases(recipe, parse(budget), file)
    assert known == {"full": {"training_seconds": 100, "latency_ms": 101}} == json.loads(file.read_text())


def test_limits_on_what_is_measured_may_be_relative(tmp_path):
    narrow = replace(SPACE, sparsities=(), skips=(), tunes={"linear-probe": TUNES["linear-probe"]}, multiples=(1.0,))
    given = {"space": narrow, "trials": 1}
    found = search(tmp_path / "found", budget="latency <= 2000%, train time <= 2000% of full", **given)
    base = json.loads((found.folder / "measured.json").read_text())
    assert found.budget.most["latency"] == 20 * base["dense"]["latency_ms"] > 0
    assert found.budget.most["train time"] == 20 * base["full"]["training_seconds"] > 0
    assert 0 < found.best.costs["training_seconds"] < found.budget.most["train time"]
    again = search(tmp_path / "found", budget="latency <= 2000%, train time <= 2000% of full", **given)
    assert again.budget.most == found.budget.most  # the base is measured once
    with pytest.raises(BudgetError, match=r"latency: the least of 1 is .* \(linear-probe\), asked are"):
        search(tmp_path / "none", budget="latency <= 1%", **given)
    if not torch.cuda.is_available():
        with pytest.raises(BudgetError, match="measured memory: needs a GPU"):
            search(tmp_path / "gpu", budget="measured memory <= 2 GB", **given)


def test_train_time_counts_the_passes_that_a_step_is_made_of(monkeypatch):
    monkeypatch.setattr(measured, "_step_seconds", lambda model, spec: 2.0)
    recipe = expand({"backbone": {"name": "tiny-clip", "pretrained": False}, "task": "retrieval", "data": DATA,
                     "training": {"steps": 5, "batch_size": 8, "accumulate": 3}}, "x")[0]  # fmt: skip
    model = assemble(recipe).model
    assert measured.measure(model, recipe, {"training_seconds"}) == {"training_seconds": 2.0 * 5 * 3}


def test_a_trial_that_was_cut_off_is_the_first_to_go_on(found, tmp_path, monkeypatch):
    narrow = replace(SPACE, sparsities=(), skips=(), tunes={"linear-probe": TUNES["linear-probe"]})
    given = {"space": narrow, "budget": "disk <= 2 MB", "trials": 2}
    under_way = []

    def killed_later(recipe, folder, **more):
        under_way.append(recipe.training.learning_rate)
        if len(under_way) == 2:
            (folder / "checkpoints").mkdir()
            raise KeyboardInterrupt
        return run(recipe, folder, **more)

    monkeypatch.setattr(halving, "run", killed_later)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "found", **given)
    folder = tmp_path / "found" / "trials" / "001"
    assert not (folder / "trial.json").exists()
    again = search(tmp_path / "found", **given)
    assert [t["number"] for t in trials_of(again)] == [0, 1] and len(under_way) == 3
    assert under_way[2] == under_way[1] != under_way[0]
    other = trial.Trial(1, Candidate(0.5, 0, "linear-probe", 3.0), {})
    (folder / "checkpoints").mkdir(exist_ok=True)
    replace_search(found)._claim(folder, other)
    assert not (folder / "checkpoints").exists()  # no trial goes on from another's checkpoint


def test_time_for_less_than_one_trial_is_an_error_that_says_what_one_takes(found, tmp_path):
    given = {"time": 0.001, "trials": 1, "reference": True, "budget": "disk <= 2 MB"}
    lines: list[str] = []
    narrow = replace(SPACE, sparsities=(), skips=(), tunes={"linear-probe": TUNES["linear-probe"]})
    with pytest.raises(BudgetError, match=r"did not suffice for one.*linear-probe: it would have taken about [0-9]+ s"):
        search(tmp_path / "short", space=narrow, tell=lines.append, **given)
    assert "no time to compare with full" in lines
    again = search(tmp_path / "short", space=narrow, **{**given, "time": None, "reference": False})
    assert [t["status"] for t in trials_of(again)] == ["cut", "whole"]  # what was cut is tried again
    assert again.paid == 1 + 9


@pytest.mark.parametrize("time", ["0m", 0, -5, "xx", "1.2.3"])
def test_no_time_is_refused(tmp_path, time):
    with pytest.raises(ValueError, match=f"time: expected '20m'.* more than none, found {time!r}"):
        search(tmp_path / "found", time=time)
    assert not (tmp_path / "found").exists()


def test_too_few_rows_are_told_before_anything_is_counted(tmp_path):
    from PIL import Image

    lines: list[str] = []
    for name in ("train", "test"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
        rows = [json.dumps({"image": f"{name}.png", "caption": f"picture {i}"}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"4 rows are too few to hold out 0.1 of them: give a file for `validation`"):
        trimtab.fit("tiny-clip", "retrieval", tmp_path / "train.jsonl", test=tmp_path / "test.jsonl", tell=lines.append,
                    budget="disk <= 2 MB", out=tmp_path / "found", space=SPACE, overrides=QUICK)  # fmt: skip
    assert lines == []
