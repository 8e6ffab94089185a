"""What of the COCO caption evaluation needs Java: its tokeniser, METEOR 1.5 and SPICE, through `pycocoevalcap`.

Installed by `pip install -e '.[captions]'` and a Java runtime (8 or later). Each function refuses, with the way out,
where one of them is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Words = Sequence[str]


def missing() -> str | None:
    """What is not installed and how to get it, or None."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "the package pycocoevalcap is not installed: pip install -e '.[captions]' in trimtab's folder"
    if shutil.which("java") is None:
        return "no Java runtime is installed: expected a program `java` on the path"
    return None


def _package(name: str) -> Any:
    if reason := missing():
        raise RuntimeError(f"{name} needs Java and pycocoevalcap, but {reason}")
    return importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")


def tokenise(captions: Sequence[str]) -> list[str]:
    """Captions by the official tokeniser: lower case, punctuation dropped, a blank between words.

    Raises:
        RuntimeError: if Java or the package is missing, or Java did not run.
    """
    if reason := missing():
        raise RuntimeError(f"the official tokeniser needs Java and pycocoevalcap, but {reason}")
    module = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    # A caption without a word at the end would be lost with its line, so that each goes under its own number and a full
    # stop, which is dropped, stands at the end.
    lines = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate([*captions, "."])}
    found = module.PTBTokenizer().tokenize(lines)
    if len(found) < len(captions):
        raise RuntimeError(f"expected {len(captions)} tokenised captions from Java, found {len(found)}")
    return [found[i][0] for i in range(len(captions))]


def meteor(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the set and of each caption (Denkowski & Lavie, WMT 2014).

    Raises:
        RuntimeError: if Java or the package is missing.
    """
    scorer = _package("METEOR").Meteor()
    total, each = scorer.compute_score(*_numbered(captions, references))
    return float(total), [float(score) for score in each]


def spice(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """SPICE of the set and of each caption (Anderson et al., ECCV 2016).

    Raises:
        RuntimeError: if Java, the package, or the parser's models are missing. The models are a download of their own,
            which the package would start by itself; that is left to the user.
    """
    module = _package("SPICE")
    library = Path(module.__file__).parent / "lib"
    if not list(library.glob("stanford-corenlp-*-models.jar")):
        raise RuntimeError(
            f"SPICE needs the models of its parser, stanford-corenlp-3.6.0-models.jar in {library}, found none: "
            "python -c 'from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()'"
        )
    total, each = module.Spice().compute_score(*_numbered(captions, references))
    return float(total), [float(score["All"]["f"]) for score in each]


def _numbered(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[Any, Any]:
    """References and captions as the package takes them."""
    told = {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}
    return told, {i: [" ".join(words)] for i, words in enumerate(captions)}
