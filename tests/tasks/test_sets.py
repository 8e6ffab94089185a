"""Set prediction: matching, losses and spans against plain loops over the published formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tests.tasks.tiny import mdetr, table, tokenizer
from trimtab import adapt
from trimtab.backbones.pictures import Cropped
from trimtab.methods import METHODS
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.grounding import corners, iou
from trimtab.tasks.sets import Things, match, set_loss, spans_to_tokens

Q, SLOTS, WIDTH, LEVELS = 4, 12, 8, 3


def made(things: int, aligned: bool = True) -> tuple[dict, Things, list[int]]:
    """Outputs for two texts that name `things` and one thing."""
    torch.manual_seed(things)
    counts = [things, 1]
    tokens = torch.zeros(2, things, 7, dtype=torch.bool)
    for i, count in enumerate(counts):
        for j in range(count):
            tokens[i, j, 1 + j : 3 + 2 * j] = True
    there = torch.tensor([[j < count for j in range(things)] for count in counts])
    found = {"logits": torch.randn(LEVELS, 2, Q, SLOTS), "boxes": torch.rand(LEVELS, 2, Q, 4)}
    if aligned:
        found["objects"] = F.normalize(torch.randn(LEVELS, 2, Q, WIDTH), dim=-1)
        found["words"] = F.normalize(torch.randn(2, 7, WIDTH), dim=-1)
    return found, Things(torch.rand(2, things, 4) * 0.5 + 0.2, tokens, there), counts


def cost(found: dict, level: int, things: Things, row: int, query: int, thing: int) -> float:
    shares = found["logits"][level, row, query].softmax(-1)
    own = things.tokens[row, thing].nonzero().flatten()
    kind = -sum(shares[int(t)].item() for t in own) / len(own)
    box, target = found["boxes"][level, row, query], things.boxes[row, thing]
    return kind + 5 * (box - target).abs().sum().item() - 2 * iou(corners(box), corners(target))[1].item()


def best(found: dict, level: int, things: Things, counts: list[int]) -> list[tuple[int, ...]]:
    """Of every row the objects of its things with the least whole cost, by trying all."""
    return [
        min(itertools.permutations(range(Q), count),
            key=lambda pick: sum(cost(found, level, things, row, q, t) for t, q in enumerate(pick)))
        for row, count in enumerate(counts)
    ]  # fmt: skip


def level_loss(found: dict, level: int, things: Things, counts: list[int]) -> float:
    picks, total = best(found, level, things, counts), 0.0
    for row, pick in enumerate(picks):
        logp = found["logits"][level, row].log_softmax(-1)
        total += sum(-0.1 * logp[q, -1].item() for q in range(Q) if q not in pick)
        for thing, q in enumerate(pick):
            own = things.tokens[row, thing].nonzero().flatten().tolist()
            total -= sum(logp[q, t].item() for t in own) / len(own)
            box, target = found["boxes"][level, row, q], things.boxes[row, thing]
            total += 5 * (box - target).abs().sum().item() + 2 * (1 - iou(corners(box), corners(target))[1].item())
        if "objects" in found:
            similar = (found["objects"][level, row] @ found["words"][row].T / 0.07).tolist()
            belong = [(q, t) for thing, q in enumerate(pick) for t in things.tokens[row, thing].nonzero().flatten()]
            for axis in (0, 1):  # of objects over tokens, then of tokens over objects
                for one in {int(pair[axis]) for pair in belong}:
                    line = similar[one] if axis == 0 else [s[one] for s in similar]
                    mine = [line[int(pair[1 - axis])] for pair in belong if int(pair[axis]) == one]
                    total += (math.log(sum(math.exp(x) for x in line)) - sum(mine) / len(mine)) / 2
    return total


@pytest.mark.parametrize("things", [1, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_loss_of_all_levels_is_that_of_loops(things, aligned):
    if things > 1:
        pytest.importorskip("scipy")
    found, wanted, counts = made(things, aligned)
    total = sum(level_loss(found, level, wanted, counts) for level in range(LEVELS)) / sum(counts)
    assert set_loss(found, wanted).item() == pytest.approx(total, rel=1e-4)
    picks = best(found, 1, wanted, counts)
    mine = match(found["logits"][1], found["boxes"][1], wanted)
    assert [tuple(mine[i, : len(p)].tolist()) for i, p in enumerate(picks)] == picks


def test_more_things_than_objects_are_an_error():
    found, wanted, _ = made(Q + 1)
    with pytest.raises(ValueError, match="row 0 names 5 things, the model gives 4 objects"):
        match(found["logits"][0], found["boxes"][0], wanted)


def test_spans_of_characters_become_tokens():
    words, text = tokenizer(1), "the red  dog near"
    encoding = words([text, "big"], padding=True)
    names = words.convert_ids_to_tokens(encoding["input_ids"][0])
    assert names == ["[CLS]", "the", "red", "dog", "near", "[SEP]"]

    def held(*spans):
        return [n for n, t in zip(names, spans_to_tokens(encoding, 0, text, spans, len(names)), strict=True) if t]

    assert held((4, 12)) == ["red", "dog"] and held((5, 6)) == ["red"] and held((0, 3), (9, 12)) == ["the", "dog"]
    assert held((7, 12)) == ["dog"] and held((4, 9)) == ["red"]  # from a blank on, or up to one
    assert held((0, len(text))) == names[1:-1]
    cut = words([text], truncation=True, max_length=4)
    assert spans_to_tokens(cut, 0, text, [(9, 12)], 4).sum() == 0  # what was cut off
    for bad in ((3, 3), (-1, 2), (0, 99)):
        with pytest.raises(ValueError, match=r"expected spans from 0 to 17 in 'the red  dog near', found \["):
            held(bad)


def test_objects_are_asked_for_the_words_of_the_row():
    model = TaskModel(mdetr(), TASKS["set-grounding"]()).eval()
    rows = [dict(row) for row in table("grounding")][:2]
    batch = model.task.collate(model.backbone, rows, True)
    names = [model.backbone.tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"].tolist()]
    meant = [[n for n, t in zip(*pair, strict=True) if t] for pair in zip(names, batch["tokens"], strict=True)]
    assert meant == [["red", "dog"], ["big", "cat"]]
    for row in rows:
        del row["tokens_positive"]
    whole = model.task.collate(model.backbone, rows, True)["tokens"]
    assert whole.sum(dim=1).tolist() == [3, 5]
    assert batch["boxes"][0].tolist() == pytest.approx([0, 2 / 16, 12 / 20, 14 / 16])  # of a picture of 20 by 16


def test_boxes_are_of_the_picture_without_the_padding_of_its_batch():
    """A picture alone, and beside a higher one, to whose frame it is padded: the same objects in the same places."""
    torch.manual_seed(0)
    model = TaskModel(mdetr(), TASKS["set-grounding"]()).eval()
    first = dict(table("grounding")[0])
    tall = {**first, "image": first["image"].resize((16, 22))}
    alone, both = model.answer([first]), model.answer([first, tall])
    assert both[0]["box"] == pytest.approx(alone[0]["box"], abs=0.05)
    assert not model.backbone.pictures.fixed
    model.backbone.pictures = Cropped(64)
    with pytest.raises(ValueError, match="takes pictures whole, but one of 20 x 16 pixels is cropped or framed"):
        model.answer([first])


def test_a_slow_tokenizer_is_refused():
    model = TaskModel(mdetr(), TASKS["set-grounding"]())
    words = model.backbone.tokenizer
    model.backbone.tokenizer = type("Slow", (), {"is_fast": False, "__call__": lambda self, *a, **k: words(*a, **k)})()
    with pytest.raises(ValueError, match="needs a fast tokenizer .* found Slow"):
        model.task.collate(model.backbone, list(table("grounding")), True)


def test_unipt_gives_four_levels_that_are_each_matched():
    """Levels of a side network on a decoder of six layers: three that are read and the last, as the authors code it."""
    torch.manual_seed(0)
    backbone = mdetr(layers=6)
    task = TASKS["set-grounding"]()
    model = TaskModel(backbone, task)
    backbone.requires_grad_(False)
    adapt(backbone.model, with_task=model).attach(
        METHODS.make("unipt", towers=("encoder", "decoder"), layers=(1, 3, 5))
    )
    batch = task.collate(backbone, list(table("grounding")), True)
    states, text = backbone.detect(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    assert states.shape[0] == 4 and text.shape[:2] == batch["input_ids"].shape
    model.train()(**batch)["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all(n.startswith("head.") or "unipt" in n for n in trained), sorted(trained)[:5]
    assert {n for n, _ in model.named_parameters() if n.startswith("head.")} <= trained
