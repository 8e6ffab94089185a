"""The tool that compares with reference tensors: what it takes from a case, and what it does where one fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import conformance

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
