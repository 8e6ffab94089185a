"""Text-video retrieval as CLIP4Clip scores it (`metrics.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.metrics.checking import matrix
from trimtab.metrics.retrieval import Ties, rank_rows


def _positions(scores: Tensor, own: Tensor) -> list[int]:
    """Of each row in turn, all places in its sorted scores that hold the score of its right item."""
    before, level = (scores > own[:, None]).sum(dim=1), (scores == own[:, None]).sum(dim=1)
    return [
        place
        for first, many in zip(before.tolist(), level.tolist(), strict=True)
        for place in range(first, first + many)
    ]


def _summary(found: list[int]) -> dict[str, float]:
    ordered = sorted(found)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    recalls = {f"R{k}": 100 * sum(r < k for r in found) / len(found) for k in (1, 5, 10)}
    return recalls | {"MedianR": median + 1, "MeanR": sum(found) / len(found) + 1}


def one_sentence(scores: Any) -> dict[str, Any]:
    """Both directions where text i belongs to video i.

    With equal scores a query counts once for each place that holds the score of its right item, as in the official
    code: the list of ranks is then longer than the number of queries.

    Args:
        scores: (N, N) of text i and video j.

    Returns:
        `t2v` and `v2t`: `R1`, `R5`, `R10` in percent, `MedianR`, `MeanR`, and `ranks` from 0.

    Raises:
        ValueError: for a matrix that is not square, or a row with a number that is not finite.
    """
    scores = matrix(scores, "scores of texts and videos")
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"expected as many texts as videos, found {tuple(scores.shape)}; several sentences a video are scored by "
            "several_sentences"
        )
    own = scores.diagonal()
    found = {"t2v": _positions(scores, own), "v2t": _positions(scores.T, own)}
    return {way: _summary(ranks) | {"ranks": ranks} for way, ranks in found.items()}


def several_sentences(scores: Any, sentences: Sequence[int], ties: Ties = "against") -> dict[str, Any]:
    """Both directions where every video has sentences of its own (MSVD, MSR-VTT full, LSMDC ...).

    Text to video: each sentence is a query; recalls are of single precision and the median is the lower of two middle
    ranks, as there. Video to text: videos are compared with the best sentence of every video; equal scores count as in
    `one_sentence`.

    Args:
        scores: (sentences, videos); the sentences of a video stand together, in the videos' order.
        sentences: how many each video has.
        ties: of text to video, where the official sort is not stable; as of `retrieval.rank_rows`.

    Returns:
        As of `one_sentence`; `t2v` has `Std_Rank` too.

    Raises:
        ValueError: for numbers of sentences that do not fit, a video without one, or a row with a number that is not
            finite.
    """
    scores = matrix(scores, "scores of sentences and videos")
    counts = torch.as_tensor(sentences)
    if counts.shape != (scores.shape[1],) or int(counts.sum()) != len(scores):
        raise ValueError(f"expected numbers of sentences of {scores.shape[1]} videos that sum to {len(scores)}, found "
                         f"{len(counts)} that sum to {int(counts.sum())}")  # fmt: skip
    if (counts < 1).any():
        raise ValueError(f"video {int((counts < 1).nonzero()[0])} has no sentence")
    video = torch.repeat_interleave(torch.arange(len(counts)), counts).to(scores.device)
    own = video[:, None] == torch.arange(len(counts), device=scores.device)
    ranks = rank_rows(scores, own, ties)
    recalls = {f"R{k}": float((ranks < k).sum() * 100 / len(ranks)) for k in (1, 5, 10)}
    from_one = (ranks + 1).double()
    text = recalls | {
        "MedianR": float(from_one.median()),
        "MeanR": float(from_one.mean()),
        "Std_Rank": float(from_one.std(correction=0)),
        "ranks": ranks.tolist(),
    }
    best = torch.stack([part.amax(dim=0) for part in scores.split(counts.tolist())], dim=1)  # (videos, groups)
    found = _positions(best, best.diagonal())
    return {"t2v": text, "v2t": _summary(found) | {"ranks": found}}
