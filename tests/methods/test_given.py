"""Masks that were found before, from a file or from a run."""

from __future__ import annotations

import json

import pytest
import torch

from trimtab import backbones
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run
from trimtab.methods.prune.masks import Masks


def masks_of(backbone) -> Masks:
    torch.manual_seed(0)
    weights = backbone.anatomy.weights(backbone.model)
    return Masks({w.path: torch.rand_like(backbone.model.get_parameter(w.path)) > 0.7 for w in weights})


def result(folder):
    return folder_of_runs.load(folder).backbone.model, json.loads((folder / "methods.json").read_text())


def test_a_run_takes_the_masks_of_another_and_keeps_them(tiny_raw, tmp_path):
    def carry_out(*methods, **training):
        r = recipe.expand(tiny_raw("tiny-vilt", "vqa", list(methods), **training), "test")[0]
        return run.run(r, tmp_path / methods[0]["name"], measure_costs=False)

    found = carry_out({"name": "chita", "sparsity": 0.7, "batches": 2, "batch_size": 4}, steps=0)
    used = carry_out({"name": "masks", "path": str(found)}, "full")
    pruned, states = result(found)
    trained, later = result(used)
    assert later[0]["state"] == {"from": str(found), **states[0]["state"]}
    assert later[0]["state"]["pruner"] == "chita" and set(later[0]["state"]["towers"]) == {"fusion"}
    moved = 0.0
    for weight in backbones.load("tiny-vilt", pretrained=False).anatomy.weights(pruned):
        a, b = pruned.get_parameter(weight.path), trained.get_parameter(weight.path)
        assert torch.equal(a == 0, b == 0)
        moved += (a - b).abs().sum().item()
    assert moved > 0


def test_a_file_of_masks_is_taken(tiny_raw, tmp_path):
    masks = masks_of(backbones.load("tiny-vilt", pretrained=False))
    masks.save(tmp_path / "m.safetensors")
    method = {"name": "masks", "path": str(tmp_path / "m.safetensors")}
    r = recipe.expand(tiny_raw("tiny-vilt", "vqa", [method], steps=0), "test")[0]
    model, states = result(run.run(r, tmp_path / "run", measure_costs=False))
    assert states[0]["state"]["kept"] == masks.kept
    assert all(torch.equal(model.get_parameter(path) != 0, mask) for path, mask in masks.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "nothing is at '.*given'.* carry out the recipe"),
        (lambda p: p.mkdir(), "not the folder of a finished run"),
        (lambda p: masks_of(backbones.load("tiny-clip", pretrained=False)).save(p), "for another model"),
    ],
)
def test_what_holds_no_masks_for_this_model_is_refused(make, message, tiny_raw, tmp_path):
    make(tmp_path / "given")
    method = {"name": "masks", "path": str(tmp_path / "given")}
    with pytest.raises(ValueError, match=message):
        run.run(recipe.expand(tiny_raw("tiny-vilt", "vqa", [method]), "test")[0], tmp_path / "run")


def test_a_run_without_a_pruner_or_of_another_backbone_is_refused(tiny_raw, tmp_path):
    def carry_out(backbone, task, *methods):
        r = recipe.expand(tiny_raw(backbone, task, list(methods), steps=0), "test")[0]
        return run.run(r, tmp_path / f"{backbone}-{methods[0]['name']}", measure_costs=False)

    probe = carry_out("tiny-clip", "retrieval", {"name": "linear-probe"})
    with pytest.raises(ValueError, match="one pruner .* its methods are: linear-probe"):
        carry_out("tiny-vilt", "vqa", {"name": "masks", "path": str(probe)})
    omp = carry_out("tiny-clip", "retrieval", {"name": "omp"})
    with pytest.raises(ValueError, match="for another model: it has no prunable '"):
        carry_out("tiny-vilt", "vqa", {"name": "masks", "path": str(omp)})
