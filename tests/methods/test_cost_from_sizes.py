"""`fit.cost` of a model without values: as of a real one where tensors are made for sizes, else refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trimtab
from tests.models.four import DECODER, SINGLE, Tiny
from trimtab.methods.adapted import Adapted
from trimtab.sizes import sizes_only


def adapted(tiny: Tiny, levers: str) -> Adapted:
    fit = trimtab.adapt(tiny.make())
    if "prune" in levers:
        fit.prune("omp", 0.5)
    if "skip" in levers:
        fit.skip(plan=[list(fit.anatomy.blocks())[-2].path])
    return fit.tune("lora", rank=2) if "lora" in levers else fit.tune("unipt")


@pytest.mark.parametrize(
    ("tiny", "levers"), [(SINGLE, "prune lora"), (SINGLE, "skip lora"), (DECODER, "prune unipt")],
    ids=lambda x: getattr(x, "name", x),
)  # fmt: skip
def test_sizes_cost_what_values_cost(tiny, levers):
    real = asdict(adapted(tiny, levers).cost(tiny.batch))
    with sizes_only():
        sized = asdict(adapted(tiny, levers).cost(tiny.batch))
    for name in ("nonzero", "disk_bytes") if "prune" in levers else ():  # which weights go is assumed, not how many
        assert sized.pop(name) == pytest.approx(real.pop(name), rel=0.03)
    assert sized == real


def test_a_search_is_assumed_and_data_are_not_asked_for():
    real = trimtab.adapt(SINGLE.make())
    with sizes_only():
        fit = trimtab.adapt(SINGLE.make()).skip("das", skip=1)
        skipped = fit.cost(SINGLE.batch)
    assert len(list(fit.anatomy.blocks())) == 3 and skipped.macs < real.cost(SINGLE.batch).macs


def test_models_without_values_made_otherwise_say_the_way_out():
    with pytest.raises(ValueError, match=r"on the meta device .*to count its costs .*sizes_only\(\)"):
        trimtab.adapt(SINGLE.make().to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' .* is a fake tensor .*inside `with trimtab.sizes.sizes_only"):
        trimtab.adapt(model)
