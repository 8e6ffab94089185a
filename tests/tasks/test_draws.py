"""What is drawn for a row: by its place alone, whatever is drawn beside it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.tasks import tiny
from tests.tasks.parts import stub
from trimtab.data import draws
from trimtab.data.augment import Augmentation
from trimtab.tasks import TASKS

CAPTIONS = [f"{a} {b}" for a in ("red", "big", "the", "one") for b in ("dog", "cat", "sea")]


def rows_of(numbers, epoch: int = 0, seed: int = 0) -> list[dict]:
    """Rows with everything that a task may draw from, at their places."""
    found = []
    for n in numbers:
        picture = Image.effect_noise((24, 20), 80).convert("RGB")
        row = {"image": picture, "images": [tiny.picture("red"), tiny.picture("blue")], "label": "true",
               "captions": [f"{c} {n}" for c in CAPTIONS], "foils": [f"no {c} {n}" for c in CAPTIONS],
               "statement": "left is red"}  # fmt: skip
        found.append(draws.placed(row, draws.Place(seed, epoch, n)))
    return found


TASKS_THAT_DRAW = {
    "retrieval": {}, "captioning": {}, "pretraining": {}, "matching": {}, "pairs": {"swap": True},
    "reranking": {"negatives": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone():
    return tiny.vilt()


def drawn(name: str, backbone, rows) -> list[str]:
    """The sentences that a task hands to the backbone, and which words it masks."""
    task = TASKS[name](**TASKS_THAT_DRAW[name])
    heard = stub(tokenizer=backbone.tokenizer)
    batch = task.collate(heard, rows, train=True)
    return [*heard.heard, *(str(batch[k].tolist()) for k in ("words",) if k in batch)]


@pytest.mark.parametrize("name", list(TASKS_THAT_DRAW))
def test_draws_are_those_of_seed_epoch_and_row(name, backbone):
    torch.manual_seed(0)
    first = drawn(name, backbone, rows_of(range(8)))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert drawn(name, backbone, rows_of(range(8))) == first
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(state, before), "the global one is left alone"
    assert drawn(name, backbone, rows_of(range(8), epoch=1)) != first
    assert drawn(name, backbone, rows_of(range(8), seed=1)) != first


@pytest.mark.parametrize("name", ["retrieval", "captioning", "pretraining", "pairs"])
def test_a_rows_draw_does_not_depend_on_its_batch(name, backbone):
    whole = drawn(name, backbone, rows_of(range(8)))
    parts = [text for some in ((0, 1, 2), (3,), (4, 5, 6, 7)) for text in drawn(name, backbone, rows_of(some))]
    assert parts == whole


def test_rows_without_a_place_draw_from_the_global_generator(backbone):
    rows = [{k: v for k, v in row.items() if k != draws.PLACE} for row in rows_of(range(8))]
    torch.manual_seed(0)
    first, second = drawn("retrieval", backbone, rows), drawn("retrieval", backbone, rows)
    torch.manual_seed(0)
    assert drawn("retrieval", backbone, rows) == first != second


def test_masked_words_do_not_depend_on_padding(backbone):
    task = TASKS["matching"](mask_share=0.5)
    short, long = rows_of(range(4)), rows_of(range(4))
    for row in short + long:
        row["captions"] = ["the red dog is near the big sea"]
    long[3] |= {"captions": ["the red dog is near the big sea of the"] * 2, "foils": ["it " * 20]}
    short[3] |= {"foils": ["it"]}
    few, many = (task.collate(backbone, rows, train=True)["words"][:2] for rows in (short, long))
    assert torch.equal(few, many[:, : few.shape[1]]) and bool((few >= 0).any())


def test_an_augmentation_does_not_change_what_else_is_drawn(backbone):
    rows = rows_of(range(8))
    for row in rows:
        del row["images"]
    changed = Augmentation(crop=0.5, light=0.2, randaugment="vilt")(rows)
    assert drawn("retrieval", backbone, changed) == drawn("retrieval", backbone, rows)
    again = Augmentation(crop=0.5, light=0.2, randaugment="vilt")(rows[3:4])
    assert again[0]["image"].tobytes() == changed[3]["image"].tobytes() != rows[3]["image"].tobytes()


def test_every_option_is_as_likely():
    places = [{draws.PLACE: draws.Place(0, epoch, row)} for epoch in range(20) for row in range(100)]
    counts = torch.bincount(torch.tensor([draws.choose(p, "caption", range(5)) for p in places]))
    assert counts.min() > 330 and counts.max() < 470  # 400 each; 3.9 deviations
    flips = sum(draws.coin(p, "swap") for p in places)
    assert 900 < flips < 1100
    both = sum(draws.coin(p, "swap") == draws.coin(p, "foil or other") for p in places)
    assert 900 < both < 1100, "draws for two ends are independent"


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    orders = [draws.order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(50)) for o in orders) and len(set(map(tuple, orders))) == 4
    assert draws.order(50, 0, 1) == orders[1]


def test_nothing_to_draw_from_names_the_row():
    row = draws.placed({"captions": []}, draws.Place(0, 0, 7))
    with pytest.raises(ValueError, match="nothing to draw a caption from: row 7 of the training table has none"):
        draws.choose(row, "caption", row["captions"])


def test_a_videos_sentence_is_drawn_by_its_place(monkeypatch):
    from trimtab.data import video

    monkeypatch.setattr(video, "read", lambda path, rule: [tiny.picture("red")])
    rows = [{k: v for k, v in row.items() if k not in ("image", "images")} | {"video": "x.mp4"}
            for row in rows_of(range(6))]  # fmt: skip
    heard = stub()
    told = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        TASKS["video-retrieval"](frames=1).collate(heard, rows, train=True)
        told.append(list(heard.heard))
    assert told[0] == told[1] and len(set(told[0])) == 6
