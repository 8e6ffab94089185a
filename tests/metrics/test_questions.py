"""VQA, GQA, NLVR2 and classes: what the official code does with odd input, and what is refused."""

from __future__ import annotations

import pytest
import torch

from trimtab.metrics import answers, gqa, nlvr2, vqa
from trimtab.metrics.words import normalise, normalise_vilt


def people(*texts: str) -> list[dict]:
    return [{"answer": text, "answer_id": i} for i, text in enumerate(texts, start=1)]


def test_answers_are_written_alike_as_in_the_official_code():
    """Values of GT-Vision-Lab/VQA a013f00."""
    told = {
        "Twas the 1,000 dogs, dont they?": "'twas 1000 dogs don't they",
        "a-b -c": "ab c",  # a sign that touches a blank anywhere leaves none anywhere
        "3.5. 4.": "3.5 4",
        "somebody'd couldnt've": "somebodyd couldn't've",
        "shes the one": "shes 1",
        "it's 5:30 & $5": "it's 5:30 & $5",
        "." * 33: ".",  # at most 32 periods go
    }
    assert {text: normalise(text) for text in told} == told
    assert normalise_vilt("a , b") == "b" and normalise_vilt("x\t, y") == "x y"


def test_ten_equal_answers_are_compared_as_they_are_written():
    assert vqa.score(people(*["Yes"] * 10), "yes") == 0
    assert vqa.score(people(*["Yes"] * 9, "no"), "yes") == 1
    assert vqa.score(["Yes"] * 9 + ["no"], "yes") == 1  # plain strings are of different people
    assert vqa.score(people("yes", "yes", *["no"] * 8), "yes") == pytest.approx((2 * 1 + 8 * 2) / 30)


def test_vqa_refuses_what_cannot_be_scored():
    told = {7: {"answers": people("a", "b")}, 8: {"answers": people("c")}}
    for predictions, message in (
        ({7: "a"}, r"question without a prediction: 8 \(1 of 2\)"),
        ({7: "a", 8: "b", 9: "c"}, "prediction for an unknown question: 9"),
        ({"7": "a", "8": "b"}, "question 7: its prediction is under '7': ids must be of one kind .* expected int"),
        ({7: "a", 8: 3}, "question 8: expected an answer as a string, found 3"),
    ):
        with pytest.raises(ValueError, match=message):
            vqa.evaluate(told, predictions)
    with pytest.raises(ValueError, match="there is no question to score"):
        vqa.evaluate({}, {})
    with pytest.raises(ValueError, match="question 7: expected at least one answer"):
        vqa.evaluate({7: {"answers": []}}, {7: "a"})
    with pytest.raises(ValueError, match="rule must be one of official, x-vlm"):
        vqa.score(["a"], "a", rule="other")
    assert vqa.evaluate(told, {7: "a", 8: "b", 9: "c"}, extra=True)["by_question"][8] == 0


def test_the_vocabulary_has_normalised_answers_of_nine_questions():
    told = ["two"] * 5 + ["a dog"] * 9 + ["2"] * 4 + ["cat"] * 8
    assert answers.vocabulary(told) == ["2", "dog"]
    assert answers.vocabulary(told, least=8) == ["2", "dog", "cat"]


def test_soft_targets_count_answers_as_written_unless_normalised():
    known = {"dog": 0, "2": 1}
    told = ["dog", "dog", "a dog", "two", "2", "dog", "dog"]
    assert answers.soft_targets(told, known) == {0: 1.0, 1: 0.3}
    assert answers.soft_targets(told, known, normalise=normalise_vilt) == {0: 1.0, 1: 0.6}
    assert [answers.soft_score(n) for n in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]


def test_classes_that_are_equally_likely_and_rows_that_are_left_out():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    assert answers.soft_accuracy(logits, [[0, 0.9, 0.3], [0, 0, 0.6], [0, 1, 1]]) == pytest.approx(0.5)
    assert answers.class_accuracy(logits, [1, 0, -100]) == 0.5
    with pytest.raises(ValueError, match="row 1: expected a class from 0 to 2, found 3"):
        answers.class_accuracy(logits, [1, 3, 0])
    with pytest.raises(ValueError, match="nothing to score"):
        answers.class_accuracy(logits, [-100] * 3)
    with pytest.raises(ValueError, match="logits: row 1 holds a number that is not finite"):
        answers.class_accuracy([[0.0, 1.0], [float("nan"), 0.0]], [0, 1])


def question(answer: str, **fields) -> dict:
    return {
        "question": "what is this?", "answer": answer, "isBalanced": True, "entailed": [], "semantic": [],
        "types": {"structural": "query", "semantic": "obj", "detailed": "category"}, "groups": {"global": None},
    } | fields  # fmt: skip


def test_gqa_refuses_what_cannot_be_scored():
    questions = {"1": question("dog", entailed=["1", "2"]), "2": question("cat", isBalanced=False)}
    told = {"1": "dog", "2": "dog"}
    assert gqa.evaluate(questions, told)["consistency"] == 0
    assert gqa.evaluate(questions, {"1": "dog"}, consistency=False)["accuracy"] == 100
    with pytest.raises(ValueError, match="question without a prediction: '2'"):
        gqa.evaluate(questions, {"1": "dog"})
    with pytest.raises(ValueError, match="question '1': its prediction is under 1: .* expected str, found int"):
        gqa.evaluate(questions, {1: "dog", 2: "cat"})
    with pytest.raises(ValueError, match="unknown question: '3'"):
        gqa.evaluate(questions, told | {"3": "dog"})
    with pytest.raises(ValueError, match="question '1' entails questions that are not there: '2'"):
        gqa.evaluate({"1": questions["1"]}, told, extra=True)
    with pytest.raises(ValueError, match="question that is not in the choices: '1'"):
        gqa.evaluate(questions, told, choices={"2": {}})
    with pytest.raises(ValueError, match="none of 1 questions is balanced"):
        gqa.evaluate({"2": questions["2"]}, told)


def test_gqa_leaves_open_what_was_not_computed():
    result = gqa.evaluate({"1": question("dog")}, {"1": "cat"})
    assert [result[name] for name in ("validity", "plausibility", "consistency", "binary", "distribution")] == [
        None
    ] * 5
    assert result["open"] == 0


def test_nlvr2_groups_pairs_by_sentence():
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "true", "dev-2-0-0": "False"}
    told = {"dev-1-0-0": "true", "dev-1-1-0": "true", "dev-1-0-1": "True", "dev-2-0-0": "FALSE"}
    assert nlvr2.evaluate(labels, told) == {"accuracy": 0.75, "consistency": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="without a prediction: 'dev-2-0-0'"):
        nlvr2.evaluate(labels, dict.fromkeys(list(labels)[:3], "true"))
    with pytest.raises(ValueError, match="unknown pair: 'dev-9-0-0'"):
        nlvr2.evaluate(labels, told | {"dev-9-0-0": "true"})
    with pytest.raises(ValueError, match="pair 'dev-1-0-0': expected the label True or False, found 1"):
        nlvr2.evaluate(labels | {"dev-1-0-0": 1}, told)
