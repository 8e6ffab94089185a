"""What a search is asked for: rows, folders and changes that it heeds, and those that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from tests.data import official
from trimtab.budgets.asking import OtherSearch, data_of, recipe_of, seconds_of, take
from trimtab.budgets.space import Space
from trimtab.experiments.assembly import assemble, tables

SMALL = ["backbone.pretrained=false"]


def write_rows(folder: Path, rows: int = 30, answer: str = "yes") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        Image.new("RGB", (32, 32), (8 * i, 0, 0)).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "question": f"is it {i}?", "answer": answer if i % 2 else "no"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def recipe_for(data, test=None, validation=None, overrides=()):
    return recipe_of("tiny-vilt", "vqa", data, test, validation, [*SMALL, *overrides])


@pytest.fixture
def sets(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "sets" / split)
    return tmp_path / "sets"


def test_own_rows_without_a_file_for_validation_are_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    given = data_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl", None)
    assert given["held_out"] == 0.1 and "validation" not in given
    assert data_of({"name": "files", "train": "a", "test": "b"}, None, None)["held_out"] == 0.1
    given = {"name": "files", "train": "a", "test": "b", "validation": "c"}
    assert data_of(given, None, None) == given
    with pytest.raises(ValueError, match="name those to report on"):
        data_of(tmp_path / "a.jsonl", None, None)
    with pytest.raises(ValueError, match="no file or folder, nor a source"):
        data_of("nothing", None, None)


@pytest.mark.parametrize("data", ["pictograms", {"name": "pictograms"}])
@pytest.mark.parametrize("given", [("rows.jsonl", None), (None, "rows.jsonl")])
def test_rows_that_would_not_be_read_are_refused(data, given):
    with pytest.raises(ValueError, match=r"(test|validation): stands beside a file of training rows.*'pictograms'"):
        data_of(data, *given)


def test_a_folder_of_splits_is_read_with_rows_held_out(sets):
    recipe = recipe_for(sets)
    train, validation, test = tables(recipe, assemble(recipe))
    assert [len(table) for table in (train, validation, test)] == [27, 3, 30]
    assert not set(train["question"]) & set(validation["question"])
    write_rows(sets / "validation", 5)
    recipe = recipe_for(sets)
    assert [len(table) for table in tables(recipe, assemble(recipe))] == [30, 5, 30]
    write_rows(sets.parent / "others", 4)
    recipe = recipe_for(sets, validation=sets.parent / "others")
    assert [len(table) for table in tables(recipe, assemble(recipe))] == [30, 4, 30]


def test_a_folder_without_rows_to_report_on_is_told(sets):
    with pytest.raises(ValueError, match="expected files or folders for train and test, found neither: name the rows"):
        data_of(sets / "train", None, None)


def test_a_published_set_is_read_from_its_folder(tmp_path):
    root = official.refer(tmp_path / "data", [official.ref(1, "train", ["the dog"])], {101: [5, 5, 20, 10]})
    assert data_of(root, None, None) == {"name": "refcoco", "root": str(root), "form": "refer"}
    with pytest.raises(ValueError, match="validation: .* is read by the source 'refcoco', whose rows for it are named"):
        data_of(root, None, "rows.jsonl")


def test_splits_in_several_files_are_read_whole(tmp_path):
    for split, parts in (("train", 2), ("validation", 1), ("test", 1)):
        for i in range(parts):
            rows = [{"question": f"{split} {i} {n}?", "answer": "yes"} for n in range(3)]
            Dataset.from_list(rows).to_parquet(tmp_path / f"{split}-{i:05d}-of-{parts:05d}.parquet")
    assert data_of(tmp_path, None, None) == {"name": "datasets", "root": str(tmp_path)}
    with pytest.raises(ValueError, match="validation: .* is read by the source 'datasets', whose rows for it"):
        data_of(tmp_path, None, "rows.jsonl")


def test_validation_rows_that_are_the_training_rows_are_refused(sets, tmp_path):
    recipe = recipe_for({"name": "imagefolder", "root": str(sets)})
    with pytest.raises(ValueError, match="validation rows are the training rows"):
        take(tmp_path / "found", recipe, Space(), [], 3)
    assert not (tmp_path / "found").exists()


def test_a_search_on_other_rows_is_another_search(sets, tmp_path):
    recipe = recipe_for(sets)
    for _ in range(2):
        take(tmp_path / "found", recipe, Space(), [], 3)
    write_rows(sets / "train", answer="perhaps")
    with pytest.raises(OtherSearch, match="holds a search on other rows: name another folder"):
        take(tmp_path / "found", recipe, Space(), [], 3)


def test_a_search_of_other_weights_is_another_search(sets, tmp_path):
    recipe = recipe_for(sets)
    take(tmp_path / "found", recipe, Space(), [], 3)
    file = tmp_path / "found" / "asked.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": "others"}))
    with pytest.raises(OtherSearch, match="holds a search with other weights"):
        take(tmp_path / "found", recipe, Space(), [], 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.learning_rate=1e-5", "training.learning_rate: each way to tune has its own"),
        ("training.learning_rate=3e-4", "training.learning_rate: each way to tune has its own"),  # the default
        ("training={head_multiplier: 7}", "training.head_multiplier: each way to tune has its own"),
        ("methods=[bitfit]", "methods: the search chooses them"),
        ("seeds=[3,4]", r"found 2 \(variants or seeds\): search once for each"),
    ],
)
def test_what_the_search_decides_is_not_taken_from_the_recipe(change, said):
    with pytest.raises(ValueError, match=said):
        recipe_for({"name": "pictograms"}, overrides=[change])


def test_other_changes_are():
    recipe = recipe_for("pictograms", overrides=["training.steps=7", "seed=3", "data.train=64"])
    assert (recipe.training.steps, recipe.seed, recipe.data["train"]) == (7, 3, 64)


@pytest.mark.parametrize(("time", "seconds"), [("20m", 1200), ("90s", 90), (".5h", 1800), (" 2 min ", 120), (2.5, 2.5)])
def test_times_are_read(time, seconds):
    assert seconds_of(time) == seconds
