"""What holds for the tasks on pairs, sentences about a picture, boxes, classes and videos."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.tasks.tiny import BACKBONES, COLOURS, descent, table
from trimtab.data.images import ImageError, encoded
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.classification import Classification
from trimtab.tasks.labelled import Labelled

NAMED = {"classes": COLOURS}
CASES = [  # task, backbone, settings
    ("pairs", "meter", {}),
    ("pairs", "vilt", {}),
    ("pairs", "blip pairs", {}),
    ("pairs", "xvlm pairs", {}),
    ("entailment", "meter", {}),
    ("entailment", "vilt", {"premise": True}),
    ("box-regression", "xvlm", {}),
    ("box-regression", "vilt", {}),
    ("set-grounding", "mdetr", {}),
    ("classification", "vit", NAMED),
    ("classification", "dinov2", NAMED),
    ("classification", "swin", NAMED),
    ("classification", "clip", NAMED),
    ("classification", "clip", {**NAMED, "prompts": ("a photo of a {}", "the {}")}),
]
TARGETS = ("label", "box")


def kind_of(task: str) -> str:
    return TASKS[task].schema or task


def built(task: str, backbone: str, settings: dict) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(BACKBONES[backbone](), TASKS[task](**settings))
    model.backbone.limit_text(9)
    return model


@pytest.mark.parametrize(("task", "backbone", "settings"), CASES)
def test_loss_falls_and_predictions_are_scored(task, backbone, settings):
    model, rows = built(task, backbone, settings), table(kind_of(task))
    model.task.check(model.backbone, rows)
    batch = model.task.collate(model.backbone, list(encoded(rows)), train=True)
    losses = descent(model, batch, 0.05, 4)
    assert min(losses[1:]) < 0.99 * losses[0], losses
    assert all(p.grad is not None for p in model.head.parameters())

    model.eval()
    plain = [{k: v for k, v in row.items() if k not in TARGETS} for row in rows]
    asked = model.answer(plain)
    with torch.inference_mode():
        records = model.predict(model.task.collate(model.backbone, list(rows), train=False))
        records = model.task.finish(model.backbone, model.head, records)
        scores = model.task.score(model.backbone, model.head, records, rows)
    key = "box" if kind_of(task) == "grounding" else "label"
    assert [r[key] for r in asked] == [r[key] for r in records]
    assert 0 <= scores[model.task.primary] <= 1 and all(0 <= v <= 1 for v in scores.values())
    entries = model.task.gallery(records, rows, [0, 3])
    assert len(entries) == 2 and all(e["query"] and isinstance(e["correct"], bool) for e in entries)


@pytest.mark.parametrize(("task", "backbone", "settings"), CASES)
def test_an_example_is_like_a_batch(task, backbone, settings):
    model = built(task, backbone, settings)
    batch = model.task.collate(model.backbone, list(encoded(table(kind_of(task)))), train=True)
    found = {k: (v.dtype, v.ndim, len(v)) for k, v in model.example(6).items()}
    assert found == {k: (v.dtype, v.ndim, len(v)) for k, v in batch.items()}
    with torch.no_grad():
        assert model(**model.example(6))["loss"].isfinite()


@pytest.mark.parametrize(("task", "backbone", "settings"), [CASES[i] for i in (0, 4, 6, 8, 9)])
def test_a_bad_picture_is_named(task, backbone, settings):
    model, rows = built(task, backbone, settings), list(encoded(table(kind_of(task))))
    bad = {"bytes": b"no picture", "path": "bad.png"}
    rows[1] = {**rows[1], **({"images": [rows[1]["images"][0], bad]} if "images" in rows[1] else {"image": bad})}
    with pytest.raises(ImageError, match=r"bad\.png"):
        model.task.collate(model.backbone, rows, train=True)


@pytest.mark.parametrize(
    ("task", "sees", "kinds"),
    [("pairs", "images", "joint or pairs"), ("video-retrieval", "video", "dual or video"),
     ("set-grounding", "image", "detector"), ("box-regression", "image", "joint")],
)  # fmt: skip
def test_each_task_says_what_it_sees_and_reads(task, sees, kinds):
    found = TASKS[task]()
    with pytest.raises(ValueError, match=rf"task '{task}' needs the columns \['{sees}'\], the table has"):
        found.check(
            SimpleNamespace(kind=found.kinds[0], name="mine"), SimpleNamespace(column_names=[*found.columns, "x"])
        )
    with pytest.raises(ValueError, match=f"task '{task}' needs a {kinds} backbone, 'mine' is vision"):
        found.check(SimpleNamespace(kind="vision", name="mine"), SimpleNamespace(column_names=[sees, *found.columns]))


@pytest.mark.parametrize(("task", "backbone"), [("pairs", "vilt"), ("entailment", "vilt"), ("classification", "vit")])
def test_rows_without_a_label_count_nothing_and_a_wrong_one_is_named(task, backbone):
    model = built(task, backbone, NAMED if task == "classification" else {}).eval()
    rows = [dict(row) for row in table(task)]
    known = [{**rows[i], "label": rows[i]["label"] if i in (0, 2) else ""} for i in range(4)]
    with torch.no_grad():
        some = model(**model.task.collate(model.backbone, known, True))["loss"]
        alone = model(**model.task.collate(model.backbone, [known[0], known[2]], True))["loss"]
    assert some.item() == pytest.approx(alone.item(), abs=1e-5)
    records = [{"label": known[0]["label"]}] * 4
    right = 1.0 if known[0]["label"] == known[2]["label"] else 0.5
    given = {"label": [row["label"] for row in known]}
    assert Labelled.score(model.task, None, None, records, given) == {"accuracy": right}
    apart = [{"label": known[0]["label"]} for _ in range(4)]
    Labelled.score(model.task, None, None, apart, given)
    assert ["credit" in record for record in apart] == [True, False, True, False] and apart[0]["credit"] == 1
    assert model.task.chance({"label": ["a", "a", "b", ""]}) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no row of the table has a label"):
        Labelled.score(model.task, None, None, records, {"label": [""] * 4})
    with pytest.raises(ValueError, match=rf"task '{task}': label 'maybe' is none of its"):
        model.task.collate(model.backbone, [{**rows[0], "label": "maybe"}], True)


def test_classes_come_from_the_source_and_are_checked():
    source = SimpleNamespace(classes=lambda: ("cat", "dog"))
    assert Classification.settings_from(source, {}) == {"classes": ["cat", "dog"]}
    assert Classification.settings_from(None, {"classes": ["cat"]}) == {"classes": ["cat"]}
    for settings, message in (
        ({"classes": ["cat", "cat"]}, "found 'cat' twice"),
        ({"classes": []}, "found none"),
        ({"classes": ["cat"], "prompts": ["a photo"]}, "found 'a photo'"),
        ({"classes": ["cat"], "prompts": []}, "at least one template"),
    ):
        with pytest.raises(ValueError, match=message):
            Classification(**settings)


def test_zero_shot_takes_the_class_whose_mean_prompt_is_nearest():
    model = built("classification", "clip", {**NAMED, "prompts": ("a photo of a {}", "the {}")}).eval()
    backbone, rows = model.backbone, list(table("classification"))
    batch = model.task.collate(backbone, rows, train=False)
    unit = nn.functional.normalize
    with torch.no_grad():
        image = unit(backbone.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output, dim=-1)
        classes = []
        for colour in COLOURS:
            words = backbone.texts([f"a photo of a {colour}", f"the {colour}"])
            text = unit(backbone.model.get_text_features(**words).pooler_output, dim=-1)
            classes.append(unit(text.mean(0), dim=-1))
        shares = (backbone.logit_scale.exp() * image @ torch.stack(classes).T).softmax(-1)
    records = model.answer([{"image": row["image"]} for row in rows])
    assert torch.allclose(torch.tensor([[r["shares"][c] for c in COLOURS] for r in records]), shares, atol=1e-5)
    assert len({round(s, 4) for s in records[0]["shares"].values()}) == 3  # the names do make a difference
