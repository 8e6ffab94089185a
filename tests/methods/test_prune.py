"""Pruners on the toy vision-text-fusion model and on attentions: evidence, allocations, masks, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab
from tests import conformance
from tests.comparisons.prune import LOSS, Toy
from trimtab import Masks
from trimtab.methods import METHODS
from trimtab.methods.prune.allocations import ALLOCATIONS, floored
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence
from trimtab.methods.prune.made import sizes
from trimtab.methods.prune.prunable import prunable
from trimtab.methods.prune.scores import SCORES

GOLDEN = Path(__file__).parents[1] / "golden"
PRUNERS = sorted(n for n, m in METHODS.items() if m.lever == "prune")
STEPS = {"itersnip": {"steps": 2}, "chita++": {"steps": 2, "ridge": 1.0}, "chita": {"ridge": 1.0}}


def make() -> Toy:
    return Toy(conformance.Case("b1_model", json.loads((GOLDEN / "b1_model.json").read_text()), GOLDEN))


@pytest.fixture
def toy() -> Toy:
    return make()


def run(toy: Toy, name: str, sparsity=0.5, **settings):
    batches = settings.pop("batches", None) or toy.batches(LOSS)[:4]
    loss = settings.pop("loss", None)
    anatomy = settings.pop("anatomy", None) or toy.model.anatomy()
    found = trimtab.prune(toy.model, name, sparsity, batches, anatomy, loss, **STEPS.get(name, {}), **settings)
    return found if isinstance(found, list) else found.masks


# --- scores and allocations -------------------------------------------------------------------------------------------


def test_scores_are_their_formulas():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 4), torch.randn(50, 4)
    evidence = Evidence(5, squares=x.square().mean(0), gram=x.T @ x / 50, gradient=torch.randn(5, 4))
    root = x.square().mean(0).sqrt()
    inverse = torch.linalg.inv(evidence.gram + 0.01 * evidence.gram.diagonal().mean() * torch.eye(4))
    wanted = {
        "wanda": weight.abs() * root,
        "ria": (weight.abs() / weight.abs().sum(0) + weight.abs() / weight.abs().sum(1, keepdim=True)) * root.sqrt(),
        "saliency": weight.square() / inverse.diagonal(),
        "sensitivity": (weight * evidence.gradient).abs(),
    }
    for name, scores in wanted.items():
        torch.testing.assert_close(SCORES[name](weight, [evidence]), scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.3, 0.63, 0.95])
@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_an_allocation_gives_what_is_asked_for(name, sparsity, toy):
    weights = prunable(toy.model, toy.model.anatomy())
    torch.manual_seed(0)
    scores = {w: torch.rand(t.shape) * (i + 1) for i, (w, t) in enumerate(weights.items())}
    counts = ALLOCATIONS[name](scores, weights, sparsity)
    total = sum(t.numel() for t in weights.values())
    assert abs(sum(counts.values()) - sparsity * total) <= len(counts)
    assert all(0 <= counts[w] <= t.numel() for w, t in weights.items())
    if name == "ecoflap":  # nobody gives more than a tenth above the average, and the most important gives least
        shares = {w: counts[w] / t.numel() for w, t in weights.items()}
        assert max(shares.values()) <= sparsity + 0.1 + 0.01
        assert min(shares, key=shares.get) in list(weights)[-8:]


@pytest.mark.parametrize("floor", [0.05, 0.2, 0.25])
def test_a_floor_is_kept_by_every_tensor_and_paid_by_its_modality(floor, toy):
    weights = prunable(toy.model, toy.model.anatomy())
    known = sizes(weights)
    torch.manual_seed(0)
    scores = {w: torch.rand(t.shape) * (i + 1) for i, (w, t) in enumerate(weights.items())}
    plain = ALLOCATIONS["modality"](scores, weights, 0.75)
    found = floored(plain, known, floor)
    assert min(1 - plain[w] / n for w, n in known.items()) < 0.05  # one starves without
    assert all(known[w] - found[w] >= floor * known[w] for w in known)
    for modality in {w.modality for w in known}:
        mine = [w for w in known if w.modality == modality]
        assert sum(found[w] for w in mine) == sum(plain[w] for w in mine)
        assert all(found[w] >= plain[w] for w in mine if known[w] - plain[w] > floor * known[w])  # the others give
    if floor == 0.25:
        assert all(abs(found[w] - 0.75 * n) <= 1 for w, n in known.items())


def test_a_modality_without_enough_gets_its_floor_from_the_others(toy):
    weights = prunable(toy.model, toy.model.anatomy())
    known = sizes(weights)
    starved = {w for w in known if w.modality == "vision"}
    counts = {w: n if w in starved else 0 for w, n in known.items()}
    found = floored(counts, known, 0.1)
    assert sum(found.values()) == sum(counts.values())
    assert all(n - found[w] >= 0.1 * n for w, n in known.items())
    with pytest.raises(ValueError, match="floor: expected at most the share of all weights that is kept"):
        floored(counts, known, 0.99)


@pytest.mark.parametrize("name", ["multiflow", "omp", "sparsegpt", "itersnip"])
def test_a_pruner_keeps_a_floor(name, toy):
    (masks,) = run(toy, name, [0.8], floor=0.15)
    assert min(m.double().mean() for m in masks.values()) >= 0.15
    assert masks.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_global_threshold_may_empty_a_tower_which_is_refused(toy):
    with torch.no_grad():
        for w in toy.model.anatomy().weights(toy.model):
            if w.modality == "vision":
                toy.model.get_parameter(w.path).mul_(1e-3)
    with pytest.raises(ValueError, match="no weight of the tower 'vision' is left .* allow_empty_tower"):
        run(toy, "omp", 0.5)
    (masks,) = run(toy, "omp", [0.5], allow_empty_tower=True)
    assert not any(m.any() for path, m in masks.items() if path.startswith("vision"))
    (masks,) = run(toy, "omp", [0.5], allocation="modality")
    assert any(m.any() for path, m in masks.items() if path.startswith("vision"))


# --- every pruner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_prunes_in_place_and_leaves_the_rest_alone(name, toy):
    model = toy.model
    model.text_encoder.cls.train()
    model.itm_head.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
    several = run(toy, name, [0.5, 0.9])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    masks = run(toy, name, 0.9)
    assert flags == {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
    assert model.text_encoder.cls.training and not model.training
    assert abs(several[0].sparsity - 0.5) < 0.01 and abs(masks.sparsity - 0.9) < 0.01
    if name != "random-pruning":
        assert all(torch.equal(mask, several[1][path]) for path, mask in masks.items())
    for path, parameter in model.named_parameters():
        if path not in masks:
            assert torch.equal(parameter, before[path])
            continue
        assert not parameter[~masks[path]].any()
        same = torch.equal(parameter[masks[path]], before[path][masks[path]])
        assert same or METHODS[name].changes_weights


@pytest.mark.parametrize("allocation", list(ALLOCATIONS))
@pytest.mark.parametrize("name", ["omp", "multiflow", "lamp", "itersnip", "ria"])
def test_allocations_can_be_exchanged(name, allocation, toy):
    masks = run(toy, name, 0.6, allocation=allocation)
    assert abs(masks.sparsity - 0.6) < 0.01


def test_wanda_takes_as_many_of_every_output(toy):
    (masks,) = run(toy, "wanda", [0.5])
    assert all(len(set(mask.sum(dim=1).tolist())) == 1 for mask in masks.values())
    (masks,) = run(toy, "wanda", [0.7])  # not a whole number of any output's weights: some give one more
    assert {int(mask.sum(dim=1).max() - mask.sum(dim=1).min()) for mask in masks.values()} == {0, 1}
    assert all(int((~mask).sum()) == int(0.7 * mask.numel()) for mask in masks.values())
    (masks,) = run(toy, "wanda", [0.5], per_output=False)
    assert any(len(set(mask.sum(dim=1).tolist())) > 1 for mask in masks.values())


@pytest.mark.parametrize("sequential", [True, False])
def test_sparsegpt_keeps_outputs_closer_than_zeroing_the_same_weights(sequential, toy):
    batches = toy.batches(LOSS)[:8]
    forward = [{k: b[k] for k in ("images", "text_ids", "text_atts")} for b in batches]

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([toy.model(**b) for b in forward])

    dense = outputs()
    state = {k: v.clone() for k, v in toy.model.state_dict().items()}
    masks = run(toy, "sparsegpt", 0.5, batches=batches, sequential=sequential, block_size=5)
    assert all(abs(1 - float(m.float().mean()) - 0.5) < 0.01 for m in masks.values())
    rebuilt = float((outputs() - dense).square().mean())
    toy.model.load_state_dict(state)
    masks.enforce(toy.model)
    assert rebuilt < 0.8 * float((outputs() - dense).square().mean())


def test_chita_keeps_its_number_where_the_published_code_loses_a_block(toy):
    asked = int(0.1 * sum(t.numel() for t in prunable(toy.model, toy.model.anatomy()).values()))
    kept = {}
    for faithful in (True, False):
        settings = {"ridge": 0.01, "faithful": faithful}
        masks = trimtab.prune(toy.model, "chita", [0.9], toy.batches(LOSS)[:3], toy.model.anatomy(), **settings)
        kept[faithful] = masks[0].kept
    assert kept[True] < kept[False] and asked - kept[False] <= 1


def test_tamt_computes_its_first_step_with_weights(toy):
    seen = {}
    for faithful in (True, False):
        method = METHODS["tamt"](faithful=faithful)
        calibration = Calibration(toy.model, toy.model, toy.model.anatomy(), lambda: toy.batches(LOSS)[:1])
        calibration.loss = lambda out, f=faithful: seen.__setitem__(f, active(toy)) or out["loss"]
        list(method.trace(calibration, 0.63))
    assert seen == {True: 0, False: pytest.approx(2956, abs=20)}


def active(toy: Toy) -> int:
    return sum(int(t.count_nonzero()) for t in prunable(toy.model, toy.model.anatomy()).values())


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["omp", "sparsegpt"])
def test_masks_are_saved_and_loaded(name, toy, tmp_path):
    masks = run(toy, name, [0.7])[0]
    masks.save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size < 60_000
    again = Masks.read(tmp_path / "masks.safetensors", toy.model)
    assert list(again) == list(masks) and again.sparsity == masks.sparsity
    again.apply(toy.model)
    for path, mask in masks.items():
        parameter = toy.model.get_parameter(path)
        assert torch.equal(parameter != 0, mask)
        assert name == "omp" or torch.equal(parameter, masks.weights[path])
        parameter.data += 1
    again.enforce(toy.model)
    assert all(torch.equal(toy.model.get_parameter(path) != 0, mask) for path, mask in masks.items())


def test_masks_of_another_model_are_refused(toy, tmp_path):
    file = tmp_path / "masks.safetensors"
    run(toy, "omp", [0.7])[0].save(file)
    first = "vision_encoder.vit.layers.0.fc1"
    toy.model.set_submodule(first, nn.Linear(13, 20))
    with pytest.raises(
        ValueError, match=f"masks.safetensors: .*'{first}.weight' has the shape .20, 13., its mask .20, 12."
    ):
        Masks.read(file, toy.model)
    with pytest.raises(ValueError, match="another model, or a block was removed: unknown parameter 'vision_encoder"):
        Masks.read(file).apply(nn.Linear(2, 2))
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="expected a file of masks"):
        Masks.read(file)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in [0, 1), found 1.0"),
        ({"sparsity": [0.5, -0.1]}, "sparsity must lie in [0, 1), found -0.1"),
        ({"sparsity": []}, "found an empty sequence"),
        ({"name": "multifow"}, "unknown pruner 'multifow': did you mean 'multiflow'"),
        ({"name": "full"}, "unknown pruner 'full'"),
        ({"alocation": "global"}, "unknown setting 'alocation': did you mean 'allocation'"),
        ({"allocation": "globl"}, "unknown allocation 'globl': did you mean 'global'"),
        ({"sparsity": 0.75, "floor": 0.3}, "floor must lie between 0 and the share that is kept of all weights, 0.25"),
        ({"floor": -0.1}, "floor must lie between 0 and"),
        ({"sparsity": None, "pattern": "2:4", "floor": 0.1}, "leaves every tensor the same share, found 0.1"),
        ({"masks": "there", "floor": 0.1}, "masks that were found before have their shares"),
        ({"name": "chita", "floor": 0.1}, "CHITA divides the weights itself, found 0.1"),
        ({"name": "tamt", "floor": 0.1}, "TAMT learns what each tensor keeps, found 0.1"),
        ({"name": "chita", "allocation": "uniform"}, "CHITA divides the weights among tensors itself"),
        ({"name": "tamt", "allocation": "uniform"}, "TAMT learns it"),
        ({"name": "sparsegpt", "allocation": "global"}, "set sequential: false"),
        ({"name": "sparsegpt", "damping": 0.0}, "damping must be above 0"),
        ({"name": "itersnip", "schedule": "exp"}, "schedule must be 'exponential' or 'linear'"),
        ({"name": "chita++", "ridge": 0.0}, "ridge must be above 0"),
    ],
)
def test_wrong_settings_say_why(arguments, message, toy):
    import re

    settings = {**STEPS.get(arguments.get("name", "omp"), {}), **arguments}
    name, sparsity = settings.pop("name", "omp"), settings.pop("sparsity", 0.5)
    with pytest.raises(ValueError, match=re.escape(message)):
        trimtab.prune(toy.model, name, sparsity, toy.batches(LOSS)[:2], toy.model.anatomy(), **settings)


def test_calibration_data_that_do_not_do_are_refused(toy):
    def prune(name="multiflow", batches=(), **settings):
        trimtab.prune(toy.model, name, 0.5, batches, toy.model.anatomy(), **settings)

    good = toy.batches(LOSS)[:3]
    with pytest.raises(ValueError, match="'multiflow' needs calibration data: pass `batches`"):
        prune(batches=None)
    with pytest.raises(ValueError, match="calibration data are empty"):
        prune()
    used_up = iter(good)
    list(used_up)
    with pytest.raises(ValueError, match="calibration data are empty"):
        prune(batches=used_up)
    with pytest.raises(ValueError, match="4 rounds of calibration need a batch each, found 3 batches"):
        prune("itersnip", good, steps=4)
    with pytest.raises(ValueError, match="expected a dict of the model's keyword arguments, found list"):
        prune(batches=[[1]])
    ended = Calibration(toy.model, toy.model, toy.model.anatomy(), lambda: good, 5)
    with pytest.raises(ValueError, match="ended after 3 of the 5 batches"):
        list(next(ended.rounds()))
    without = [{**b, "counted_tokens": None} for b in toy.batches(("text_ids", "text_atts"))[:2]]
    message = "batch 1 has no mask of valid tokens for the tower 'text': expected one at the input 'counted_tokens'"
    with pytest.raises(ValueError, match=message):
        trimtab.prune(make().model, "wanda", 0.5, without, toy.model.anatomy("counted_tokens"))
    with pytest.raises(ValueError, match="the model's output .Tensor. has no 'loss'"):
        prune("snip", toy.batches(("text_ids", "text_atts")))


def test_what_is_not_finite_is_named(toy):
    good = toy.batches(LOSS)[:3]
    bad = [good[0], {**good[1], "images": good[1]["images"] / 0}]
    first = "vision_encoder.vit.layers.0"
    with pytest.raises(ValueError, match="batch 2: the inputs of 'vision_encoder.vit.layers.0.fc1' are not finite"):
        run(toy, "multiflow", batches=bad)
    with pytest.raises(ValueError, match=f"batch 2: the loss is nan; the first output .* is that of '{first}"):
        run(toy, "snip", batches=bad)
    with pytest.raises(ValueError, match="expected a scalar loss"):
        run(toy, "snip", loss=lambda out: out["losses"])
    with pytest.raises(ValueError, match="the loss depends on none of the prunable weights"):
        run(toy, "snip", loss=lambda out: out["loss"].detach())
    with pytest.raises(ValueError, match="gradient of 'vision_encoder.* is not finite"):
        run(toy, "snip", loss=lambda out: (out["loss"] - out["loss"].detach()).abs().sqrt())
    toy.model.get_parameter(f"{first}.fc2.weight").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"'{first}.fc2.weight' is not finite"):
        run(toy, "omp")


def test_a_model_without_linear_layers_is_refused():
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(3)))
    model = nn.Module()
    model.blocks = blocks
    with pytest.raises(ValueError, match="hold no linear layer .*blocks"):
        trimtab.prune(model, "omp", 0.5)


def test_an_unknown_precision_is_refused(toy):
    with pytest.raises(ValueError, match="precision.*fp32.*bf16.*auto.*fp8"):
        trimtab.prune(toy.model, "multiflow", 0.5, toy.batches(LOSS), precision="fp8")


# --- the comparison with reference tensors ----------------------------------------------------------------------------


def test_conformance_knows_a_case_by_its_json_and_fails_on_other_numbers(tmp_path, capsys):
    for name in ("b1_lamp", "b1_model"):
        for end in ("json", "safetensors"):
            shutil.copy(GOLDEN / f"{name}.{end}", tmp_path / f"{name.replace('b1_lamp', 'renamed')}.{end}")
    (tmp_path / "figures.json").write_text('{"conventions": "none"}')
    (tmp_path / "other.json").write_text('{"case": "Z9"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert conformance.main(tmp_path) == 0
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines["renamed"]["kind"] == "pruner lamp" and lines["renamed"]["pass"]
    assert lines["figures"]["pass"] is None and "no tensors" in lines["figures"]["skipped"][0]
    assert "'Z9'" in lines["other"]["skipped"][0]

    tensors = load_file(tmp_path / "renamed.safetensors")
    mask = next(k for k in tensors if k.startswith("s90.mask."))
    tensors[mask][0, 0] ^= True
    save_file(tensors, tmp_path / "renamed.safetensors")
    assert conformance.main(tmp_path) == 1
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        failed["case"] == "renamed"
        and not failed["pass"]
        and failed["quantity"] == "s90.mask"
        and failed["max_error"] == 1
    )
