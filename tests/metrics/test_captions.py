"""Captions: the words of the official tokeniser, and the scores of the official code."""

from __future__ import annotations

import pytest

from trimtab.metrics import captions, coco_java, ptb

# Captions and what Stanford's PTBTokenizer 3.4.1 and the official list of punctuation leave of them.
WORDS = {
    "It's a well-lit horse's stall (left), isn't it?": "it 's a well-lit horse 's stall -lrb- left -rrb- is n't it",
    "I can't, won't, don't, shan't; they're we've I'm he'd she'll": "i ca n't wo n't do n't sha n't they 're we 've i "
    "'m he 'd she 'll",
    "You cannot, I'm gonna; 'tis o'clock, O'Brien's": "you can not i 'm gon na 't is o'clock o'brien 's",
    "Mr. Smith of St. Louis, U.S. at 5:30 p.m. etc. The inc. A. Miss. miss.": "mr. smith of st. louis u.s. at 5:30 "
    "p.m. etc. the inc. a. miss. miss",
    "No. 5 has 1,000 dogs at $5.00 and 50% of 1/2 #1 @home": "no. 5 has 1,000 dogs at $ 5.00 and 50 % of 1/2 # 1 @home",
    "a \"dog\" and/or 'cat' runs,jumps ... wait... ok?? no!": "a dog and/or cat runs jumps wait ok ?? no",
    "an ant's-eye-view, dogs' bowls [x] R&B a&b wi--fi - the '90s": "an ant 's eye-view dogs bowls -lsb- x -rsb- r&b a "
    "& b wi fi the '90s",
    "a man's  two   spaces\tand a café’s door": "a man 's two spaces and a café 's door",
    "": "",
}


def test_words_are_those_of_the_official_tokeniser():
    assert {text: " ".join(ptb.tokens(text)) for text in WORDS} == WORDS
    assert not [text for text in WORDS if ptb.doubtful(text)]


@pytest.mark.parametrize(
    "text",
    [
        "p!nk dog",
        "see www.foo.com",
        "a :) dog",
        "the dog.the cat",
        "y'all",
        "a – b",
        "10:o",
        "50 1/2 dogs",
        "he says no.",
        "with vitamin A. The cat",
        "from the U.S.",
    ],
)
def test_captions_that_the_official_tokeniser_may_split_otherwise_are_found(text):
    assert ptb.doubtful(f"a dog {text}")
    with pytest.warns(UserWarning, match="official Java tokeniser may split otherwise"):
        captions.cider(["a dog", "a cat"], [["a dog"], [text]])


def test_texts_are_scored_by_their_words_and_by_id():
    told = {"7": ["A dog's (red) ball."], "8": ["Two cats, one dog."]}
    mine = {"8": "two cats one dog", "7": "a dog 's -LRB- red -RRB- ball"}
    result = captions.evaluate(mine, told)
    assert result["CIDEr"] == pytest.approx(10) and result["ROUGE-L"] == 1
    assert result["BLEU-4"] == pytest.approx(1, abs=1e-6) and len(result["by_caption"]["BLEU-4"]) == 2
    short = captions.evaluate(mine | {"8": ""}, told)
    assert short["by_caption"]["ROUGE-L"] == [1, 0] and 0 < short["CIDEr"] < 6


def test_captions_refuse_what_cannot_be_scored():
    told = {1: ["a dog"], 2: ["a cat"]}
    for mine, references, message in (
        ({1: "a dog"}, told, "picture without a prediction: 2"),
        ({1: "a", 2: "b", 3: "c"}, told, "unknown picture: 3"),
        ({"1": "a", "2": "b"}, told, "picture 1: its prediction is under '1'"),
        ({1: "a", 2: "b"}, told | {2: []}, "picture 2 has no reference"),
        ({1: "a", 2: None}, told, "picture 2: expected captions as strings, found None"),
    ):
        with pytest.raises(ValueError, match=message):
            captions.evaluate(mine, references)
    with pytest.raises(ValueError, match="expected as many captions as lists of references, found 1 and 2"):
        captions.cider(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="row 1 has no reference"):
        captions.bleu4(["a", "b"], [["a"], []])


def test_java_is_refused_with_the_way_out_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(coco_java.shutil, "which", lambda name: None)
    monkeypatch.setattr(coco_java.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match="the official tokeniser needs Java .* no Java runtime is installed"):
        captions.evaluate({1: "a"}, {1: ["a"]}, java=True)
    monkeypatch.setattr(coco_java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"METEOR needs .* pip install -e '\.\[captions\]'"):
        coco_java.meteor([["a"]], [[["a"]]])


@pytest.mark.slow
@pytest.mark.skipif(coco_java.missing() is not None, reason=str(coco_java.missing()))
def test_java_gives_the_same_words():
    assert coco_java.tokenise([*WORDS, "", "."]) == [*WORDS.values(), "", ""]
    with pytest.raises(
        RuntimeError, match=r"SPICE needs the models of its parser, .*models\.jar in .*get_stanford_models"
    ):
        coco_java.spice([["a"]], [[["a"]]])
