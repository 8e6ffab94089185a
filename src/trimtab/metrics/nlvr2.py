"""NLVR2: accuracy and consistency (Suhr et al., ACL 2019; lil-lab/nlvr, `nlvr2/eval/metrics.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.metrics.checking import complete


def sentence_of(identifier: str) -> str:
    """The sentence of a pair: `split-set-pair-sentence` without the pair.

    Raises:
        ValueError: for an identifier of another form.
    """
    parts = identifier.split("-")
    if len(parts) < 3:
        raise ValueError(f"identifier {identifier!r}: expected split-set-pair-sentence")
    parts[2] = ""
    return "-".join(parts)


def evaluate(labels: Mapping[str, str], predictions: Mapping[str, str], extra: bool = False) -> dict[str, float]:
    """Share of pairs that are right, and of sentences with all their pairs right; both 0 to 1.

    Args:
        labels: identifier -> "True" or "False", in any case.
        predictions: likewise. Any other word is wrong.
        extra: predictions for other pairs are let pass, as the official program does.

    Returns:
        `accuracy`, `consistency`.

    Raises:
        ValueError: with the identifier, for a prediction that is missing, unknown or no string, or a label that is
            neither true nor false.
    """
    complete(predictions, labels.keys(), "pair", extra)
    right: dict[str, list[bool]] = {}
    for name, label in labels.items():
        if not isinstance(label, str) or label.lower() not in ("true", "false"):
            raise ValueError(f"pair {name!r}: expected the label True or False, found {label!r}")
        found = predictions[name]
        if not isinstance(found, str):
            raise ValueError(f"pair {name!r}: expected a prediction as a string, found {found!r}")
        right.setdefault(sentence_of(name), []).append(found.lower() == label.lower())
    return {
        "accuracy": sum(map(sum, right.values())) / len(labels),
        "consistency": sum(map(all, right.values())) / len(right),
    }
