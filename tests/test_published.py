"""The recipes of `recipes/published` run on tiny files in the layouts of the authors, from file to metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.official import file, rows
from trimtab.experiments import assembly, recipe, run
from trimtab.experiments import folder as folder_of_runs

NAMES = [n for n in recipe.names() if n.startswith("published/")]
FEW = {"search_steps": 4, "turn": 1, "subsets": 2, "batches": 1, "batch_size": 4}  # two blocks give two plans


def tiny(r: recipe.Recipe, folder: Path) -> recipe.Recipe:
    """The same recipe on a tiny file of the backbone that it names, with few steps."""
    path, settings, words = file(folder, r.backbone.name)
    more = {k: v for k, v in r.backbone.settings.items() if k != "image_size"}  # tables of positions stay as they are
    backbone = replace(r.backbone, name=str(path), settings={**more, **settings}, tokenizer=str(words), max_text=7)
    data = str(rows(folder / "data"))
    methods = []
    for m in r.methods:
        few = {k: v for k, v in FEW.items() if k in m}
        methods.append({**m, **few, **({"skip": 1} if "skip" in m else {})})
    training = replace(r.training, steps=min(r.training.steps, 2), batch_size=4, accumulate=1, precision="fp32")
    return replace(r, backbone=backbone, methods=tuple(methods), training=training,
                   data={**r.data, "train": data, "test": data, "validation": data})  # fmt: skip


def test_there_is_a_recipe_of_every_paper():
    assert {n.split("/")[1].split("_")[0] for n in NAMES} == {"das", "unipt", "multiflow"} and len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
def test_every_published_recipe_runs_from_an_official_file(name, tmp_path):
    small = tiny(recipe.read(name)[0], tmp_path)
    assembly.check(small)
    if "masks" in small.methods[0]:
        find = recipe.read(str(Path(name).parent / f"{Path(name).name.rsplit('_', 1)[0]}_find"))[0]
        assert small.methods[0]["masks"] == f"runs/{find.name}/{find.variant}-seed0"
        run.run(tiny(find, tmp_path), tmp_path / "found", measure_costs=False)
        small = replace(small, methods=({**small.methods[0], "masks": str(tmp_path / "found")}, *small.methods[1:]))
    folder = run.run(small, tmp_path / "run", measure_costs=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(torch.isfinite(torch.tensor(float(v))) for v in metrics["test"].values())
    model = folder_of_runs.load(folder)
    if "multiflow" in name:
        weights = [
            model.backbone.model.get_parameter(w.path) for w in model.backbone.anatomy.weights(model.backbone.model)
        ]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(0.63, abs=0.01)
    if "das" in name:
        assert len(json.loads((folder / "fit.json").read_text())["methods"][0]["state"]["skip"]) == 1
