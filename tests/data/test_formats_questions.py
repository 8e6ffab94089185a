"""Readers of questions, statements and choices: VQA v2, GQA, NLVR2, SNLI-VE, ScienceQA."""

from __future__ import annotations

import json

import pytest
from datasets import Image

from tests.data import made_sets
from tests.data.made_sets import picture, write
from trimtab.data.formats import vqav2
from trimtab.data.formats.gqa import GQA
from trimtab.data.formats.nlvr2 import NLVR2
from trimtab.data.formats.scienceqa import ScienceQA
from trimtab.data.formats.snli_ve import SNLIVE
from trimtab.data.formats.vqav2 import VQAv2
from trimtab.data.reading import DataError, Kept, NotThere, RowError


@pytest.fixture
def vqa(tmp_path):
    return made_sets.vqav2(tmp_path)


def change(path, edit) -> None:
    """A JSON file after an edit of its content."""
    content = json.loads(path.read_text())
    edit(content)
    write(path, content)


# --- VQA v2 -----------------------------------------------------------------------------------------------------------


def test_vqa_joins_by_id_and_keeps_answers_as_written(vqa):
    table = VQAv2(root=vqa).load("vqa", "validation")
    assert table["question_id"][:] == ["30", "31", "32", "33", "34", "35"] and set(table["image_id"]) == {"3"}
    assert table[1]["question"] == "What? 1" and table[1]["answer"] == "Two"
    assert table[1]["answers"] == ["Two"] * 8 + ["red", "zebra"] and sum(table[1]["weights"]) == pytest.approx(1)
    test = VQAv2(root=vqa, test=("test",)).load("answer", "test")
    assert test["answers"][:] == [[]] * 6 and test["answer"][:] == [""] * 6


def test_vqa_vocabulary_and_what_is_outside_it(vqa):
    """Of 18 common answers in train and val 9 are `red`; with four changed 9 are `Two` or `two.`, which is class 2."""
    source = VQAv2(root=vqa)
    assert source.answers() == ["red"]
    path = vqa / "v2_mscoco_val2014_annotations.json"
    change(path, lambda c: [a.update(multiple_choice_answer="two.") for a in c["annotations"][:4]])
    assert source.answers() == ["2"]  # a file that has changed is read again
    assert len(VQAv2(root=vqa, outside="keep").load("vqa", "train")) == 12


def test_vqa_has_a_vocabulary_though_an_annotation_is_left_out(vqa):
    change(vqa / "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][5].update(multiple_choice_answer=[]))
    with pytest.raises(
        RowError, match=r"val2014_annotations.json, annotations\[5\]: expected 'multiple_choice_answer'"
    ):
        VQAv2(root=vqa).answers()
    kept = Kept("skip")
    VQAv2(root=vqa, on_error="skip").read("vqa", "val", kept)
    assert len(kept.left_out) == 1 and "annotations[5]: expected 'multiple_choice_answer'" in kept.left_out[0]


def test_vqa_leaves_out_training_questions_without_a_known_answer(vqa):
    train = VQAv2(root=vqa).load("vqa", "train")
    assert train["question_id"][:] == ["10", "11", "13", "14", "15", "20", "21", "23", "24", "25"]
    assert len(VQAv2(root=vqa).load("vqa", "test")) == 6  # evaluation is over all of them
    with pytest.raises(DataError, match=r"train2014_annotations\.json, annotations\[9\]: none of its answers is among"):
        VQAv2(root=vqa, outside="stop").load("vqa", "train")
    listed = write(vqa / "mine.json", {"zebra": 1, "odd 2": 0})
    source = VQAv2(root=vqa, answer_list=listed)
    assert source.answers() == ["odd 2", "zebra"] and len(source.load("vqa", "train")) == 12


@pytest.mark.parametrize("content", [["a", "b", "a"], {"a": 0, "b": 2}, {"a": 0, "b": 0}, [], ["a", 1], "a"])
def test_a_vocabulary_that_is_none(tmp_path, content):
    path = write(tmp_path / "list.json", json.dumps(content))
    with pytest.raises(DataError, match=r"list\.json: "):
        vqav2.answer_list(path)


def test_vqa_cuts_the_last_pictures_of_validation_off(vqa, monkeypatch):
    monkeypatch.setattr(vqav2, "REST", 1)
    change(vqa / "v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(image_id=1))
    change(vqa / "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][5].update(image_id=1))
    picture(vqa / "val2014/COCO_val2014_000000000001.jpg")
    source = VQAv2(root=vqa, outside="keep")
    rest, others = source.table("vqa", "rest-val"), source.table("vqa", "trainable-val")
    assert rest["question_id"][:] == ["30"] and others["question_id"][:] == ["31", "32", "33", "34", "35"]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].pop(2),
         r"val2014_questions\.json, questions\[3\]: the question '33' has no annotation in v2_mscoco_val2014_ann"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"].pop(3),
         r"val2014_annotations\.json, annotations\[2\]: the annotation is of the question '33', which is not in"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][2].update(question_id=31),
         r"questions\[2\]: the question_id '31' stands twice"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(image_id=99),
         r"questions\[0\]: the picture 'val2014/COCO_val2014_000000000099\.jpg' is not there"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0].update(image_id=True),
         r"questions\[0\]: expected 'image_id' to be a whole number, found True"),
        ("v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0]["answers"][3].pop("answer"),
         r"annotations\[0\], answers\[3\]: expected the field 'answer'"),
        ("v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0].update(answers=[]),
         r"annotations\[0\]: expected ten answers, found none"),
    ],
)  # fmt: skip
def test_vqa_names_a_broken_row(vqa, file, edit, message):
    change(vqa / file, edit)
    with pytest.raises(DataError, match=message):
        VQAv2(root=vqa).load("vqa", "validation")
    skipping = VQAv2(root=vqa, on_error="skip").load("vqa", "validation")
    assert len(skipping) == 5


def test_lists_of_xvlm_with_visual_genome(tmp_path):
    picture(tmp_path / "train2014/COCO_train2014_000000000001.jpg")
    picture(tmp_path / "vg/image/77.jpg")
    asked = {"question_id": 5, "question": "Is it, here?", "image": "train2014/COCO_train2014_000000000001.jpg"}
    write(tmp_path / "vqa_train.json", [{**asked, "answer": ["Yes"] * 7 + ["no"] * 3, "dataset": "vqa"}])
    write(tmp_path / "vg_qa.json", [
        {"question_id": 5, "question": "Where?", "image": "image/77.jpg", "answer": "here", "dataset": "vg"},
    ])  # fmt: skip
    write(tmp_path / "vqa_test.json", [asked])
    write(tmp_path / "answer_list.json", ["Yes"])
    settings = {"root": tmp_path, "form": "xvlm", "wording": "blip", "vg_weight": 0.2}
    train = VQAv2(train=("train", "vg"), **settings).load("vqa", "train")
    assert train["question"][:] == ["is it, here?", "where?"] and train["answer"][:] == ["Yes", "here"]
    assert train["answers"][1] == ["here"] and train["weights"][1] == pytest.approx([0.2])
    assert VQAv2(**settings).answers() == ["Yes"]
    assert VQAv2(test=("test",), **settings).load("vqa", "test")["answers"][:] == [[]]
    write(tmp_path / "answer_list.json", ["maybe"])
    with pytest.raises(DataError, match=r"vqa_train\.json, entry\[0\]: none of its answers is among the 1 of"):
        VQAv2(outside="stop", **settings).load("vqa", "train")


# --- GQA --------------------------------------------------------------------------------------------------------------


def test_gqa_keeps_ids_as_strings_and_what_its_metrics_need(tmp_path):
    source = GQA(root=made_sets.gqa(tmp_path))
    train, validation, test = (source.load("vqa", s)[0] for s in ("train", "validation", "test"))
    assert train["question_id"] == "01" and train["answer"] == "red" and train["group"] == "color"
    assert (train["structural"], train["semantic"], train["detailed"]) == ("query", "attr", "color")
    assert train["full_answer"] == "It is red." and train["balanced"] and train["steps"] == 2
    assert validation["entailed"] == ["01"] and validation["group"] == "" and test["image_id"] == "n8"
    hidden = GQA(root=tmp_path, test=("test_balanced",)).load("gqa", "test")[0]
    assert hidden["answer"] == hidden["structural"] == "" and hidden["entailed"] == []
    assert source.answers() == ["red", "blue"]


def test_gqa_joins_chunks_in_the_order_of_their_numbers(tmp_path):
    source = GQA(root=made_sets.gqa(tmp_path), train=("train_all",))
    table = source.load("vqa", "train")
    assert table["question_id"][:] == [str(100 + i) for i in range(11)] and not any(table["balanced"])
    (tmp_path / "questions1.2/train_all_questions/train_all_questions_3.json").unlink()
    with pytest.raises(DataError, match=r"expected the chunk train_all_questions_3\.json"):
        source.load("vqa", "train")


def test_gqa_in_the_forms_of_lxmert_and_mdetr(tmp_path):
    made_sets.gqa(tmp_path)
    write(tmp_path / "train.json", [{"question_id": "07", "img_id": "7", "sent": "?a", "label": {"red": 1.0}}])
    row = GQA(root=tmp_path, form="lxmert").load("vqa", "train")[0]
    assert (row["question_id"], row["image_id"], row["question"], row["answer"]) == ("07", "7", "?a", "red")
    write(tmp_path / "trainval_label2ans.json", ["b", "a"])
    assert GQA(root=tmp_path, form="lxmert").answers() == ["b", "a"]
    asked = {
        "file_name": "n8.jpg",
        "caption": "?b",
        "questionId": "08",
        "answer": "no",
        "question_type": "obj",
        "id": 0,
    }
    path = write(tmp_path / "finetune_gqa_testdev_balanced.json", {"images": [asked], "annotations": []})
    row = GQA(root=tmp_path, form="mdetr").load("vqa", "test")[0]
    assert (row["question_id"], row["answer"], row["semantic"], row["image_id"]) == ("08", "no", "obj", "n8")
    write(path, {"images": [{**asked, "questionId": 8}]})
    with pytest.raises(DataError, match=r"images\[0\]: expected 'questionId' to be a string, found 8"):
        GQA(root=tmp_path, form="mdetr").load("vqa", "test")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["02"].pop("answer"), r"val_balanced_questions\.json, id '02': the question '02' has no answer"),
        (lambda c: c["02"].update(imageId="9"), r"id '02': the picture '9\.jpg' is not there"),
        (lambda c: c["02"].update(entailed="01"), r"id '02': expected 'entailed' to be a list"),
        (lambda c: c.update({"02": []}), r"id '02': expected an object with named fields"),
    ],
)
def test_gqa_names_a_broken_question(tmp_path, edit, message):
    change(made_sets.gqa(tmp_path) / "questions1.2/val_balanced_questions.json", edit)
    with pytest.raises(DataError, match=message):
        GQA(root=tmp_path).load("vqa", "validation")


def test_gqa_testdev_has_answers_and_test_has_none(tmp_path):
    """Their names begin alike."""
    root = made_sets.gqa(tmp_path)
    path = root / "questions1.2/testdev_balanced_questions.json"
    content = json.loads(path.read_text())
    del content["03"]["answer"]
    write(path, content)
    with pytest.raises(RowError, match="testdev_balanced_questions.json, id '03': the question '03' has no answer"):
        GQA(root=root).load("vqa", "test")
    assert GQA(root=root).table("vqa", "test_balanced")["answer"][:] == [""]


def test_gqa_does_not_lose_a_question_whose_id_stands_twice(tmp_path):
    path = made_sets.gqa(tmp_path) / "questions1.2/val_balanced_questions.json"
    text = path.read_text()
    path.write_text(f"{text[:-1]}, {text[1:]}")
    with pytest.raises(DataError, match=r"val_balanced_questions\.json, id '02': this key stands twice"):
        GQA(root=tmp_path).load("vqa", "validation")


# --- NLVR2, SNLI-VE, ScienceQA ----------------------------------------------------------------------------------------


def test_nlvr2_finds_its_pictures_and_opens_them_by_content(tmp_path):
    source = NLVR2(root=made_sets.nlvr2(tmp_path))
    row = source.load("pairs", "train")[0]
    assert [i.size for i in row["images"]] == [(8, 6), (5, 7)] and [i.format for i in row["images"]] == ["PNG", "JPEG"]
    assert (row["statement"], row["label"], row["identifier"]) == ("The left dog sleeps.", "true", "train-5-0-1")
    asked = source.load("answer", "validation")[0]
    assert asked["question"] == "Two dogs. True or false?" and asked["answer"] == "false"
    cells = source.load("pairs", "validation").cast_column("images", [Image(decode=False)])[0]["images"]
    assert [c["path"].rpartition("/")[2] for c in cells] == ["dev-6-1-img0.png", "dev-6-1-img1.png"]


def test_nlvr2_in_the_form_of_xvlm(tmp_path):
    made_sets.nlvr2(tmp_path)
    files = ["dev/dev-6-1-img1.png", "dev/dev-6-1-img0.png"]
    path = write(tmp_path / "nlvr_test.json", [{"sentence": "It's so.", "label": "True", "images": files}])
    source = NLVR2(root=tmp_path, form="xvlm", wording="xvlm")
    row = source.load("pairs", "test")[0]
    assert row["statement"] == "its so" and row["label"] == "true" and row["identifier"] == ""
    write(path, [{"sentence": "It's so.", "label": "True", "images": files[:1]}])
    with pytest.raises(DataError, match=r"nlvr_test\.json, entry\[0\]: expected 'images' to be two paths"):
        source.load("pairs", "test")
    write(tmp_path / "balanced_dev.json", ({"identifier": "dev-6-1-0"},))  # of the other form
    with pytest.raises(NotThere, match=r"the form 'xvlm' has no split 'balanced_dev'; it has train, dev, test1, test2"):
        source.table("pairs", "balanced_dev")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"label": "true"}, r"dev\.json, line 2: expected 'label' to be \"True\" or \"False\", found 'true'"),
        ({"label": True}, r"line 2: expected 'label' to be a string, found True"),
        ({"identifier": "dev-6-1-0"}, r"line 2: the identifier 'dev-6-1-0' stands twice"),
        ({"identifier": "dev-6"}, r"line 2: expected 'identifier' to be SPLIT-SET-PAIR-SENTENCE, found 'dev-6'"),
        ({"identifier": "dev-7-1-0"}, r"line 2: the picture 'dev/dev-7-1-img0\.png' is not there"),
    ],
)
def test_nlvr2_names_a_broken_line(tmp_path, rows, message):
    path = made_sets.nlvr2(tmp_path) / "data/dev.json"
    with path.open("a") as file:
        file.write(json.dumps({"identifier": "dev-6-1-1", "sentence": "x", "label": "True"} | rows) + "\n")
    with pytest.raises(DataError, match=message):
        NLVR2(root=tmp_path).load("pairs", "validation")
    assert len(NLVR2(root=tmp_path, on_error="skip").load("pairs", "validation")) == 1


def test_json_lines_that_are_none(tmp_path):
    path = made_sets.nlvr2(tmp_path) / "data/dev.json"
    whole = path.read_text()
    path.write_text(f"[{whole.strip()}]")
    with pytest.raises(DataError, match=r"dev\.json, line 1: expected one JSON object a line, found a JSON list"):
        NLVR2(root=tmp_path, on_error="skip").load("pairs", "validation")
    path.write_text(whole + "\n" + whole[:20])
    with pytest.raises(DataError, match=r"dev\.json, line 3: expected a JSON object"):
        NLVR2(root=tmp_path).load("pairs", "validation")
    assert len(NLVR2(root=tmp_path, on_error="skip").load("pairs", "validation")) == 1


@pytest.mark.parametrize("key", ["Flickr30K_ID", "Flikr30kID"])
def test_snli_ve_reads_both_keys(tmp_path, key):
    picture(tmp_path / "flickr30k-images/0123.jpg")
    row = {key: "0123", "gold_label": "neutral", "sentence1": "premise", "sentence2": "It rains.", "pairID": "a"}
    path = write(tmp_path / "snli_ve_dev.jsonl", (row,))
    found = SNLIVE(root=tmp_path).load("entailment", "validation")[0]
    assert (found["statement"], found["label"], found["premise"]) == ("It rains.", "neutral", "premise")
    assert (found["pair_id"], found["image_id"]) == ("a", "0123")
    for fault, message in (
        ({"gold_label": "-"}, r"snli_ve_dev\.jsonl, line 2: 'gold_label' is '-'"),
        ({"gold_label": "maybe"}, r"line 2: 'gold_label': unknown value 'maybe'"),
        ({"pairID": "a"}, r"line 2: the pairID 'a' stands twice"),
        ({key: "9"}, r"line 2: the picture '9\.jpg' is not there"),
    ):
        write(path, (row, {**row, "pairID": "b", **fault}))
        with pytest.raises(DataError, match=message):
            SNLIVE(root=tmp_path).load("entailment", "validation")
    write(path, ({k: v for k, v in row.items() if k != key},))
    with pytest.raises(DataError, match=r"line 1: expected the field 'Flickr30K_ID' or 'Flikr30kID', found neither"):
        SNLIVE(root=tmp_path).load("entailment", "validation")


def test_scienceqa_with_and_without_a_picture(tmp_path):
    asked = {
        "question": "Which?",
        "choices": ["this", "that"],
        "answer": 1,
        "hint": "",
        "image": None,
        "split": "train",
    }
    problems = {"3": asked, "4": {**asked, "hint": "Look.", "image": "image.png", "subject": "natural science",
                                  "grade": "grade2"}}  # fmt: skip
    path = write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"train": ["4", "3"]})
    picture(tmp_path / "images/train/4/image.png", "PNG")
    table = ScienceQA(root=tmp_path).load("answer", "train")
    assert table["question_id"][:] == ["4", "3"] and [len(i) for i in table["images"]] == [1, 0]
    assert table[0]["answer"] == "that" and table[0]["choices"] == ["this", "that"] and table[0]["hint"] == "Look."
    assert table["grade"][:] == ["grade2", ""]
    with pytest.raises(
        DataError, match=r"pid_splits\.json: expected lists of question ids by split; unknown split 'test'"
    ):
        ScienceQA(root=tmp_path).load("answer", "test")
    write(path, {**problems, "3": {**asked, "answer": 2}})
    with pytest.raises(
        DataError, match=r"problems\.json, id '3': expected 'answer' to be a choice from 0 to 1, found 2"
    ):
        ScienceQA(root=tmp_path).load("answer", "train")
    write(tmp_path / "pid_splits.json", {"train": ["4", "5"]})
    with pytest.raises(DataError, match=r"pid_splits\.json, train\[1\]: the question '5' is not in problems\.json"):
        ScienceQA(root=tmp_path).load("answer", "train")
