"""Retrieval, videos and boxes: ranks in blocks, ties, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.metrics import boxes, eccv, retrieval, videos


def sorted_ranks(scores: np.ndarray, own: list[set[int]]) -> list[int]:
    """The rank of the best right item by sorting, for scores that are all different."""
    order = np.argsort(scores, axis=1)[:, ::-1]
    return [min(list(row).index(i) for i in items) for row, items in zip(order, own, strict=True)]


@pytest.fixture(scope="module")
def world():
    """Embeddings of 24 pictures and of 1 to 5 texts each, in no order."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.cat([torch.arange(24), torch.randint(24, (50,), generator=generator)])
    images = torch.randn(24, 8, generator=generator).double()
    texts = images[owner] + torch.randn(74, 8, generator=generator).double() * 2
    return images, texts, owner


def test_ranks_of_any_number_of_texts_whole_and_in_blocks(world):
    images, texts, owner = world
    scores = (images @ texts.T).numpy()
    own = [set(np.flatnonzero(owner.numpy() == i)) for i in range(24)]
    found = retrieval.ranks(scores, owner)
    assert found.image_to_text.tolist() == sorted_ranks(scores, own)
    assert found.text_to_image.tolist() == sorted_ranks(scores.T, [{int(i)} for i in owner])
    for block in (1, 5_000, 20_000):
        part = retrieval.ranks_of_embeddings(images, texts, owner, block_bytes=block)
        assert torch.equal(part.image_to_text, found.image_to_text)
        assert torch.equal(part.text_to_image, found.text_to_image)
    result = retrieval.evaluate(images, texts, owner)
    assert result == retrieval.evaluate_scores(scores, owner)
    assert result["rsum"] == pytest.approx(sum(result[w][f"R@{k}"] for w in ("i2t", "t2i") for k in (1, 5, 10)))


def test_folds_are_consecutive_blocks_of_pictures(world):
    images, texts, owner = world
    result = retrieval.evaluate(images, texts, owner, folds=3)
    parts = []
    for start in (0, 8, 16):
        keep = (owner >= start) & (owner < start + 8)
        parts.append(retrieval.evaluate(images[start : start + 8], texts[keep], owner[keep] - start))
    assert result["t2i"]["meanr"] == pytest.approx(sum(p["t2i"]["meanr"] for p in parts) / 3)
    assert result["rsum"] == pytest.approx(sum(p["rsum"] for p in parts) / 3)
    with pytest.raises(ValueError, match="24 pictures do not fall into 5 equal folds"):
        retrieval.evaluate(images, texts, owner, folds=5)


def test_a_model_that_gives_every_pair_one_score_finds_nothing():
    scores, owner = torch.ones(4, 8), torch.arange(8) // 2
    assert retrieval.ranks(scores, owner).image_to_text.tolist() == [6] * 4
    assert retrieval.ranks(scores, owner).text_to_image.tolist() == [3] * 8
    assert retrieval.ranks(scores, owner, ties="for").image_to_text.tolist() == [0] * 4
    later = retrieval.ranks(scores, owner, ties="later")
    assert later.image_to_text.tolist() == [6, 4, 2, 0] and later.text_to_image.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("scores", "owner", "message"),
    [
        (torch.rand(2, 3), [0, 1], "expected the picture of each of 3 texts"),
        (torch.rand(2, 3), [0, 1, 2], "text 2: its picture is 2, but pictures are 0 to 1"),
        (torch.rand(2, 3), [0, 0, 0], "picture 1 has no text of its own"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), [0, 1], "row 1 holds a number that is not finite"),
        (torch.rand(0, 3), [0, 0, 0], "expected a matrix that is not empty"),
    ],
)
def test_retrieval_refuses_what_cannot_be_ranked(scores, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval.ranks(scores, owner)


def test_scores_after_re_ranking_are_those_of_each_direction(world):
    images, texts, owner = world
    scores = images @ texts.T
    other = scores.T.clone()
    other[0] = torch.arange(24.0).double()
    found = retrieval.ranks(scores, owner, other)
    assert found.text_to_image[0] == 23 and torch.equal(
        found.image_to_text, retrieval.ranks(scores, owner).image_to_text
    )
    result = retrieval.matching_summary(found)
    assert result["img_r10"] == pytest.approx(100 * (found.text_to_image < 10).double().mean().item())
    assert result["r_mean"] == pytest.approx((result["txt_r_mean"] + result["img_r_mean"]) / 2)
    with pytest.raises(ValueError, match="scores of texts and pictures: expected shape"):
        retrieval.ranks(scores, owner, scores)


def test_eccv_refuses_short_lists_and_queries_without_a_right_item():
    assert eccv.evaluate({1: [5, 6]}, {1: [5, 7, 6]})["map@r"] == 0.5
    with pytest.raises(ValueError, match="query 1: .* found 2 items and a list of 1"):
        eccv.evaluate({1: [5, 6]}, {1: [5]})
    with pytest.raises(ValueError, match="query 1: .* found 0 items"):
        eccv.evaluate({1: []}, {1: [5]})
    with pytest.raises(ValueError, match="query without a prediction: 2"):
        eccv.evaluate({1: [5], 2: [5]}, {1: [5]})


def test_video_retrieval_refuses_sentences_that_do_not_fit():
    scores = torch.rand(5, 3)
    assert len(videos.several_sentences(scores, [2, 1, 2])["v2t"]["ranks"]) == 3
    for counts, message in (([2, 2, 2], "sum to 5, found 3 that sum to 6"), ([2, 3], "found 2 that sum to 5"),
                            ([5, 0, 0], "video 1 has no sentence")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            videos.several_sentences(scores, counts)
    with pytest.raises(ValueError, match="several_sentences"):
        videos.one_sentence(scores)


def test_boxes_that_touch_that_are_turned_over_and_without_area():
    true = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    found = torch.tensor([[0.0, 0, 10, 20], [9.0, 0, 19, 10]])
    result = boxes.accuracy(found, true)
    assert result["accuracy"] == 0.5 and result["iou"].tolist() == pytest.approx([0.5, 1 / 19])
    assert boxes.accuracy(found, true, rule="x-vlm")["iou"].tolist() == pytest.approx([0.5, 0])  # one pixel is none
    assert boxes.giou(found, true).tolist() == pytest.approx([0.5, 1 / 19])
    for wrong, truth, message in (
        ([[0, 0, 10, 10], [5, 0, 4, 1]], true, "predicted boxes: row 1: expected left, top, right, bottom"),
        (found, [[0, 0, 10, 10], [3, 3, 3, 9]], "true boxes: row 1 has no area"),
        (found[:1], true, "expected as many predicted boxes as true boxes, found 1 and 2"),
        ([[0, 0, 1, 1], [0, 0, float("nan"), 1]], true, "predicted boxes: row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            boxes.accuracy(wrong, truth)


def test_mdetr_takes_the_larger_box_of_equal_scores():
    true = torch.tensor([[0.0, 0, 10, 10]])
    both = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 20, 20]])
    result = boxes.mdetr_precision([(torch.tensor([0.5, 0.5]), both)], true, ["refcoco"])
    assert result == {"refcoco": {"P@1": 0, "P@5": 1, "P@10": 1, "accuracy": 0}}
    with pytest.raises(ValueError, match="prediction 0: boxes: row 0"):
        boxes.mdetr_precision([(torch.tensor([0.5]), torch.tensor([[3.0, 0, 1, 1]]))], true, ["refcoco"])
    with pytest.raises(ValueError, match="sizes"):
        boxes.mdetr_boxes(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.tensor([[4, 5]]))
