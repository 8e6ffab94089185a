"""Everything that is shipped runs: recipes (every variant, few steps) and the code in the README and in docs."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.data.made_sets import write_illustrator
from trimtab import cli
from trimtab.data.pictograms.illustrators import ILLUSTRATORS
from trimtab.experiments import assembly, plateau, recipe, run
from trimtab.experiments import folder as folder_of_runs
from trimtab.files import cache_dir

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"train": 32, "validation": 32, "test": 20}
FEW = {"search_steps": 4, "turn": 1, "batches": 1, "batch_size": 8, "steps": 1}


def shrink(r: recipe.Recipe) -> recipe.Recipe:
    """The same recipe with little data and few steps."""
    methods = tuple({k: FEW.get(k, v) for k, v in {**m, **_needed(m)}.items()} for m in r.methods)
    training = plateau.of_fixed_length(r.training)
    training = replace(training, steps=min(training.steps, 2), batch_size=8, save_every=None)
    task = {**r.task, "pool": 10} if "pool" in r.task else r.task  # each picture is ranked with all texts of its pool
    return replace(r, methods=methods, training=training, task=task, data={**r.data, **SMALL})


def _needed(method: dict) -> dict:
    from trimtab.methods import METHODS

    return {k: v for k, v in FEW.items() if k in METHODS[method["name"]].Settings.__dataclass_fields__}


def found_masks(r: recipe.Recipe, folder: Path) -> Path:
    """A run that pruned the same backbone, in place of the one that the recipe takes its masks from."""
    pruner = {k: v for k, v in shrink(r).methods[0].items() if k != "masks"}
    found = folder / f"{pruner['name']}-{pruner['sparsity']}"
    small = replace(shrink(r), methods=({**pruner, "allow_empty_tower": True},), training=replace(r.training, steps=0))
    return found if found.exists() else run.run(small, found, measure_costs=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # files of their own test these
    [n for n in recipe.names() if not n.startswith(("published/", "own/", "flickr8k/"))],
)
def test_every_variant_of_a_shipped_recipe_runs(name, tmp_path):
    if "lite0" in name and find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip("needs the extra 'real'")
    done = set()
    variants = recipe.read(name, ["seeds=[0]"])
    if variants[0].data.get("style") == "illustrators-varied":  # npm fetches what they drew; here they drew nothing
        for illustrator in ILLUSTRATORS:
            write_illustrator(cache_dir() / "art", illustrator, {}, {})
    for r in variants:
        assembly.check(r)
    # Of the demo's recipes two that differ in everything; of a study's dozens one.
    shown = name.startswith(("demo/", "compose/"))
    for r in variants[:: max(1, (len(variants) + 1) // 2)] if shown else [variants[len(variants) // 2]]:
        small = shrink(r)
        if r.methods and "masks" in r.methods[0]:
            taken = {**r.methods[0], "masks": str(found_masks(r, tmp_path))}
            small = replace(small, methods=(taken, *r.methods[1:]))
        key = json.dumps([small.to_dict()[k] for k in ("backbone", "methods", "training")])
        if key not in done:
            done.add(key)
            folder = run.run(small, tmp_path / r.variant, measure_costs=False)
            assert folder_of_runs.is_finished(folder, small)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_in_documents_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__main__"}  # as a program of one's own
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(code, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_documents_are_right(page, tmp_path, monkeypatch):
    """Shell lines that start with trimtab: their options parse, and the recipes and backbones that they name exist."""
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] != ["trimtab"]:
                continue
            options = cli.parse(words[1:])
            if options.command in ("run", "cost"):
                for name in recipe.below(options.recipe):
                    for r in recipe.read(name, options.overrides):
                        assembly.check(r)
            elif options.command in ("anatomy", "list"):
                assert cli.main(words[1:]) == 0
