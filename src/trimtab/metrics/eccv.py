"""Retrieval with several right items: mAP@R, R-precision, recall (ECCV Caption: Chun et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from trimtab.metrics.checking import complete


def evaluate(
    right: Mapping[Hashable, Sequence[Hashable]],
    ranked: Mapping[Hashable, Sequence[Hashable]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Means over queries, 0 to 1.

    Args:
        right: query -> its right items, R of them.
        ranked: query -> items, best first, at least R of them.

    Returns:
        `map@r`: the mean over the first R places of the precision there, 0 where the item is wrong; `r-precision`: of
        the first R items; `recall@k`: whether one of the first k is right.

    Raises:
        ValueError: with the query, if it has no right item, no list or one that is too short, or is unknown.
    """
    complete(ranked, right.keys(), "query")
    averages, precisions = [], []
    recalls: dict[int, list[bool]] = {k: [] for k in ks}
    for query, items in right.items():
        wanted, found = set(items), list(ranked[query])
        if not wanted or len(found) < max(len(wanted), 1):
            raise ValueError(
                f"query {query!r}: expected at least one right item and a list as long, found {len(wanted)} items "
                f"and a list of {len(found)}"
            )
        # The official code takes the items of the first places as a set.
        at = [len(wanted & set(found[:r])) / len(set(found[:r])) for r in range(1, len(wanted) + 1)]
        averages.append(sum(p for p, item in zip(at, found, strict=False) if item in wanted) / len(at))
        precisions.append(at[-1])
        for k, hits in recalls.items():
            hits.append(not wanted.isdisjoint(found[:k]))
    return {
        "map@r": sum(averages) / len(averages),
        "r-precision": sum(precisions) / len(precisions),
        **{f"recall@{k}": sum(hits) / len(hits) for k, hits in recalls.items()},
    }
