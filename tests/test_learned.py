"""To which backbone learned weights belong, and what is learned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trimtab
from tests.methods.small import Stack
from trimtab.anatomy.structure import mark_added
from trimtab.methods.tune.lora import LoRA
from trimtab.sizes import sizes_only
from trimtab.storage.learned import fingerprint, learned_part, precision, trace


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    out = Stack()
    out.norm = nn.BatchNorm1d(640)
    return out


@pytest.mark.parametrize("place", range(0, 640, 71))
def test_every_element_counts(place, model):
    before = fingerprint(model)
    model.norm.running_mean[place] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_every_type_is_read_as_it_is_stored(dtype):
    model = nn.Module()
    model.register_buffer("table", torch.zeros(3, 5).to(dtype).t())  # not contiguous
    model.register_buffer("none", torch.zeros(0))
    model.register_buffer("one", torch.tensor(3))
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    model.table[4, 2] = 1
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_change_of_a_few_numbers_is_seen(size, dtype):
    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        before, after = (torch.rand(size, generator=draw).to(dtype) + 2 for _ in range(2))
        assert trace(before).left(after) != torch.equal(before, after)
        assert size == 1 or torch.equal(before, before.flip(0)) or trace(before).left(before.flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_remembered_is_kept_only_of_what_is_the_same(dtype):
    first = torch.randn(33, dtype=dtype)
    before = trace(first)
    for now in (first.clone(), first + 1, first.to(torch.bfloat16), first.to(torch.float64), first.to("meta")):
        assert trace(now, before) == trace(now)
    assert trace(first, before).sums is before.sums
    assert trace(first.requires_grad_(), before).trained


def test_shapes_names_types_and_ties_count(model):
    found = {fingerprint(model)}
    other = copy.deepcopy(model)
    other.norm.running_mean = other.norm.running_mean.view(64, 10)
    found.add(fingerprint(other))
    other = copy.deepcopy(model)
    other.norms = other.norm
    del other.norm
    found.add(fingerprint(other))
    found.add(fingerprint(copy.deepcopy(model).double()))
    other = copy.deepcopy(model)
    other.blocks[0].value.weight = other.blocks[0].query.weight
    found.add(fingerprint(other))
    assert len(found) == 5


def test_what_methods_add_does_not_count(model):
    before = fingerprint(model), precision(model)
    LoRA(rank=2, targets=("query",)).attach(model, model.anatomy())
    model.side = mark_added(nn.Linear(3, 3), "lst")
    assert (fingerprint(model), precision(model)) == before


def test_without_values_shapes_count(model):
    with sizes_only():
        assert fingerprint(Stack()) == fingerprint(Stack()) != fingerprint(Stack(24))
    assert fingerprint(Stack().to("meta")) == fingerprint(Stack().to("meta"))


def test_precision_is_told(model):
    total = sum(p.numel() for p in model.parameters())
    assert precision(model) == {"float32": total}
    model.blocks[0].query.to(torch.bfloat16)
    model.blocks[1].query.weight = model.blocks[1].value.weight  # tied: counted once
    assert precision(model) == {"bfloat16": 16 * 17, "float32": total - 16 * 17 - 256}


def test_buffers_that_training_moves_are_learned():
    model = nn.ModuleDict({
        "trained": nn.BatchNorm1d(4), "part": nn.BatchNorm1d(4), "frozen": nn.BatchNorm1d(4),
        "bare": nn.BatchNorm1d(4, affine=False), "linear": nn.Linear(4, 4),
    })  # fmt: skip
    model.register_buffer("own", torch.ones(1))
    model["trained"].register_buffer("hidden", torch.ones(1), persistent=False)
    model.requires_grad_(False)
    assert learned_part(model) == {}
    model["trained"].requires_grad_(True)
    model["part"].bias.requires_grad_(True)
    stats = ["running_mean", "running_var", "num_batches_tracked"]
    names = {f"trained.{n}" for n in ("weight", "bias", *stats)} | {f"part.{n}" for n in ("bias", *stats)}
    names |= {f"bare.{n}" for n in stats}
    found = learned_part(model)
    assert found.keys() == names
    other = copy.deepcopy(model)
    model.train()
    for name in ("trained", "part", "bare"):
        model[name](torch.randn(8, 4))
    other.load_state_dict({**other.state_dict(), **learned_part(model)})
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("whole", [False, True], ids=["what is learned", "the model"])
def test_what_was_trained_in_single_precision_is_loaded_so_on_a_base_in_half(whole, tmp_path):
    def base() -> Stack:
        torch.manual_seed(0)
        return Stack().bfloat16()

    fit = trimtab.adapt(base(), anatomy=Stack().anatomy()).tune("lora", rank=2, targets="all-linear")
    if whole:
        fit.model.float()
    with torch.no_grad():
        for parameter in fit.parameters():
            parameter.data = torch.randn(parameter.shape)
    fit.save(tmp_path / "fit")
    again = trimtab.adapt(base(), tmp_path / "fit", anatomy=Stack().anatomy())
    assert all(torch.equal(a, b) for a, b in zip(fit.parameters(), again.parameters(), strict=True))
    if whole:
        again.model.float()
    x = torch.randn(4, 16).to(torch.float32 if whole else torch.bfloat16)
    assert torch.equal(fit.model(x), again.model(x))
