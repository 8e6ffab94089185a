"""Masks as values: read from files and folders, of a part of a model, and of another pruner than the one named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import trimtab
from tests.methods.small import Stack
from trimtab.methods import METHODS
from trimtab.methods.prune.masks import Masks
from trimtab.sizes import sizes_only


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack()


def session(model: Stack) -> SimpleNamespace:
    """What a pruner needs that is given its masks."""
    return SimpleNamespace(plain=model, anatomy=model.anatomy())


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(i))} for i in range(2)]


def write_folder(folder, *methods) -> str:
    """A folder as a run leaves it behind: what each method found, and its tensors."""
    folder.mkdir(exist_ok=True)
    found = [{"name": m.name, "lever": m.lever, "settings": m.describe(), "state": m.state} for m in methods]
    (folder / "fit.json").write_text(json.dumps({"methods": found}))
    tensors = {f"method.{i}.{k}": v for i, m in enumerate(methods) for k, v in m.tensors.items()}
    save_file({**tensors, "learned.blocks.0.query.bias": torch.ones(16)}, folder / "weights.safetensors")
    return str(folder)


def pruned(model: Stack, name: str = "omp", sparsity: float = 0.63):
    """A pruner that has found its masks, and these."""
    data = batches() if METHODS[name](sparsity=sparsity).rounds else None
    (masks,) = trimtab.prune(model, name, [sparsity], data, model.anatomy())
    method = METHODS[name](sparsity=sparsity)
    method.take(masks, model.anatomy())
    return method, masks


# --- the setting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("name", ["omp", "sparsegpt"])
def test_a_pruner_takes_masks_that_it_found_before(name, place, model, tmp_path):
    first, masks = pruned(model, name)
    if place == "file":
        masks.save(tmp_path / "m.safetensors")
        where = str(tmp_path / "m.safetensors")
    else:
        where = write_folder(tmp_path / "run", METHODS["lora"](), first)
    method = METHODS[name](masks=where)
    method.prepare(session(model))
    assert method.state == {**first.state, "from": where} and method.state["pruner"] == name
    assert json.loads(json.dumps(method.state)) == method.state
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method.attach(model, model.anatomy())
    for path, mask in masks.items():
        kept = masks.weights.get(path, before[path])
        assert torch.equal(model.get_parameter(path), kept * mask)


def test_masks_of_another_pruner_are_refused(model, tmp_path):
    where = write_folder(tmp_path / "run", pruned(model)[0])
    with pytest.raises(ValueError, match=r"masks: those of '.*run' were found by 'omp', not by 'lamp': name 'omp'"):
        METHODS["lamp"](masks=where).prepare(session(model))


def test_masks_of_another_sparsity_are_refused(model, tmp_path):
    where = write_folder(tmp_path / "run", pruned(model)[0])
    METHODS["omp"](masks=where, sparsity=0.63).prepare(session(model))
    with pytest.raises(ValueError, match=r"have the sparsity 0\.6\d+, the settings say 0.9: leave out `sparsity`"):
        METHODS["omp"](masks=where, sparsity=0.9).prepare(session(model))


def test_masks_made_by_hand_are_anybodys(model, tmp_path):
    Masks({"blocks.0.query.weight": torch.eye(16).bool()}).save(tmp_path / "m.safetensors")
    method = METHODS["multiflow"](masks=str(tmp_path / "m.safetensors"))
    method.prepare(session(model))
    method.attach(model, model.anatomy())
    assert method.state["pruner"] == "" and int(model.blocks[0].query.weight.count_nonzero()) == 16


@pytest.mark.parametrize(("given", "sparsity", "wanted"), [(False, 0.75, 0.75), (False, None, 0.63), (True, None, 0.5)])
def test_costs_are_counted_with_the_masks_or_with_the_sparsity_while_they_are_not_there(
    given, sparsity, wanted, model, tmp_path
):
    where = tmp_path / "run"
    if given:
        write_folder(where, pruned(model, "sparsegpt", 0.5)[0])
    method = METHODS["sparsegpt"](masks=str(where), sparsity=sparsity)
    with sizes_only():
        fake = Stack()
        method.assume(fake, fake.anatomy())
        method.attach(fake, fake.anatomy())
    assert method.state["kept"] == pytest.approx((1 - wanted) * method.state["prunable"], abs=1)
    values = sum(v.numel() for k, v in method.tensors.items() if k.endswith(".values"))
    assert values == pytest.approx(method.state["kept"], abs=6)
    real = METHODS["sparsegpt"](masks=str(where), sparsity=sparsity)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    real.assume(model, model.anatomy())
    real.attach(model, model.anatomy())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what is not there ------------------------------------------------------------------------------------------------


def test_what_holds_no_masks_for_this_model_is_refused(model, tmp_path):
    def refused(message, where="given"):
        with pytest.raises(ValueError, match=message):
            METHODS["omp"](masks=str(tmp_path / where)).prepare(session(model))

    refused("nothing is at '.*given'.* carry out the recipe")
    (tmp_path / "given").mkdir()
    refused("'.*given' is not the folder of a finished run or of an adapted model: it has no fit.json")
    write_folder(tmp_path / "given", METHODS["lora"]())
    refused("expected one pruner at '.*given', its methods are: lora")
    write_folder(tmp_path / "given", *(pruned(model)[0] for _ in range(2)))
    refused("expected one pruner at '.*given', its methods are: omp, omp")
    wide = Stack(24)
    write_folder(tmp_path / "given", pruned(wide)[0])
    refused(r"given: these masks are for another model: 'blocks.0.query.weight' has the shape \(16, 16\)")
    method, _ = pruned(model)
    del method.tensors["blocks.1.value.weight"]
    write_folder(tmp_path / "given", method)
    refused("given: the mask of 'blocks.1.value.weight' is missing")
    whole = (tmp_path / "given" / "weights.safetensors").read_bytes()
    (tmp_path / "given" / "weights.safetensors").write_bytes(whole[:-10])
    refused("weights.safetensors: not a whole safetensors file")
    with pytest.raises(ValueError, match="masks: expected the path of a file or folder, found an empty text"):
        METHODS["omp"](masks="")


def test_a_damaged_mask_is_refused(model):
    packed = pruned(model, "sparsegpt")[1].packed()
    shapes = {path: (16, 16) for path in packed if not path.endswith(".values")}
    first = next(iter(shapes))
    with pytest.raises(ValueError, match=f"the mask of '{first}' keeps .* weights, found 3"):
        Masks.unpacked({**packed, f"{first}.values": torch.ones(3)}, shapes)
    with pytest.raises(ValueError, match="takes 32 bytes, found 1"):
        Masks.unpacked({**packed, first: torch.zeros(1, dtype=torch.uint8)}, shapes)
    with pytest.raises(ValueError, match="'head.weight' is there, but no weight of that name"):
        Masks.unpacked({**packed, "head.weight": torch.ones(3)}, shapes)


# --- of a part --------------------------------------------------------------------------------------------------------


def test_masks_without_some_blocks_are_of_what_is_left(model, tmp_path):
    _, masks = pruned(model, "sparsegpt")
    left = masks.without(["blocks.1", "blocks.2.query"])
    assert list(left) == ["blocks.0.query.weight", "blocks.0.value.weight", "blocks.2.value.weight"]
    assert left.prunable == 3 * 256 and left.kept == sum(int(masks[path].sum()) for path in left)
    assert left.weights.keys() == left.keys() and left.found_by == "sparsegpt"
    left.save(tmp_path / "left.safetensors")
    again = Masks.read(tmp_path / "left.safetensors", model)
    assert again.sparsity == left.sparsity and again.found_by == "sparsegpt"
    assert len(masks.without("blocks.1")) == 4
    with pytest.raises(ValueError, match="no mask stands at or below 'blocks.1x'; the first is that of 'blocks.0"):
        masks.without(["blocks.1x"])


def test_masks_are_equal_if_they_keep_the_same_weights_at_the_same_values():
    kept = torch.tensor([[True, False], [True, True]])
    one = Masks({"w": kept})
    assert one == Masks({"w": kept.clone()}) and one != Masks({"w": ~kept}) and one != Masks({"v": kept})
    assert one != Masks({"w": kept.flatten()}) and one != {"w": kept}
    values = {"w": torch.tensor([[1.0, 0.0], [2.0, 3.0]])}
    assert Masks({"w": kept}, values) == Masks({"w": kept}, {"w": values["w"].clone()}) != one
    assert Masks({"w": kept}, values) != Masks({"w": kept}, {"w": 2 * values["w"]})
