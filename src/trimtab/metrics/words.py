"""How the VQA evaluation writes answers alike before it compares them (GT-Vision-Lab/VQA, `vqaEval.py`)."""

from __future__ import annotations

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}  # fmt: skip

# Words that get an apostrophe back which was left out; where a word has two, either one may be missing.
_SHORTENED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _SHORTENED.split() for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the published table has this one the wrong way round

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the published code hands a flag (re.UNICODE, 32) to the argument that limits the replacements


def clean(answer: str) -> str:
    """Line ends and tabs to blanks, no blanks at either end; done to every answer."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def plain_punctuation(answer: str) -> str:
    """Punctuation goes; it leaves a blank unless the answer has it beside a blank, or has a comma within a number."""
    joined = _COMMA_IN_NUMBER.search(answer) is not None
    out = answer
    for sign in PUNCTUATION:
        out = out.replace(sign, "" if joined or f"{sign} " in answer or f" {sign}" in answer else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def plain_words(answer: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes restored."""
    told = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in told if word not in ARTICLES)


def normalise(answer: str) -> str:
    """The official normalisation: what two answers must have in common to be the same answer.

    >>> normalise("The T-Shirts, two.")
    't shirts 2'
    """
    return plain_words(plain_punctuation(clean(answer)))


def normalise_vilt(answer: str) -> str:
    """The copy with which ViLT and METER build their vocabulary of answers (ViLT, `glossary.normalize_word`): line
    ends and tabs count as any white space, and no comma is left."""
    return plain_words(plain_punctuation(answer)).replace(",", "")
