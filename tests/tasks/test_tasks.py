"""What holds for every task."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from tests.tasks.parts import PARTS, rows_of, stub, table_of
from tests.tasks.tiny import descent
from trimtab import backbones
from trimtab.data.images import ImageError
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.base import Task
from trimtab.tasks.matching import Matching
from trimtab.tasks.retrieval import Retrieval
from trimtab.tasks.vqa import VQA


def test_answers_are_those_of_the_source_unless_they_are_given():
    source = SimpleNamespace(answers=lambda: ("no", "yes"))
    assert VQA.settings_from(source, {}) == {"answers": ["no", "yes"]}
    assert VQA.settings_from(None, {"answers": ["cat"]}) == {"answers": ["cat"]}  # the source is not even asked
    assert Retrieval.settings_from(None, {"pooling": "gpo"}) == {"pooling": "gpo"}


@pytest.mark.parametrize("name", list(PARTS))
def test_loss_falls_on_one_batch(name):
    """A few steps of plain gradient descent, every parameter trained; then predictions are scored."""
    backbone_name, kind, settings = PARTS[name]
    torch.manual_seed(0)
    task = TASKS[name](**settings)
    model = TaskModel(backbones.load(backbone_name, pretrained=False), task).train()
    table, rows = table_of(kind), rows_of(kind)
    batch = task.collate(model.backbone, rows, train=True)
    assert {len(v) for v in batch.values()} == {16}
    losses = descent(model, batch, 0.03, 5)
    assert losses[-1] < 0.97 * losses[0], losses
    assert all(p.grad is not None for n, p in model.head.named_parameters())

    model.eval()
    with torch.inference_mode():
        records = model.predict(task.collate(model.backbone, rows, train=False))
        assert len(records) == 16
        scores = task.score(model.backbone, model.head, records, table)
    assert 0 <= scores[task.primary] <= 1 and all(math.isfinite(v) for v in scores.values())
    assert all(0 <= v <= 1 for k, v in scores.items() if k != "rsum" and not k.endswith(" rank"))
    entries = task.gallery(records, table, [0, 3])
    assert len(entries) == 2
    assert all(e["query"] and isinstance(e["correct"], bool) for e in entries)


@pytest.mark.parametrize("name", list(PARTS))
def test_an_example_is_like_a_batch(name, vilt, clip):
    backbone_name, kind, settings = PARTS[name]
    backbone, task = {"tiny-vilt": vilt, "tiny-clip": clip}[backbone_name], TASKS[name](**settings)
    batch, example = task.collate(backbone, rows_of(kind, 4), train=True), task.example(backbone, 4)
    assert {k: v.dtype for k, v in example.items()} == {k: v.dtype for k, v in batch.items()}
    assert all(example[k].ndim == v.ndim and len(example[k]) == 4 for k, v in batch.items())
    with torch.no_grad():
        assert task.loss(backbone, task.head(backbone), example).isfinite()


@pytest.mark.parametrize(
    ("name", "backbone", "fits"),
    [(n, k, k == ("dual" if n == "retrieval" else "joint")) for n in PARTS for k in ("dual", "joint")],
)
def test_check_asks_for_the_right_kind_of_backbone(name, backbone, fits):
    task = TASKS[name](**PARTS[name][2])
    table = SimpleNamespace(column_names=["image", *task.columns, "further"])
    given = SimpleNamespace(kind=backbone, name="mine")
    if fits:
        task.check(given, table)
    else:
        right = "dual" if backbone == "joint" else "joint"
        with pytest.raises(ValueError, match=f"task '{name}' needs a {right} backbone, 'mine' is {backbone}"):
            task.check(given, table)


@pytest.mark.parametrize("name", list(PARTS))
def test_check_names_missing_columns(name):
    task = TASKS[name](**PARTS[name][2])
    for missing in ("image", *task.columns):
        table = SimpleNamespace(column_names=[c for c in ("image", *task.columns, "further") if c != missing])
        with pytest.raises(ValueError, match=rf"'{name}' needs the columns \['{missing}'\], the table has .*further"):
            task.check(SimpleNamespace(kind=task.kinds[0], name="mine"), table)


@pytest.mark.parametrize("name", ["retrieval", "vqa", "grounding"])
def test_a_bad_image_in_a_batch_is_named(name):
    _, kind, settings = PARTS[name]
    rows = rows_of(kind, 4)
    rows[1] = {**rows[1], "image": {"bytes": b"no image", "path": "bad.png"}}
    with pytest.raises(ImageError, match=r"bad\.png"):
        TASKS[name](**settings).collate(stub(), rows, train=True)


@pytest.mark.parametrize("name", ["retrieval", "vqa", "grounding"])
def test_answer_takes_rows_without_targets(name, vilt, clip):
    backbone_name, kind, settings = PARTS[name]
    task = TASKS[name](**settings)
    model = TaskModel({"tiny-vilt": vilt, "tiny-clip": clip}[backbone_name], task).train()
    text = {"retrieval": "captions", "vqa": "question", "grounding": "phrase"}[name]
    table = table_of(kind, 4)
    records = model.answer([{"image": row["image"], text: row[text]} for row in table])
    assert len(records) == 4 and not model.training
    with torch.inference_mode():
        same = model.predict(task.collate(model.backbone, list(table), train=False))
    key = {"retrieval": "text", "vqa": "answer", "grounding": "box"}[name]
    for a, b in zip(records, same, strict=True):
        assert torch.equal(a[key], b[key]) if name == "retrieval" else a[key] == b[key]


def test_frozen_parts_stay_in_evaluation_mode():
    class Nothing(Task):
        name, columns, primary, kinds = "nothing", (), "", ()
        head = collate = loss = predict = score = lambda *_: nn.Linear(2, 2)

    backbone = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.BatchNorm1d(2))
    model = TaskModel(backbone, Nothing()).train()
    assert all(m.training for m in model.modules())
    backbone[1].requires_grad_(False)
    model.train()
    assert not backbone[1].training and backbone[0][1].training and model.head.training
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("task", [Retrieval(captions="first"), Matching()], ids=["retrieval", "matching"])
def test_training_draws_among_a_rows_captions_and_evaluation_takes_the_first(task, vilt):
    rows = rows_of("retrieval", 8)
    drawn = [set() for _ in rows]
    backbone = stub(tokenizer=SimpleNamespace(all_special_ids=[0], mask_token_id=1))
    for _ in range(30):
        task.collate(backbone, rows, train=True)
        for i, text in enumerate(backbone.heard):
            drawn[i].add(text)
    own = 6 if isinstance(task, Matching) else 8  # matching gives the last quarter wrong captions
    for i, row in enumerate(rows):
        captions = set(row["captions"])
        assert drawn[i] == captions if i < own else not drawn[i] & captions
    task.collate(backbone, rows, train=False)
    assert backbone.heard == [row["captions"][0] for row in rows]


ASKED = {"question": ["a", "b"], "answer": ["a", "b"], "question_id": ["1", "2"], "balanced": [False, False],
         "structural": ["x"] * 2, "semantic": ["x"] * 2, "detailed": ["x"] * 2, "group": [""] * 2,
         "entailed": [[], []], "steps": [1, 1]}  # fmt: skip
TOLD = {"captions": [["a"]] * 7}


@pytest.mark.parametrize(("name", "settings", "columns", "message", "mended"), [
    ("matching", {"pool": 8}, TOLD, "blocks of 8 pictures, .* has 7 rows: set task.pool to 7 or", {"pool": 7}),
    ("retrieval", {"folds": 5}, TOLD, "the 7 pictures to test on do not fall into 5 equal", {"folds": 7}),
    ("reranking", {"folds": 2}, TOLD, "the 7 pictures to test on do not fall into 2 equal", {"folds": 1}),
    ("classification", {"classes": ["a", "b"]}, {"label": ["", ""]}, "no row of the table has a label",
     {"label": ["a", ""]}),
    ("pairs", {}, {"label": ["true"] * 2, "identifier": ["a-1-2-3"] * 2}, "each identifier once, found 'a-1-2-3'",
     {"identifier": ["a-1-2-3", "a-1-2-4"]}),
    ("vqa", {"answers": ["a"]}, {"answer": ["a", "b"], "answers": [["a"] * 4, []]},
     "row 1: no answers of people, which", {"answers": [["a"] * 4, ["b"] * 4]}),
    ("gqa", {"answers": ["a"]}, ASKED, "none of 2 questions is balanced", {"balanced": [False, True]}),
])  # fmt: skip
def test_a_table_that_cannot_be_scored_is_told_before_training(name, settings, columns, message, mended):
    with pytest.raises(ValueError, match=message):
        TASKS[name](**settings).check_test(Dataset.from_dict(columns))
    settings = settings | {k: v for k, v in mended.items() if k not in columns}
    columns = columns | {k: v for k, v in mended.items() if k in columns}
    TASKS[name](**settings).check_test(Dataset.from_dict(columns))
