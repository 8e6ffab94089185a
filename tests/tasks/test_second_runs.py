"""The second tasks through whole runs: a recipe on folders of tiny models, its run folder, and an answer from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.tasks.tiny import BACKBONES, COLOURS, meter, picture, table
from trimtab import backbones
from trimtab.data import video
from trimtab.data.images import encoded
from trimtab.data.sources import SOURCES
from trimtab.data.video import Length
from trimtab.experiments import folder
from trimtab.experiments.collation import table_print
from trimtab.experiments.estimate import estimate
from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """A data source of rows made up for each task, and videos that are read from their numbers."""

    @dataclass(frozen=True)
    class MadeUp:
        drop_bad_images: bool = True

        def load(self, task: str, split: str) -> Any:
            if task == "video-retrieval":
                from tests.tasks.test_videos import films_of

                return films_of()
            return table(task)

        def classes(self) -> tuple[str, ...]:
            return COLOURS

    monkeypatch.setitem(SOURCES._items, "made-up", MadeUp)
    monkeypatch.setattr(video, "read", lambda path, rule: [picture(COLOURS[i % 3]) for i in rule(Length(4, 2.0))])


def saved(name: str, backbone: Any, where: Any) -> str:
    backbone.save_pretrained(where / name)
    return str(where / name)


def recipe(task: dict, backbone: str, methods: list) -> Any:
    raw = {
        "title": "made up", "backbone": {"name": backbone, "max_text": 8}, "task": task, "data": {"name": "made-up"},
        "methods": methods, "training": {"steps": 2, "batch_size": 4},
    }  # fmt: skip
    return expand(raw, "made-up")[0]


PAIR = {"images": [picture("red")] * 2, "statement": "it is"}
FILM = {"video": "1.mp4", "captions": ["red"]}
CASES = [
    ({"name": "pairs"}, lambda: meter(nlvr2=2), ["linear-probe"], PAIR),
    ({"name": "pairs"}, BACKBONES["blip pairs"], ["lora"], PAIR),
    ({"name": "classification"}, BACKBONES["vit"], ["lora"], {"image": picture("red")}),
    ({"name": "video-retrieval", "frames": 2}, BACKBONES["seqTransf"], ["full"], FILM),
    ({"name": "set-grounding"}, BACKBONES["mdetr"], ["unipt"], {"image": picture("red"), "phrase": "the dog"}),
]


@pytest.mark.parametrize(("task", "make", "methods", "row"), CASES, ids=[f"{c[0]['name']}-{c[2][0]}" for c in CASES])
def test_a_recipe_runs_and_its_folder_answers(task, make, methods, row, tmp_path):
    torch.manual_seed(0)
    place = saved("backbone", make(), tmp_path)
    assert backbones.load(place).kind == make().kind
    found = recipe(task, place, methods)
    if task["name"] == "set-grounding":  # counted on fake tensors, which takes longer than the run
        costs = estimate(found)
        assert costs["macs"] > costs["dense_macs"] > 0 and costs["trainable_params"] > 0
    out = run(found, tmp_path / "run", measure_costs=False)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["primary"] in metrics["test"]
    samples = json.loads((out / "samples" / "samples.json").read_text())
    assert all((out / "samples" / s["image"]).is_file() for s in samples)
    again = folder.load(out)
    (record,) = again.answer([row])
    assert set(record) & {"label", "similar", "box"}
    if "label" in record:
        assert record["label"] in again.task.names


def test_a_table_of_lists_has_a_print_of_its_pictures():
    rows = encoded(table("pairs"))
    other = encoded(table("pairs").map(lambda row, i: {"images": row["images"][::-1]}, with_indices=True))
    assert table_print(rows) == table_print(encoded(table("pairs"))) != table_print(other)
