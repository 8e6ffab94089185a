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
    assert VQA(["yes", "no"]).score(None, None, records, table.remove_columns("kind")) == {"accuracy": 0.5}
    assert VQA(["yes", "no"]).chance(table) == 0.5  # of always saying "no"


def test_vqa_predicts_the_likeliest_answer():
    backbone = SimpleNamespace(
        width=3, token_width=3,
        pair=lambda *_: SimpleNamespace(tokens=torch.tensor([[[0.0, 2.0, 1.0]], [[5.0, 2.0, 1.0]]])),
    )  # fmt: skip
    batch = {"pixel_values": None, "input_ids": None, "attention_mask": None}
    assert VQA(["yes", "no", "2"]).predict(backbone, nn.Identity(), batch) == [{"answer": "no"}, {"answer": "yes"}]
