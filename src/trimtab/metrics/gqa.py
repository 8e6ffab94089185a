"""GQA's metrics: accuracy, consistency, validity, plausibility, distribution (Hudson & Manning, CVPR 2019, `eval.py`).

Grounding, the sixth, needs scene graphs and attention maps and is not computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from trimtab.metrics.checking import complete, listed

# Of questions whose detailed type has "Common" in it ("what do both have in common?"), in place of the listed answers.
COMMON = ("color", "material", "shape")
# Operations of a program that ask for the answer and are no step of reasoning.
ASKING = ("exist", "query: name", "choose name")


def steps(question: Mapping[str, Any]) -> int:
    """Steps of reasoning in a question's program."""
    told = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in step for word in ASKING) for step in told)


def evaluate(
    questions: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Collection[str]]] | None = None,
    consistency: bool = True,
    extra: bool = False,
) -> dict[str, Any]:
    """The five metrics over the balanced questions; an answer is right if it is the same string.

    Args:
        questions: id -> question, as in GQA's files; for consistency the unbalanced ones must be there too, that is,
            all that a balanced one entails.
        predictions: id -> answer: of the balanced questions, and for consistency of all.
        choices: id -> its `valid` and `plausible` answers.
        consistency: whether to compute it.
        extra: predictions for other questions are let pass, as the official program does.

    Returns:
        Percent: `accuracy`, `binary`, `open`, `validity`, `plausibility`, `consistency`; None where not asked for or
        there is nothing to average (the official program says 0). `distribution`: chi-square over the global groups,
        weighted by their size, over 100; lower is better. `by_structural_type`, `by_semantic_type`, `by_length`
        (words), `by_steps`: name -> (percent, number of questions).

    Raises:
        ValueError: with the question's id: a prediction missing, unknown, or no string; an entailed question or its
            choices not there; no balanced question.
    """
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    if not balanced:
        raise ValueError(f"none of {len(questions)} questions is balanced: there is nothing to score")
    wanted = questions if consistency else balanced
    known = {name: p for name, p in predictions.items() if name in wanted or name not in questions}
    complete(known, wanted.keys(), "question", extra)
    for name in wanted:
        if not isinstance(predictions[name], str):
            raise ValueError(f"question {name!r}: expected a prediction as a string, found {predictions[name]!r}")
    right = {name: float(predictions[name] == questions[name]["answer"]) for name in wanted}
    each = [right[name] for name in balanced]
    kinds = {name: question["types"]["structural"] for name, question in balanced.items()}
    return {
        "accuracy": _percent(each),
        "binary": _percent([right[name] for name, kind in kinds.items() if kind != "query"]),
        "open": _percent([right[name] for name, kind in kinds.items() if kind == "query"]),
        "validity": _belonging(balanced, predictions, choices, "valid"),
        "plausibility": _belonging(balanced, predictions, choices, "plausible"),
        "consistency": _consistency(balanced, right) if consistency else None,
        "distribution": _distribution(balanced, predictions),
        "by_structural_type": _by(right, kinds),
        "by_semantic_type": _by(right, {name: q["types"]["semantic"] for name, q in balanced.items()}),
        "by_length": _by(right, {name: len(q["question"].split()) for name, q in balanced.items()}),
        "by_steps": _by(right, {name: steps(q) for name, q in balanced.items()}),
    }


def _percent(scores: list[float]) -> float | None:
    return sum(scores) / len(scores) * 100 if scores else None


def _by(right: Mapping[str, float], kinds: Mapping[str, Any]) -> dict[Any, tuple[float, int]]:
    found = defaultdict(list)
    for name, kind in kinds.items():
        found[kind].append(right[name])
    return {kind: (sum(scores) / len(scores) * 100, len(scores)) for kind, scores in found.items()}


def _belonging(balanced: Mapping[str, Any], predictions: Mapping[str, str], choices: Any, which: str) -> float | None:
    """Share of predictions that are among a question's answers of this kind."""
    if not choices:
        return None
    if missing := [name for name in balanced if name not in choices]:
        raise ValueError(f"question that is not in the choices: {listed(missing)}")
    allowed = (
        COMMON if "Common" in question["types"]["detailed"] else choices[name][which]
        for name, question in balanced.items()
    )  # fmt: skip
    return _percent([float(predictions[name] in group) for name, group in zip(balanced, allowed, strict=True)])


def _consistency(balanced: Mapping[str, Any], right: Mapping[str, float]) -> float | None:
    """Mean over right answers to questions that entail others of the share of those answered rightly."""
    found = []
    for name, question in balanced.items():
        entailed = [other for other in question["entailed"] if other != name]
        if not right[name] or not entailed:
            continue
        if missing := [other for other in entailed if other not in right]:
            raise ValueError(f"question {name!r} entails questions that are not there: {listed(missing)}")
        found.append(sum(right[other] for other in entailed) / len(entailed))
    return _percent(found)


def _distribution(balanced: Mapping[str, Any], predictions: Mapping[str, str]) -> float | None:
    """Chi-square between the true and the predicted answers of every global group; only true answers count."""
    true: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    told: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            true[group][question["answer"]] += 1
            told[group][predictions[name]] += 1
    total = weight = 0.0
    for group, counts in true.items():
        size = sum(counts.values())
        total += size * sum((told[group].get(answer, 0) - count) ** 2 / count for answer, count in counts.items())
        weight += size
    return total / weight / 100 if weight else None
