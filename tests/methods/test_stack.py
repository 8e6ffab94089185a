"""Prune, skip and tune composed on four tiny models: trained is what is called so, zeros stay, folders are exact.

The whole cross product of levers is too large to train: every pair of two levers' choices is, each with one choice of
the third. The rules that refuse a combination are gone over in full.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from tests.models.four import DECODER, DUAL, FOUR, SINGLE, Tiny
from trimtab.methods import METHODS
from trimtab.methods.stack import refusal

PRUNERS = (None, "omp", "multiflow", "snip", "sparsegpt")  # by weights, activations, gradients, and with new values
FORMS = (None, "parallel", "sequential", "routed", "none")
TUNERS = (None, *sorted(n for n, m in METHODS.items() if m.lever == "tune"))
SMALL = {"shallow-prompt": {"prompts": 2}, "deep-prompt": {"prompts": 2}, "partial": {"blocks": 1}}


def attached(tiny: Tiny, prune: str | None, form: str | None, tune: str | None, searched: bool) -> trimtab.Adapted:
    torch.manual_seed(0)
    fit = trimtab.adapt(tiny.make())
    batches = [tiny.batch] * 4
    if prune:
        fit.prune(prune, 0.5, batches if METHODS.make(prune).rounds else None)
    if form:
        data = {"train": batches, "validation": batches, "steps": 4, "turn": 1, "warmup": 0.25} if searched else {}
        fit.skip("das" if searched else "random-skip", skip=1, adapters=form, reduction=4, **data)
    if tune:
        fit.tune(tune, **SMALL.get(tune, {}))
    return fit


def output(tiny: Tiny, model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return tiny.loss(model(**tiny.batch))


def combinations():
    """Every pair of (pruner, form), (pruner, tuner), (form, tuner) at least once, each on two of the models; the third
    choice and the models go round.

    With TRIMTAB_EVERY_COMBINATION set, the whole cross product.
    """
    if os.environ.get("TRIMTAB_EVERY_COMBINATION"):  # the first is nothing at all, which `save` refuses
        return list(itertools.product(FOUR, list(itertools.product(PRUNERS, FORMS, TUNERS))[1:]))
    every = [(p, FORMS[(i + j) % 5], tuner) for i, tuner in enumerate(TUNERS) for j, p in enumerate(PRUNERS)][1:]
    return [(tiny, chosen) for i, chosen in enumerate(every) for tiny in (FOUR[i % 4], FOUR[(i + 1 + i // 4 % 3) % 4])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny", "levers"), combinations(), ids=lambda x: getattr(x, "name", None) or "-".join(map(str, x))
)
def test_a_combination(tiny, levers, tmp_path):
    prune, form, tune = levers
    detaches = tune in ("unipt", "lst", "sherl", "side-tuning", "linear-probe")
    searched = form not in (None, "none") and detaches
    try:
        fit = attached(tiny, prune, form, tune, searched)
    except ValueError as error:
        assert any(x in str(error) for x in REASONS), error
        pytest.skip(str(error))
    check(tiny, fit, tmp_path)


# Why a method does not apply to one of these models at all, whatever it is combined with.
REASONS = (
    "use parallel adapters",  # sequential and routed ones need a norm before the part
    "no described part",
    "have no bias",
    "no prompts fit before",
)


def check(tiny: Tiny, fit: trimtab.Adapted, tmp_path) -> None:
    trained = {n: p for n, p in fit.model.named_parameters() if p.requires_grad}
    costs = fit.cost(tiny.batch)
    if trained:
        step(tiny, fit, trained, costs)
    before = output(tiny, fit.model)
    folder = fit.save(tmp_path / "fit")
    counted = costs if fit.tuned else fit.cost(tiny.batch)  # of a pruned model alone what was trained comes on top
    assert counted.disk_bytes == sum(f.stat().st_size for f in folder.iterdir())
    again = trimtab.adapt(tiny.make(), folder)
    assert torch.equal(output(tiny, again.model), before)
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, p in fit.model.named_parameters() if p.requires_grad
    }
    stored = load_file(folder / "weights.safetensors")
    learned = sum(v.numel() for k, v in stored.items() if not k.startswith("method.") and v.is_floating_point())
    # Without a method that says what is trained, what has changed is stored: no matrix that is all zeros.
    changed = (p.numel() for n, p in trained.items() if fit.tuned or (n not in costs.idle and p.count_nonzero()))
    assert learned >= sum(changed)
    export(tiny, fit, before, tmp_path)


def step(tiny: Tiny, fit: trimtab.Adapted, trained: dict, costs) -> None:
    """One step reaches all that is called trained; after 6 with weight decay the zeros are still zeros."""
    optimizer = torch.optim.AdamW(list(fit.parameters()), 1e-2, weight_decay=0.1)
    fit.keep(optimizer)
    for i in range(6):
        fit.model.train()
        optimizer.zero_grad()
        tiny.loss(fit.model(**tiny.batch)).backward()
        if i == 0:
            idle = [n for n, p in trained.items() if p.grad is None]
            assert idle == list(costs.idle)
            if "full" in list(fit) or not any(METHODS[n].lever != "prune" for n in fit):
                assert all(n.startswith(tiny.idle or ("-",)) for n in idle), idle
            else:
                assert not idle
            assert costs.trained == sum(p.numel() for p in trained.values() if p.grad is not None)
        optimizer.step()
    if fit.masks is not None:
        assert fit.masks.revived(fit.model) == []
        assert 0.4 < fit.sparsity < 0.6


def export(tiny: Tiny, fit: trimtab.Adapted, before: torch.Tensor, tmp_path) -> None:
    if any(m.keeps for m in fit.methods):
        with pytest.raises(ValueError, match="cannot be exported"):
            fit.export(tmp_path / "plain")
        return
    fit.export(tmp_path / "plain")
    plain = type(fit.model).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(output(tiny, plain), before, rtol=1e-4, atol=1e-5)
    if fit.masks is not None:
        zeros = sum(int((p == 0).sum()) for p in plain.parameters())
        assert zeros >= fit.masks.prunable - fit.masks.kept
    assert torch.equal(output(tiny, fit.model), before)  # the model itself is as it was


def test_every_order_of_every_combination_is_decided_by_the_facts():
    """Prune x skip x tune in all orders: refused are skipping after tuning, and side networks over adapters that
    nothing has trained; nothing else."""
    anatomy = trimtab.Anatomy.of(SINGLE.make())
    skips = [("das", f) for f in FORMS[1:]] + [("random-skip", f) for f in FORMS[1:]]
    for pruner, (skip, form), tuner in itertools.product(PRUNERS[1:], skips, TUNERS[1:]):
        made = {"prune": METHODS.make(pruner), "skip": METHODS.make(skip, adapters=form), "tune": METHODS.make(tuner)}
        for order in itertools.permutations(made):
            methods = [made[lever] for lever in order]
            found = [refusal(methods[:i], m, anatomy) for i, m in enumerate(methods)]
            late = order.index("skip") > order.index("tune")
            detaches = tuner in ("unipt", "lst", "sherl", "side-tuning", "linear-probe")
            untrained = not late and detaches and skip == "random-skip" and form != "none"
            assert any("skip first, then tune" in f for f in found) == late
            assert any("nothing has trained them" in f and "`adapters: none`" in f for f in found) == untrained
            assert bool("".join(found)) == (late or untrained)


@pytest.mark.parametrize("tiny", FOUR, ids=lambda t: t.name)
def test_the_three_levers_together(tiny, tmp_path):
    fit = attached(tiny, "multiflow", "none", "lora", False)
    assert list(fit) == ["multiflow", "random-skip", "lora"]
    check(tiny, fit, tmp_path)


def test_a_model_that_is_only_pruned_is_saved_as_its_masks(tmp_path):
    fit = attached(SINGLE, "omp", None, None, False)
    stored = load_file(fit.save(tmp_path / "fit") / "weights.safetensors")
    assert all(k.startswith("method.0.") for k in stored), "nothing was trained yet"
    assert fit.cost(SINGLE.batch).disk_bytes == sum(f.stat().st_size for f in (tmp_path / "fit").iterdir())
    again = trimtab.adapt(SINGLE.make(), tmp_path / "fit")
    assert all(p.requires_grad for p in again.model.parameters()), "what is trained is left to the user"
    optimizer = torch.optim.AdamW(fit.parameters(), 1e-2)
    fit.keep(optimizer)
    SINGLE.loss(fit.model.train()(**SINGLE.batch)).backward()
    optimizer.step()
    third = trimtab.adapt(SINGLE.make(), fit.save(tmp_path / "trained"))
    assert torch.equal(output(SINGLE, third.model), output(SINGLE, fit.model))


def test_adapters_of_a_search_are_kept_and_frozen_under_a_side_network(tmp_path):
    fit = attached(SINGLE, "omp", "parallel", "unipt", True)
    kept = [n for n, p in fit.model.named_parameters() if ".das_" in n or ".adapter." in n]
    assert kept and not any(dict(fit.model.named_parameters())[n].requires_grad for n in kept)
    stored = load_file(fit.save(tmp_path / "fit") / "weights.safetensors")
    assert {f"kept.{n}" for n in kept} <= stored.keys() and not any(
        k.startswith("learned.") and ".das_" in k for k in stored
    )
    trained = sum(p.numel() for p in fit.parameters())
    assert (
        trained
        == fit.cost(SINGLE.batch).trained
        == sum(p.numel() for n, p in fit.model.named_parameters() if "unipt" in n and p.requires_grad)
    )


def test_side_networks_over_adapters_that_nothing_has_trained_are_refused():
    with pytest.raises(
        ValueError, match="unipt: .*adapters of random-skip .*nothing has trained them.*`adapters: none`"
    ):
        attached(SINGLE, None, "parallel", "unipt", False)


def test_masks_of_removed_blocks_go_and_the_sparsity_is_of_what_is_left():
    fit = attached(SINGLE, "omp", None, None, False)
    before = fit.prunable
    block = next(fit.anatomy.blocks()).path
    fit.skip("random-skip", plan=[block], adapters="none")
    assert not any(p.startswith(block + ".") for p in fit.masks) and fit.prunable < before
    real = sum(int((fit.model.get_parameter(p) == 0).sum()) for p in fit.masks)
    assert fit.sparsity == pytest.approx(real / fit.prunable)


def test_masks_follow_lora_and_merged_weights_keep_every_zero(tmp_path):
    fit = attached(SINGLE, "omp", None, "lora", False)
    assert set(fit.masks) == set(trimtab.prune(SINGLE.make(), "omp", 0.5).masks)
    for name, parameter in fit.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = fit.folded()
    masks = fit.masks
    assert masks.revived(plain) == [] and any("query" in p for p in masks)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("prune", "omp", 0.5), ("prune", "l2", 0.5), "pruned already with omp"),
        (("skip", "random-skip", 1), ("skip", "das", 1), "skipped already by random-skip"),
        (("tune", "lora"), ("tune", "unipt"), "tuned already with lora.*fit.add"),
        (("tune", "lora"), ("skip", "random-skip", 1), "skip first, then tune"),
    ],
)
def test_a_lever_twice_and_an_order_that_loses_something_are_refused(first, second, message):
    fit = trimtab.adapt(SINGLE.make())
    getattr(fit, first[0])(*first[1:])
    before = [n for n, _ in fit.model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        getattr(fit, second[0])(*second[1:])
    assert [n for n, _ in fit.model.named_parameters()] == before and list(fit) == [first[1]]


def test_what_does_not_fit_changes_nothing_that_is_trained():
    fit = attached(SINGLE, "omp", "parallel", None, False)
    trained = [n for n, p in fit.model.named_parameters() if p.requires_grad]
    before = output(SINGLE, fit.model)
    with pytest.raises(ValueError, match="unknown tower 'fusoin': did you mean 'fusion'"):
        fit.tune("adapter", towers=("fusoin",))
    with pytest.raises(ValueError, match="partial: blocks is 99, but tower 'fusion' has 3"):
        fit.tune("partial", blocks=99)
    assert [n for n, p in fit.model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(output(SINGLE, fit.model), before) and list(fit) == ["omp", "random-skip"]
    with pytest.raises(ValueError, match="unknown setting 'rnak': did you mean 'rank'"):
        fit.tune("lora", rnak=2)
    fit.tune("lora", rank=2)


def test_adapting_twice_names_the_way_out():
    fit = trimtab.adapt(SINGLE.make())
    fit.tune("lora")
    with pytest.raises(ValueError, match="adapted already .lora.*its handle"):
        trimtab.adapt(fit.model)
    assert trimtab.prune(fit.model, "omp", 0.5) is fit  # the shortcuts go on with it


def test_blocks_that_masks_and_side_networks_need_are_not_taken_out_behind_the_handle():
    for fit in (attached(SINGLE, "omp", None, None, False), attached(SINGLE, None, None, "unipt", False)):
        block = next(fit.anatomy.blocks()).path
        before = output(SINGLE, fit.model)
        with pytest.raises(ValueError, match=r"need its blocks: use `fit.skip\(...\)`"):
            trimtab.shorten(fit.model, [block])
        assert torch.equal(output(SINGLE, fit.model), before)


def test_a_forgotten_callback_is_noticed_at_save(tmp_path):
    fit = attached(SINGLE, "omp", None, "full", False)
    optimizer = torch.optim.AdamW(fit.parameters(), 1e-2)
    SINGLE.loss(fit.model.train()(**SINGLE.batch)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"regained non-zeros, first '.*weight'.*fit.keep\(optimizer\)"):
        fit.save(tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
    fit.masks.enforce(fit.model)
    fit.save(tmp_path / "fit")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: DUAL.make(), "another base: a FixedOrderVilt, this is a CLIPModel"),
        (lambda: SINGLE.make().to(torch.bfloat16), "another precision: 100 % .*float32, here 100 % .*bfloat16"),
        (lambda: _changed(SINGLE.make()), "same architecture and precision with other weights"),
        (
            lambda: _set_otherwise(SINGLE.make()),
            "another configuration: hidden_act gelu, here relu: load the checkpoint",
        ),
    ],
)
def test_another_base_is_refused_with_the_difference(base, message, tmp_path):
    attached(SINGLE, None, None, "unipt", False).save(tmp_path / "fit")
    model = base()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(trimtab.FitError, match=message):
        trimtab.adapt(model, tmp_path / "fit")
    assert {n for n, _ in model.named_parameters()} == before.keys()


def _changed(model):
    """The last element of the largest matrix: a hash of a sample would not see it."""
    largest = max(model.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        largest.view(-1)[-1] += 1
    return model


def _set_otherwise(model):
    model.config.hidden_act, model.config.hidden_dropout_prob = "relu", 0.3  # the latter decides no output
    return model


def test_damaged_folders_are_refused(tmp_path):
    folder = attached(SINGLE, "omp", None, "lora", False).save(tmp_path / "fit")
    with pytest.raises(FileNotFoundError, match="expected fit.json and weights.safetensors"):
        trimtab.adapt(SINGLE.make(), tmp_path)
    weights = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="weights.safetensors"):
        trimtab.adapt(SINGLE.make(), folder)
    (folder / "weights.safetensors").write_bytes(weights)
    config = json.loads((folder / "fit.json").read_text())
    (folder / "fit.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(trimtab.FitError, match="fit.json: format 99, this version of trimtab reads 1"):
        trimtab.adapt(SINGLE.make(), folder)
    (folder / "fit.json").write_text(json.dumps(config)[:-40])
    with pytest.raises(trimtab.FitError, match="no JSON"):
        trimtab.adapt(SINGLE.make(), folder)


def test_saving_over_a_folder_and_exporting_what_cannot_fold(tmp_path):
    fit = attached(SINGLE, None, None, "unipt", False)
    fit.save(tmp_path / "fit")
    with pytest.raises(FileExistsError, match="name a new folder"):
        fit.save(tmp_path / "fit")
    with pytest.raises(ValueError, match="unipt cannot be exported as a plain model: its side networks stand beside"):
        fit.export(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# --- copies, wrappers, several results --------------------------------------------------------------------------------

INSIDE = ("unipt", "lst", "sherl", "side-tuning", "adapter", "parallel-adapter", "deep-prompt", "lora")


@pytest.mark.parametrize("tune", INSIDE)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own(tune, how):
    fit = attached(SINGLE, "omp", "parallel" if tune in ("adapter", "lora") else None, tune, False)
    twin = how(fit.model)
    assert torch.equal(output(SINGLE, twin), output(SINGLE, fit.model))
    before = output(SINGLE, fit.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert torch.equal(output(SINGLE, fit.model), before) and not torch.equal(output(SINGLE, twin), before)
    SINGLE.loss(twin.train()(**SINGLE.batch)).backward()
    assert all(p.grad is None for p in fit.model.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_several_results_on_one_pruned_and_shortened_base(tmp_path):
    fit = attached(SINGLE, "omp", "none", "lora", False)
    first = output(SINGLE, fit.model)
    fit.add("other")
    with torch.no_grad():
        for parameter in fit.parameters():
            parameter.add_(0.1)
    second = output(SINGLE, fit.model)
    assert fit.names == ["default", "other"] and not torch.equal(first, second)
    fit.switch("default")
    assert torch.equal(output(SINGLE, fit.model), first)
    fit.save(tmp_path / "other", "other")
    again = trimtab.adapt(SINGLE.make(), fit.save(tmp_path / "default"))
    again.load(tmp_path / "other", "questions")
    again.switch("questions")
    assert torch.equal(output(SINGLE, again.model), second)
    stranger = attached(SINGLE, "l2", "none", "lora", False).save(tmp_path / "stranger")
    with pytest.raises(ValueError, match="made with l2, random-skip, lora, here are omp"):
        again.load(stranger, "third")


@pytest.mark.parametrize("tune", ["unipt", "lora", "adapter"])
def test_moved_and_cast_after_attaching(tune):
    fit = attached(DECODER, "omp", "none", tune, False)
    fit.model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(fit.parameters(), 1e-2, weight_decay=0.1)
    fit.keep(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        DECODER.loss(fit.model.train()(**DECODER.batch)).backward()
        optimizer.step()
    assert fit.masks.revived(fit.model) == []
