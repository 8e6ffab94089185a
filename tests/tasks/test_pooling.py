"""GPO on valid tokens alone is the published operator on each sample by itself."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trimtab import pooling
from trimtab.pooling import GPO, lengths_of
from trimtab.tasks import retrieval

COUNTS = (4, 0, 7, 1, 4, 7, 2, 5, 3)


def published(pool: GPO, tokens: torch.Tensor) -> torch.Tensor:
    """Valid tokens of one sample (n, D) -> (D,), as VSE-infinity's `modules/aggr/gpo.py` computes it."""
    if not len(tokens):
        return tokens.new_zeros(tokens.shape[1])
    forth, back = pool.gru(pool._positions(len(tokens))[None])[0].chunk(2, dim=-1)
    weights = torch.softmax(pool.linear((forth + back) / 2) / 0.1, dim=1)[0]
    return (tokens.sort(dim=0, descending=True).values * weights).sum(dim=0)


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    return GPO().double()


def mask_of(where: str) -> torch.Tensor:
    """Valid tokens of texts in front, behind, or at any places."""
    front = torch.arange(7) < torch.tensor(COUNTS)[:, None]
    if where == "behind":
        return front.flip(1)
    return front if where == "front" else front[:, torch.tensor([3, 0, 6, 1, 4, 2, 5])]


def gradients(pool, out, x):
    factors = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return torch.autograd.grad((out * factors).sum(), [x, *pool.parameters()])


@pytest.mark.parametrize("known", [True, False], ids=["lengths known", "lengths not known"])
@pytest.mark.parametrize("where", ["front", "behind", "anywhere"])
@pytest.mark.parametrize("samples", [9, 3], ids=["more samples than lengths", "fewer"])
def test_each_sample_is_pooled_as_if_alone(pool, where, samples, known, monkeypatch):
    if not known:
        monkeypatch.setattr(pooling, "lengths_of", lambda valid: None)
    valid = mask_of(where)[:samples]
    x = torch.randn(samples, 7, 5, dtype=torch.double, requires_grad=True)
    out = pool(x, valid)
    alone = torch.stack([published(pool, tokens[own]) for tokens, own in zip(x, valid, strict=True)])
    assert torch.allclose(out, alone, atol=1e-12)
    for found, wanted in zip(gradients(pool, out, x), gradients(pool, alone, x), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_tokens_that_are_all_valid_need_no_mask(pool):
    x = torch.randn(3, 6, 5, dtype=torch.double, requires_grad=True)
    alone = torch.stack([published(pool, tokens) for tokens in x])
    wanted = [alone, *gradients(pool, alone, x)]
    for out in (pool(x), pool(x, torch.ones(3, 6, dtype=torch.bool))):
        for a, b in zip([out, *gradients(pool, out, x)], wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_single_precision_is_sorted_as_torch_sorts_it():
    x = torch.randn(4, 3, 11)
    assert torch.equal(x.gather(2, pooling.descending(x)), x.sort(dim=2, descending=True).values)


def test_a_pooled_side_maps_valid_tokens_alone_to_the_same(monkeypatch):
    side, tokens, mask = retrieval.PooledSide(4, 6), torch.randn(9, 7, 4), mask_of("front").long()
    few = side(tokens.masked_fill(mask[..., None] == 0, float("nan")), mask)
    for module in (retrieval, pooling):
        monkeypatch.setattr(module, "lengths_of", lambda valid: None)
    assert torch.allclose(few, side(tokens, mask), atol=1e-6)


def test_size_augmentation_leaves_out_up_to_its_share_of_four_samples_in_five():
    torch.manual_seed(0)
    share = 1 - pooling.size_augmented(torch.zeros(2000, 500, 1), 0.3).double().mean(dim=1)
    assert (share == 0).double().mean() == pytest.approx(0.2, abs=0.03)
    gone = share[share > 0]  # rates from 0.2 to 1 times the share, each token by itself
    assert gone.mean() == pytest.approx(0.6 * 0.3, abs=0.005) and 0.3 < gone.max() < 0.4


def test_a_pooled_side_leaves_out_tokens_in_training_alone():
    torch.manual_seed(0)
    side, tokens, mask = retrieval.PooledSide(4, 6, drop=0.9), torch.randn(9, 7, 4), mask_of("front").long()
    plain = retrieval.PooledSide(4, 6)
    plain.load_state_dict(side.state_dict())
    assert not torch.equal(side(tokens, mask), plain(tokens, mask))
    assert not torch.equal(side(tokens, None), plain(tokens, None))
    hidden = tokens.masked_fill(mask[..., None] == 0, float("nan"))
    assert side(hidden, mask).isfinite().all()  # what padding hides stays hidden
    side.eval()
    assert torch.equal(side(tokens, mask), plain(tokens, mask)) and torch.equal(side(tokens, None), plain(tokens, None))


def test_lengths_are_not_asked_of_tensors_without_values():
    with FakeTensorMode():
        assert lengths_of(torch.ones(2, 3, dtype=torch.bool)) is None
        assert GPO()(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)).shape == (2, 4)
