"""Answering by writing: a chat model is shown pictures and asked in words, and its own words are the answer.

row: images, question (hint, choices) --wording--> conversation --the model's template--> prompt --generate--> answer
training: prompt + answer, the loss on the answer's tokens alone (LLaVA, section 4.2; LaVIN and DAS on ScienceQA)
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data.images import decode, encoded
from trimtab.metrics import captions, vqa
from trimtab.settings import within
from trimtab.sizes import as_usual
from trimtab.tasks.base import TASKS, Batch, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PRIMARY = {"exact": "exact match", "choice": "accuracy", "vqa": "vqa accuracy", "cider": "cider"}


@TASKS.register("answer")
class Answer(Task):
    """Columns `question` and `answer`, or `messages`; `image`, or `images` (any number); `answers`, `choices`, `hint`.

    `messages` is a transformers chat whose last message, the assistant's, is the answer; its pictures are entries
    `{"type": "image"}`, which stand for the row's pictures in their order.

    Without `wording` the user's words are what a row has of these, a line each: "Context: " and the hint, the question,
    the choices as "A. ...", and, where letters are asked for, LLaVA's "Answer with the option's letter from the given
    choices directly."

    Args:
        metric: `exact`: the answer, or one of `answers`, letter by letter; `choice`: the right one of `choices`; `vqa`:
            VQA accuracy over the column `answers`; `cider`: CIDEr against `answers`, or the one `answer`.
        wording: how the user's words are made of `{question}`, `{hint}` and `{choices}`.
        template: for a folder without a chat template: the whole prompt, of `{question}` (the user's words) and
            `{images}` (the tokens of the row's pictures, for processors that do not put them there), such as
            "Question: {question} Answer:".
        system: a system message before every conversation.
        choose: how a choice is answered, by its `letter` or its `text`.
        longest: tokens of an answer at most, in generation.
        shortest: tokens of an answer at least.
        beams: of beam search; 1 is greedy.
        length_penalty: above 1 favours longer answers of several beams.
        smoothing: of labels, in training.
        by: columns by whose values the primary metric is given too, such as `subject`; of `grade` also those of
            ScienceQA's published table, 1-6 and 7-12; `context` is its "text", "image" and "no" (a hint, a picture).

    Raises:
        ValueError: if a wording or template has an unknown field, or a number is out of its range.
    """

    columns = ()
    primary = "exact match"
    kinds = ("chat",)
    blank = {"question": "", "answer": ""}
    causal = True

    def __init__(self, metric: Literal["exact", "choice", "vqa", "cider"] = "exact", wording: str | None = None,
                 template: str | None = None, system: str | None = None, choose: Literal["letter", "text"] = "letter",
                 longest: int = 32, shortest: int = 0, beams: int = 1, length_penalty: float = 1.0,
                 smoothing: float = 0.0, by: Sequence[str] = ()):  # fmt: skip
        self.metric, self.wording, self.template, self.system = metric, wording, template, system
        self.choose, self.smoothing, self.by = choose, smoothing, tuple(by)
        self.primary = _PRIMARY[metric]  # type: ignore[misc]  # by which runs of these settings are compared
        within(locals(), longest="[1, inf)", shortest=f"[0, {longest}]", beams="[1, inf)", smoothing="[0, 1)",
               length_penalty="(-inf, inf)")  # fmt: skip
        self.how = {"longest": longest, "shortest": shortest, "beams": beams, "length_penalty": length_penalty}
        _filled("wording", wording or "", question="", hint="", choices="")
        _filled("template", template or "", question="", images="")
        if template is not None and "{question}" not in template:
            raise ValueError(f"template: expected '{{question}}' in it, found {template!r}")
        if template is not None and system is not None:
            raise ValueError("system: a plain `template` has no place for it: write it into the template")

    # --- conversations ------------------------------------------------------------------------------------------------

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        pictures = [_pictures(row, i) for i, row in enumerate(rows)]
        asked = [
            self._conversation(backbone, row, len(p), i) for i, (row, p) in enumerate(zip(rows, pictures, strict=True))
        ]
        if not train:
            return backbone.ask(asked, pictures)
        return backbone.teach(asked, pictures, [self._told(row, i) for i, row in enumerate(rows)])

    def _conversation(self, backbone: Any, row: dict[str, Any], pictures: int, number: int) -> Any:
        """What the backbone is given of a row: messages, or a prompt as it is."""
        if self.template is not None:
            if row.get("messages"):
                raise ValueError(
                    f"row {number} of the batch has `messages`, which a plain `template` cannot put: leave it out"
                )
            places = (backbone.picture_token or "") * pictures
            return _filled("template", self.template, question=self._asked(row), images=places)
        first = [_message("system", self.system)] if self.system else []
        if row.get("messages"):
            messages, _ = _split(row["messages"], number)
            places = sum(part["type"] == "image" for m in messages for part in m["content"])
            if places != pictures:
                raise ValueError(
                    f"row {number} of the batch: its messages have {places} places for pictures "
                    f"({{'type': 'image'}}), and it has {pictures} pictures"
                )
            return [*first, *messages]
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": self._asked(row)}]
        return [*first, {"role": "user", "content": content}]

    def _asked(self, row: dict[str, Any]) -> str:
        """The user's words."""
        choices, hint = list(row.get("choices") or ()), row.get("hint") or ""
        if len(choices) > len(LETTERS):
            raise ValueError(
                f"{len(choices)} choices, and there are {len(LETTERS)} letters for them: {choices[:3]} ..."
            )
        lines = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices)]
        if self.wording is not None:
            return _filled("wording", self.wording, question=row["question"], hint=hint, choices="\n".join(lines))
        if lines and self.choose == "letter":
            lines.append("Answer with the option's letter from the given choices directly.")
        return "\n".join([*([f"Context: {hint}"] if hint else []), row["question"], *lines])

    def _told(self, row: dict[str, Any], number: int) -> str:
        """The answer that a row teaches.

        Raises:
            ValueError: if it has none, or one that is no choice of its.
        """
        answer = _split(row["messages"], number)[1] if row.get("messages") else row["answer"]
        if not answer:
            raise ValueError(f"row {number} of the batch has no answer to learn: leave such rows out of training")
        if not row.get("choices"):
            return answer
        index = _index(answer, row["choices"], f"row {number} of the batch")
        return LETTERS[index] if self.choose == "letter" else row["choices"][index]

    # --- the model ----------------------------------------------------------------------------------------------------

    def head(self, backbone: Any) -> nn.Module:
        """Nothing: the model's own head writes."""
        return nn.Module()

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        logits, labels = backbone.told(batch)
        total = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing, reduction="sum")
        return divided.mean(total, len(labels))

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        return [{"answer": text} for text in backbone.reply(batch, **self.how)]

    def example(self, backbone: Any, size: int) -> Batch:
        """Rows of one picture, a question of as many words as costs are counted with, and an answer of one."""
        row = {"images": [backbone.picture()], "question": " ".join(["a"] * backbone.counted_text), "answer": "a"}
        with as_usual():  # a processor of pictures computes with numpy
            if size <= 2:
                return self.collate(backbone, [row] * size, True)
            one, two = (self.collate(backbone, [row] * n, True) for n in (1, 2))
            found = {name: _axis_of_rows(one[name], two[name]) for name in two}
            axes = {name: axis for name, axis in found.items() if axis is not None}
            if len(axes) < len(found):  # rows do not just follow each other
                return self.collate(backbone, [row] * size, True)
            return {name: torch.cat([one[name]] * size, dim=axis) for name, axis in axes.items()}

    # --- measuring ----------------------------------------------------------------------------------------------------

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        texts, table = [record["answer"] for record in records], list(_words_of(rows))
        if self.metric == "cider":
            references = [self._references(row, i) for i, row in enumerate(table)]
            return {"cider": captions.cider(texts, references), "bleu@4": captions.bleu4(texts, references)}
        values = [self._value(text, row, i) for i, (text, row) in enumerate(zip(texts, table, strict=True))]
        for record, value in zip(records, values, strict=True):
            record["credit"] = value
        out = {self.primary: sum(values) / len(values)}
        if self.metric == "choice":
            read = [_chosen(text, row["choices"], self.choose) for text, row in zip(texts, table, strict=True)]
            out["no choice read"] = read.count(None) / len(read)
        groups: dict[str, list[float]] = defaultdict(list)
        for column in self.by:
            for row, value in zip(encoded(rows) if column == "context" else table, values, strict=True):
                for label in _groups(column, row):
                    groups[label].append(value)
        return out | {f"{self.primary}: {label}": sum(v) / len(v) for label, v in sorted(groups.items())}

    def _references(self, row: dict[str, Any], number: int) -> list[str]:
        if row.get("messages"):
            return [_split(row["messages"], number)[1]]
        return list(row.get("answers") or [row["answer"]])

    def _value(self, text: str, row: dict[str, Any], number: int) -> float:
        """What an answer is worth, in 0..1."""
        if self.metric == "choice":
            return float(
                _chosen(text, row["choices"], self.choose) == _index(row["answer"], row["choices"], f"row {number}")
            )
        if self.metric == "vqa":
            return vqa.score(row["answers"], text)
        told = [reference.strip() for reference in (*self._references(row, number), row.get("answer") or "")]
        return float(text in [reference for reference in told if reference])

    def chance(self, rows: Any) -> float | None:
        """Choosing blindly, or always giving the commonest answer."""
        if self.metric == "choice":
            return sum(1 / len(choices) for choices in rows["choices"]) / len(rows)
        if self.metric != "exact" or "answer" not in rows.column_names:
            return None
        return Counter(rows["answer"]).most_common(1)[0][1] / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        table, out = _words_of(rows), []
        for i in indices:
            row, text = table[i], records[i]["answer"]
            target = self._references(row, i)[0]
            if row.get("messages"):
                query = " ".join(p["text"] for p in _split(row["messages"], i)[0][-1]["content"] if p["type"] == "text")
            else:
                query = row["question"]
            if row.get("choices"):
                query += " " + " ".join(f"({LETTERS[k]}) {choice}" for k, choice in enumerate(row["choices"]))
            right = text == target if self.metric == "cider" else self._value(text, row, i) > 0.5
            out.append({"query": query, "prediction": text, "target": target, "correct": right})
        return out

    def check_row(self, row: Mapping[str, Any], where: str) -> None:
        """Raise a ValueError unless a row has a question or messages; it may be about no picture."""
        if row.get("question") is None and not row.get("messages"):
            raise ValueError(f"{where}: task 'answer' needs 'question' or 'messages', found {sorted(row)}")

    def check(self, backbone: Any, table: Any) -> None:
        """Raise a ValueError unless it is a chat model and the table has what the settings ask for."""
        if backbone.kind not in self.kinds:
            raise ValueError(
                f"task 'answer' needs a chat backbone, a folder of a model that writes answers (transformers' "
                f"AutoModelForImageTextToText); {backbone.name!r} is {backbone.kind}"
            )
        columns = table.column_names
        needed = [] if "messages" in columns else ["question", "answer"]
        needed += {"choice": ["choices", "answer"], "vqa": ["answers"]}.get(self.metric, [])
        needed += [column for column in self.by if column != "context"]
        if missing := [c for c in dict.fromkeys(needed) if c not in columns]:
            raise ValueError(f"task 'answer' needs the columns {missing}, the table has {columns}")

    def check_scored(self, table: Any) -> None:
        for i, row in enumerate(_words_of(table)):
            if self.metric == "choice":
                _index(row["answer"] or "", row["choices"] or (), f"row {i}")
            elif self.metric == "vqa" and len(row["answers"] or ()) < vqa.LEAST:
                raise ValueError(
                    f"row {i}: {len(row['answers'] or ())} answers in 'answers', expected those of ten people, "
                    f"{vqa.LEAST} at least: VQA's accuracy asks for three others who say the same; take `metric: exact`"
                )
            elif not any((*self._references(row, i), row.get("answer"))):
                raise ValueError(f"row {i}: no answer, so that nothing can be scored: leave such rows out of the test")


def _filled(what: str, template: str, **fields: str) -> str:
    """A template with its fields; no other braces are touched, and what is filled in is not looked at again."""
    names = re.findall(r"\{(\w*)\}", template)
    if wrong := [name for name in names if name not in fields]:
        raise ValueError(f"{what}: unknown field {{{wrong[0]}}}; there are {', '.join(f'{{{f}}}' for f in fields)}")
    return re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], template)


def _axis_of_rows(one: Tensor, two: Tensor) -> int | None:
    """The axis along which the tensor of two equal rows is that of one, twice; None if there is none."""
    for axis in range(one.ndim):
        sizes = [*one.shape[:axis], 2 * one.shape[axis], *one.shape[axis + 1 :]]
        if list(two.shape) == sizes and torch.equal(two, torch.cat([one, one], dim=axis)):
            return axis
    return None


def _pictures(row: Mapping[str, Any], number: int) -> list[Any]:
    """A row's PIL images: those of `images`, or the one of `image`; none if it has neither."""
    cells = row.get("images")
    if cells is None:
        cells = [] if row.get("image") is None else [row["image"]]
    return [decode(cell, f"picture {k} of row {number} of the batch") for k, cell in enumerate(cells)]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _split(messages: Sequence[Mapping[str, Any]], number: int) -> tuple[list[dict[str, Any]], str]:
    """Messages up to the last answer, their content as lists of parts, and that answer; empty if none is given."""
    out = []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [
            {k: v for k, v in part.items() if v is not None} for part in content
        ]  # fmt: skip
        if strange := [p.get("type") for p in parts if p.get("type") not in ("text", "image")]:
            raise ValueError(f"row {number}: a message has a part of type {strange[0]!r}, expected 'text' or 'image'")
        out.append({"role": message["role"], "content": parts})
    if not out or out[-1]["role"] != "assistant":
        return out, ""
    answer = out.pop()
    return out, "".join(part.get("text", "") for part in answer["content"])


def _index(answer: str, choices: Sequence[str], where: str) -> int:
    """Which choice an answer is: by its text, else by its letter."""
    if answer in choices:
        return list(choices).index(answer)
    if len(answer) == 1 and answer in LETTERS[: len(choices)]:
        return LETTERS.index(answer)
    raise ValueError(
        f"{where}: expected 'answer' to be one of the choices {list(choices)} or its letter, found {answer!r}"
    )


def _chosen(text: str, choices: Sequence[str], choose: str) -> int | None:
    """Which choice a written answer names; None if it names none, which counts as wrong.

    As LLaVA's evaluation on ScienceQA reads it: a letter alone, one before a stop or bracket, or "answer is X"; a text
    is that of a choice but for case, spaces and a last full stop. Where both can be read, what `choose` says is.
    """
    found = re.match(r"\(?([A-Z])(?:[).:]|$)", text.strip()) or re.search(r"[Aa]nswer is:? \(?([A-Z])(?![\w'])", text)
    by_letter = LETTERS.index(found[1]) if found and LETTERS.index(found[1]) < len(choices) else None
    plain = [" ".join(c.casefold().split()).rstrip(".") for c in (text, *choices)]
    by_text = plain[1:].index(plain[0]) if plain[0] in plain[1:] else None
    first, second = (by_letter, by_text) if choose == "letter" else (by_text, by_letter)
    return second if first is None else first


def _groups(column: str, row: Mapping[str, Any]) -> list[str]:
    """The groups of `by` to which a row belongs."""
    if column == "context":
        seen = bool(row.get("images") or row.get("image"))
        found = [name for name, there in (("text context", row.get("hint")), ("image context", seen)) if there]
        return found or ["no context"]
    value = str(row[column])
    grade = re.fullmatch(r"grade(\d+)", value) if column == "grade" else None
    return [value, "grades 1-6" if int(grade[1]) <= 6 else "grades 7-12"] if grade else [value]


def _words_of(rows: Any) -> Any:
    """A table without its pictures, which need not be decoded to be scored."""
    return rows.remove_columns([name for name in ("image", "images") if name in rows.column_names])
