"""Answers as classes: the vocabulary, the soft targets of a question, and the score of the most likely class.

The rule of ViLT and METER (ViLT, `write_vqa.py`), which is that of Pythia and of Anderson et al. (CVPR 2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.metrics.checking import matrix
from trimtab.metrics.words import normalise_vilt

SOFT = (0.0, 0.3, 0.6, 0.9)  # of none to three people; all more are certain


def vocabulary(answers: Iterable[str], least: int = 9) -> list[str]:
    """The classes: normalised most common answers that at least `least` questions have, in the order in which they are
    first met. Over VQA v2's train and val these are the published 3,129.

    Args:
        answers: `multiple_choice_answer` of every question of train and val, in the files' order.
        least: questions.
    """
    counts = Counter(map(normalise_vilt, answers))
    return [answer for answer, count in counts.items() if count >= least]


def soft_score(people: int) -> float:
    """0, 0.3, 0.6, 0.9 or 1 for the number of people who gave an answer."""
    return SOFT[people] if people < len(SOFT) else 1.0


def soft_targets(
    answers: Sequence[str], known: Mapping[str, int], normalise: Callable[[str], str] | None = None
) -> dict[int, float]:
    """Class -> target of one question; classes that nobody gave are left out.

    Args:
        answers: of people, as written.
        known: answer -> class.
        normalise: applied to the answers before they are counted. ViLT and METER count them as written (None), so an
            answer that normalises to a known one still counts for nothing.
    """
    counts = Counter(answers if normalise is None else map(normalise, answers))
    return {known[answer]: soft_score(people) for answer, people in counts.items() if answer in known}


def soft_accuracy(logits: Any, targets: Any) -> float:
    """Mean target of the most likely class, 0 to 1 (ViLT's `VQAScore`); of equally likely classes the first.

    Args:
        logits: (N, classes).
        targets: (N, classes), soft.

    Raises:
        ValueError: for shapes that differ, no rows, or a row with a number that is not finite.
    """
    logits, targets = matrix(logits, "logits"), matrix(targets, "targets")
    if logits.shape != targets.shape:
        raise ValueError(f"expected targets of shape {tuple(logits.shape)}, found {tuple(targets.shape)}")
    # numpy promises the first of equal maxima, torch does not
    best = torch.from_numpy(np.argmax(logits.detach().cpu().float().numpy(), axis=1))
    return float(targets.cpu().double().gather(1, best[:, None]).mean())


def class_accuracy(logits: Any, labels: Sequence[int] | Tensor, ignored: int = -100) -> float:
    """Share of rows whose most likely class is the label, 0 to 1 (ViLT's and METER's `Accuracy`; SNLI-VE, NLVR2).

    Args:
        logits: (N, classes); of equally likely classes the first counts.
        labels: (N,) classes.
        ignored: rows with this label are left out.

    Raises:
        ValueError: for unequal lengths, a label that is no class (with its row), or if all rows are left out.
    """
    logits = matrix(logits, "logits")
    labels = torch.as_tensor(labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"expected {len(logits)} labels, one a row, found shape {tuple(labels.shape)}")
    told = labels != ignored
    wrong = (told & ((labels < 0) | (labels >= logits.shape[1]))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"row {row}: expected a class from 0 to {logits.shape[1] - 1}, found {int(labels[row])}")
    if not told.any():
        raise ValueError(f"all {len(labels)} rows have the label {ignored}, which is left out: nothing to score")
    best = torch.from_numpy(np.argmax(logits.detach().cpu().float().numpy(), axis=1))
    return float((best == labels.cpu())[told.cpu()].double().mean())


def label_accuracy(predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Share of predictions that are the label, 0 to 1: `accuracy`, and `by_label`.

    Raises:
        ValueError: for unequal lengths or nothing to score.
    """
    if len(predicted) != len(labels) or not len(labels):
        raise ValueError(f"expected as many predictions as labels, and some, found {len(predicted)} and {len(labels)}")
    each: dict[str, list[bool]] = {}
    for found, label in zip(predicted, labels, strict=True):
        each.setdefault(label, []).append(found == label)
    right = sum(map(sum, each.values()))
    return {"accuracy": right / len(labels), "by_label": {label: sum(r) / len(r) for label, r in each.items()}}
