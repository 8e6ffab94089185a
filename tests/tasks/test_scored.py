"""What cannot be scored is refused before training, and what is not told does not count."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from PIL import Image

from trimtab.data.augment import Augmentation
from trimtab.tasks.answer import Answer
from trimtab.tasks.classification import Classification
from trimtab.tasks.matching import Matching
from trimtab.tasks.pairs import _identifiers
from trimtab.tasks.retrieval import recalls
from trimtab.tasks.vqa import VQA


def said(*answers):
    return [{"answer": a} for a in answers]


def test_rows_without_an_answer_do_not_count():
    task, records = VQA(["cat", "dog"]), said("cat", "cat", "cat")
    table = Dataset.from_dict({"answer": ["cat", "", None], "kind": ["a", "a", "b"]})
    assert task.score(None, None, records, table) == {"accuracy": 1.0, "accuracy: a": 1.0}
    assert [r.get("credit") for r in records] == [1.0, None, None] and task.chance(table) == 1.0
    untold = Dataset.from_dict({"answer": ["", ""], "answers": [[], []]})
    with pytest.raises(ValueError, match="'vqa': no row of the table has an answer.*choose another split"):
        task.check_scored(untold)
    assert task.chance(untold) is None


def test_few_answers_are_no_people_of_vqa():
    """Three others must say the same for a right answer to count 1."""
    task = VQA(["cat", "dog"])
    with pytest.raises(ValueError, match="row 1: 3 in 'answers', expected those of ten people, 4 at least"):
        task.check_scored(Dataset.from_dict({"answer": ["cat"] * 2, "answers": [["cat"] * 4, ["cat"] * 3]}))
    four = Dataset.from_dict({"answer": ["cat"], "answers": [["cat"] * 4]})
    task.check_scored(four)
    assert task.score(None, None, said("cat"), four)["accuracy"] == 1.0
    with pytest.raises(ValueError, match="row 0: 2 answers in 'answers'.*metric: exact"):
        Answer(metric="vqa").check_scored(Dataset.from_dict({"question": ["?"], "answers": [["cat"] * 2]}))


@pytest.mark.parametrize("weight", [0.05, 0.2, 0.3, 1.0])
def test_the_answer_of_one_person_is_the_target_whatever_its_weight(weight):
    row = {"answer": "cat", "answers": ["cat"], "weights": [weight]}
    assert VQA(["cat", "dog"]).targets(row).tolist() == [1.0, 0.0]


def test_empty_labels_are_no_class_and_unknown_ones_are_told_of_early():
    task = Classification(classes=["cat", "dog"])
    assert task.labels([{"label": "dog"}, {"label": ""}, {"label": None}]).tolist() == [1, -100, -100]
    with pytest.raises(ValueError, match="label 'zebra' is none of its 2: cat, dog"):
        task.check_scored(Dataset.from_dict({"label": ["cat", "zebra"]}))


def test_any_of_the_answers_is_right_and_an_empty_one_is_none():
    task = Answer()
    table = Dataset.from_dict({"question": ["?"] * 3, "answer": ["feline"] * 3, "answers": [["cat", ""]] * 3})
    assert task.score(None, None, said("feline", "cat", ""), table) == {"exact match": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="row 0: no answer, so that nothing can be scored"):
        task.check_scored(Dataset.from_dict({"question": ["?"], "answer": [None]}))
    with pytest.raises(ValueError, match="row 0: expected 'answer' to be one of the choices"):
        Answer(metric="choice").check_scored(Dataset.from_dict({"answer": ["x"], "choices": [["cat", "dog"]]}))


def test_matching_leaves_no_row_out():
    table = Dataset.from_dict({"captions": [["a"]] * 99})
    with pytest.raises(ValueError, match="of the 99 rows to evaluate on 49 are left over"):
        Matching(pool=50).check_scored(table)
    Matching(pool=33).check_scored(table)


def test_a_wrong_one_with_the_same_score_stands_before_the_right_one():
    records = [{} for _ in range(20)]
    equal = recalls(torch.zeros(20, 20), [str(i) for i in range(20)], records)
    assert equal["recall@10"] == 0 and all(r["credit"] == 0 for r in records)
    same_words = recalls(torch.eye(4), ["a", "a", "b", "c"], [{} for _ in range(4)])
    assert same_words["recall@1"] == 1
    with pytest.raises(ValueError, match="similarities: row 0 holds a number that is not finite"):
        recalls(torch.full((4, 4), torch.nan), [*"abcd"], records)


def test_identifiers_of_ones_own_are_not_nlvr2s():
    own = Dataset.from_dict({"identifier": ["0e37df36-f698-11e6-8dd4-cb9ced3df976", None]})
    assert _identifiers(own) == [] and _identifiers(own.select([0])) == []
    assert _identifiers(Dataset.from_dict({"identifier": ["dev-850-0-0"]})) == ["dev-850-0-0"]


@pytest.mark.parametrize("box", [[-1.0, 2, 10, 10], [2.0, 2, 20.001, 10]])
def test_a_crop_keeps_what_is_in_the_picture_of_a_box_that_sticks_out(box):
    row = {"image": Image.new("RGB", (20, 20)), "box": box}
    for seed in range(20):
        found = Augmentation(crop=0.3)([row], torch.Generator().manual_seed(seed))[0]
        assert found["image"].size == (20, 20)
        inside = [max(found["box"][0], 0), max(found["box"][1], 0), min(found["box"][2], 20), min(found["box"][3], 20)]
        assert inside[2] - inside[0] > 7.9 and inside[3] - inside[1] > 7.9  # stretched, and never cut


def test_rows_of_words_alone_are_not_augmented():
    words = {"question": "?", "image": None, "images": None}
    both = [{"question": "?", "image": Image.new("RGB", (8, 8)), "images": None}, words]
    found = Augmentation(light=0.5)(both, torch.Generator().manual_seed(0))
    assert found[1] is words and found[0]["image"].size == (8, 8)
