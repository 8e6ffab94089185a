"""The recipes of `recipes/published` run on tiny backbones in the layouts of the authors and a few rows of each set."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.data.stand_ins import stand_in
from tests.models.official import file
from trimtab.experiments import assembly, recipe, run
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.estimate import estimate

NAMES = [n for n in recipe.names() if n.startswith("published/")]
# What runs each time: every lever, the readers and tasks that differ most. The others are marked slow.
FAST = {
    ("das_vilt_nlvr2", "das-1"), ("unipt_vse_coco", "unipt"), ("unipt_clip4clip_msvd", "unipt"),
    ("multiflow_blip_vqav2", "multiflow-0.63"),
}  # fmt: skip
FEW = {"search_steps": 4, "turn": 1, "subsets": 2, "batches": 1, "batch_size": 4, "steps": 1, "prompts": 2,
       "layers": [1], "skip": 1}  # fmt: skip


def chosen(name: str) -> list[str]:
    """The variants that are run: all, but of grids of sparsities and pruners one of each kind of pruner."""
    labels = [r.variant for r in recipe.read(name, ["seeds=[0]"])]
    return labels if "multiflow" not in name else [
        label for label in labels if label in ("dense", "multiflow-0.63", "snip-0.63", "chita++-0.63", "tamt-0.63")
    ]  # fmt: skip


def cases() -> list:
    """Of each recipe one variant beside the fast ones, another of the next recipe; all if the environment says so."""
    out, every = [], "TRIMTAB_EVERY_VARIANT" in os.environ
    for i, name in enumerate(NAMES):
        short, labels = name.split("/")[1], chosen(name)
        for label in labels:
            if not every and (short, label) not in FAST and label != labels[i % len(labels)]:
                continue
            marks = () if (short, label) in FAST else pytest.mark.slow
            out.append(pytest.param(name, label, marks=marks, id=f"{short}-{label}"))
    return out


def tiny(r: recipe.Recipe, root: Path) -> recipe.Recipe:
    """The same recipe on a tiny backbone and a stand-in of its data, with few steps."""
    path, settings, words = file(root / "model", r.backbone.name)
    more = {k: v for k, v in r.backbone.settings.items() if k != "image_size"}  # tables of positions stay as they are
    text = {} if words is None else {"tokenizer": str(words), "max_text": 7}
    backbone = replace(r.backbone, name=str(path), settings={**more, **settings}, **text)
    methods = tuple({**m, **{k: v for k, v in FEW.items() if k in m}} for m in r.methods)
    training = replace(r.training, steps=min(r.training.steps, 2), batch_size=4, accumulate=1, precision="fp32",
                       evaluation_batch=4)  # fmt: skip
    return replace(r, backbone=backbone, methods=methods, training=training, data=stand_in(r.data, root / "data"))


@cache
def found_by(name: str) -> set[str]:
    """The run folders that a recipe leaves."""
    return {f"runs/published/{name}/{r.variant}-seed{r.seed}" for r in recipe.read(f"published/{name}")}


def on_found_masks(small: recipe.Recipe, root: Path) -> recipe.Recipe:
    """With masks that the recipe that finds them has found on the same tiny backbone."""
    found = Path(small.methods[0]["masks"])
    variant, _, seed = found.name.partition("-seed")
    (find,) = recipe.read(f"published/{found.parent.name}", [f"variants=['{variant}']", f"seeds=[{seed}]"])
    run.run(tiny(find, root), root / "found", measure_costs=False)
    return replace(small, methods=({**small.methods[0], "masks": str(root / "found")}, *small.methods[1:]))


def test_there_is_a_recipe_of_every_experiment():
    for lever, backbones, sets in (
        ("das", ("meter", "vilt"), ("vqav2", "nlvr2", "flickr30k")), ("das", ("llava",), ("scienceqa",)),
        ("unipt", ("vse",), ("flickr30k", "coco")), ("unipt", ("clip4clip",), ("msr-vtt", "msvd")),
        ("unipt", ("clip-vil",), ("vqav2", "gqa")), ("unipt", ("mdetr",), ("refcoco", "refcoco+", "refcocog")),
        ("multiflow", ("blip", "xvlm"), ("find", "coco-retrieval", "coco-captions", "vqav2")),
        ("multiflow", ("dino",), ("find", "cifar10", "cifar100", "flowers102")),
    ):  # fmt: skip
        assert {f"published/{lever}_{b}_{d}" for b in backbones for d in sets} <= set(NAMES)
    assert len(NAMES) == 28


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_and_says_how_it_is_run(name):
    """Its head names itself; masks that it takes are those of a recipe here, by variant and seed."""
    taken = set()
    for r in recipe.read(name):
        for i, method in enumerate(r.methods):
            assembly.method_of(method, f"methods.{i}")
        if r.methods and (masks := r.methods[0].get("masks")):
            taken.add(masks)
    assert taken <= {m for find in {Path(masks).parent.name for masks in taken} for m in found_by(find)}
    assert f"# trimtab run {name} " in recipe.find(name).read_text()


@pytest.mark.parametrize(("name", "variant"), cases())
def test_every_published_recipe_runs(name, variant, tmp_path):
    (r,) = recipe.read(name, [f"variants=['{variant}']", "seeds=[0]"])
    small = tiny(r, tmp_path)
    assembly.check(small)
    if small.methods and "masks" in small.methods[0]:
        small = on_found_masks(small, tmp_path)
    folder = run.run(small, tmp_path / "run", measure_costs=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(torch.isfinite(torch.tensor(float(v))) for v in metrics["test"].values())
    if variant == "multiflow-0.63" and "_xvlm_" not in name:
        model = folder_of_runs.load(folder)
        masked = folder_of_runs.load(tmp_path / "found") if (tmp_path / "found").exists() else model
        weights = [model.backbone.model.get_parameter(w.path)
                   for w in masked.backbone.anatomy.weights(masked.backbone.model)
                   if w.path in dict(model.backbone.model.named_parameters())]  # fmt: skip
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(0.63, abs=0.03)
    if variant.startswith("das"):
        assert len(json.loads((folder / "fit.json").read_text())["methods"][0]["state"]["skip"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "trained"),
    [
        ("das_meter_flickr30k", "das-4", 5_333_000), ("das_meter_flickr30k", "adapter", 5_340_000),
        ("das_meter_flickr30k", "lora", 295_000), ("das_vilt_flickr30k", "das-1", 3_559_000),
        ("unipt_clip4clip_msvd", "unipt", 9_584_000),
    ],
)  # fmt: skip
def test_costs_without_data_or_weights(name, variant, trained):
    """As many parameters as the papers count: beside them poolers, token types, norms and scorers are trained, too."""
    (r,) = recipe.read(f"published/{name}", [f"variants=['{variant}']", "training.batch_size=2"])
    more = {"das_meter": 1_250_000, "das_vilt": 660_000}.get(name.rsplit("_", 1)[0], 20_000)
    assert trained <= estimate(r)["trainable_params"] <= trained + more
