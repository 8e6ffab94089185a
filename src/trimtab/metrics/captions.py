"""Metrics of captions as the COCO caption evaluation computes them (`pycocoevalcap` 1.2): BLEU-1 to 4, ROUGE-L and
CIDEr-D, and through that package, where Java is installed, METEOR and SPICE.

The first three are written down here: they are needed in every evaluation of a caption, and the package brings 100 MB
and a Java tokeniser. They work on lists of words; `ptb.tokens` gives the words of the official evaluation.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from trimtab.metrics import coco_java, ptb
from trimtab.metrics.checking import complete, paired

Words = Sequence[str]
Tokenise = Callable[[str], list[str]]
Grams = Counter[tuple[str, ...]]

# The published BLEU adds these so that nothing is divided by zero.
_TINY, _SMALL = 1e-15, 1e-9


def simple_words(caption: str) -> list[str]:
    """Lower case, every sign that is no letter, digit, underscore or blank left out, split at blanks: a tokenisation
    that some papers use in place of the official one. Numbers from the two cannot be compared."""
    return "".join(c for c in caption.lower() if c.isalnum() or c == "_" or c.isspace()).split()


def grams(tokens: Words, longest: int = 4) -> Grams:
    """How often every run of 1 to `longest` words occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def bleu_of_words(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[list[float], list[Any]]:
    """BLEU-1 to 4 of the whole set (Papineni et al., ACL 2002), and of each caption alone (4, N).

    The reference of the nearest length counts for brevity, the shorter one of two.
    """
    right, given = [0] * 4, [0] * 4
    length = wanted = 0
    each: list[list[float]] = [[] for _ in range(4)]
    for tokens, told in zip(captions, references, strict=True):
        most: Grams = Counter()
        for ref in told:
            most |= grams(ref)
        hits = [0] * 4
        for gram, count in grams(tokens).items():
            hits[len(gram) - 1] += min(count, most[gram])
        tries = [max(0, len(tokens) - n) for n in range(4)]
        nearest = min((abs(len(ref) - len(tokens)), len(ref)) for ref in told)[1]
        for scores, score in zip(each, _bleu(hits, tries, len(tokens), nearest), strict=True):
            scores.append(score)
        length, wanted = length + len(tokens), wanted + nearest
        for n in range(4):
            right[n] += hits[n]
            given[n] += tries[n]
    return _bleu(right, given, length, wanted), each


def _bleu(right: list[int], given: list[int], length: int, wanted: int) -> list[float]:
    product, scores = 1.0, []
    for n in range(4):
        product *= (right[n] + _TINY) / (given[n] + _SMALL)
        scores.append(product ** (1 / (n + 1)))
    ratio = (length + _TINY) / (wanted + _SMALL)
    return [score * math.exp(1 - 1 / ratio) for score in scores] if ratio < 1 else scores


def rouge_of_words(captions: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> list[float]:
    """ROUGE-L of each caption (Lin, 2004): the longest common subsequence, its best precision and its best recall over
    the references, weighted by `beta`."""
    scores = []
    for tokens, told in zip(captions, references, strict=True):
        # A caption without words is one empty word in the published code.
        mine, theirs = list(tokens) or [""], [list(ref) or [""] for ref in told]
        common = [_common(mine, ref) for ref in theirs]
        precision = max(common) / len(mine)
        recall = max(c / len(ref) for c, ref in zip(common, theirs, strict=True))
        both = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / both if precision and recall else 0.0)
    return scores


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for i, other in enumerate(second, start=1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]


def cider_of_words(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0
) -> list[float]:  # fmt: skip
    """CIDEr-D of each caption (Vedantam et al., CVPR 2015, equations 2 to 5 and section 5): 10 for captions that equal
    all their references.

    Cosine of n-gram counts weighted by how rare they are among these pictures' references, n = 1..4, counts clipped to
    the reference's, times a Gaussian of the difference in length; the mean over n and references.
    """
    told = [[grams(ref) for ref in refs] for refs in references]
    pictures = Counter(gram for refs in told for gram in set().union(*refs))
    everything = math.log(len(told))

    def vector(counts: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (everything - math.log(max(1.0, pictures[gram])))
        # The published code takes the number of word pairs for the length.
        length = sum(count for gram, count in counts.items() if len(gram) == 2)
        return parts, [math.sqrt(sum(v * v for v in part.values())) for part in parts], length

    scores = []
    for tokens, refs in zip(captions, told, strict=True):
        mine, norms, length = vector(grams(tokens))
        total = 0.0
        for ref in refs:
            theirs, their_norms, their_length = vector(ref)
            near = math.exp(-((length - their_length) ** 2) / (2 * sigma**2))
            for a, b, norm, their_norm in zip(mine, theirs, norms, their_norms, strict=True):
                if norm and their_norm:
                    overlap = sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b)
                    total += near * overlap / (norm * their_norm) / 4 / len(refs)
        scores.append(10 * total)
    return scores


def evaluate_words(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Any]:
    """BLEU, ROUGE-L and CIDEr-D of captions that are words already.

    Args:
        captions: one a picture.
        references: one or more a picture.

    Returns:
        `BLEU-1` to `BLEU-4`, `ROUGE-L` (0 to 1), `CIDEr` (0 to 10); `by_caption`: the same names -> a list.

    Raises:
        ValueError: for unequal lengths, nothing to score, or the row of a picture without a reference.
    """
    _check(captions, references)
    corpus, each = bleu_of_words(captions, references)
    single = {f"BLEU-{n}": scores for n, scores in enumerate(each, start=1)}
    single |= {"ROUGE-L": rouge_of_words(captions, references), "CIDEr": cider_of_words(captions, references)}
    out: dict[str, Any] = {name: sum(scores) / len(scores) for name, scores in single.items()}
    return out | {f"BLEU-{n}": score for n, score in enumerate(corpus, start=1)} | {"by_caption": single}


def evaluate(
    captions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    tokenise: Tokenise | None = None,
    java: bool = False,
    extra: bool = False,
) -> dict[str, Any]:
    """All metrics of a set of captions, as the COCO caption evaluation gives them.

    Args:
        captions: id of a picture -> its caption.
        references: id of a picture -> its references. The rarity of words is counted in these, so that CIDEr of a part
            of a set is not comparable with that of the whole.
        tokenise: words of a caption; else the official ones: by Java where it is asked for, by `ptb.tokens` where not,
            with a warning if there are captions for which that is not known to be the same.
        java: use the official tokeniser, and add `METEOR`.
        extra: captions of other pictures are let pass.

    Returns:
        As of `evaluate_words`; lists in the order of `references`.

    Raises:
        ValueError: with the picture's id, for a caption that is missing, unknown or no string, or a picture without
            references.
        RuntimeError: if Java is asked for and it, or `pycocoevalcap`, is not installed.
    """
    complete(captions, references.keys(), "picture", extra)
    ids = list(references)
    mine, told = [captions[name] for name in ids], [list(references[name]) for name in ids]
    for name, caption, refs in zip(ids, mine, told, strict=True):
        if not refs:
            raise ValueError(f"picture {name!r} has no reference")
        if wrong := [text for text in (caption, *refs) if not isinstance(text, str)]:
            raise ValueError(f"picture {name!r}: expected captions as strings, found {wrong[0]!r}")
    if java and tokenise is None:
        words = [line.split() for line in coco_java.tokenise([*mine, *(text for refs in told for text in refs)])]
        rest = iter(words[len(mine) :])
        split = [[next(rest) for _ in refs] for refs in told]
        words = words[: len(mine)]
    else:
        words, split = _split(mine, told, tokenise)
    out = evaluate_words(words, split)
    if java:
        out["METEOR"], out["by_caption"]["METEOR"] = coco_java.meteor(words, split)
    return out


def _check(captions: Sequence[Any], references: Sequence[Sequence[Any]]) -> None:
    paired(captions, references, ("captions", "lists of references"))
    for row, refs in enumerate(references):
        if not len(refs):
            raise ValueError(f"row {row} has no reference")


def _split(
    captions: Sequence[str], references: Sequence[Sequence[str]], tokenise: Tokenise | None
) -> tuple[list[list[str]], list[list[list[str]]]]:  # fmt: skip
    """The words of captions and references; warns where they may not be the official ones."""
    _check(captions, references)
    if tokenise is None:
        tokenise = ptb.tokens
        texts = (text for group in ([*captions], *references) for text in group)
        if odd := [text for text in texts if ptb.doubtful(text)]:
            warnings.warn(
                f"{len(odd)} captions have parts that the official Java tokeniser may split otherwise, such as "
                f"{ptb.doubtful(odd[0])!r} in {odd[0]!r}: `java=True` uses it",
                stacklevel=3,
            )
    return [tokenise(text) for text in captions], [[tokenise(text) for text in refs] for refs in references]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]], tokenise: Tokenise | None = None) -> float:
    """CIDEr-D of a set, one caption and one or more references a picture; arguments as of `evaluate`."""
    scores = cider_of_words(*_split(captions, references, tokenise))
    return sum(scores) / len(scores)


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]], tokenise: Tokenise | None = None) -> float:
    """BLEU-4 of a set; arguments as of `cider`."""
    return bleu_of_words(*_split(captions, references, tokenise))[0][3]
