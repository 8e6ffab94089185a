"""Matching: labels, masked words, wrong captions and ranking."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.tasks.parts import rows_of, stub
from trimtab.tasks.matching import IGNORED, Matching


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
    assert 0.2 < masked[:8][valid].float().mean() < 0.6 and not masked[:8][~valid].any()
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
    assert [r["credit"] for r in swapped] == [0, 0, 1, 1, 1, 1]
    left = [{k: v for k, v in r.items() if k != "credit"} for r in swapped]
    Matching(pool=4).score(Comparing(), None, left, table)
    assert ["credit" in r for r in left] == [True] * 4 + [False] * 2  # what fills no block is not scored
    assert Matching(pool=3).chance(table) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="blocks of 7 pictures, the table to evaluate on has 6 rows"):
        Matching(pool=7).score(Comparing(), None, records, table)
