"""Predictions as files in the form that evaluation servers and the official programs take, and back.

| form | file | of |
|---|---|---|
| `vqa` | JSON list of `question_id` (a number), `answer` | VQA v2 (EvalAI), VQA-E, OK-VQA |
| `gqa` | JSON list of `questionId` (a string), `prediction` | GQA |
| `nlvr2` | lines `identifier,True` or `identifier,False` | NLVR2 |
| `captions` | JSON list of `image_id` (a number), `caption` | COCO captions, nocaps |

Every id is checked against those of the questions before anything is written, and a file is there as a whole or not at
all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.files import replace_file
from trimtab.metrics.checking import complete


@dataclass(frozen=True)
class Form:
    """Attributes:
    name: of the id.
    answer: the other field.
    number: the id is a whole number in the file.
    what: has the id, in the singular.
    allowed: an answer that may stand there.
    """

    name: str
    answer: str
    number: bool
    what: str
    allowed: Callable[[str], bool] = lambda answer: True


FORMS = {
    "vqa": Form("question_id", "answer", True, "question"),
    "gqa": Form("questionId", "prediction", False, "question"),
    "nlvr2": Form("identifier", "label", False, "pair", lambda answer: answer.lower() in ("true", "false")),
    "captions": Form("image_id", "caption", True, "picture"),
}


def _form(name: str) -> Form:
    if name not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, found {name!r}")
    return FORMS[name]


def _identity(form: Form, value: Any) -> int | str:
    """An id as the file has it; a string of digits becomes a number where numbers stand."""
    if form.number:
        text = str(value)
        if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
            raise ValueError(f"{form.what} {value!r}: expected a whole number as {form.name}")
        return int(text)
    if not isinstance(value, str):
        raise ValueError(f"{form.what} {value!r}: expected a string as {form.name}, found {type(value).__name__}")
    return value


def write(
    name: str, path: str | Path, predictions: Mapping[Any, str], known: Collection[Any], extra: bool = False
) -> Path:  # fmt: skip
    """Write predictions for a server.

    Args:
        name: of the form: vqa, gqa, nlvr2, captions.
        predictions: id -> answer. Ids may be strings of digits where the file has numbers.
        known: the ids that the server knows, all of which must have a prediction (`ids_of` reads them from the file of
            questions).
        extra: predictions for other ids are left out, not refused.

    Raises:
        ValueError: with the id: for a prediction that is missing or for an unknown id, an answer that is no string or
            may not stand there, an id of another kind, or one that is there twice, as a number and as a string.
    """
    form = _form(name)
    wanted = {_identity(form, value) for value in known}
    given: dict[int | str, str] = {}
    for value, answer in predictions.items():
        key = _identity(form, value)
        if key in given:
            raise ValueError(f"{form.what} {key!r} has two predictions")
        if not isinstance(answer, str) or not form.allowed(answer):
            raise ValueError(f"{form.what} {key!r}: {form.answer} {answer!r} may not stand in a file for {name}")
        given[key] = answer
    complete(given, wanted, form.what, extra)
    given = {key: answer for key, answer in given.items() if key in wanted}
    if name == "nlvr2":
        text = "".join(f"{key},{answer.capitalize()}\n" for key, answer in given.items())
    else:
        text = json.dumps([{form.name: key, form.answer: answer} for key, answer in given.items()])
    path = Path(path)
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def read(name: str, path: str | Path, known: Collection[Any] | None = None, extra: bool = False) -> dict[Any, str]:
    """Read such a file: id, as the file has it -> answer.

    Args:
        name: of the form: vqa, gqa, nlvr2, captions.
        path: of the file.
        known: the ids that must have a prediction (see `ids_of`); None looks at the file alone.
        extra: predictions for other ids are let pass.

    Raises:
        ValueError: with the file and the row, from 0: for a broken file, a row of another form, an id of another kind
            or that is there twice. With the file and the id: for a prediction that is missing or for an unknown id.
    """
    form, path = _form(name), Path(path)
    found: dict[Any, str] = {}
    for row, (value, answer) in enumerate(_csv(path) if name == "nlvr2" else _json(form, path)):
        try:
            if _identity(form, value) != value:
                raise ValueError(f"{form.what} {value!r}: expected a whole number, found a string")
            if not isinstance(answer, str):
                raise ValueError(f"{form.what} {value!r}: expected {form.answer} as a string, found {answer!r}")
            if value in found:
                raise ValueError(f"{form.what} {value!r} is there twice")
        except ValueError as error:
            raise ValueError(f"{path}: row {row}: {error}") from None
        found[value] = answer
    if known is not None:
        try:
            complete(found, known, form.what, extra)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def _json(form: Form, path: Path) -> Iterator[tuple[Any, Any]]:
    rows = _load(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {form.name, form.answer} <= row.keys():
            raise ValueError(f"{path}: row {i}: expected {form.name} and {form.answer}, found {row!r:.80}")
        yield row[form.name], row[form.answer]


def _csv(path: Path) -> Iterator[tuple[str, str]]:
    for i, row in enumerate(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()):
        parts = row.strip().split(",")
        if len(parts) != 2:
            raise ValueError(f"{path}: row {i}: expected identifier,label, found {row!r:.80}")
        yield parts[0], parts[1]


def ids_of(path: str | Path) -> list[Hashable]:
    """The ids in a file of questions: VQA's questions or annotations, GQA's questions, NLVR2's JSON lines, or COCO's
    captions or picture list; which of these is read from its contents.

    Raises:
        ValueError: for a file of another form, with the row where it is one.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError:
        return _lines(path, text)
    if isinstance(content, dict):
        for field, name in (("questions", "question_id"), ("images", "id"), ("annotations", "question_id")):
            if isinstance(rows := content.get(field), list):
                return [_field(path, i, row, name) for i, row in enumerate(rows)]
        if content and all(isinstance(row, dict) and "question" in row for row in content.values()):
            return list(content)
        if "identifier" in content:  # a file of one line
            return [content["identifier"]]
    raise ValueError(f"{path}: expected questions of VQA or GQA, pairs of NLVR2, or pictures of COCO")


def _lines(path: Path, text: str) -> list[Hashable]:
    found = []
    for i, line in enumerate(row for row in text.splitlines() if row.strip()):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: row {i}: expected JSON: {error}") from None
        found.append(_field(path, i, row, "identifier"))
    return found


def _field(path: Path, row: int, content: Any, name: str) -> Hashable:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"{path}: row {row}: expected {name}, found {content!r:.80}")
    return content[name]
