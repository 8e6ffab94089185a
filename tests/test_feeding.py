"""Training reads its rows ahead and resumes, and no number depends on it."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from transformers import TrainerCallback

from tests.tasks import tiny
from trimtab import files
from trimtab.data.images import ImageError
from trimtab.experiments import feeding, resuming, training
from trimtab.experiments.schema import TrainingSpec
from trimtab.tasks import TASKS, TaskModel

SPEC = TrainingSpec(steps=8, batch_size=4, learning_rate=1e-3, log_every=1, crop=0.6, light=0.2, workers=0)


@pytest.fixture(scope="module")
def table() -> Dataset:
    """18 rows of five captions: four batches an epoch, and a rest that is left out."""
    pictures = [tiny.picture(c, (20, 16 + i)) for i in range(6) for c in tiny.COLOURS]
    told = [[f"{a} {b}" for a in ("red", "big", "the", "it", "one")] for b in (*tiny.WORDS, "sea")[:18]]
    return Dataset.from_dict({"image": pictures, "captions": told}).cast_column("image", Image())


def model_of(dropout: float = 0.3) -> TaskModel:
    """A dual encoder, all of it trained, that drops out."""
    torch.manual_seed(0)
    model = TaskModel(tiny.clip(), TASKS["retrieval"](captions="first"))
    for module in model.modules():
        if "Attention" in type(module).__name__:
            module.dropout = dropout
    return model


def fitted(table, folder=None, callbacks=(), **changes):
    """Losses and weights after training."""
    model = model_of()
    torch.manual_seed(5)
    spec = replace(SPEC, **changes)
    history = training.fit(model, table, spec, 3, list(callbacks), checkpoints=folder)
    return [(e["step"], e["loss"], e["grad_norm"]) for e in history], model.state_dict()


def same(one, two) -> bool:
    return one[0] == two[0] and all(torch.equal(one[1][k], v) for k, v in two[1].items())


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(table):
    return fitted(table)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_numbers(table, whole, workers):
    assert len(whole[0]) == 8 and len({loss for _, loss, _ in whole[0]}) == 8
    assert same(fitted(table, workers=workers), whole)
    assert not multiprocessing.active_children(), "workers end with the training"


def test_another_seed_and_dropout_are_told_apart(table, whole):
    """Otherwise the other tests here would pass whatever was drawn."""
    other = training.fit(model_of(), table, SPEC, 4)
    assert [e["loss"] for e in other] != [loss for _, loss, _ in whole[0]]
    torch.manual_seed(5)
    dry = training.fit(model_of(0.0), table, SPEC, 3)
    assert dry[0]["loss"] != whole[0][0][1]


@pytest.mark.parametrize(("stop", "save_every", "settings"), [
    (3, 2, {}), (5, 4, {}), (7, 3, {"workers": 1, "log_every": 4}), (7, 3, {"accumulate": 3, "log_every": 2}),
])  # fmt: skip
def test_a_resumed_training_is_the_same_to_the_bit(table, tmp_path, stop, save_every, settings):
    """In the middle and at the end of an epoch, between two points of the curve, with accumulated batches."""
    straight = fitted(table, **settings)
    with pytest.raises(KeyboardInterrupt):
        fitted(table, tmp_path, [StopAt(stop)], save_every=save_every, **settings)
    (left,) = tmp_path.glob("checkpoint-*")
    assert left.name == f"checkpoint-{stop - stop % save_every}" and resuming.content(left)
    assert same(fitted(table, tmp_path, save_every=save_every, **settings), straight)


class Steps(TrainerCallback):
    """Notes at which step a training begins."""

    def __init__(self):
        self.first = None

    def on_step_end(self, args, state, control, **kwargs):
        self.first = self.first or state.global_step


@pytest.mark.parametrize("part", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "mark_whole"])
def test_of_a_half_written_checkpoint_the_one_before_is_taken(table, whole, tmp_path, monkeypatch, part, caplog):
    owner = resuming if part == "mark_whole" else training._Trainer
    original = getattr(owner, part)

    def cut(*args, **kwargs):
        trainer_or_folder = args[0]
        if part == "mark_whole" and trainer_or_folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        original(*args, **kwargs)
        if part != "mark_whole" and trainer_or_folder.state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, part, cut)
        with pytest.raises(KeyboardInterrupt):
            fitted(table, tmp_path, save_every=2)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    steps = Steps()
    assert same(fitted(table, tmp_path, [steps], save_every=2), whole)
    assert steps.first == 3 and "checkpoint-4: not whole" in caplog.text
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def slow_file(kill):
    """`torch.save` that is killed with half of the optimizer's file on disk."""

    def save(value, path, original=torch.save):
        content = io.BytesIO()
        original(value, content)
        with Path(path).open("wb", buffering=0) as file:
            file.write(content.getvalue()[: len(content.getvalue()) // 2])
            kill(path)
            file.write(content.getvalue()[len(content.getvalue()) // 2 :])

    return torch, "save", save


def last_file(kill):
    """The mark of a whole checkpoint is written beside its place, and not yet put there."""

    def replaced(partial, path, original=os.replace):
        kill(path)
        original(partial, path)

    return files.os, "replace", replaced


def removal(kill):
    """The older checkpoint is deleted in part, when the newer one is whole."""

    def remove(checkpoint):
        (checkpoint / "model.safetensors").unlink()
        kill(str(checkpoint).replace("checkpoint-2", "checkpoint-4"))

    return resuming, "remove", remove


@pytest.mark.parametrize(("place", "first"), [(slow_file, 3), (last_file, 3), (removal, 5)])
def test_a_process_that_is_killed_in_the_writing_goes_on_from_the_last_whole_checkpoint(
    table, whole, tmp_path, place, first
):
    if not (child := os.fork()):
        try:
            ours, name, slow = place(lambda path: "checkpoint-4" in str(path) and os.kill(os.getpid(), signal.SIGKILL))
            setattr(ours, name, slow)
            fitted(table, tmp_path, save_every=2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    steps = Steps()
    assert same(fitted(table, tmp_path, [steps], save_every=2), whole) and steps.first == first
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_truncated_checkpoint_is_not_whole_and_one_of_another_training_is_not_taken(table, tmp_path, caplog):
    fitted(table, tmp_path, steps=2, save_every=2)
    key = resuming.content(tmp_path / "checkpoint-2")["training"]
    assert resuming.last_whole(tmp_path, key) == tmp_path / "checkpoint-2"
    assert resuming.last_whole(tmp_path, {**key, "learning_rate": 2e-3}) is None
    assert "checkpoint-2: of another training (learning_rate was 0.001, is 0.002)" in caplog.text
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert resuming.last_whole(tmp_path, key) is None and "checkpoint-2: not whole" in caplog.text
    steps = Steps()
    anew = fitted(table, tmp_path, [steps], steps=2, save_every=2, learning_rate=2e-3)
    assert steps.first == 1 and same(anew, fitted(table, steps=2, learning_rate=2e-3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(table, tmp_path, workers):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    rows = table.select(range(8)).to_list()
    rows[5]["image"] = {"path": str(bad), "bytes": None}
    rows[6]["image"] = {"path": None, "bytes": b"none either"}
    broken = Dataset.from_list(rows, features=table.features)
    with pytest.raises(ImageError, match=r"^(.*bad\.png|the image of row 6 of the training table): cannot be decoded"):
        fitted(broken, steps=2, workers=workers)
    assert not multiprocessing.active_children()


class Killed(feeding.Feed):
    """A worker that is killed at a row, as by the system when memory runs out, or by a decoder that crashes."""

    def batch(self, places, worker):
        self.at[worker] = places[0].row
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_names_its_row(table, tmp_path, monkeypatch):
    rows = [{**row, "image": {"path": f"{i}.png", "bytes": row["image"]["bytes"]}}
            for i, row in enumerate(table.to_list())]  # fmt: skip
    monkeypatch.setattr(training, "Feed", Killed)
    with pytest.raises(feeding.WorkerDied, match=r"at row \d+ \(\d+\.png\) of the training table.*on_error=skip"):
        fitted(Dataset.from_list(rows, features=table.features), steps=2, workers=1)
    assert not multiprocessing.active_children()


def test_workers_are_chosen_by_what_is_there(monkeypatch):
    monkeypatch.setattr(feeding.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 10**9}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [feeding.workers_for(None, steps, 1000) for steps in (9, 10, 1000)] == [0, 1, 1]
    assert feeding.workers_for(None, 100, 10**9) == 0, "batches would not fit in shared memory"
    assert feeding.workers_for(3, 1, 10**9) == 3, "what is asked for is done"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert feeding.workers_for(None, 100, 1000) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert feeding.workers_for(None, 100, 1000) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert feeding.workers_for(None, 100, 1000) == 0
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert feeding.workers_for(None, 100, 1000) == 0
    with pytest.raises(ValueError, match=r"training\.workers: 2 processes would be forked"):
        feeding.workers_for(2, 100, 1000)


def test_a_batch_goes_through_one_tensor_and_comes_out_the_same():
    batch = {
        "pixel_values": torch.randn(3, 2, 5), "input_ids": torch.arange(7), "mask": torch.tensor([True, False]),
        "half": torch.randn(3).half(), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "words": ["a"],
        "turned": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    found = feeding.Packed.of(batch).batch()
    assert found.pop("words") == batch.pop("words") and found.keys() == batch.keys()
    for name, tensor in batch.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_drafts_are_for_rows_without_a_box(table):
    big = [tiny.picture(c, (160, 128)) for c in tiny.COLOURS]
    rows = Dataset.from_dict({"image": big, "captions": [["a dog"]] * 3}).cast_column("image", Image())
    jpegs = []
    for picture in big:
        content = io.BytesIO()
        picture.save(content, "JPEG")
        jpegs.append({"bytes": content.getvalue(), "path": None})
    rows = Dataset.from_dict({"image": jpegs, "captions": [["a dog"]] * 3}, features=rows.features)
    boxed = rows.add_column("box", [[0.0, 0.0, 9.0, 9.0]] * 3)
    seen = []
    model = model_of()
    model.task.collate = lambda backbone, found, train: seen.append(found[0]["image"].size) or {}
    for which, settings in ((rows, {}), (rows, {"draft": True}), (rows, {"draft": True, "crop": 0.1}),
                            (boxed, {"draft": True})):  # fmt: skip
        spec = replace(SPEC, **{"crop": 1.0, "light": 0.0, **settings})
        feeding.Feed(model, which, spec).batch([feeding.Place(0, 0, 0)], 0)
    assert seen == [(160, 128), (20, 16), (80, 64), (160, 128)]
