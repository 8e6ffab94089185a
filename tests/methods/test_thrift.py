"""What saves memory while weights are pruned changes no number."""

from __future__ import annotations

import pytest
import torch

from trimtab.anatomy.parts import Weight
from trimtab.methods.prune.evidence import Evidence
from trimtab.methods.prune.made import Listed, Made, Magnitudes
from trimtab.methods.prune.rows import single
from trimtab.methods.prune.scores import SCORES, Scores
from trimtab.methods.prune.selection import below

SHAPES = ((600, 700), (3, 5), (700, 500))  # more than one piece, less, and more than one that is no view in order


def stored(dtype: torch.dtype) -> dict[Weight, torch.Tensor]:
    torch.manual_seed(0)
    found = [torch.randn(shape).to(dtype) for shape in SHAPES]
    found[2] = found[2].t()
    return {Weight(f"layers.{i}", "weight", "text"): tensor for i, tensor in enumerate(found)}


def made(weights: dict[Weight, torch.Tensor]) -> Made:
    """As of a model: copies in single precision, or the weights themselves."""
    numbers = {w: t.numel() for w, t in weights.items()}
    return Made(numbers, lambda w: single(weights[w]), weights.__getitem__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_threshold_over_pieces_of_magnitudes_is_that_over_whole_ones(dtype):
    weights = stored(dtype)
    whole = [w.abs() if dtype == torch.float64 else w.abs().float() for w in weights.values()]
    assert any(len(torch.unique(t)) < t.numel() for t in whole) or dtype == torch.float64  # some are equal
    listed = Listed(Magnitudes(made(weights)), list(weights))
    for share in (0.1, 0.63, 1.0):
        count = int(share * sum(t.numel() for t in whole))
        assert below(listed, count) == below(whole, count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_flow_of_a_weight_as_it_is_stored_is_that_of_its_copy(dtype):
    weights = stored(dtype)
    before = [w.clone() for w in weights.values()]
    evidence = {w: [Evidence(len(t), torch.rand(t.shape[1]))] for w, t in weights.items()}
    scores = Scores(SCORES["flow"], made(weights), evidence)
    for weight, tensor in weights.items():
        wide = tensor if dtype == torch.float64 else tensor.float()
        edges = wide.abs() * evidence[weight][0].squares.sqrt()
        plain = (edges.mean(dim=1, keepdim=True) * edges.mean(dim=0, keepdim=True) * wide).abs()
        assert scores[weight].dtype == wide.dtype
        torch.testing.assert_close(scores[weight], plain, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights.values(), strict=True))
