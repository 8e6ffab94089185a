"""Which of many scores are smallest, with ties, in one tensor and over several: against a plain sort."""

from __future__ import annotations

import pytest
import torch

from trimtab.methods.prune.selection import below, kth_smallest, largest, smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(7, 30), (20000, 1, 12345)])
def test_the_kth_smallest_is_that_of_the_concatenation(sizes, dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(n).abs().mul(3).round(decimals=2).to(dtype) for n in sizes]  # rounded: with ties
    tensors[0][::3] = 0
    for scores in (
        tensors,
        [t - 1 for t in tensors],
        [t * 1e-30 for t in tensors],
        [torch.zeros_like(t) for t in tensors],
    ):
        everything = torch.cat(scores)
        for count in {1, 5, len(everything) // 3, len(everything) - 1, len(everything)}:
            found = kth_smallest(scores, count)
            assert found.dtype == dtype and found == everything.kthvalue(count).values, count


def test_the_kth_smallest_of_fewer_is_refused():
    with pytest.raises(ValueError, match="the 4-th smallest of 3 scores"):
        kth_smallest([torch.zeros(3)], 4)


def test_of_equal_scores_exactly_as_many_go_as_were_asked_for():
    scores = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert smallest(scores, 1).tolist() == [[True, True], [False, True]]  # the last goes
    assert smallest(scores, 1, torch.tensor([[1.0, -1.0], [2.0, 1.0]])).tolist() == [[True, False], [True, True]]
    assert largest(scores, 3).tolist() == [[True, True], [False, True]]


def test_equal_scores_of_several_tensors_go_by_size_then_in_proportion():
    scores = [torch.zeros(6), torch.tensor([1.0, 0.0]), torch.zeros(4)]
    assert below(scores, 5) == [2, 1, 2]  # of 6, 1 and 4 equal ones
    weights = [torch.full((6,), 3.0), torch.tensor([1.0, -9.0]), torch.tensor([1.0, -2.0, 1.0, 4.0])]
    assert below(scores, 5, weights) == [2, 0, 3]
    assert below(scores, 3, weights) == [0, 0, 3]
    assert below(scores, 12, weights) == [6, 2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_what_a_threshold_takes_from_tensors_is_what_they_then_give(seed):
    """Scores and weights of few values, so that nearly all are equal: counts and masks agree with a plain sort."""
    draw = torch.Generator().manual_seed(seed)
    scores, weights = ([torch.randint(3, (n, 7), generator=draw).float() for n in (5, 3, 9)] for _ in range(2))
    count = int(torch.randint(1, 17 * 7, (), generator=draw))
    given = below(scores, count, weights)
    assert sum(given) == count
    keys = [
        [(float(a), float(b)) for a, b in zip(s.flatten(), w.flatten(), strict=True)]
        for s, w in zip(scores, weights, strict=True)
    ]
    last = sorted(k for own in keys for k in own)[count - 1]
    for own, number, score, weight in zip(keys, given, scores, weights, strict=True):
        assert sum(k < last for k in own) <= number <= sum(k <= last for k in own)
        gone = ~smallest(score, number, weight)
        assert sorted(own)[:number] == sorted(k for k, g in zip(own, gone.flatten().tolist(), strict=True) if g)
