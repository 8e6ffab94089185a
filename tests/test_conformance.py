"""The tool that compares with reference tensors: what it takes from a case, and what it does where one fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import conformance
from tests.data import made_sets, official

GOLDEN = Path(__file__).parent / "golden"


def put(folder: Path, name: str, tensors=None, **fields) -> None:
    """A golden case in a folder, with other tensors or fields."""
    info = json.loads((GOLDEN / f"{name}.json").read_text()) | fields
    (folder / f"{name}.json").write_text(json.dumps(info))
    if tensors is None:
        shutil.copy(GOLDEN / f"{name}.safetensors", folder)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")


def report(folder: Path, capsys) -> tuple[int, dict[str, dict]]:
    status = conformance.main(folder)
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return status, {line["case"]: line for line in lines}


def test_a_case_that_raises_has_failed_and_the_rest_go_on(tmp_path, capsys):
    put(tmp_path, "a1_vse_transformer", hidden_size=[32, 32])
    (tmp_path / "a2_broken.json").write_text("{")
    put(tmp_path, "a3_clip4clip_text", {"x": torch.zeros(1)})
    put(tmp_path, "c2_adapter")
    status, lines = report(tmp_path, capsys)
    assert status == 1
    first, broken, third, last = lines.values()
    assert not first["pass"] and first["error"].startswith("ValueError: unipt: 4 hidden maps are read, found 2 widths")
    assert not broken["pass"] and "a2_broken.json: Expecting" in broken["error"]
    assert not third["pass"] and "KeyError" in third["error"] and "modules.py, line" in third["error"]
    assert last["pass"] and last["case"] == "c2_adapter"


def test_fields_and_values_that_are_not_known_are_named(tmp_path, capsys):
    put(tmp_path, "a4_clipvil", temperature=2.0, mode="train")
    status, lines = report(tmp_path, capsys)
    assert status == 0
    assert lines["a4_clipvil"]["unknown"] == {"mode": "train", "temperature": 2.0}


@pytest.mark.parametrize(("formula", "passes"), [("x/(sum|x|+1e-8)", True), ("x/(sum|x|+1e-1)", False)])
def test_the_guard_of_row_sums_is_the_one_that_the_case_states(tmp_path, capsys, formula, passes):
    put(tmp_path, "a1_vse_transformer", l1norm=formula)
    assert report(tmp_path, capsys)[1]["a1_vse_transformer"]["pass"] is passes


def short_search() -> tuple[dict, dict]:
    """A golden search that ends after two of its three epochs: the last one trains with the last choice."""
    name = "c1_gate_vilt"
    info, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    ends = {e["epoch"]: e for e in info["timeline"] if e.get("epoch_end")}
    chosen = ends[1]["selected_indices"]
    timeline = [e for e in info["timeline"] if e["epoch"] < 2]
    mask = [float(i in chosen) for i in range(len(tensors["cost"]))]
    timeline += [{"epoch": 2, "step": s, "train_mask": mask} for s in range(info["steps_per_epoch"])]
    timeline.append(ends[1] | {"epoch": 2})
    updates = [u for u in info["update_epoch_step"] if u[0] < 2]
    fields = {"das_epoch": 2, "timeline": timeline, "update_epoch_step": updates, "n_updates": len(updates)}
    return fields, tensors


def test_a_search_ends_after_the_epochs_that_its_case_states(tmp_path, capsys):
    fields, tensors = short_search()
    put(tmp_path, "c1_gate_vilt", tensors, **fields)
    assert report(tmp_path, capsys)[1]["c1_gate_vilt"]["pass"]
    put(tmp_path, "c1_gate_vilt", tensors, **fields | {"das_epoch": 3})  # which would go on drawing
    status, lines = report(tmp_path, capsys)
    assert status == 1 and not lines["c1_gate_vilt"]["pass"]


def test_conformance_of_an_empty_folder_fails(tmp_path):
    assert conformance.main(tmp_path) == 1


def test_a_data_set_is_read_and_held_against_its_tables(tmp_path, capsys):
    """Which set it is stands in the file, or shows in the names of its files; the folder's name says nothing here."""
    made_sets.nlvr2(tmp_path / "some")
    row = ["dev-6-1-0", "Two dogs.", False]
    tables = {"dev": {"columns": ["identifier", "sentence", "label"], "rows": [row], "n_rows": 1}}
    made_sets.write(tmp_path / "some/expected.json", {"dataset": "nlvr2", "tables": tables})
    status, lines = report(tmp_path, capsys)
    assert status == 0 and lines["some/dev"]["pass"] and lines["some/dev"]["checks"] == 3
    row[2] = True
    made_sets.write(tmp_path / "some/expected.json", {"tables": tables})
    made_sets.write(tmp_path / "some/balanced_dev.json", "")
    status, lines = report(tmp_path / "some", capsys)
    assert status == 1 and lines["some/dev"]["difference"] == "row 0, 'label': expected True, found False"
    tables["dev"]["n_rows"] = 2
    made_sets.write(tmp_path / "some/expected.json", {"tables": tables})
    assert report(tmp_path, capsys)[1]["some/dev"]["difference"] == "expected 2 rows, found 1"
    made_sets.write(tmp_path / "some/expected.json", {"tables": {"train": tables["dev"], "test1": tables["dev"]}})
    assert "expected test1.json" in report(tmp_path, capsys)[1]["some/test1"]["error"]


def test_a_broken_file_passes_with_an_error_that_names_file_and_row(tmp_path, capsys):
    made_sets.nlvr2(tmp_path / "set")
    made_sets.write(tmp_path / "set/expected.json", {"dataset": "nlvr2", "tables": {}})
    good = {"identifier": "dev-6-1-0", "sentence": "x", "label": "True"}
    files = {"whole": (good,), "broken": (good, {**good, "identifier": "dev-6-1-1", "label": "yes"})}
    for name, rows in files.items():
        made_sets.write(tmp_path / f"bad/{name}.jsonl", rows)
    made_sets.write(tmp_path / "bad/cut.json", '{"images": [')
    made_sets.write(tmp_path / "bad/other.xyz", "?")
    names = ["whole.jsonl", "broken.jsonl", "cut.json", "other.xyz"]
    made_sets.write(tmp_path / "bad/index.json", [{"file": name, "what_is_wrong": "see"} for name in names])
    status, lines = report(tmp_path, capsys)
    assert status == 1 and [lines[f"bad/{name}"]["pass"] for name in names] == [False, True, True, None]
    assert "broken.jsonl, line 2: expected 'label'" in lines["bad/broken.jsonl"]["told"]


def test_a_broken_file_that_no_reader_of_its_own_takes_stands_in_for_the_one_it_is_like(tmp_path, capsys):
    made_sets.gqa(tmp_path / "set")
    made_sets.write(tmp_path / "set/expected.json", {"dataset": "gqa", "tables": {}})
    content = json.loads((tmp_path / "set/questions1.2/val_balanced_questions.json").read_text())
    made_sets.write(tmp_path / "bad/whole.json", content)
    content["02"]["imageId"] = "gone"
    made_sets.write(tmp_path / "bad/broken.json", content)
    names = ["whole.json", "broken.json"]
    made_sets.write(tmp_path / "bad/index.json", [{"file": name, "what_is_wrong": "see"} for name in names])
    status, lines = report(tmp_path, capsys)
    assert status == 1 and [lines[f"bad/{name}"]["pass"] for name in names] == [False, True]
    assert "bad/broken.json, id '02': the picture 'gone.jpg' is not there" in lines["bad/broken.json"]["told"]


def test_a_table_of_refs_says_whose_splits_it_has(tmp_path, capsys):
    root = tmp_path / "set"
    official.refer(root, [official.ref(1, "train", ["the dog"]), official.ref(2, "testAB", ["a man"])],
                   {101: [1, 2, 3, 4], 102: [1, 1, 5, 5]})  # fmt: skip
    unc = root / "refcoco/refs(unc).p"
    unc.with_name("refs(google).p").write_bytes(unc.read_bytes())
    official.refer(root, [official.ref(3, "train", ["a bus"])], {101: [1, 2, 3, 4], 102: [1, 1, 5, 5]})
    columns = ["expression", "ref_id", "split"]
    tables = {"refcoco": {"columns": columns, "n_rows": 2, "rows": [["the dog", 1, "train"], ["a man", 2, "testAB"]]}}
    made_sets.write(root / "expected.json", {"dataset": "refcoco", "tables": tables})
    status, lines = report(tmp_path, capsys)
    assert status == 0 and lines["set/refcoco"]["pass"]


def test_a_damaged_pickle_that_runs_code_fails_nothing_else(tmp_path, capsys):
    for name, content in {"evil_a.p": b"\x80\x02\x82\x01.", "evil_b.p": b"ceval\neval\n.", "evil_c.p": b"]."}.items():
        (tmp_path / name).write_bytes(content)
    lines = report(tmp_path, capsys)[1]
    assert [lines[f"{tmp_path.name}/evil_{n}.p"]["pass"] for n in "abc"] == [True, True, False]
