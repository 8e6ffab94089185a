"""Grounding: boxes, the vote of the patches and the loss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.tasks.parts import stub
from trimtab.backbones import Encoded, Pictures
from trimtab.tasks.grounding import BoxHead, Grounding, centred, grid, iou


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
    encoded_ = Encoded(tokens[:, 0], tokens, image_tokens=slice(1, 2))
    backbone = stub(pair=lambda *_: encoded_, pictures=Pictures(8))
    return task, backbone, task.collate(backbone, rows, train=True) | {"attention_mask": torch.ones(len(rows), 1)}


def test_grounding_targets_are_shares_of_each_picture():
    _, _, batch = grounded([(10, 5, 30, 20)])
    assert torch.allclose(batch["boxes"], torch.tensor([[0.25, 0.25, 0.75, 1.0]]))


def test_a_right_box_costs_nothing_and_a_wrong_one_does():
    task, backbone, batch = grounded([(10, 5, 30, 20), (0, 0, 8, 8)])
    take = lambda tokens, words, *_: (tokens[:, 0], torch.zeros(len(tokens), 1))  # noqa: E731
    assert task.loss(backbone, take, batch).item() == pytest.approx(0, abs=1e-5)
    records = task.predict(backbone, take, batch)
    assert [r["box"] for r in records] == [pytest.approx([10, 5, 30, 20]), pytest.approx([0, 0, 8, 8])]
    assert task.score(None, None, records, None) == {"accuracy@0.5": 1, "mean IoU": pytest.approx(1)}
    assert [r["credit"] for r in records] == [1, 1]
    shift = torch.tensor([0.1, 0.0, 0.1, 0.0])
    off = lambda tokens, words, *_: (tokens[:, 0] + shift, take(tokens, words)[1])  # noqa: E731
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
    backbone = SimpleNamespace(
        pair=lambda *_: Encoded(torch.zeros(1, 2), torch.zeros(1, 5, 2), image_tokens=slice(1, 5))
    )
    even = lambda tokens, words, *_: (target, torch.full((1, 4), math.log(0.25)))  # noqa: E731
    assert task.loss(backbone, even, batch).item() == pytest.approx(math.log(4), abs=1e-6)
    small = batch | {
        "boxes": torch.tensor([[0.4, 0.4, 0.6, 0.6]])
    }  # no centre lies in it: nothing is asked of the vote
    right = lambda tokens, words, *_: (small["boxes"], torch.full((1, 4), math.log(0.25)))  # noqa: E731
    assert task.loss(backbone, right, small).item() == pytest.approx(0, abs=1e-6)
