"""The last part of `trimtab demo`: a budget for the model and the questions of `demo/vqa`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from trimtab.budgets.asking import SEARCHED, OtherSearch
from trimtab.budgets.fit import Found, fit
from trimtab.budgets.space import TUNES, Space
from trimtab.experiments.recipe import read

RECIPE = "demo/vqa"
BUDGET = "macs <= -10%, nonzeros <= -30%, train memory <= -30%"
TRIALS, STEPS, SECONDS = 6, 100, 80
# Few enough to be counted in seconds; each lever is there.
SPACE = Space(
    sparsities=(0.3, 0.5), skips=(2, 3), batches=4, multiples=(1.0, 3.0),
    tunes={name: TUNES[name] for name in ("lora-8", "unipt-2", "skip-adapters")},
)  # fmt: skip


def search(out: Path, overrides: Sequence[str] = (), redo: bool = False) -> Found:
    """Search under the budget, on the rows that the demo's recipe has made already.

    Args:
        out: folder of the search; what was tried there with the same settings is kept, any other search is removed.
        overrides: changes to the recipe of all trials; those that choose variants or seeds, or say what the search
            decides, say nothing here.
        redo: search anew.

    Raises:
        BudgetError, ValueError: as `fit` does.
    """
    keys = [o.partition("=")[0].strip() for o in overrides]
    decided = {f"training.{key}" for key in SEARCHED}
    own = [o for o, key in zip(overrides, keys, strict=True)
           if key.split(".")[0] not in ("variants", "seeds", "methods") and key not in decided]  # fmt: skip
    recipe = read(RECIPE)[-1]
    t = recipe.training
    steps = [f"training.steps={STEPS}", f"training.batch_size={t.batch_size}", f"training.log_every={t.log_every}"]

    def carry_out() -> Found:
        return fit(recipe.backbone.name, recipe.task, recipe.data, budget=BUDGET, time=SECONDS, trials=TRIALS,
                   out=out, space=SPACE, overrides=[*steps, *own])  # fmt: skip

    if redo and (out / "asked.json").exists():
        shutil.rmtree(out)
    try:
        return carry_out()
    except OtherSearch:
        shutil.rmtree(out)
        return carry_out()
