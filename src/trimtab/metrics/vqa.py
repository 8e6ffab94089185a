"""VQA accuracy as the official evaluation gives it (Antol et al., ICCV 2015; GT-Vision-Lab/VQA, `vqaEval.py`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from trimtab.metrics.checking import complete
from trimtab.metrics.words import clean, normalise, plain_punctuation, plain_words

Rule = Literal["official", "x-vlm"]
LEAST = 4
"""So many people must have answered that an answer which all give is right: three others have to say the same."""
Answers = Sequence[str] | Sequence[Mapping[str, Any]]


def _official(answers: list[str], prediction: str) -> tuple[list[str], str]:
    """Normalised only where the people differ: against ten equal answers "Yes" is not "yes"."""
    answers, prediction = [clean(a) for a in answers], clean(prediction)
    if len(set(answers)) > 1:
        return [normalise(a) for a in answers], normalise(prediction)
    return answers, prediction


def _xvlm(answers: list[str], prediction: str) -> tuple[list[str], str]:
    """The copy in X-VLM and multiflow: the prediction always normalised, the answers' punctuation alone, and only where
    they differ. Its numbers are not the official ones."""
    prediction = plain_words(plain_punctuation(clean(prediction)))
    return [plain_punctuation(a) for a in answers] if len(set(answers)) > 1 else answers, prediction


RULES: dict[str, Callable[[list[str], str], tuple[list[str], str]]] = {"official": _official, "x-vlm": _xvlm}


def score(answers: Answers, prediction: str, rule: Rule = "official") -> float:
    """Accuracy of one prediction, 0 to 1: the mean over people of min(1, matches among the other answers / 3).

    Args:
        answers: of people, usually ten: strings, each of another person; or records with `answer` as in the annotation
            files. The official code counts equal records as one and the same person, so records without `answer_id`
            give another number.
        prediction: one answer.
        rule: whose comparison: the official one, or the copy in X-VLM and multiflow.

    Raises:
        ValueError: for no answers, an answer or a prediction that is no string, or another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, found {rule!r}")
    if not answers:
        raise ValueError("expected at least one answer of a person, found none")
    records: list[dict[str, Any]] = [
        dict(a) if isinstance(a, Mapping) else {"answer": a, "answer_id": i} for i, a in enumerate(answers)
    ]
    for text in (prediction, *(record.get("answer") for record in records)):
        if not isinstance(text, str):
            raise ValueError(f"expected an answer as a string, found {text!r}")
    texts, prediction = RULES[rule]([r["answer"] for r in records], prediction)
    records = [record | {"answer": text} for record, text in zip(records, texts, strict=True)]
    right = []
    for record in records:
        matches = sum(other["answer"] == prediction for other in records if other != record)
        right.append(min(1, matches / 3))
    return sum(right) / len(right)


def evaluate(
    annotations: Mapping[Any, Mapping[str, Any]],
    predictions: Mapping[Any, str],
    rule: Rule = "official",
    extra: bool = False,
) -> dict[str, Any]:
    """Accuracy over questions, by question type and by answer type, in percent and not rounded.

    The official program rounds to two places (`rounded`).

    Args:
        annotations: id of a question -> its annotation: `answers` as of `score`; `question_type` and `answer_type`
            where known.
        predictions: id of a question -> answer.
        rule: as of `score`.
        extra: predictions for other questions are let pass, which the official program does not do.

    Returns:
        `overall`; `by_question_type`, `by_answer_type`: type -> accuracy; `by_question`: id -> accuracy.

    Raises:
        ValueError: with the question's id, for a prediction that is missing, unknown or no string, or answers that are
            not there.
    """
    complete(predictions, annotations.keys(), "question", extra)
    each: dict[Any, float] = {}
    kinds: dict[str, dict[str, list[float]]] = {"question_type": defaultdict(list), "answer_type": defaultdict(list)}
    for name, annotation in annotations.items():
        try:
            each[name] = score(annotation.get("answers", ()), predictions[name], rule)
        except ValueError as error:
            raise ValueError(f"question {name!r}: {error}") from None
        for field, found in kinds.items():
            if annotation.get(field):
                found[annotation[field]].append(each[name])
    return {
        "overall": _percent(list(each.values())),
        "by_question_type": {kind: _percent(scores) for kind, scores in kinds["question_type"].items()},
        "by_answer_type": {kind: _percent(scores) for kind, scores in kinds["answer_type"].items()},
        "by_question": {name: 100 * found for name, found in each.items()},
    }


def _percent(scores: list[float]) -> float:
    return 100 * sum(scores) / len(scores)


def rounded(result: Any, places: int = 2) -> Any:
    """What `evaluate` gives, as the official program prints it."""
    if isinstance(result, dict):
        return {name: rounded(value, places) for name, value in result.items()}
    return round(result, places)
