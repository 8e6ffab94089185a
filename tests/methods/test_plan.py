"""Plans: saved, read, printed, used again, and refused for another model."""

from __future__ import annotations

import json

import pytest
from transformers import ViltModel

from tests.methods.skipping import plan_of, vilt
from trimtab import Anatomy
from trimtab.methods.skip.plan import Plan, PlanError
from trimtab.methods.skip.search.das import DAS


def test_a_plan_is_saved_read_printed_and_used_again(tmp_path):
    model = vilt()
    plan = plan_of(model, 0, 3)
    plan.save(tmp_path / "plan.json", updates=[])
    state = json.loads((tmp_path / "plan.json").read_text())
    methods = [{"name": "lora", "lever": "tune", "state": {}}, {"name": "das", "lever": "skip", "state": state}]
    (tmp_path / "fit.json").write_text(json.dumps({"methods": methods}))
    assert Plan.read(tmp_path / "plan.json") == plan == Plan.read(tmp_path)
    text = str(plan)
    assert "das for ViltModel: 2 of 4 blocks skipped" in text
    rows = [line for line in text.splitlines() if "encoder.layer" in line]
    assert [("skipped" in r, "kept" in r) for r in rows] == [(True, False), (False, True), (False, True), (True, False)]
    assert "-0.2500" in rows[1] and "fusion" in rows[1]
    method = DAS(plan=str(tmp_path))
    method.assume(model, Anatomy.of(model))
    assert method.state["skip"] == ["encoder.layer.0", "encoder.layer.3"]


def test_the_course_of_a_search_is_drawn(tmp_path, capsys):
    from trimtab import cli

    plan = plan_of(vilt(), 0, 3)
    updates = [{"step": s, "gates": [0.1 * s, -0.1, 0, 0.2 * s]} for s in (1, 2, 3)]
    plan.save(tmp_path / "plan.json", updates=updates)
    assert cli.main(["plan", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "gates.png")]) == 0
    assert "encoder.layer.3" in capsys.readouterr().out
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    plan.save(tmp_path / "plan.json")
    assert cli.main(["plan", str(tmp_path / "plan.json"), "--plot", str(tmp_path / "gates.png")]) == 2
    assert "no course of a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: vilt(3), r"skips 'encoder.layer.3', which is no block of this ViltModel .*it has 3, the plan knows 4"),
        (lambda: vilt(5), r"knows 4 blocks, this ViltModel has 5 \('encoder.layer.4' is not in the plan\)"),
        (lambda: vilt(4, 64), r"'encoder.layer.0' is 32 wide in the plan and 64 in this ViltModel"),
        (lambda: type("Other", (ViltModel,), {})(vilt().config), "made for a ViltModel, this is a Other"),
    ],
)
def test_a_plan_of_another_model_is_refused(other, message, tmp_path):
    plan_of(vilt(), 0, 3).save(tmp_path / "plan.json")
    model = other()
    with pytest.raises(PlanError, match=message):
        DAS(plan=str(tmp_path / "plan.json")).assume(model, Anatomy.of(model))


def test_a_plan_itself_is_used_and_told_by_its_paths():
    model = vilt(2)
    plan = Plan.of(model, Anatomy.of(model), list(Anatomy.of(model).blocks()), (1,))
    method = DAS(plan=plan)  # two blocks, as many as the default `skip` would take
    left = method.attach(model, Anatomy.of(model))
    assert [b.path for b in left.blocks()] == ["encoder.layer.0"] and method.plan == plan
    assert method.describe()["plan"] == ("encoder.layer.1",)
    with pytest.raises(PlanError, match=r"das: plan: skips 'encoder.layer.1', which is no block"):
        DAS(plan=plan).attach(vilt(1), Anatomy.of(vilt(1)))


def test_a_folder_in_which_nothing_is_skipped_holds_no_plan(tmp_path):
    (tmp_path / "fit.json").write_text(json.dumps({"methods": [{"name": "lora", "lever": "tune", "state": {}}]}))
    with pytest.raises(PlanError, match=r"fit.json: no blocks are skipped there \(found lora\)"):
        Plan.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 7}', '{"format": 1, "model": "x", "blocks": [1]}']
)
def test_a_file_that_is_no_plan_is_named(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=str(file)):
        Plan.read(file)
