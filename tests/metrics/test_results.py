"""Files of predictions for evaluation servers."""

from __future__ import annotations

import json

import pytest

from trimtab.metrics import results

GIVEN = {
    "vqa": (
        {"12": "yes", 7: "no"},
        [7, 12],
        '[{"question_id": 12, "answer": "yes"}, {"question_id": 7, "answer": "no"}]',
    ),
    "gqa": ({"012": "dog"}, ["012"], '[{"questionId": "012", "prediction": "dog"}]'),
    "nlvr2": (
        {"test1-0-1-0": "true", "test1-0-0-0": "False"},
        ["test1-0-0-0", "test1-0-1-0"],
        "test1-0-1-0,True\ntest1-0-0-0,False\n",
    ),
    "captions": ({"42": "a dog, a “cat”"}, ["42"], '[{"image_id": 42, "caption": "a dog, a \\u201ccat\\u201d"}]'),
}


@pytest.mark.parametrize("form", GIVEN)
def test_files_are_in_the_servers_form_and_read_back(form, tmp_path):
    predictions, known, text = GIVEN[form]
    path = results.write(form, tmp_path / "new" / "file", predictions, known)
    assert path.read_text() == text
    numbers = results.FORMS[form].number
    wanted = {int(key) if numbers else key: answer for key, answer in predictions.items()}
    if form == "nlvr2":
        wanted = {key: answer.capitalize() for key, answer in wanted.items()}
    assert results.read(form, path) == wanted


@pytest.mark.parametrize(
    ("form", "predictions", "known", "message"),
    [
        ("vqa", {1: "a"}, [1, 2], "question without a prediction: 2"),
        ("vqa", {1: "a", 3: "b"}, [1], "unknown question: 3"),
        ("vqa", {"q1": "a"}, [1], "question 'q1': expected a whole number as question_id"),
        ("vqa", {1: "a", "1": "b"}, [1], "question 1 has two predictions"),
        ("vqa", {1: 4}, [1], "question 1: answer 4 may not stand in a file for vqa"),
        ("gqa", {1: "a"}, ["1"], "question 1: expected a string as questionId, found int"),
        ("nlvr2", {"dev-1-0-0": "maybe"}, ["dev-1-0-0"], "pair 'dev-1-0-0': label 'maybe' may not stand"),
        ("captions", {}, [], "there is no picture to score"),
        ("other", {}, [], "form must be one of vqa, gqa, nlvr2, captions"),
    ],
)
def test_nothing_is_written_that_a_server_would_refuse(form, predictions, known, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        results.write(form, tmp_path / "file.json", predictions, known)
    assert not list(tmp_path.iterdir())


def test_predictions_beyond_the_known_ids_are_left_out_where_told(tmp_path):
    path = results.write("vqa", tmp_path / "file.json", {1: "a", 3: "b"}, [1], extra=True)
    assert results.read("vqa", path) == {1: "a"}


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("vqa", "[{]", "file: expected JSON"),
        ("vqa", "{}", "expected a list of rows, found dict"),
        ("vqa", '[{"question_id": 1, "answer": "a"}, {"question_id": 2}]', "row 1: expected question_id and answer"),
        (
            "vqa",
            '[{"question_id": "1", "answer": "a"}]',
            "row 0: question '1': expected a whole number, found a string",
        ),
        ("gqa", '[{"questionId": 1, "prediction": "a"}]', "row 0: question 1: expected a string as questionId"),
        ("gqa", '[{"questionId": "1", "prediction": "a"}, {"questionId": "1", "prediction": "a"}]', "row 1: .* twice"),
        (
            "captions",
            '[{"image_id": 1, "caption": null}]',
            "row 0: picture 1: expected caption as a string, found None",
        ),
        ("nlvr2", "dev-1-0-0,True\n\ndev-1-1-0\n", "row 1: expected identifier,label"),
    ],
)
def test_a_broken_file_is_an_error_with_its_row(form, text, message, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(form, tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"questions": [{"question_id": 5, "question": "?"}]}, [5]),
        ({"annotations": [{"question_id": 6, "answers": []}]}, [6]),
        ({"images": [{"id": 9}], "annotations": [{"image_id": 9, "id": 1, "caption": "a"}]}, [9]),
        ({"05": {"question": "?", "isBalanced": True}}, ["05"]),
    ],
)
def test_ids_are_read_from_the_file_of_questions(content, ids, tmp_path):
    (tmp_path / "file").write_text(json.dumps(content))
    assert results.ids_of(tmp_path / "file") == ids


def test_ids_of_json_lines_and_of_other_files(tmp_path):
    file = tmp_path / "dev.json"
    file.write_text('{"identifier": "dev-1-0-0"}\n{"identifier": "dev-1-1-0"}\n')
    assert results.ids_of(file) == ["dev-1-0-0", "dev-1-1-0"]
    for text, message in (
        ('{"identifier": "a"}\n{', "row 1: expected JSON"),
        ("[]", "expected questions of VQA or GQA"),
        ('{"questions": [{"question_id": 1}, {}]}', "row 1: expected question_id"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            results.ids_of(file)


def test_a_file_is_held_against_the_known_ids(tmp_path):
    path = results.write("gqa", tmp_path / "file.json", {"012": "dog"}, ["012"])
    assert results.read("gqa", path, ["012"]) == {"012": "dog"}
    with pytest.raises(ValueError, match=r"file\.json: question without a prediction: '7'"):
        results.read("gqa", path, ["012", "7"])
    with pytest.raises(ValueError, match=r"file\.json: prediction for an unknown question: '012'"):
        path.write_text(path.read_text()[:-1] + ', {"questionId": "7", "prediction": "cat"}]')
        results.read("gqa", path, ["7"])
    assert results.read("gqa", path, ["7"], extra=True)["7"] == "cat"
