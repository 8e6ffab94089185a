"""Retrieval: recall, losses, heads, and folding the head into the backbone."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn

from tests.tasks.parts import rows_of
from trimtab.backbones.base import Backbone
from trimtab.backbones.siglip.features import SiglipBackbone
from trimtab.metrics import retrieval as measured
from trimtab.tasks.retrieval import Retrieval, by_length, recalls


@pytest.mark.parametrize(("place", "expected"), [(0, (1, 1, 1)), (2, (0, 1, 1)), (7, (0, 0, 1)), (11, (0, 0, 0))])
def test_recall_at_k(place, expected):
    """The right caption stands in the same place of every picture's ranking, and the other way round."""
    n = 12
    index = torch.arange(n)
    similarity = -((index[None, :] - index[:, None] + place) % n).float()
    records = [{} for _ in range(n)]
    found = recalls(similarity, [str(i) for i in range(n)], records)
    assert records == [{"credit": expected[0]}] * n
    for direction in ("", "image to text ", "text to image "):
        assert tuple(found[f"{direction}recall@{k}"] for k in (1, 5, 10)) == expected


def test_recall_of_the_two_directions_and_their_mean():
    records = [{}, {}]
    found = recalls(torch.tensor([[2.0, 3.0], [0.0, 4.0]]), ["a", "b"], records)
    assert records == [{"credit": 0.5}, {"credit": 1.0}]
    assert found["image to text recall@1"] == 0.5  # picture 0 prefers caption 1
    assert found["text to image recall@1"] == 1
    assert found["recall@1"] == 0.75 and found["recall@5"] == 1


def test_a_caption_with_the_same_words_is_right():
    similarity = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 1.0], [3.0, 2.0, 1.0]])
    assert recalls(similarity, ["a", "b", "c"], [{}, {}, {}])["image to text recall@1"] == 0
    found = recalls(similarity, ["a", "a", "c"], [{}, {}, {}])  # pictures 0 and 1 rank each other's caption first
    assert found["image to text recall@1"] == pytest.approx(2 / 3)
    assert found["text to image recall@1"] == pytest.approx(1 / 3)  # captions 0 and 2 tie with wrong ones


def test_retrieval_starts_from_the_pretrained_space(clip):
    task = Retrieval()
    batch = task.collate(clip, rows_of("retrieval", 4), train=False)
    with torch.no_grad():
        records = task.predict(clip, task.head(clip), batch)
        pooled = clip.image(batch["pixel_values"]).pooled
    assert torch.allclose(
        torch.stack([r["image"] for r in records]), pooled / pooled.norm(dim=-1, keepdim=True), atol=1e-6
    )
    assert all(torch.allclose(r["text"].norm(dim=-1), torch.ones(4), atol=1e-5) for r in records)  # four captions


def test_retrieval_loss_of_a_perfect_and_a_blind_space():
    eye = torch.eye(4)
    head = Retrieval().head(SimpleNamespace(width=4, logit_scale=nn.Parameter(torch.tensor(math.log(50.0)))))
    features = lambda x: SimpleNamespace(  # noqa: E731
        image=lambda _: SimpleNamespace(pooled=eye), text=lambda *_: SimpleNamespace(pooled=x)
    )
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": None}
    loss = lambda x: Retrieval().loss(features(x), head, batch).item()  # noqa: E731
    assert loss(eye) < 1e-6
    assert loss(torch.ones(4, 4)) == pytest.approx(math.log(4), abs=1e-5)
    assert loss(eye.roll(1, 0)) > 40


def test_triplets_take_the_hardest_wrong_partner_and_at_first_all_of_them():
    cosines = torch.tensor([[0.9, 0.8, 0.1], [0.0, 0.5, 0.6], [0.2, 0.75, 0.7]])
    image = torch.eye(3)  # so that texts hold the cosines
    space = SimpleNamespace(
        image=lambda _: SimpleNamespace(pooled=image), text=lambda *_: SimpleNamespace(pooled=cosines.T)
    )
    task = Retrieval(objective="triplet", margin=0.2, all_negatives=1)
    task.embed = lambda *_: (image, cosines.T)
    head = task.head(SimpleNamespace(width=3))
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": None}
    # margin + wrong - own; texts of pictures: .1, 0 | 0, .3 | 0, .25; pictures of texts: 0, 0 | .5, .45 | 0, .1
    assert task.loss(space, head, batch).item() == pytest.approx(0.1 + 0.3 + 0.25 + 0.5 + 0.45 + 0.1, abs=1e-6)
    assert task.loss(space, head, batch).item() == pytest.approx((0.1 + 0.3 + 0.25) + (0 + 0.5 + 0.1), abs=1e-6)
    head.eval()
    seen = int(head.seen)
    task.loss(space, head, batch)
    assert int(head.seen) == seen == 2


def test_pooled_heads_read_valid_tokens_only(clip):
    task = Retrieval(pooling="gpo")
    head = task.head(clip)
    batch = task.collate(clip, rows_of("retrieval", 4), train=False)
    with torch.no_grad():
        image, text = task.embed(clip, head, batch)
        longer = {**batch, **{k: nn.functional.pad(batch[k], (0, 3)) for k in ("input_ids", "attention_mask")}}
        assert torch.allclose(task.embed(clip, head, longer)[1], text, atol=1e-5)
    assert image.shape == (4, clip.width) and text.shape == (16, clip.width)
    batch = task.collate(clip, rows_of("retrieval", 4), train=True)
    task.loss(clip, head, batch).backward()
    assert head.image.linear.weight.grad.any() and head.text.pool.linear.weight.grad.any()


def test_captions_of_like_length_are_read_together_and_give_the_same_vectors(clip):
    words = ["red", "a red star left of two blue moons and a tree", "star", "one tree below the sun", "sun and moon"]
    texts = clip.texts([" and ".join([words[i % 5]] * (i % 4 + 1)) for i in range(40)])
    ids, mask, lengths = texts["input_ids"], texts["attention_mask"], []

    def read(ids, mask):
        lengths.append(ids.shape[1])
        return clip.text(ids, mask).pooled

    with torch.no_grad():
        found = by_length(read, ids, mask, rows=8)
        assert lengths == sorted(lengths) and len(set(lengths)) > 2 and lengths[-1] == ids.shape[1]
        assert torch.allclose(found, clip.text(ids, mask).pooled, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["padded to the longest", "padded as the model asks"])
def test_padding_is_left_out_where_it_tells_the_model_nothing(clip, own, monkeypatch):
    lengths, text = [], type(clip).text
    monkeypatch.setattr(
        type(clip), "text", lambda self, ids, mask: lengths.append(ids.shape[1]) or text(self, ids, mask)
    )
    if own:  # as SigLIP's
        monkeypatch.setattr(type(clip), "texts", lambda self, sentences: Backbone.texts(self, sentences))
    task, rows = Retrieval(), [{**r, "captions": [*r["captions"]] * 5} for r in rows_of("retrieval", 4)]
    rows[0]["captions"].append("a star and " * 6)
    batch = task.collate(clip, rows, train=False)
    task.predict(clip, task.head(clip), batch)
    assert (min(lengths) == batch["input_ids"].shape[2]) == own
    assert SiglipBackbone.texts is not Backbone.texts


@pytest.mark.parametrize("settings", [{"pooling": "max"}, {"objective": "hinge"}, {"captions": "five"}])
def test_retrieval_names_the_words_it_knows(settings):
    with pytest.raises(ValueError, match="must be one of"):
        Retrieval(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pooling": "gpo", "drop": 1.0}, r"drop must lie in \[0, 1\), found 1"),
     ({"pooling": "gpo", "drop": -0.1}, r"drop must lie in \[0, 1\), found -0.1"),
     ({"drop": 0.2}, "drop leaves out tokens that `pooling: gpo` pools: found 0.2 with 'own'")],
)  # fmt: skip
def test_a_share_of_tokens_that_cannot_be_left_out(settings, message):
    with pytest.raises(ValueError, match=message):
        Retrieval(**settings)


def test_pooled_heads_need_tokens():
    space = SimpleNamespace(
        name="vectors", width=4, example=lambda n: {"pixel_values": torch.zeros(n, 3, 2, 2)},
        image=lambda _: SimpleNamespace(tokens=None),
    )  # fmt: skip
    with pytest.raises(ValueError, match="'vectors' gives one vector for its images"):
        Retrieval(pooling="gpo").head(space)


def test_folding_the_head_into_the_backbone_changes_no_vector(clip):
    model, task = copy.deepcopy(clip), Retrieval()
    head = task.head(model)
    batch = task.collate(model, rows_of("retrieval", 4), train=False)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        before = task.embed(model, head, batch)
        plain = task.embed(model, task.head(model), batch)
        task.fold(model, head)
        after = task.embed(model, task.head(model), batch)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(before, plain, strict=True))
    assert model.logit_scale.item() == pytest.approx(head.scale.item())


class Vectors(nn.Module):
    """A dual encoder whose pictures and texts are vectors already: pixels and ids hold them."""

    def image(self, pixels):
        return SimpleNamespace(pooled=pixels.float())

    def text(self, ids, mask):
        assert mask.any(dim=-1).all()  # no text of padding alone is encoded
        return SimpleNamespace(pooled=ids.float())


def test_all_captions_of_every_picture_are_ranked():
    """Any number of captions a picture; the official numbers, whatever the batches."""
    torch.manual_seed(0)
    counts = [2, 1, 3, 1, 2, 3]
    images, texts = torch.randn(6, 4), torch.randn(sum(counts), 4)
    owner = [i for i, n in enumerate(counts) for _ in range(n)]
    table = {"captions": [[f"{i} {k}" for k in range(n)] for i, n in enumerate(counts)]}
    parts = list(texts.split(counts))
    task = Retrieval(folds=2)
    head = task.head(SimpleNamespace(width=4))

    def batch(rows):
        most = max(counts[i] for i in rows)
        ids = torch.zeros(len(rows), most, 4)
        mask = torch.zeros(len(rows), most, 4, dtype=torch.long)
        for b, i in enumerate(rows):
            ids[b, : counts[i]], mask[b, : counts[i]] = parts[i], 1
        return {"pixel_values": images[rows], "input_ids": ids, "attention_mask": mask}

    with torch.no_grad():
        records = [r for rows in ([0, 1, 2, 3], [4, 5]) for r in task.predict(Vectors(), head, batch(rows))]
    assert [len(r["text"]) for r in records] == counts
    found = task.score(None, head, records, table)
    unit = torch.nn.functional.normalize
    wanted = measured.evaluate(unit(images, dim=-1), unit(texts, dim=-1), owner)
    assert found["rsum"] == pytest.approx(wanted["rsum"])
    assert sum(r["credit"] for r in records) / len(records) == pytest.approx(found["recall@1"])
    own = measured.ranks_of_embeddings(unit(images, dim=-1), unit(texts, dim=-1), owner)
    first = (own.image_to_text[0] == 0).double() / 2 + (own.text_to_image[: counts[0]] == 0).sum() * 6 / 12 / 2
    assert records[0]["credit"] == pytest.approx(first.item())
    assert found["image to text recall@1"] == pytest.approx(wanted["i2t"]["R@1"] / 100)
    assert found["text to image median rank"] == wanted["t2i"]["medr"]
    assert found["recall@1"] == pytest.approx((wanted["i2t"]["R@1"] + wanted["t2i"]["R@1"]) / 200)
    halves = [measured.evaluate(unit(images[a:b], dim=-1), unit(texts[c:d], dim=-1), [o - a for o in owner[c:d]])
              for a, b, c, d in ((0, 3, 0, 6), (3, 6, 6, 12))]  # fmt: skip
    assert found["2 folds: rsum"] == pytest.approx(sum(h["rsum"] for h in halves) / 2)
    task.check_scored(Dataset.from_dict({"captions": [["a", "b"]] * 5}))  # validation rows may be odd
    odd = task.score(None, head, records[:5], {"captions": table["captions"][:5]})
    assert "rsum" in odd and "2 folds: rsum" not in odd
    cosines = unit(images, dim=-1) @ unit(texts, dim=-1).T
    for entry, i in zip(task.gallery(records, table, [0, 5]), (0, 5), strict=True):
        assert entry["prediction"].startswith(str(owner[int(cosines[i].argmax())]))
        assert entry["correct"] == (owner[int(cosines[i].argmax())] == i)


def test_evaluation_takes_all_captions_or_as_many_as_are_asked_for(clip):
    rows = rows_of("retrieval", 3)
    rows[1]["captions"] = rows[1]["captions"][:1]
    for settings, counts in (({}, [4, 1, 4]), ({"most": 2}, [2, 1, 2]), ({"captions": "first"}, [1, 1, 1])):
        task = Retrieval(**settings)
        batch = task.collate(clip, rows, train=False)
        assert batch["attention_mask"].any(dim=-1).sum(dim=1).tolist() == counts
        texts = clip.texts([c for row, n in zip(rows, counts, strict=True) for c in row["captions"][:n]])
        there = batch["attention_mask"].any(dim=-1)
        assert torch.equal(batch["input_ids"][there], texts["input_ids"])
    with pytest.raises(ValueError, match="row 1 of the batch has no caption"):
        Retrieval().collate(clip, [rows[0], {**rows[1], "captions": []}], train=False)


@pytest.mark.parametrize("settings", [{"most": -1}, {"folds": 0}, {"folds": 2, "captions": "first"}])
def test_numbers_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Retrieval(**settings)
