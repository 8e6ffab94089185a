from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trimtab.backbones import BACKBONES
from trimtab.experiments import assembly, recipe
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.recipe import build, expand, read
from trimtab.experiments.schema import RecipeError, TrainingSpec


@pytest.fixture
def raw(tiny_raw):
    return tiny_raw("tiny-vilt", "vqa", [{"name": "multiflow", "sparsity": 0.5}, "full"])


def only(raw, *overrides):
    (found,) = expand(raw, "test", overrides)
    return found


# --- what a recipe stands for -----------------------------------------------------------------------------------------


def test_short_and_long_forms_are_the_same(raw):
    short = {"backbone": "tiny-vilt", "task": "vqa", "data": "pictograms", "methods": ["full"]}
    long = {k: [{"name": v[0]}] if k == "methods" else {"name": v} for k, v in short.items()}
    assert only(short) == only(long)
    assert only(short).training == TrainingSpec() and only(short).seed == 0
    assert only({**short, "methods": None}).methods == ()


def test_variants_times_seeds(raw):
    raw |= {"variants": {"a": None, "b": {"methods": ["linear-probe"]}}, "seeds": [3, 4]}
    found = expand(raw, "test")
    assert [(r.variant, r.seed) for r in found] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    assert [len(r.methods) for r in found] == [2, 2, 1, 1]
    assert {r.name for r in found} == {"test"}


def test_a_variant_is_merged_key_by_key(raw):
    raw["training"] |= {"learning_rate": 1e-3}
    raw["variants"] = {
        "first": {"training": {"steps": 7}, "data": {"style": "twemoji"}, "methods": [{"name": "lora", "rank": 2}]},
        "second": {},
    }
    first, second = expand(raw, "test")
    assert first.training.steps == 7 and first.training.learning_rate == 1e-3 and first.training.batch_size == 8
    assert first.data == {**raw["data"], "style": "twemoji"}
    assert first.methods == ({"name": "lora", "rank": 2},)  # a list is replaced
    assert second.training.steps == 3 and "style" not in second.data  # the first variant left no trace
    assert second.methods[0]["sparsity"] == 0.5


def test_overrides_reach_keys_and_list_entries(raw):
    found = only(
        raw, "training.steps=9", "training.learning_rate=1e-2", "methods.0.sparsity=0.9", "data.style=twemoji",
        "backbone.pretrained=true", "seed=5", "methods.1=linear-probe", "task=grounding",
    )  # fmt: skip
    assert found.training.steps == 9 and found.training.learning_rate == 0.01
    assert found.methods == ({"name": "multiflow", "sparsity": 0.9}, {"name": "linear-probe"})
    assert found.data["style"] == "twemoji" and found.backbone.pretrained is True and found.seed == 5
    assert found.task == {"name": "grounding"}
    assert raw["methods"][0]["sparsity"] == 0.5  # the mapping that was passed in is left alone


def test_overrides_of_short_forms(raw):
    raw["data"] = "pictograms"
    assert only(raw, "data.train=5").data == {"name": "pictograms", "train": 5}


def test_an_override_of_one_variant_leaves_the_others(raw):
    raw |= {"variants": {"a": {}, "b": {"training": {"steps": 6}}}, "seeds": [0]}
    found = expand(raw, "test", ["variants.b.training.steps=9", "variants.b.seed=5", "training.batch_size=2"])
    assert [(r.training.steps, r.seed, r.training.batch_size) for r in found][1] == (9, 5, 2)
    assert found[0].training.steps == expand(raw, "test")[0].training.steps and found[0].seed == 0


def test_overrides_come_after_variants_and_choose_among_them(raw):
    raw |= {"variants": {k: {"training": {"steps": n}} for k, n in (("a", 5), ("b", 6), ("c", 7))}, "seeds": [0]}
    found = expand(raw, "test", ["variants=[c,a]", "seeds=[1,2]", "training.batch_size=2"])
    assert [(r.variant, r.seed, r.training.steps) for r in found] == [
        ("a", 1, 5),
        ("a", 2, 5),
        ("c", 1, 7),
        ("c", 2, 7),
    ]
    assert {r.training.batch_size for r in found} == {2}
    assert {r.training.steps for r in expand(raw, "test", ["training.steps=1"])} == {1}


@pytest.mark.parametrize(
    "change",
    [
        {"variants": {"a": {"seed": 7}}},
        pytest.param({"variants": {"a": {"data": {"train": 5}}}, "data": "pictograms"}, id="variant of a short form"),
    ],
)
def test_a_variant_changes_what_an_override_can(change, raw):
    """`variants: {a: {seed: 7}}` is as good as `seed=7`, and a short form takes settings in both ways."""
    raw |= change
    found = only(raw)
    assert found.seed == change["variants"]["a"].get("seed", 0)
    assert found.data.get("train") == change["variants"]["a"].get("data", {}).get("train", 64)


def test_one_seed_on_the_command_line_stands_for_one_run(raw):
    raw["seeds"] = [0, 1, 2]
    assert [r.seed for r in expand(raw, "test", ["seed=5"])] == [5]


# --- wrong names: each error gives the nearest right one --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainin": {}}, "unknown key 'trainin': did you mean 'training'"),
        ({"training": {"step": 1}}, "training: unknown key 'step': did you mean 'steps'"),
        (
            {"backbone": {"name": "tiny-vilt", "atention": "sdpa"}},
            "backbone: unknown key 'atention': did you mean 'attention'",
        ),
        ({"variants": {"a": {"metods": []}}}, "variants.a: unknown key 'metods': did you mean 'methods'"),
        ({"backbone": "tiny-vlit"}, "unknown backbone 'tiny-vlit': did you mean 'tiny-vilt'"),
        ({"backbone": {"name": "tiny-vilt", "start_from": "tiny-clp"}}, "'tiny-clp': did you mean 'tiny-clip'"),
        ({"task": "groundig"}, "unknown task 'groundig': did you mean 'grounding'"),
        ({"task": {"name": "vqa", "answer": ["yes"]}}, "task: unknown key 'answer': did you mean 'answers'"),
        ({"data": "pictogram"}, "unknown data source 'pictogram': did you mean 'pictograms'"),
        ({"data": {"name": "pictograms", "styl": "x"}}, "data: unknown key 'styl': did you mean 'style'"),
        ({"methods": ["multifow"]}, "unknown method 'multifow': did you mean 'multiflow'"),
        (
            {"methods": ["full", {"name": "multiflow", "sparsty": 0.5}]},
            "methods.1: multiflow: unknown setting 'sparsty': did you mean 'sparsity'",
        ),
    ],
)
def test_a_wrong_name_gets_the_nearest(change, message, raw):
    with pytest.raises(RecipeError) as error:
        assembly.check(only({**raw, **change}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "'training.steps': expected key=value, such as training.steps=10"),
        ("=3", "expected key=value"),
        ("training.steps=[1", "'training.steps=[1': the value is not YAML"),
        ("trainin.steps=3", "unknown key 'trainin': did you mean 'training'"),
        ("sed=3", "unknown key 'sed': did you mean 'seed'"),
        ("training.stps=3", "training: unknown key 'stps': did you mean 'steps'"),
        ("methods.7.sparsity=0.1", "'methods.7.sparsity' does not name a field"),
        ("methods.first.sparsity=0.1", "'methods.first.sparsity' does not name a field"),
        ("seed.deep.er=1", "'seed.deep.er' does not name a field"),
        ("variants=[fulll]", "unknown variant 'fulll': did you mean 'full'"),
    ],
)
def test_a_wrong_override(override, message, raw):
    raw["variants"] = {"full": {}, "other": {}}
    with pytest.raises(RecipeError) as error:
        expand(raw, "test", [override])
    assert message in str(error.value)


# --- wrong values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"steps": "many"}}, ("training", "steps", "many")),
        ({"training": {"precision": "fp8"}}, ("training", "precision", "fp8", "bf16")),
        ({"training": {"steps": -1}}, ("training: steps must be at least 0, found -1",)),
        ({"training": {"batch_size": 0}}, ("training: batch_size must be at least 1",)),
        ({"training": {"accumulate": 0}}, ("training: accumulate must be at least 1",)),
        ({"training": {"learning_rate": -1e-3}}, ("training: learning_rate must be at least 0, found -0.001",)),
        ({"training": {"head_multiplier": float("nan")}}, ("training: head_multiplier must lie in [0, inf), found",)),
        ({"training": {"steps": None}}, ("training: steps: expected int, found null",)),
        ({"backbone": {"pretrained": False}}, ("backbone", "name")),
        ({"backbone": {"name": "tiny-vilt", "attention": "flash"}}, ("backbone", "attention", "flash", "eager")),
        ({"data": {"style": "openmoji"}}, ("'data'", "'name'")),
        ({"data": {"name": "pictograms", "train": "some"}}, ("data", "train", "some")),
        ({"data": {"name": "pictograms", "style": "crayon"}}, ("data", "style", "crayon", "openmoji")),
        ({"methods": [{"sparsity": 0.5}]}, ("'methods'", "'name'")),
        ({"methods": [{"name": "multiflow", "sparsity": 1.0}]}, ("methods.0", "sparsity", "1.0")),
        ({"methods": ["full", {"name": "multiflow", "sparsity": -0.1}]}, ("methods.1", "sparsity", "-0.1")),
        ({"methods": [{"name": "multiflow", "sparsity": "half"}]}, ("methods.0", "sparsity", "half")),
    ],
)
def test_a_wrong_value_names_its_field(change, words, raw):
    with pytest.raises(RecipeError) as error:
        assembly.check(only({**raw, **change}))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("change", "overrides", "field"),
    [
        ({"seed": "many"}, (), "seed"),
        ({"seeds": 3}, (), "seeds"),
        ({}, ("seeds=3",), "seeds"),
        ({"variants": ["a"]}, (), "variants"),
        ({"variants": {"a": {"seeds": [1]}}}, (), "variants.a: 'seeds' belongs beside 'variants'"),
        ({"variants": {"abc": {}}}, ("variants.abd.training.steps=3",), "unknown variant 'abd': did you mean 'abc'"),
        ({"variants": {"abc": {}}}, ("variants.abc=3",), "'variants.abc': names no field of a variant"),
        ({"backbone": None}, (), "backbone"),
        ({"task": None}, (), "task"),
        ({"training": 5}, (), "training"),
        ({"methods": "full"}, (), "full"),
    ],
)
def test_a_section_of_the_wrong_shape_names_its_field(change, overrides, field, raw):
    try:
        found = expand({**raw, **change}, "test", overrides)
    except RecipeError as error:
        assert field in str(error)
    else:
        assert [m["name"] for m in found[0].methods] == ["full"], "one method may stand for a list of one"


@pytest.mark.parametrize("key", ["backbone", "task", "data"])
def test_a_missing_section_is_named(key, raw):
    del raw[key]
    with pytest.raises(RecipeError, match=f"the key '{key}' is missing"):
        only(raw)


def test_zero_steps_are_an_evaluation(raw):
    assert only(raw, "training.steps=0").training.steps == 0


def test_build_converts_by_signature():
    spec = build(TrainingSpec, {"steps": 4, "learning_rate": 1, "save_every": None}, "here")
    assert (spec.steps, spec.learning_rate, spec.save_every) == (4, 1.0, None)
    assert isinstance(spec.learning_rate, float)


# --- files ------------------------------------------------------------------------------------------------------------


def test_read_names_runs_after_the_file(raw, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**raw, "title": "My run"}))
    (found,) = read(file, ["training.steps=4"])
    assert (found.name, found.title, found.training.steps, found.variant) == ("mine", "My run", 4, "default")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone: [tiny-vilt\ntask: vqa\n", "not YAML"),
        ("- a\n- list\n", "expected a mapping with the keys backbone, task"),
        ("", "expected a mapping"),
        ("backbone: tiny-vilt\ntsk: vqa\n", "unknown key 'tsk': did you mean 'task'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(text, message, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        read(file)
    assert str(file) in str(error.value) and message in str(error.value)


def test_an_unknown_recipe_gets_the_nearest():
    with pytest.raises(RecipeError, match="no recipe file 'pretrain/tiny-clp'.*did you mean 'pretrain/tiny-clip'"):
        read("pretrain/tiny-clp")


@pytest.mark.parametrize("name", recipe.names())
def test_every_shipped_recipe_can_be_run_and_written_down(name, tmp_path):
    """Each variant passes the check, and is the same after it went through a run folder's recipe.yaml."""
    found = read(name)
    assert recipe.title(name) == found[0].title != ""
    assert len({(r.variant, r.seed) for r in found}) == len(found)
    assert {r.name for r in found} == {name}
    for r in {r.variant: r for r in found}.values():
        if not {r.backbone.name, r.backbone.start_from} <= {*BACKBONES, None}:
            pytest.skip(f"{r.backbone.name} is not registered")
        if r.data["name"] == "easy-vqa":
            pytest.importorskip("easy_vqa")
        assembly.check(r)
        (tmp_path / "recipe.yaml").write_text(r.to_yaml())
        assert folder_of_runs.load_recipe(tmp_path) == r


def test_a_resolved_recipe_survives_its_file(raw, tmp_path):
    raw |= {"title": "T", "seeds": [4], "variants": {"odd: label": {"task": {"name": "vqa", "answers": ["yes", "no"]}}}}
    (first,) = expand(raw, "folder/name")
    (tmp_path / "recipe.yaml").write_text(first.to_yaml())
    again = folder_of_runs.load_recipe(tmp_path)
    assert again == first
    assert (again.name, again.variant, again.seed, again.title) == ("folder/name", "odd: label", 4, "T")


def test_values_of_python_are_written_plainly_and_others_are_told(raw, tmp_path):
    (first,) = expand(raw, "folder/name")
    rate, folder = np.logspace(-4, -3, 2)[0], Path("a") / "b"
    odd = replace(first, training=replace(first.training, learning_rate=rate), data={**first.data, "train": folder})
    told = yaml.safe_load(odd.to_yaml())
    assert told["training"]["learning_rate"] == 1e-4 and told["data"]["train"] == str(folder)
    (tmp_path / "recipe.yaml").write_text(odd.to_yaml())
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    assert folder_of_runs.is_finished(tmp_path, odd)  # and is not carried out again
    assert not folder_of_runs.is_finished(tmp_path, first)
    with pytest.raises(RecipeError, match=r"expected numbers, text, lists and mappings, found .*\(dtype\)"):
        replace(first, task={"name": "vqa", "as": torch.float16}).to_yaml()


def test_shipped_names_are_paths_below_the_recipe_folder():
    assert "pretrain/tiny-clip" in recipe.names()
    assert recipe.find("pretrain/tiny-clip") == recipe.find("pretrain/tiny-clip.yaml")
    assert recipe.find("pretrain/tiny-clip").is_file()


# --- grids ------------------------------------------------------------------------------------------------------------

GRID = {
    "backbone": "tiny-vilt", "task": "vqa", "data": "pictograms",
    "grid": {"pruner": ["multiflow", "omp"], "sparsity": [0.63, 0.9]},
    "methods": [{"name": "{pruner}", "sparsity": "{sparsity}", "masks": "runs/{pruner}-{sparsity}"}],
    "variants": {"dense": {"methods": ["full"]}},
    "seeds": {"multiflow-*": [0, 1], "*": [0]},
}  # fmt: skip


def test_a_grid_stands_for_every_combination_beside_the_variants():
    runs = recipe.expand(GRID, "g")
    assert [(r.variant, r.seed) for r in runs] == [
        ("dense", 0), ("multiflow-0.63", 0), ("multiflow-0.63", 1), ("multiflow-0.9", 0), ("multiflow-0.9", 1),
        ("omp-0.63", 0), ("omp-0.9", 0),
    ]  # fmt: skip
    assert runs[0].methods == ({"name": "full"},)
    # A value that stands alone keeps its type, within a text it is written out.
    assert runs[3].methods == ({"name": "multiflow", "sparsity": 0.9, "masks": "runs/multiflow-0.9"},)
    assert [r.variant for r in recipe.expand(GRID, "g", ["variants=[omp-0.63]", "seeds=[4]"])] == ["omp-0.63"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"pruner": []}}, r"grid\.pruner: expected a list that is not empty"),
        ({"grid": {"pruner": "omp"}}, r"grid\.pruner: expected a list"),
        ({"grid": ["omp"]}, "grid: expected a mapping"),
        ({"seeds": {"multiflow-*": [0]}}, r"no pattern fits the variant 'dense'.*end with '\*'"),
        ({"seeds": {"*": 0}}, "seeds: expected a list"),
        ({"variants": {"dense": {"grid": {"a": [1]}}}}, "'grid' belongs beside 'variants'"),
    ],
)
def test_a_wrong_grid_is_named(change, message):
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.expand({**GRID, **change}, "g")


def test_a_folder_stands_for_its_recipes_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.yaml").write_text("{}")
    assert [Path(p).name for p in recipe.below(tmp_path)] == ["a.yaml", "b.yaml"]
    assert recipe.below("demo/vqa") == ["demo/vqa"]
    assert [Path(p).stem for p in recipe.below("demo")] == ["easy-vqa", "grounding", "retrieval", "vqa"]


# --- a rate that falls in steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "step"}, r"drops: 'schedule: step' needs them .* found \[\]"),
        ({"drops": [0.5]}, r"no other schedule has them, found \[0.5\] with 'schedule: cosine'"),
        ({"schedule": "step", "drops": [0.6, 0.5]}, r"expected rising shares between 0 and 1, found \[0.6, 0.5\]"),
        ({"schedule": "step", "drops": [0.5, 0.5]}, "expected rising shares"),
        ({"schedule": "step", "drops": [1.0]}, "expected rising shares"),
    ],
)
def test_drops_are_rising_shares_of_the_schedule_that_has_them(raw, given, message):
    with pytest.raises(RecipeError, match=message):
        only({**raw, "training": given})


def test_the_rate_falls_to_a_tenth_where_epoch_15_of_25_ends(raw):
    from trimtab.experiments.training import falling

    drops = only({**raw, "training": {"schedule": "step", "drops": [0.6]}}).training.drops
    rates = [falling(i, 25 * 259, 0, drops) for i in (0, 15 * 259 - 1, 15 * 259, 25 * 259 - 1)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])
    assert [falling(i, 20, 4, (0.5, 0.75)) for i in (0, 2, 4, 9, 10, 15)] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.01])
