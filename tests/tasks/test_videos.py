"""Video-text retrieval: what is computed of videos that are made up frame by frame."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from tests.tasks.tiny import BACKBONES, COLOURS, descent, picture
from trimtab.data import video
from trimtab.data.images import encoded, shown
from trimtab.data.video import Length
from trimtab.experiments.folder import write_gallery
from trimtab.tasks import TaskModel
from trimtab.tasks import video_retrieval as module
from trimtab.tasks.video_retrieval import VideoRetrieval

HEADS = ("clip", "meanP", "seqLSTM", "seqTransf", "tightTransf")


@pytest.fixture(autouse=True)
def films(monkeypatch):
    """A path `N.mp4` is a video of N seconds, two frames each, whose colours go round from that of its number."""

    def read(path, rule):
        seconds = int(path.removesuffix(".mp4"))
        return [picture(COLOURS[(seconds + i) % 3]) for i in rule(Length(2 * seconds, 2.0))]

    monkeypatch.setattr(video, "read", read)


def films_of(sentences: bool = True) -> Dataset:
    captions = [["red dog"], ["blue cat", "a dog"], ["green sea"], ["the big red"], ["two dog", "both"]]
    own = captions if sentences else [c[:1] for c in captions]
    return Dataset.from_dict({"video": [f"{n}.mp4" for n in range(1, 6)], "captions": own})


def built(head: str, **settings) -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(BACKBONES[head](), VideoRetrieval(**{"frames": 3, **settings}))
    with torch.no_grad():
        for parameter in model.backbone.parameters():  # a head that starts at nothing compares nothing
            parameter += 0.05 * torch.randn_like(parameter)
    model.backbone.limit_text(8)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_loss_falls_and_predictions_are_scored(head):
    model, rows = built(head), films_of()
    model.task.check(model.backbone, rows)
    batch = model.task.collate(model.backbone, list(rows), train=True)
    assert batch["video_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    found = {k: (v.dtype, v.ndim, len(v)) for k, v in model.example(5).items()}
    assert found == {k: (v.dtype, v.ndim, len(v)) for k, v in batch.items()}
    losses = descent(model, batch, 0.05, 4)
    assert min(losses[1:]) < losses[0]
    records = model.answer(list(rows))
    assert [len(r["similar"]) for r in records] == [7] * 5 and [r["sentences"] for r in records] == [1, 2, 1, 1, 2]
    scores = model.task.score(model.backbone, model.head, records, rows)
    assert 0 <= scores["recall@1"] <= 1 and scores["recall@5"] == 1 <= scores["video to text mean rank"] <= 5
    entries = model.task.gallery(records, rows, [0, 1])
    assert entries[1]["target"] == "blue cat" and all(isinstance(e["correct"], bool) for e in entries)


def test_a_dual_encoder_compares_with_the_mean_of_the_frames_that_are_there():
    model, rows = built("clip").eval(), films_of()
    clip = model.backbone.model
    records = model.answer(list(rows))
    texts = [text for own in rows["captions"] for text in own]
    with torch.no_grad():
        words = F.normalize(clip.get_text_features(**model.backbone.texts(texts)).pooler_output, dim=-1)
        for number, record in enumerate(records, 1):
            colours = [COLOURS[(number + 2 * second) % 3] for second in range(min(number, 3))]
            if number > 3:  # spread over the seconds
                colours = [COLOURS[(number + 2 * second) % 3] for second in {4: (0, 1, 3), 5: (0, 2, 4)}[number]]
            pixels = model.backbone.images([picture(c) for c in colours])["pixel_values"]
            mean = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1).mean(0)
            cosines = words @ F.normalize(mean, dim=-1)
            assert torch.allclose(record["similar"], model.head.scale.exp() * cosines, atol=1e-4)


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_models_own_head_compares_and_blocks_change_nothing(head, monkeypatch):
    model, rows = built(head).eval(), films_of()
    assert not list(model.head.parameters())
    similar = torch.stack([r["similar"] for r in model.answer(list(rows))], dim=1)  # (7, 5)
    batch = model.task.collate(model.backbone, list(rows), train=False)
    assert batch["input_ids"].shape[:2] == (5, 2) and batch["attention_mask"][0, 1].sum() == 0
    there = batch["attention_mask"].any(dim=-1)
    with torch.no_grad():
        plain = model.backbone.model(batch["input_ids"][there], batch["pixel_values"], batch["video_mask"],
                                     batch["attention_mask"][there])  # fmt: skip
    assert torch.allclose(similar, plain, atol=1e-4) and plain.std() > 1e-4
    monkeypatch.setattr(module, "PAIRS", 2)
    again = torch.stack([r["similar"] for r in model.answer(list(rows))], dim=1)
    assert torch.allclose(similar, again, atol=1e-5)


def test_one_sentence_a_video_is_scored_as_such():
    rows, task = films_of(sentences=False), VideoRetrieval()
    similar = torch.eye(5)
    similar[:, 0] = torch.tensor([3, 2.1, 2.2, 2.3, 2.4])  # every sentence likes the first video best
    records = [{"similar": similar[:, i], "sentences": 1} for i in range(5)]
    scores = task.score(None, None, records, rows)
    assert scores["text to video recall@1"] == pytest.approx(1 / 5)
    assert scores["video to text recall@1"] == 1.0 and scores["recall@1"] == pytest.approx(3 / 5)
    assert task.chance(rows) == 1 / 5


def test_wrong_settings_and_rows_are_named():
    for settings, message in (({"keep": "some"}, "keep must be one of first, last, spread, found 'some'"),
                              ({"frames": 0}, "frames must be at least 1, found 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            VideoRetrieval(**settings)
    for head, most in (("seqTransf", 8), ("tightTransf", 7)):
        model = built(head, frames=most + 1)
        with torch.no_grad(), pytest.raises(ValueError, match=f"of {most + 1} frames, .* has positions for {most}"):
            model(**model.example(2))
    model = built("clip")
    with pytest.raises(ValueError, match=r"2\.mp4: has no caption"):
        model.task.collate(model.backbone, [{"video": "2.mp4", "captions": []}], True)


def test_the_gallery_shows_the_middle_frame(tmp_path):
    rows = films_of()
    assert shown(rows[1]).getpixel((0, 0)) == shown({"image": picture(COLOURS[(2 + 2) % 3])}).getpixel((0, 0))
    model = built("clip").eval()
    write_gallery(model.task, model.answer(list(rows)), encoded(rows), tmp_path, count=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "samples.json"]
