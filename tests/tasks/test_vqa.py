"""Visual question answering: the loss, unknown answers and accuracy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn

from tests.tasks.parts import stub
from trimtab.tasks.vqa import VQA


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
    assert [r["credit"] for r in records] == [1, 0, 1, 0]
    assert VQA(["yes", "no"]).score(None, None, records, table.remove_columns("kind")) == {"accuracy": 0.5}
    assert VQA(["yes", "no"]).chance(table) == 0.5  # of always saying "no"


def test_vqa_predicts_the_likeliest_answer():
    backbone = SimpleNamespace(
        width=3, token_width=3,
        pair=lambda *_: SimpleNamespace(tokens=torch.tensor([[[0.0, 2.0, 1.0]], [[5.0, 2.0, 1.0]]])),
    )  # fmt: skip
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": None}
    assert VQA(["yes", "no", "2"]).predict(backbone, nn.Identity(), batch) == [{"answer": "no"}, {"answer": "yes"}]


PICTURE = Image.new("RGB", (4, 4))
TEN = ["yes", *["no"] * 2, *["Two"] * 3, *["dog"] * 4]


def test_soft_targets_count_people():
    row = {"image": PICTURE, "question": "?", "answer": "dog", "answers": TEN}
    task = VQA(["no", "yes", "2", "dog", "cat"])
    assert task.targets(row).tolist() == pytest.approx([0.6, 0.3, 0, 1, 0])  # "Two" is not written as the class is
    assert VQA(task.answers, counting="normalised").targets(row).tolist() == pytest.approx([0.6, 0.3, 0.9, 1, 0])
    assert task.targets({"answer": "cat", "answers": ["cat"]}).tolist() == [0, 0, 0, 0, 1]  # Visual Genome: one person
    assert task.targets({"answer": "no"}).tolist() == [1, 0, 0, 0, 0]
    weights = {"answer": "no", "answers": ["no", "yes"], "weights": [0.8, 0.2]}  # shares, in the files of X-VLM
    assert task.targets(weights).tolist() == pytest.approx([1, 0.6, 0, 0, 0])
    with pytest.raises(ValueError, match="found 1 weights and 2 answers"):
        task.targets(weights | {"weights": [1.0]})


def test_binary_loss_is_summed_over_classes_and_leaves_out_rows_without_a_known_answer():
    logits = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, -2.0]], requires_grad=True)
    task = VQA(["yes", "no", "dog"])
    rows = [{"image": PICTURE, "question": "?", "answer": "dog", "answers": TEN},
            {"image": PICTURE, "question": "?", "answer": "cow", "answers": ["cow"] * 10}]  # fmt: skip
    backbone = stub(pair=lambda *_: SimpleNamespace(tokens=logits[:, None]))
    batch = task.collate(backbone, rows, train=True) | {"attention_mask": torch.ones(2, 3)}
    loss = task.loss(backbone, nn.Identity(), batch)
    target = torch.tensor([0.3, 0.6, 1.0])
    # ViLT: the mean of binary cross-entropies times the number of classes
    wanted = nn.functional.binary_cross_entropy_with_logits(logits[:1], target[None]) * 3
    assert loss.item() == pytest.approx(wanted.item())
    loss.backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    records = task.predict(backbone, nn.Identity(), batch)
    assert [r["answer"] for r in records] == ["yes", "no"]
    assert [r["soft score"] for r in records] == pytest.approx([0.3, 0])


@pytest.mark.parametrize(("loss", "there", "key"), [("auto", True, "targets"), ("auto", False, "labels"),
                                                    ("binary", False, "targets"), ("one", True, "labels")])  # fmt: skip
def test_which_loss_a_table_gets(loss, there, key):
    row = {"image": PICTURE, "question": "?", "answer": "yes"} | ({"answers": ["yes"] * 10} if there else {})
    batch = VQA(["yes", "no"], loss=loss).collate(stub(), [row], train=True)
    assert key in batch and not {"targets", "labels"} - {key} & batch.keys()


def test_accuracy_with_peoples_answers_is_the_official_one():
    answers = [TEN, ["yes"] * 10, ["no"] * 9 + ["yes"]]
    table = Dataset.from_dict({"answer": ["dog", "yes", "no"], "answers": answers, "question": ["?"] * 3,
                               "answer_type": ["other", "yes/no", "yes/no"]})  # fmt: skip
    records = [{"answer": "two"}, {"answer": "Yes"}, {"answer": "yes"}]
    task = VQA(["yes", "no"])
    found = task.score(None, None, records, table)
    # Three people said two: 7 x 1 + 3 x 2/3. Against ten equal answers "Yes" is not "yes". One said yes: 9 x 1/3.
    assert found["accuracy, answer type: other"] == pytest.approx(0.9)
    assert found["accuracy, answer type: yes/no"] == pytest.approx((0 + 0.3) / 2)
    assert found["accuracy"] == pytest.approx((0.9 + 0.3) / 3)
    assert [r["credit"] for r in records] == pytest.approx([0.9, 0, 0.3])
    assert [e["correct"] for e in task.gallery(records, table, range(3))] == [True, False, False]
    assert task.chance(table) == pytest.approx(1 / 3)  # "dog": four of ten, none, none


def test_a_row_without_peoples_answers_among_others_is_named():
    table = Dataset.from_dict({"answer": ["a", "b"], "answers": [["a"] * 10, []]})
    with pytest.raises(ValueError, match="row 1: no answers of people, which other rows have"):
        VQA(["a"]).score(None, None, [{"answer": "a"}] * 2, table)


def test_words_and_answers_that_cannot_be():
    with pytest.raises(ValueError, match="loss must be one of auto, one, binary"):
        VQA(["a"], loss="soft")
    with pytest.raises(ValueError, match="counting must be one of"):
        VQA(["a"], counting="raw")
    with pytest.raises(ValueError, match="1 of them stand there twice, such as 'a'"):
        VQA(["a", "b", "a"])
