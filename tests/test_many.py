"""Whole runs in two processes (gloo): metrics, masks, plans and learned tensors are those of one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests import forked
from tests.models.official import tokenizer
from tests.tasks.tiny import BACKBONES, WORDS
from trimtab import cli, commands
from trimtab.experiments import assembly, failures, many, sharded
from trimtab.experiments import run as carry
from trimtab.experiments.estimate import estimate
from trimtab.experiments.folder import RunError
from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run
from trimtab.experiments.schema import RecipeError

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
DAS = {"name": "das", "skip": 1, "search_steps": 4, "turn": 1, "warmup": 0.2, "gate_rate": 2000.0,
       "dropout_in_rewards": False}  # fmt: skip
PRUNE = {"name": "multiflow", "sparsity": 0.5, "batches": 4}
RANK = {"name": "reranking", "negatives": 2}
PLATEAU = {"schedule": "plateau", "evaluate_every": 2, "patience": 1, "steps": 8,
           "load_best_model_at_end": True}  # which the search does not see  # fmt: skip
RECIPES: dict[str, tuple[str, Any, list[Any], dict[str, Any]]] = {
    "tune": ("clip", "retrieval", ["lora"], {}),  # rows are compared with those of the other process
    "prune": ("vilt", "vqa", [PRUNE, "full"], {"accumulate": 2}),
    "divided": ("vilt", "vqa", [PRUNE, "full"], {"shard": True}),
    "skip": ("vilt", "vqa", [DAS], PLATEAU),
    "composed": ("vilt", "vqa", [PRUNE, DAS, "unipt"], {"save_every": 2}),
    "cached": ("clip", "retrieval", ["linear-probe"], {"cache": "fp32"}),
    "collated together": ("vilt", RANK, ["lora"], {"workers": 1}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, and pictures with questions and captions."""
    folder = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    config = hf.ViltConfig(**SIZES, vocab_size=40, image_size=16, patch_size=4, max_position_embeddings=12)
    hf.ViltForImageAndTextRetrieval(config).save_pretrained(folder / "vilt")
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder / "vilt")
    tokenizer(folder / "vilt", 40)
    BACKBONES["clip"]().save_pretrained(folder / "clip")
    for split, count in (("train", 36), ("validation", 16), ("test", 11)):
        rows = []
        for i in range(count):
            # Of pixels drawn at random: of pictures that are nearly alike, rounding would decide who comes first.
            noise = random.Random(f"{split} {i}").randbytes(3 * 16 * (16 + i % 5))
            Image.frombytes("RGB", (16 + i % 5, 16), noise).save(folder / f"{split}-{i}.png")
            words = " ".join(["red dog", "blue cat", "a big sea"][: 1 + i % 3])
            rows.append({"image": f"{split}-{i}.png", "question": f"is it {words}", "answer": "yes" if i % 3 else "no",
                         "captions": [f"{words} {WORDS[i % len(WORDS)]} {WORDS[i * 7 % len(WORDS)]}"]})  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(place: Path, name: str, **training: Any) -> Any:
    backbone, task, methods, more = RECIPES[name]
    raw = {
        "backbone": {"name": str(place / backbone)}, "task": task, "methods": methods, "costs": False,
        "data": {"name": "files", **{s: str(place / f"{s}.jsonl") for s in ("train", "validation", "test")}},
        "training": {"steps": 4, "batch_size": 8, "evaluation_batch": 4, "log_every": 1, **more, **training},
    }  # fmt: skip
    return expand(raw, name.replace(" ", "-"))[0]


@pytest.fixture(scope="module")
def done(place) -> Path:
    def work() -> None:
        many.join()
        for name in RECIPES:
            os.environ["TRIMTAB_CACHE"] = str(place / "two")
            with contextlib.redirect_stdout(None):
                run(recipe(place, name), place / "two" / name)
        messages = {}
        for name, change in {"batch": {"batch_size": 7}, "rows": {"batch_size": 40}}.items():
            with pytest.raises(RecipeError) as found:
                run(recipe(place, "tune", **change), place / "refused")
            messages[name] = str(found.value)
        (place / f"messages.{os.environ['RANK']}").write_text(json.dumps(messages))

    forked.together(work, place)
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_find_what_one_finds(name, place, done, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(place / "one"))
    one, two = run(recipe(place, name), place / "one" / name), done / "two" / name
    (a, b) = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert b["test"] == pytest.approx(a["test"], abs=1e-6)
    if name == "skip":  # both have ended at the same step, by the same scores
        assert b["steps"] == a["steps"] and b["validation"]["cooldown_start"] == a["validation"]["cooldown_start"] >= 4
        for x, y in zip(a["validation"]["scores"], b["validation"]["scores"], strict=True):
            assert y == pytest.approx(x, abs=1e-6)
    for x, y in zip(a["history"], b["history"], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)
    for x, y in zip(*(json.loads((f / "fit.json").read_text())["methods"] for f in (one, two)), strict=True):
        assert x["state"].get("skip") == y["state"].get("skip")
        if gates := x["state"].get("gates"):
            assert max(map(abs, gates.values())) > 1e-2, "the gates moved"
            assert y["state"]["gates"] == pytest.approx(gates, abs=1e-3)
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if value.is_floating_point():
            assert torch.allclose(value, second[key], atol=1e-4), key
        else:
            assert torch.equal(value, second[key]), key
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def test_what_two_processes_cannot_divide_is_refused_by_both(done):
    for rank in range(2):
        found = json.loads((done / f"messages.{rank}").read_text())
        assert "a batch has 7 rows in all, which 2 processes do not divide: set it to 6 or 8" in found["batch"]
        assert "training.batch_size: 40, but the training table has 36 rows" in found["rows"]


def test_accumulated_batches_have_the_gradient_of_one(place, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    found = []
    for name, settings in {"whole": {"batch_size": 8}, "halves": {"batch_size": 4, "accumulate": 2}}.items():
        out = run(recipe(place, "divided", **settings, steps=1), tmp_path / name)
        found.append(json.loads((out / "metrics.json").read_text())["history"][0])
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"save_every": 2}, "writes no checkpoints"), ({"evaluate_every": 2}, "evaluated when it is whole again"),
     ({"cache": "fp16"}, "never runs the backbone"),
     ({"precision": "fp16"}, "set training.precision to bf16")],
)  # fmt: skip
def test_a_training_that_cannot_be_divided_is_refused(settings, message, place):
    with pytest.raises(RecipeError, match=message):
        sharded.check(recipe(place, "tune", shard=True, **settings).training)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "RANK, MASTER_ADDR, MASTER_PORT is not set: start them with torchrun"),
     ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "the processes meet at 127.0.0.1:.*port is in use.*--master-port N"),
     ({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "ACCELERATE_USE_FSDP": "true"}, "`training.shard: true`"),
     ({"WORLD_SIZE": "1", "ACCELERATE_USE_DEEPSPEED": "true"}, "start it without --use_fsdp and --use_deepspeed")],
)  # fmt: skip
def test_processes_that_cannot_meet_say_why(environment, message, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        if "MASTER_PORT" not in environment and "MASTER_ADDR" in environment:
            monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        PartialState._reset_state()
        with pytest.raises(RunError, match=message):
            many.join()
    PartialState._reset_state()


def test_a_command_for_one_process_refuses_to_be_one_of_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["report", "somewhere"]) == 2
    assert "report: is the work of one process, found WORLD_SIZE=2" in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_the_module_and_the_way_out():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.constant_(self.first.weight, 1e4)

        def forward(self, x):
            return {"loss": self.second(self.first(x)).sum()}

    model, batch = Large(), {"x": torch.full((2, 4), 10.0)}
    half = torch.autocast("cpu", torch.float16)
    with pytest.raises(
        RunError, match=r"loss is nan at step 7 in fp16: .*output of 'first' \(Linear\): .*bf16 or fp32"
    ):
        failures.check_finite({"loss": float("nan")}, 7, model, batch, half, "fp16")
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="the parameter 'second.weight' itself: lower training.learning_rate"):
        failures.check_finite({"loss": float("inf")}, 7, model, batch, contextlib.nullcontext(), "fp32")
    failures.check_finite({"loss": 1.0}, 7, model, batch, half, "fp16")


def test_too_little_memory_says_what_a_step_takes_and_what_lowers_it(place):
    found = recipe(place, "tune")
    told = r"a training step on 8 rows takes [\d.]+ .B.*batch_size 4 \([\d.]+ .B\) with training.accumulate 2"
    told += r" .*precision bf16.*gradient_checkpointing true \([\d.]+ .B\).*training.cache fp16"
    with pytest.raises(RunError, match=told), failures.enough_memory(found):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another thing"), failures.enough_memory(found):
        raise RuntimeError("another thing")


def test_several_recipes_go_on_after_one_that_failed_in_all_processes_or_in_one(place, tmp_path):
    todo, bad = tmp_path / "recipes", place / "bad.jsonl"
    todo.mkdir()
    lines = (place / "train.jsonl").read_text().splitlines()
    (place / "broken.png").write_bytes(b"no picture")
    bad.write_text("\n".join([lines[0].replace("train-0.png", "broken.png"), *lines[1:]]))
    few = {"steps": 9, "batch_size": 8, "evaluation_batch": 8}
    changes: dict[str, dict[str, Any]] = {"1-no-batch": {"training": {**few, "batch_size": 7}},
                                          "2-broken": {"data": {"train": str(bad)}}, "3-good": {},
                                          "4-dealt": {"data": {"train": str(bad)}}}  # fmt: skip
    for name, change in changes.items():
        raw = recipe(place, "collated together" if name == "4-dealt" else "tune").to_dict()
        raw |= {"methods": ["lora"], "training": {**few, "workers": int(name == "4-dealt")}}
        raw |= {k: v for k, v in change.items() if k != "data"}
        raw["data"] |= change.get("data", {})
        for key in ("name", "variant"):
            raw.pop(key)
        (todo / f"{name}.yaml").write_text(yaml.safe_dump(raw))

    def work() -> None:
        status = cli.main(["run", str(todo), "--out", str(tmp_path / "runs")])
        (tmp_path / f"status.{os.environ['RANK']}").write_text(str(status))

    forked.together(work, tmp_path, seconds=200)
    assert [(tmp_path / f"status.{rank}").read_text() for rank in range(2)] == ["1", "1"]
    told = [(tmp_path / f"printed.{rank}").read_text() for rank in range(2)]
    assert "3 of 4 runs failed" in told[0] and "runs failed" not in told[1]
    assert "1-no-batch default seed 0: training.batch_size: a batch has 7 rows" in told[0]
    assert re.search(r"2-broken default seed 0: process \d of 2: .*broken\.png: cannot be decoded", told[0])
    # A worker of the first process made the batch, and each process was told.
    assert re.search(r"4-dealt default seed 0: /\S*broken\.png: cannot be decoded", told[0])
    done = json.loads((tmp_path / "runs" / "3-good" / "default-seed0" / "run.json").read_text())
    assert done["processes"] == 2


def test_checkpointed_blocks_train_the_same_on_less_memory(place, tmp_path):
    found = {}
    for on in (False, True):
        one = recipe(place, "tune", gradient_checkpointing=on)
        losses = json.loads((run(one, tmp_path / str(on)) / "metrics.json").read_text())["history"]
        found[on] = [entry["loss"] for entry in losses], estimate(one)["saved_activation_bytes"]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5) and len(set(found[True][0])) == 4
    assert found[True][1] < 0.5 * found[False][1]
    with pytest.raises(RecipeError, match="gradient_checkpointing: .*Linear of 'mine' has none: leave it out"):
        assembly._checkpoint(SimpleNamespace(model=nn.Linear(1, 1), name="mine"), "recipe x")


def test_divided_weights_that_fail_end_all_processes(place, tmp_path, monkeypatch):
    """In several processes its connections cannot be left, so that the next recipe is not begun."""
    monkeypatch.setattr(many, "join", lambda: None)
    monkeypatch.setattr(many, "started", lambda: 2)
    monkeypatch.setattr(carry, "run", lambda r, folder: (_ for _ in ()).throw(RuntimeError("broken")))
    raw = recipe(place, "divided").to_dict()
    for key in ("name", "variant", "seed"):
        raw.pop(key)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**raw, "seeds": [0, 1]}))
    with pytest.raises(RuntimeError, match="broken"):
        commands._carry_out([str(tmp_path / "two.yaml")], [], tmp_path / "runs", False)
    _, failed = commands._carry_out([str(tmp_path / "two.yaml")], ["training.shard=false"], tmp_path / "runs", False)
    assert failed
