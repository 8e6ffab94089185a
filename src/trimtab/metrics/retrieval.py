"""Image-text retrieval: ranks, recall@K, rSum, median and mean rank; any number of texts a picture.

Numbers of VSE-infinity (`lib/evaluation.py`: i2t, t2i, folds) and of X-VLM, BLIP and multiflow (`itm_eval`). A rank is
the number of items before the first right one, from 0. The official code sorts with an unstable sort, so that its
number for equal scores is not defined; here the rule is a setting, and the default counts them against the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.metrics.checking import finite, matrix

Ties = Literal["against", "for", "later"]
TIES = ("against", "for", "later")


@dataclass(frozen=True)
class Ranks:
    """Attributes:
    image_to_text: (N,) rank of the best of a picture's own texts, whole numbers from 0.
    text_to_image: (M,) rank of a text's own picture.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def rank_rows(scores: Tensor, own: Tensor, ties: Ties = "against") -> Tensor:
    """The rank of the best right item in each row, (N,).

    Args:
        scores: (N, M).
        own: (N, M), True where an item is right; at least one a row.
        ties: where a wrong item has the score of the best right one: `against` puts the wrong one first, so that a
            model which gives every pair one score finds nothing; `for` puts it last; `later` puts the later column
            first, as numpy's stable sort does when it is reversed.
    """
    best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    if ties == "against":
        return ((scores >= best) & ~own).sum(dim=1)
    before = (scores > best).sum(dim=1)
    if ties == "for":
        return before
    level = scores == best
    column = torch.arange(scores.shape[1], device=scores.device)
    last = torch.where(level & own, column, -1).amax(dim=1, keepdim=True)
    return before + (level & (column > last)).sum(dim=1)


def ranks(
    scores: Any, owner: Sequence[int] | Tensor, text_scores: Any = None, ties: Ties = "against"
) -> Ranks:  # fmt: skip
    """Ranks from scores of all pairs.

    Args:
        scores: (N, M) of picture i and text j.
        owner: (M,) the picture of each text, from 0.
        text_scores: (M, N), where texts rank pictures by other scores, as after re-ranking by a cross-encoder; else the
            transpose of `scores`.
        ties: as of `rank_rows`.

    Raises:
        ValueError: for shapes that do not fit, a number that is not finite, a text whose picture is not there, a
            picture without a text, or another rule.
    """
    scores = matrix(scores, "scores of pictures and texts")
    owner = _owners(owner, scores.shape[0], scores.shape[1], ties)
    text_scores = scores.T if text_scores is None else matrix(text_scores, "scores of texts and pictures")
    if text_scores.shape != scores.T.shape:
        raise ValueError(f"scores of texts and pictures: expected shape {tuple(scores.T.shape)}, found "
                         f"{tuple(text_scores.shape)}")  # fmt: skip
    own = owner.to(scores.device) == torch.arange(len(scores), device=scores.device)[:, None]
    return Ranks(rank_rows(scores, own, ties), rank_rows(text_scores, own.T.to(text_scores.device), ties))


def ranks_of_embeddings(
    images: Tensor, texts: Tensor, owner: Sequence[int] | Tensor, ties: Ties = "against", block_bytes: int = 2**28
) -> Ranks:
    """Ranks by inner product, in blocks: the matrix of all pairs is never there.

    Equal embeddings have equal scores but for the last bit, which depends on how a block is multiplied.

    Args:
        images: (N, D); unit vectors give cosine similarity.
        texts: (M, D), on the same device.
        owner, ties: as of `ranks`.
        block_bytes: what the scores of a block and what is computed from them may take, at most about.

    Raises:
        ValueError: as of `ranks`.
    """
    if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"expected embeddings (N, D) and (M, D), found {tuple(images.shape)} and {tuple(texts.shape)}")
    finite(images, "embeddings of pictures")
    finite(texts, "embeddings of texts")
    owner = _owners(owner, len(images), len(texts), ties).to(images.device)
    positions = torch.arange(len(images), device=images.device)
    picture_ranks = [
        rank_rows(images[part] @ texts.T, owner == positions[part, None], ties)
        for part in _blocks(len(images), len(texts), images.element_size(), block_bytes)
    ]
    text_ranks = [
        rank_rows(texts[part] @ images.T, owner[part, None] == positions, ties)
        for part in _blocks(len(texts), len(images), texts.element_size(), block_bytes)
    ]
    return Ranks(torch.cat(picture_ranks), torch.cat(text_ranks))


def _blocks(rows: int, columns: int, size: int, most: int) -> Iterator[slice]:
    """Slices of rows whose scores, a masked copy of them and four tables of bits fit in `most` bytes."""
    step = max(1, most // (columns * (2 * size + 12)))
    return (slice(start, start + step) for start in range(0, rows, step))


def _owners(owner: Sequence[int] | Tensor, images: int, texts: int, ties: str) -> Tensor:
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, found {ties!r}")
    owner = torch.as_tensor(owner)
    if owner.shape != (texts,):
        raise ValueError(f"owner: expected the picture of each of {texts} texts, found shape {tuple(owner.shape)}")
    wrong = ((owner < 0) | (owner >= images)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"text {row}: its picture is {int(owner[row])}, but pictures are 0 to {images - 1}")
    without = (torch.bincount(owner, minlength=images) == 0).nonzero()
    if len(without):
        raise ValueError(f"picture {int(without[0])} has no text of its own")
    return owner


def summary(found: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`R@K` in percent; `medr`, the median rounded down, and `meanr`, both from 1 (VSE-infinity's i2t and t2i)."""
    if not len(found):
        raise ValueError("there are no ranks: expected at least one")
    found = found.double()
    recalls = {f"R@{k}": 100.0 * int((found < k).sum()) / len(found) for k in ks}
    # numpy's median, the mean of the two middle values; torch's is the lower one
    ordered = found.sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return recalls | {"medr": math.floor(median) + 1.0, "meanr": float(found.mean()) + 1}


def both_ways(found: Ranks) -> dict[str, Any]:
    """`i2t` and `t2i`, each as of `summary`, and `rsum`, the sum of the six recalls."""
    out: dict[str, Any] = {"i2t": summary(found.image_to_text), "t2i": summary(found.text_to_image)}
    return out | {"rsum": sum(out[way][f"R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10))}


def fold_indices(owner: Sequence[int] | Tensor, images: int, folds: int) -> list[tuple[slice, Tensor]]:
    """Pictures and texts of every fold: consecutive blocks of pictures with their texts (5 of 1,000 is "COCO 1K").

    Raises:
        ValueError: if the pictures do not fall into so many equal blocks.
    """
    if folds < 1 or images % folds:
        raise ValueError(f"{images} pictures do not fall into {folds} equal folds")
    owner, size = torch.as_tensor(owner), images // folds
    return [
        (slice(i * size, (i + 1) * size), (owner // size == i).nonzero()[:, 0]) for i in range(folds)
    ]  # fmt: skip


def mean_of_folds(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every metric over folds, each as of `both_ways`."""
    out: dict[str, Any] = {
        way: {name: sum(p[way][name] for p in parts) / len(parts) for name in parts[0][way]} for way in ("i2t", "t2i")
    }
    return out | {"rsum": sum(p["rsum"] for p in parts) / len(parts)}


def evaluate(
    images: Tensor, texts: Tensor, owner: Sequence[int] | Tensor, folds: int = 1, ties: Ties = "against"
) -> dict[str, Any]:
    """`i2t`, `t2i` and `rsum` of embeddings, over all pictures or as the mean over folds.

    Args:
        images, texts, owner, ties: as of `ranks_of_embeddings`.
        folds: 1 ranks all at once ("5K" of MS-COCO's test split), 5 gives its "1K".
    """
    parts = []
    for pictures, own in fold_indices(owner, len(images), folds):
        owners = torch.as_tensor(owner)[own] - (pictures.start or 0)
        where = own.to(texts.device)
        parts.append(both_ways(ranks_of_embeddings(images[pictures], texts[where], owners, ties)))
    return mean_of_folds(parts)


def evaluate_scores(
    scores: Any, owner: Sequence[int] | Tensor, folds: int = 1, ties: Ties = "against"
) -> dict[str, Any]:  # fmt: skip
    """The same from an (N, M) matrix of scores."""
    scores, parts = matrix(scores, "scores of pictures and texts"), []
    for pictures, own in fold_indices(owner, len(scores), folds):
        owners = torch.as_tensor(owner)[own] - (pictures.start or 0)
        parts.append(both_ways(ranks(scores[pictures][:, own], owners, ties=ties)))
    return mean_of_folds(parts)


def matching_summary(found: Ranks, item: str = "img") -> dict[str, float]:
    """Under the names that X-VLM and BLIP print (`itm_eval`): `txt_r1` is picture to text, `img_r1` text to picture.

    Args:
        item: "vid" for BLIP's video retrieval, which has the median rank too.
    """
    out: dict[str, float] = {}
    for prefix, ranked in (("txt", found.image_to_text), (item, found.text_to_image)):
        recalls = [100.0 * int((ranked < k).sum()) / len(ranked) for k in (1, 5, 10)]
        out |= {f"{prefix}_r{k}": recall for k, recall in zip((1, 5, 10), recalls, strict=True)}
        out[f"{prefix}_r_mean"] = sum(recalls) / 3
    out["r_mean"] = (out["txt_r_mean"] + out[f"{item}_r_mean"]) / 2
    if item == "vid":
        ordered = found.text_to_image.double().sort().values
        out["vid_mdR"] = float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 + 1
    return out
