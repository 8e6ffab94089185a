"""Metrics of captions: CIDEr-D and BLEU-4, on lower-case words without punctuation.

Both are computed as the COCO caption evaluation does (`pycocoevalcap` 1.2; tests pin its values), but for its Java
tokeniser. Writing these two down costs less than a package of 100 MB.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Grams = Counter[tuple[str, ...]]


def words(caption: str) -> list[str]:
    """Lower-case words and numbers of a caption."""
    return re.findall(r"[a-z0-9']+", caption.lower())


def grams(tokens: Sequence[str], longest: int = 4) -> Grams:
    """How often every run of 1 to `longest` words occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> float:
    """CIDEr-D (Vedantam et al., CVPR 2015, equations 2 to 5 and section 5): 10 for captions that equal all references.

    Cosine of n-gram counts weighted by how rare they are among the pictures' references, n = 1..4, counts clipped to
    the reference's, times a Gaussian of the difference in length; the mean over n, references and pictures.

    Args:
        captions: one a picture.
        references: one or more a picture.
        sigma: of the Gaussian, in words.
    """
    told = [[grams(words(r)) for r in refs] for refs in references]
    pictures = Counter(gram for refs in told for gram in set().union(*refs))
    everything = math.log(len(told))

    def vector(counts: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (everything - math.log(max(1.0, pictures[gram])))
        # The published code takes the number of word pairs for the length.
        length = sum(count for gram, count in counts.items() if len(gram) == 2)
        return parts, [math.sqrt(sum(v * v for v in part.values())) for part in parts], length

    total = 0.0
    for caption, refs in zip(captions, told, strict=True):
        mine, norms, length = vector(grams(words(caption)))
        for ref in refs:
            theirs, their_norms, their_length = vector(ref)
            near = math.exp(-((length - their_length) ** 2) / (2 * sigma**2))
            for a, b, norm, their_norm in zip(mine, theirs, norms, their_norms, strict=True):
                if norm and their_norm:
                    overlap = sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b)
                    total += near * overlap / (norm * their_norm) / 4 / len(refs)
    return 10 * total / len(told)


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a whole set (Papineni et al., ACL 2002), against the reference of the nearest length."""
    right, given = [0] * 4, [0] * 4
    length = wanted = 0
    for caption, refs in zip(captions, references, strict=True):
        tokens, told = words(caption), [words(r) for r in refs]
        length += len(tokens)
        wanted += min((abs(len(r) - len(tokens)), len(r)) for r in told)[1]
        most: Grams = Counter()
        for ref in told:
            most |= grams(ref)
        for gram, count in grams(tokens).items():
            given[len(gram) - 1] += count
            right[len(gram) - 1] += min(count, most[gram])
    if not min(right):
        return 0.0
    precision = math.exp(sum(math.log(r / g) for r, g in zip(right, given, strict=True)) / 4)
    return precision * min(1.0, math.exp(1 - wanted / length))
