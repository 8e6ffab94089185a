"""Captions and questions as the authors' code hands them to the model: lower case, without punctuation, cut to length.

`xvlm`: X-VLM's and multiflow's `pre_caption` and `pre_question`; `blip`: BLIP's, which keep comma, apostrophe, question
mark, hyphen and slash.
"""

from __future__ import annotations

import re
from typing import Literal

Wording = Literal["as written", "xvlm", "blip"]

_XVLM = re.compile(r"[,.'!?\"()*#:;~]")
_BLIP = re.compile(r"[.!\"()*#:;~]")
_BLANKS = re.compile(r"\s{2,}")
_PARTS = str.maketrans("-/", "  ")


def caption(text: str, wording: Wording, longest: int = 30) -> str:
    """A caption or statement in one of the wordings, its first `longest` words.

    Raises:
        ValueError: if nothing is left in X-VLM's wording, where the published code stops too; BLIP's goes on.
    """
    if wording == "as written":
        return text
    if wording == "xvlm":
        told = _XVLM.sub("", text.lower()).translate(_PARTS).replace("<person>", "person")
    else:
        told = _BLIP.sub(" ", text.lower())
    told = _first(_BLANKS.sub(" ", told).rstrip("\n").strip(" "), longest)
    if not told and wording == "xvlm":
        raise ValueError(f"nothing is left of {text!r} in the wording {wording!r}")
    return told


def question(text: str, wording: Wording, longest: int = 30) -> str:
    """A question in one of the wordings, its first `longest` words; blanks inside it stay, as in the published code."""
    if wording == "as written":
        return text
    told = _XVLM.sub("", text.lower()).translate(_PARTS) if wording == "xvlm" else _BLIP.sub("", text.lower())
    return _first(told.rstrip(" "), longest)


def _first(text: str, longest: int) -> str:
    words = text.split(" ")
    return text if len(words) <= longest else " ".join(words[:longest])
