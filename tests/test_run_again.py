"""What a run that is done again, goes on, or is shown beside others tells: of itself, and nothing of those before."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import small_run
from tests.written_runs import write_run
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.recipe import RecipeError, expand, read
from trimtab.experiments.run import _made_of, run
from trimtab.report.page import find_runs
from trimtab.report.runs import group_runs
from trimtab.report.tables import markdown_table

RAW = {"backbone": "tiny-clip", "task": "retrieval", "data": "pictograms"}


# --- recipes ----------------------------------------------------------------------------------------------------------


OMP = {"methods": [{"name": "omp", "sparsity": "{s}"}]}


@pytest.mark.parametrize(("more", "overrides", "message"), [
    ({**OMP, "grid": {"s": [0.5], "k": [1, 2]}}, [], "grid.k: expected '{k}' in a setting of 'methods'"),
    ({**OMP, "grid": {"s": [0.5, 0.5]}}, [], "two of its points are labelled '0.5'"),
    ({**OMP, "grid": {"s": [0.5]}, "variants": {0.5: {}}}, [], "'0.5' stands in 'variants' and comes from 'grid'"),
    ({**OMP, "grid": {"s": [0.5]}}, ["grid.s=[0.9]"], "'grid.s': grids and seeds by pattern are written in the file"),
    ({}, ["seeds.full=[1, 2]"], "'seeds.full': grids and seeds"),
    ({}, ["seed=5", "seeds=[1, 2]"], r"found seed=5 and seeds=\[1, 2\]: give one"),
    ({"variants": {True: {}}}, [], "expected a label of letters or numbers, found True: quote it"),
])  # fmt: skip
def test_what_would_be_ignored_is_refused(more, overrides, message):
    with pytest.raises(RecipeError, match=message):
        expand({**RAW, **more}, "x", overrides)


def test_labels_may_be_numbers_and_have_dots():
    found = expand({**RAW, "variants": {2: {"seed": 1}, "lora-0.5": {}}}, "x", ["variants.lora-0.5.training.steps=3"])
    assert [(r.variant, r.training.steps == 3) for r in found] == [("2", False), ("lora-0.5", True)]
    assert [r.variant for r in expand({**RAW, "variants": {2: {}, 4: {}}}, "x", ["variants=[4]"])] == ["4"]


@pytest.mark.parametrize(
    "twice", ["training: {steps: 1}\ntraining: {steps: 2}", "methods: [{name: lora, rank: 4, rank: 8}]"]
)
def test_a_key_that_stands_twice_is_told(twice, tmp_path):
    (tmp_path / "a.yaml").write_text(f"backbone: tiny-clip\ntask: retrieval\ndata: pictograms\n{twice}\n")
    with pytest.raises(
        RecipeError, match="a.yaml: not YAML: the key '(training|rank)' stands twice, again in line [45]"
    ):
        read(tmp_path / "a.yaml")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path) -> Path:
    return small_run.made_in(tmp_path)


def test_nothing_of_the_run_before_is_left(place):
    first = small_run.recipe(place, [{"name": "lora", "rank": 2}])
    run(replace(first, policy=({"match": "*"},), costs=True), place / "run")
    assert (place / "run" / "costs.json").exists() and (place / "run" / "policy.json").exists()
    run(small_run.recipe(place, [{"name": "lora", "rank": 4}]), place / "run")
    assert not (place / "run" / "costs.json").exists() and not (place / "run" / "policy.json").exists()


def test_a_policy_alone_drops_nothing_in_what_is_frozen(place):
    """As a method that trains the same: what evaluates while the rest trains does not depend on who says it."""
    from trimtab.experiments.assembly import assemble

    policy = ({"match": "*.bias", "do": "train"}, {"match": "head.*", "do": "train"}, {"match": "*", "do": "frozen"})
    for methods in ([], ["full"]):
        parts = assemble(replace(small_run.recipe(place, methods), policy=policy))
        parts.attach()
        parts.model.train()
        on = [n for n, m in parts.model.backbone.named_modules() if m.training and "drop" in n.lower()]
        assert on == [], methods
        parts.model.eval()
        assert not any(m.training for m in parts.model.modules())


def test_a_kept_run_says_that_its_data_are_newer(place):
    recipe = small_run.recipe(place, ["full"])
    folder = run(recipe, place / "run")
    assert folder_of_runs.newer(folder, recipe) is None
    test = Path(recipe.data["test"])
    os.utime(test, (test.stat().st_mtime + 1000,) * 2)
    assert folder_of_runs.newer(folder, recipe) == test and folder_of_runs.is_finished(folder, recipe)


def test_seeds_of_another_recipe_have_no_mean_together(tmp_path):
    folders = [write_run(tmp_path, "a", "full", seed, {"recipe": recipe})
               for seed, recipe in ((0, "x"), (1, "x"), (2, "y"))]  # fmt: skip
    runs, omitted = find_runs(folders)
    assert not omitted
    assert {v: len(r) for v, r in group_runs(runs)[0].methods.items()} == {"full": 2, "full (recipe 2)": 1}
    assert "| full (recipe 2) |" in markdown_table(runs)


def test_a_checkpoint_belongs_to_the_masks_that_were_read():
    """Their file may have been written anew since."""
    (recipe,) = expand({**RAW, "methods": [{"name": "omp", "masks": "m"}, "full"]}, "x")

    def made_of(bits: int) -> object:
        read = SimpleNamespace(name="omp", settings=SimpleNamespace(masks="m"), state={},
                               tensors={"a": torch.tensor([bits])})  # fmt: skip
        full = SimpleNamespace(name="full", settings=None, state={}, tensors={})
        return _made_of(recipe, SimpleNamespace(fit=SimpleNamespace(base={}), methods=[read, full]))

    assert made_of(3) == made_of(3) != made_of(5)
