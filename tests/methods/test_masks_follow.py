"""Masks follow their matrices: wrapped, copied, cast, merged, numbered anew; and what methods added is never pruned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trimtab
from tests.methods.small import Stack, check_zeros
from trimtab import Masks
from trimtab.anatomy.structure import mark_added
from trimtab.methods import METHODS
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect
from trimtab.methods.prune.masks import keep_zeros
from trimtab.methods.tune.lora import LoRA

peft = pytest.importorskip("peft")


class Holder(nn.Module):
    """A model with task, whose head has a block of the same name as the model's."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.head = nn.Linear(16, 16)
        self.inner = inner

    def forward(self, x):
        return self.head(self.inner(x))


def with_peft(model: Stack) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))


def with_lora(model: Stack) -> nn.Module:
    model.requires_grad_(False)
    LoRA(rank=2, targets=("query",)).attach(model, model.anatomy())
    return model


WRAPPERS = {
    "itself": lambda m: m,
    "a holder": Holder,
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "a copy": copy.deepcopy,
    "bf16": lambda m: m.to(torch.bfloat16),
    "LoRA": with_lora,
    "PeftModel": with_peft,
    "a copy in a compiled holder of a PeftModel": lambda m: torch.compile(Holder(copy.deepcopy(with_peft(m)))),
}


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack()


def found(model: Stack, sparsity: float = 0.63) -> Masks:
    (masks,) = trimtab.prune(model, "omp", [sparsity], anatomy=model.anatomy())
    return masks


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain path -> weight of the one `Stack` that a wrapper holds."""
    inner = next(m for m in model.modules() if isinstance(m, Stack))
    return {n.replace(".base_layer", ""): p for n, p in inner.named_parameters() if "lora" not in n}


def revive(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1


@pytest.mark.parametrize("applied", ["before", "after"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_zeros_come_back_in_the_model_that_is_there(kind, applied, model):
    masks = found(model)
    if applied == "before":
        masks.apply(model)
    wrapped = WRAPPERS[kind](model)
    if applied == "after":
        masks.apply(wrapped)
    assert masks.revived(wrapped) == []
    revive(wrapped)
    assert masks.revived(wrapped) == list(masks)
    masks.enforce(wrapped)
    assert masks.revived(wrapped) == []
    for path, mask in masks.items():
        assert torch.equal(matrices(wrapped)[path] != 0, mask)
    others = [p for n, p in wrapped.named_parameters() if "lora" in n or "head" in n or "bias" in n]
    assert all((p != 0).all() for p in others)


@pytest.mark.parametrize("kind", [k for k in WRAPPERS if k != "LoRA" and "Peft" not in k])
def test_twenty_steps_of_a_trainers_callback_keep_the_zeros(kind, model):
    masks = found(model)
    masks.apply(model)
    callback = keep_zeros(masks)
    trained = WRAPPERS[kind](model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.5)
    before = {k: v.detach().clone() for k, v in matrices(trained).items()}
    dtype = next(trained.parameters()).dtype
    for step in range(20):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        inner = getattr(trained, "_orig_mod", trained)  # nothing is compiled here
        inner(x).float().square().mean().backward()
        callback.on_pre_optimizer_step(None, None, None, model=trained)
        optimizer.step()
        callback.on_optimizer_step(None, None, None, model=trained)
        optimizer.zero_grad()
    for path, mask in masks.items():
        weight = matrices(trained)[path]
        assert not weight[~mask].any() and not torch.equal(weight, before[path])
        assert not optimizer.state[weight]["exp_avg"][~mask].any()
    if kind == "a copy":
        assert all(torch.equal(model.get_parameter(path) != 0, mask) for path, mask in masks.items())


def test_an_optimiser_of_a_copy_is_refused(model):
    masks = found(model)
    optimizer = torch.optim.AdamW(copy.deepcopy(model).parameters())
    with pytest.raises(ValueError, match="this AdamW has none of the parameters of this Stack"):
        masks.keep(model, optimizer)


def test_two_models_that_the_masks_fit_alike_are_told(model):
    both = nn.ModuleDict({"student": model, "teacher": Stack()})
    masks = found(model)
    with pytest.raises(ValueError, match="fit 'student' and 'teacher' in this ModuleDict alike: give the plain model"):
        masks.apply(both)
    masks.apply(model)
    revive(both)
    masks.enforce(both)
    check_zeros(model, masks)
    assert all((p != 0).all() for p in both["teacher"].parameters())


def test_masks_of_another_model_change_nothing(model):
    masks = found(Stack(16))
    model.blocks[2].value = nn.Linear(16, 4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'blocks.2.value.weight' has the shape \(4, 16\), its mask \(16, 16\)"):
        masks.apply(model)
    model.blocks[2].value = nn.Identity()
    with pytest.raises(
        ValueError, match=r"another model, or a block was removed: .*'blocks.2.value.weight'.*restricted"
    ):
        masks.apply(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=False))


# --- blocks that are taken out ----------------------------------------------------------------------------------------


def test_masks_of_a_skipped_block_go(model):
    masks = found(model)
    masks.apply(model)
    model.blocks[1] = mark_added(nn.Linear(16, 16), "das")
    revive(model)
    masks.enforce(model)
    left = masks.restricted_to(model)
    assert list(left) == [p for p in masks if "blocks.1" not in p] and masks.revived(model) == []
    check_zeros(model, left)
    assert (model.blocks[1].weight != 0).all()
    fresh = Stack()
    fresh.blocks[1] = nn.Identity()
    assert list(masks.restricted_to(fresh)) == list(left)
    with pytest.raises(ValueError, match="or a block was removed"):
        masks.apply(fresh)


def test_masks_follow_blocks_that_get_other_numbers(model):
    masks = found(model)
    masks.apply(model)
    mask = masks["blocks.2.query.weight"]
    short = copy.deepcopy(model)
    short.blocks = nn.ModuleList([short.blocks[0], short.blocks[2]])
    revive(short)
    masks.enforce(short)
    assert torch.equal(short.blocks[1].query.weight != 0, mask)
    left = masks.restricted_to(short)
    assert list(left) == [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("query", "value")]
    assert torch.equal(left["blocks.1.query.weight"], mask)
    left.apply(fresh := copy.deepcopy(short))
    check_zeros(fresh, left)


def test_masks_without_a_block_still_know_the_others_by_their_old_numbers(model):
    masks = found(model)
    masks.apply(model)
    left = masks.without(["blocks.0"])
    model.blocks = model.blocks[1:]
    revive(model)
    left.enforce(model)
    check_zeros(model, left.restricted_to(model))
    assert torch.equal(model.blocks[0].value.weight != 0, masks["blocks.1.value.weight"])


def test_numbers_that_cannot_be_told_are_refused(model):
    masks = found(model)
    short = Stack()
    short.blocks = short.blocks[:2]
    with pytest.raises(ValueError, match="'blocks' has 2 blocks and these masks have one for number 2: which blocks"):
        masks.restricted_to(short)
    masks.without(["blocks.2"]).apply(short)


def test_a_shortened_model_is_pruned_anew_under_its_own_numbers(model):
    found(model).apply(model)
    model.blocks = model.blocks[1:]
    with torch.no_grad():
        model.blocks[0].query.weight.mul_(100)
    masks = trimtab.prune(model, "omp", 0.9, anatomy=model.anatomy()).masks
    check_zeros(model, masks)


# --- pruning what carries LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multiflow", "sparsegpt", "snip", "chita", "itersnip", "tamt"])
def test_a_model_that_lora_wraps_is_pruned_as_the_plain_one(name, model):
    batches = [{"x": torch.randn(6, 16, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    settings = {"loss": lambda out: out.square().mean()}
    wrapped = with_lora(copy.deepcopy(model))
    added = {n: p.clone() for n, p in wrapped.named_parameters() if "lora" in n}
    masks = trimtab.prune(model, name, 0.5, batches, model.anatomy(), **settings).masks
    same = trimtab.prune(wrapped, name, 0.5, batches, model.anatomy(), **settings).masks
    assert list(same) == list(masks) and all(torch.equal(same[path], mask) for path, mask in masks.items())
    for path, mask in masks.items():
        torch.testing.assert_close(matrices(wrapped)[path], model.get_parameter(path))
        assert torch.equal(matrices(wrapped)[path] != 0, mask)
    assert all(torch.equal(p, added[n]) for n, p in wrapped.named_parameters() if n in added)


def test_a_merged_update_is_refused(model):
    wrapped = with_lora(model)
    wrapped.blocks[0].query.merge()
    with pytest.raises(ValueError, match="the update of 'blocks.0.query' is merged into its weight"):
        found(wrapped)


def test_merged_lora_keeps_every_zero_whatever_the_order(model):
    anatomy = model.anatomy()
    omp, lora = METHODS["omp"](sparsity=0.63), LoRA(rank=2, targets=("query",))
    omp.take(found(model), anatomy)
    for method in (omp, lora):
        model.requires_grad_(False)
        method.attach(model, anatomy)
    revived = copy.deepcopy(model)
    for module in revived.modules():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight)
    lora.fold(revived)
    masks = omp.attached
    assert masks.revived(revived) == [f"blocks.{i}.query.weight" for i in range(3)]
    omp.fold(revived)
    check_zeros(revived, masks)
    assert masks.revived(model) == []


def test_whole_numbers_are_not_pruned(model):
    model.blocks[1].query.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match="'blocks.1.query.weight' is stored as int8 .quantised.: prune the model before"
    ):
        found(model)


def test_inputs_are_those_of_the_plain_layer(model):
    def squares(with_task: nn.Module, plain: nn.Module) -> dict[str, torch.Tensor]:
        calibration = Calibration(with_task, plain, model.anatomy(), lambda: [batch])
        weights = model.anatomy().weights(plain)
        return {w.path: e[0].squares for w, e in collect(calibration, weights, {"squares"}, [batch]).items()}

    batch = {"x": torch.randn(5, 16)}
    wanted = squares(model, model)
    wrapped = with_peft(copy.deepcopy(model))
    found = squares(wrapped, wrapped.get_base_model())
    assert found.keys() == wanted.keys() and all(torch.equal(found[path], s) for path, s in wanted.items())
