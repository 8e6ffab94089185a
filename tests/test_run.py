"""Run folders: what they hold, that they come back, and that broken ones are refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trimtab
from tests.small_run import made_in
from tests.small_run import recipe as small_recipe
from trimtab import commands
from trimtab.experiments import assembly, recipe, run, training
from trimtab.experiments import folder as folder_of_runs
from trimtab.methods import saved
from trimtab.metrics.intervals import interval
from trimtab.storage.bits import unpack


@pytest.fixture(scope="module")
def finished(tiny_raw, tmp_path_factory):
    r = recipe.expand(tiny_raw("tiny-vilt", "vqa", ["unipt"]), "test")[0]
    return run.run(r, tmp_path_factory.mktemp("runs") / "run"), r


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_a_run_is_plain_files_and_only_the_learned_part(finished):
    folder, r = finished
    names = {p.name for p in folder.iterdir()}
    wanted = {"recipe.yaml", "run.json", "metrics.json", "costs.json", "fit.json", "weights.safetensors", "samples",
              "log.jsonl", "rows.json"}  # fmt: skip
    assert names == wanted
    told, rows = (json.loads((folder / f).read_text()) for f in ("metrics.json", "rows.json"))
    assert rows["metric"] == told["primary"] == "accuracy"
    score = told["test"]["accuracy"]
    assert sum(rows["credits"]) / len(rows["credits"]) == pytest.approx(score)
    assert told["interval"][0] <= score <= told["interval"][1]
    assert all(
        k.startswith(("task.head.", "learned.unipt.", "kept.unipt.")) for k in load_file(folder / "weights.safetensors")
    )
    info = json.loads((folder / "run.json").read_text())
    assert 0 < info["waiting"] < 1  # share of the training time
    assert info["seed"] == r.seed and info["versions"]["torch"] and "commit" in info["git"]
    costs = json.loads((folder / "costs.json").read_text())
    assert costs["checkpoint_bytes"] == (folder / "weights.safetensors").stat().st_size
    samples = json.loads((folder / "samples" / "samples.json").read_text())
    assert samples and all((folder / "samples" / s["image"]).is_file() for s in samples)
    assert folder_of_runs.load_recipe(folder) == r


def test_one_call_gives_a_model_that_answers(finished):
    from PIL import Image

    model = folder_of_runs.load(finished[0])
    answers = model.answer([{"image": Image.new("RGB", (100, 80)), "question": "how many things are there?"}])
    assert answers[0]["answer"] in model.task.answers


def test_the_same_recipe_gives_the_same_metrics_twice(finished, tmp_path):
    again = run.run(finished[1], tmp_path / "again")
    first, second = (json.loads((f / "metrics.json").read_text()) for f in (finished[0], again))
    assert first == second
    assert json.loads((finished[0] / "run.json").read_text())["seconds"] > 0


def test_no_steps_train_and_store_nothing(tiny_raw, tmp_path):
    r = recipe.expand(tiny_raw("tiny-clip", "retrieval", [], steps=0), "test")[0]
    folder = run.run(r, tmp_path / "run")
    costs = json.loads((folder / "costs.json").read_text())
    assert costs["trainable_params"] == costs["saved_activation_bytes"] == 0
    assert not load_file(folder / "weights.safetensors")
    folder_of_runs.load(folder)


@pytest.mark.parametrize("methods", [[], ["omp"]])
def test_what_a_policy_alone_trains_is_stored(tiny_raw, tmp_path, methods):
    raw = tiny_raw("tiny-clip", "retrieval", methods, steps=2)
    raw["policy"] = [{"match": "*.bias", "do": "train"}, {"match": "*", "do": "method"}]
    folder = run.run(recipe.expand(raw, "test")[0], tmp_path / "run")
    stored = load_file(folder / "weights.safetensors")
    kept = [name for name in stored if name.startswith("kept.")]
    assert kept and all(name.endswith(".bias") for name in kept)
    own = dict(folder_of_runs.load(folder).backbone.model.named_parameters())
    assert all(torch.equal(own[name.removeprefix("kept.")], stored[name]) for name in kept)


def test_rows_that_are_read_ahead_train_the_same_model(finished, tiny_raw, tmp_path):
    ahead = replace(finished[1], training=replace(finished[1].training, workers=1))
    folder = run.run(ahead, tmp_path / "ahead", measure_costs=False)
    told, again = (json.loads((f / "metrics.json").read_text()) for f in (finished[0], folder))
    assert told == again


def test_another_seed_gives_another_model(finished, tmp_path, tiny_raw):
    other = recipe.expand({**tiny_raw("tiny-vilt", "vqa", ["unipt"]), "seed": 1}, "test")[0]
    first, second = (load_file(f / "weights.safetensors") for f in (finished[0], run.run(other, tmp_path / "other")))
    assert not torch.equal(first["task.head.0.weight"], second["task.head.0.weight"])


def test_weights_of_another_model_are_refused(copy):
    tensors = load_file(copy / "weights.safetensors")
    name = "learned.unipt.fusion.up.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, copy / "weights.safetensors")
    with pytest.raises(
        folder_of_runs.RunError,
        match=rf"weights.safetensors: .*'{name}' has the shape \(128, 63\), expected",
    ):
        folder_of_runs.load(copy)


def test_missing_weights_are_named(copy):
    tensors = load_file(copy / "weights.safetensors")
    del tensors["task.head.3.bias"]
    save_file(tensors, copy / "weights.safetensors")
    with pytest.raises(folder_of_runs.RunError, match=r"fit.json tells of .*'task': 6.*found .*'task': 5"):
        folder_of_runs.load(copy)


def test_a_truncated_file_is_named(copy):
    file = copy / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(folder_of_runs.RunError, match=r"weights.safetensors: not a whole safetensors file"):
        folder_of_runs.load(copy)


def test_another_backbone_is_refused(copy):
    config = json.loads((copy / "fit.json").read_text())
    config["base"]["fingerprint"] = "0" * 16
    (copy / "fit.json").write_text(json.dumps(config))
    with pytest.raises(folder_of_runs.RunError, match="fingerprint 0000000000000000"):
        folder_of_runs.load(copy)


def test_an_unfinished_run_is_no_run(copy):
    (copy / "run.json").unlink()
    assert not folder_of_runs.is_finished(copy)
    with pytest.raises(folder_of_runs.RunError, match="not a finished run"):
        folder_of_runs.load(copy)


@pytest.mark.parametrize("broken", [(saved, "save_file"), (folder_of_runs, "write_gallery")], ids=lambda b: b[1])
def test_an_interrupted_save_leaves_no_finished_run(broken, finished, copy, monkeypatch):
    """A full disk while an old run is replaced: neither the old nor the new one may be taken for whole."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*broken, full)
    with pytest.raises(OSError, match="No space left"):
        run.run(finished[1], copy)
    assert not folder_of_runs.is_finished(copy)
    assert not list(copy.rglob(".*")), "no temporary files stay behind"


def stopped(monkeypatch, after, r, folder):
    """A run that is interrupted after some training steps."""
    step = training._Trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run(r, folder, measure_costs=False)


@pytest.mark.parametrize(("backbone", "task", "methods"), [
    ("tiny-clip", "retrieval", [{"name": "multiflow", "sparsity": 0.5, "batches": 2}, "full"]),
    ("tiny-blip", "vqa", ["lora"]),  # which drops out, and ties its word embeddings
])  # fmt: skip
def test_an_interrupted_training_resumes_from_its_checkpoint(tiny_raw, tmp_path, backbone, task, methods, monkeypatch):
    r = recipe.expand(tiny_raw(backbone, task, methods, steps=6, save_every=2, log_every=1), "test")[0]
    whole = run.run(r, tmp_path / "whole", measure_costs=False)
    stopped(monkeypatch, 5, r, tmp_path / "stopped")
    assert not folder_of_runs.is_finished(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-4").is_dir()
    run.run(r, tmp_path / "stopped", measure_costs=False)
    first, second = (load_file(f / "weights.safetensors") for f in (whole, tmp_path / "stopped"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    first, second = (json.loads((f / "metrics.json").read_text()) for f in (whole, tmp_path / "stopped"))
    assert first == second


def test_a_checkpoint_of_other_methods_is_not_taken_up(tiny_raw, tmp_path, monkeypatch):
    def made(alpha):
        settings = {"steps": 4, "save_every": 2, "log_every": 1}
        return recipe.expand(tiny_raw("tiny-vilt", "vqa", [{"name": "lora", "alpha": alpha}], **settings), "test")[0]

    stopped(monkeypatch, 3, made(8), tmp_path / "run")
    run.run(made(64), tmp_path / "run", measure_costs=False)
    run.run(made(64), tmp_path / "fresh", measure_costs=False)
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("run", "fresh"))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_side_network_of_one_token_is_refused_where_others_are_read(tiny_raw, tmp_path):
    method = {"name": "unipt", "tokens": "first"}
    for task in ("grounding", "matching"):
        with pytest.raises(recipe.RecipeError, match=r"methods\.0: 'unipt' hands on the first token alone"):
            assembly.assemble(recipe.expand(tiny_raw("tiny-vilt", task, [method]), "test")[0])
    assembly.assemble(recipe.expand(tiny_raw("tiny-vilt", "vqa", [method]), "test")[0])


def test_a_side_network_that_sees_later_words_is_refused_for_captions(tiny_raw, tmp_path):
    with pytest.raises(recipe.RecipeError, match=r"methods\.0: 'unipt' lets every word see every other"):
        run.run(recipe.expand(tiny_raw("tiny-vilt", "captioning", ["unipt"]), "test")[0], tmp_path / "run")


@pytest.mark.parametrize("sparse", [False, True])
def test_an_exported_run_is_the_same_model_with_every_zero_and_no_lora(tiny_raw, tmp_path, sparse):
    methods = [{"name": "multiflow", "sparsity": 0.6, "batches": 1, "batch_size": 4}, "lora"]
    r = recipe.expand(tiny_raw("tiny-clip", "retrieval", methods), "test")[0]
    folder = run.run(r, tmp_path / "run")
    exported = trimtab.load(folder_of_runs.export(folder, tmp_path / "out", sparse=sparse))
    tuned = folder_of_runs.load(folder)
    plain = {k.replace(".base_layer", ""): v for k, v in tuned.backbone.model.state_dict().items()}
    masks = {w.path for w in exported.anatomy.weights(exported.model)}
    state = exported.model.state_dict()
    packed = {k.split(".", 2)[2]: v for k, v in load_file(folder / "weights.safetensors").items() if "method.0" in k}
    assert masks == packed.keys()
    merged = 0
    for path in masks:
        mask = unpack(packed[path], state[path].shape)
        assert not state[path][~mask].any() and torch.equal(state[path] != 0, mask)
        merged += int((state[path] != plain[path])[mask].any())
    assert merged == sum(p.endswith(("q_proj.weight", "v_proj.weight")) for p in masks) > 0
    lora = next(m for m in tuned.modules() if hasattr(m, "get_delta_weight"))
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert (b @ a != 0).all() and not (lora.get_delta_weight("default") != 0).all()  # masked


def test_an_exported_lora_run_computes_what_the_run_computes(tiny_raw, tmp_path):
    r = recipe.expand(tiny_raw("tiny-clip", "retrieval", ["lora"]), "test")[0]
    folder = run.run(r, tmp_path / "run")
    exported, tuned = trimtab.load(folder_of_runs.export(folder, tmp_path / "out")), folder_of_runs.load(folder)
    pixels = torch.randn(3, 3, 64, 64)
    assert not any("lora" in name for name, _ in exported.named_modules())
    with torch.no_grad():
        wanted = tuned.head.image(tuned.backbone.eval().image(pixels).pooled)
        torch.testing.assert_close(exported.eval().image(pixels).pooled, wanted, rtol=1e-4, atol=1e-5)
        for module in tuned.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.zero_()
        assert not torch.allclose(wanted, tuned.head.image(tuned.backbone.image(pixels).pooled), atol=1e-4)


def test_a_run_whose_methods_added_modules_is_not_exported(finished, tmp_path):
    with pytest.raises(folder_of_runs.RunError, match="unipt cannot be exported.*stand beside the model"):
        folder_of_runs.export(finished[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_trains_at_the_rates_of_its_drops(tiny_raw, tmp_path):
    raw = tiny_raw("tiny-vilt", "vqa", ["linear-probe"])
    raw["training"] |= {"steps": 4, "learning_rate": 1e-2, "schedule": "step", "drops": [0.5], "warmup": 0,
                        "log_every": 1}  # fmt: skip
    (r,) = recipe.expand(raw, "steps")
    folder = run.run(r, tmp_path / "run", measure_costs=False)
    history = json.loads((folder / "metrics.json").read_text())["history"]
    assert [h["learning_rate"] for h in history] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])


def test_test_rows_that_cannot_be_scored_end_a_run_before_it_trains(tiny_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_train", lambda *args: pytest.fail("it trained"))
    raw = tiny_raw("tiny-vilt", {"name": "matching", "pool": 25})
    with pytest.raises(ValueError, match="blocks of 25 pictures, the table to evaluate on has 24 rows"):
        run.run(recipe.expand(raw, "test")[0], tmp_path / "run")


def test_rows_that_do_not_add_up_to_the_metric_lose_no_run():
    assert run._credits([{"credit": 1.0}, {}, {"credit": 0.0}], 0.5) == [1.0, None, 0.0]
    assert run._credits([{}, {}], 0.5) == []
    for credit in (0.2, float("nan")):
        with pytest.warns(UserWarning, match="there is no interval"):
            assert run._credits([{"credit": credit}], 0.5) == []


def test_questions_about_one_picture_are_known_as_such(tmp_path):
    place = made_in(tmp_path)
    rows = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    (place / "test.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows[:2], rows[0], rows[3], rows[1]]))
    folder = run.run(small_recipe(place, ["linear-probe"], steps=1), tmp_path / "run")
    credited = json.loads((folder / "rows.json").read_text())
    assert credited["pictures"] == [0, 1, 0, 3, 1] and len(credited["credits"]) == 5
    told = json.loads((folder / "metrics.json").read_text())
    assert told["interval"] == list(interval(credited["credits"], credited["pictures"]))


@pytest.fixture
def two(tiny_raw, tmp_path):
    """A recipe of two runs."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**tiny_raw(steps=1), "costs": False, "seeds": [0, 1]}))
    return str(tmp_path / "two.yaml")


def test_what_another_process_is_working_on_is_left_out(two, tmp_path, capsys):
    taken = tmp_path / "runs" / "two" / "default-seed0"
    with folder_of_runs.claimed(taken):
        with pytest.raises(folder_of_runs.BusyError, match="default-seed0: another process is working on it"):
            run.run(recipe.read(two, [])[0], taken)
        done, wrong = commands._carry_out([two], [], tmp_path / "runs", False)
    assert not taken.exists() and done == [taken.with_name("default-seed1")] and wrong
    told = capsys.readouterr().err
    assert told.count("seed 0: left out: ") == 2 and "1 of 2 runs are another process's work" in told
    assert sorted(p.name for p in taken.parent.iterdir()) == ["default-seed1"]  # claims leave nothing


def test_what_another_process_has_let_go_is_carried_out_at_the_end(two, tmp_path, monkeypatch):
    first = tmp_path / "runs" / "two" / "default-seed0"
    held = contextlib.ExitStack()
    held.enter_context(folder_of_runs.claimed(first))
    whole = run.run

    def released(r, folder):
        if r.seed == 1:
            held.close()
        return whole(r, folder)

    monkeypatch.setattr(run, "run", released)
    done, wrong = commands._carry_out([two], [], tmp_path / "runs", False)
    assert done == [first.with_name("default-seed1"), first] and not wrong


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_of_runs.FileLock, "acquire", lambda self: (_ for _ in ()).throw(OSError(37, "No locks")))
    with pytest.warns(UserWarning, match="cannot be locked .*No locks"), folder_of_runs.claimed(tmp_path / "run"):
        pass
