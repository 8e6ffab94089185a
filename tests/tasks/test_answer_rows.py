"""Rows of the task `answer`: how they are asked, and how answers are scored."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset

from tests.models.chats import picture
from trimtab.tasks.answer import Answer, _chosen


def heard(task: Answer, row: dict) -> tuple:
    """What a backbone is asked and told of a row."""
    said = {}
    backbone = SimpleNamespace(picture_token="<image>", teach=lambda *call: said.update(call=call))
    task.collate(backbone, [row], True)
    (asked,), (pictures,), (answer,) = said["call"]
    return asked, pictures, answer


def test_choices_hint_and_letter():
    row = {
        "images": [picture()],
        "question": "what is in the picture ?",
        "answer": "a red dog",
        "choices": ["a cat", "a red dog"],
        "hint": "Dogs bark.",
    }
    asked, pictures, answer = heard(Answer("choice", system="Be short."), row)
    assert asked[0] == {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    assert asked[1]["content"][0] == {"type": "image"} and len(pictures) == 1 and answer == "B"
    assert asked[1]["content"][1]["text"] == (
        "Context: Dogs bark.\nwhat is in the picture ?\nA. a cat\nB. a red dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert heard(Answer("choice", choose="text"), {**row, "answer": "A"})[2] == "a cat"
    worded = Answer(template="Q: {question} A:", wording="{hint} {question} {choices}")
    assert heard(worded, row)[0] == "Q: Dogs bark. what is in the picture ? A. a cat\nB. a red dog A:"
    with pytest.raises(
        ValueError, match=r"row 0 of the batch: expected 'answer' to be one of the choices .* found 'C'"
    ):
        heard(Answer("choice"), {**row, "answer": "C"})
    with pytest.raises(ValueError, match="row 0 of the batch has no answer to learn"):
        heard(Answer(), {**row, "answer": ""})


def test_messages_are_a_conversation_whose_last_answer_is_told():
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "a red one ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    asked, _, answer = heard(Answer(), {"messages": messages, "image": picture()})
    assert [m["role"] for m in asked] == ["user", "assistant", "user"] and answer == "yes"
    assert asked[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what ?"}]
    with pytest.raises(ValueError, match="row 0 of the batch: its messages have 1 places for pictures .* and it has 2"):
        heard(Answer(), {"messages": messages, "images": [picture(), picture()]})
    said = zip(messages[2:], ("a red one ?", "yes"), strict=True)
    table = Dataset.from_dict({"messages": [[{**m, "content": [{"type": "text", "text": t}]} for m, t in said]]})
    entry = Answer().gallery([{"answer": "yes"}], table, [0])
    assert entry == [{"query": "a red one ?", "prediction": "yes", "target": "yes", "correct": True}]


def scored(task: Answer, answers: list[str], columns: dict) -> dict[str, float]:
    return task.score(None, None, [{"answer": a} for a in answers], Dataset.from_dict(columns))


def test_exact_vqa_and_cider_scores():
    columns = {"question": ["?"] * 3, "answer": ["yes", "no", "a dog"]}
    assert scored(Answer(), ["yes", "No", "a dog"], columns) == {"exact match": pytest.approx(2 / 3)}
    several = {"answers": [["yes", "yeah"], ["no", "No"], ["cat", "dog"]]}
    assert scored(Answer(), ["yeah", "No", "a cat"], columns | several) == {"exact match": pytest.approx(2 / 3)}
    assert scored(Answer(), ["yeah", "No", "a dog"], columns | several) == {"exact match": 1.0}  # `answer` itself
    people = {"answers": [["yes"] * 2 + ["no"] * 8, ["two"] * 10, ["a dog"] * 3 + ["cat"] * 7]}
    found = scored(Answer("vqa"), ["Yes.", "two", "dog"], columns | people)
    assert found == {"vqa accuracy": pytest.approx((0.6 + 1 + 0.9) / 3)}  # normalised, the person's own answer left out
    told = scored(Answer("cider"), ["a red dog runs", "two cats", "x"],
                  {"answers": [["a red dog runs"], ["two cats"], ["blue birds"]]} | columns)  # fmt: skip
    assert told["cider"] > 3 and set(told) == {"cider", "bleu@4"}
    assert (Answer("vqa").primary, Answer("cider").primary, Answer.primary) == ("vqa accuracy", "cider", "exact match")


def test_scienceqa_s_accuracies():
    columns = {
        "choices": [["cat", "dog"], ["yes", "no", "both"], ["A", "B"]], "answer": ["dog", "no", "A"],
        "hint": ["x", "", ""], "subject": ["natural", "social", "natural"], "grade": ["grade3", "grade12", "grade6"],
        "images": [[], [picture()], []], "question": ["?"] * 3,
    }  # fmt: skip
    found = scored(Answer("choice", by=("subject", "grade", "context")), ["B.", "The answer is C.", "A"], columns)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["no choice read"] == 0
    assert (found["accuracy: natural"], found["accuracy: social"]) == (1, 0)
    assert (found["accuracy: grades 1-6"], found["accuracy: grades 7-12"]) == (1, 0)
    assert [found[f"accuracy: {c} context"] for c in ("text", "image", "no")] == [1, 0, 1]
    assert Answer("choice").chance(Dataset.from_dict(columns)) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("text", "index"),
    [("B", 1), ("(B)", 1), ("b", None), ("B. dog", 1), (" Dog.", 1), ("The answer is A.", 0), ("A dog", None),
     ("D", None), ("answer is Apple", None), ("", None)],
)  # fmt: skip
def test_how_a_choice_is_read(text, index):
    assert _chosen(text, ["cat", "dog", "both"], "letter") == index


def test_where_letters_are_choices_too_the_setting_decides():
    assert _chosen("A", ["b", "a"], "letter") == 0 and _chosen("A", ["b", "a"], "text") == 1
