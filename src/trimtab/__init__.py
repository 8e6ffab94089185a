"""trimtab fits a pretrained vision-language model to a task under a budget.

Three levers on one description of a backbone: prune weights (MULTIFLOW), skip blocks (DAS), tune beside (UniPT).
Public names are imported when they are first used, so that `import trimtab` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Anatomy": "trimtab.anatomy", "AnatomyError": "trimtab.anatomy", "Block": "trimtab.anatomy",
    "Sublayer": "trimtab.anatomy", "Tap": "trimtab.anatomy", "Tower": "trimtab.anatomy",
    "describes": "trimtab.anatomy",
    "adapt": "trimtab.methods.adapted", "Adapted": "trimtab.methods.adapted", "FitError": "trimtab.methods.saved",
    "prune": "trimtab.methods.shortcuts", "skip": "trimtab.methods.shortcuts",
    "tune": "trimtab.methods.shortcuts", "shorten": "trimtab.methods.shortcuts",
    "Masks": "trimtab.methods.prune.masks",
    "Plan": "trimtab.methods.skip.plan", "PlanError": "trimtab.methods.skip.plan",
    "METHODS": "trimtab.methods", "TASKS": "trimtab.tasks", "BACKBONES": "trimtab.backbones",
    "fit": "trimtab.budgets.fit", "BudgetError": "trimtab.budgets.limits",
    "DAS": "trimtab.methods.skip.search.das", "LoRA": "trimtab.methods.tune.lora",
    "Multiflow": "trimtab.methods.prune.multiflow", "UniPT": "trimtab.methods.tune.unipt",
    "load": "trimtab.backbones",
    "save_pretrained": "trimtab.storage.checkpoints", "from_pretrained": "trimtab.backbones",
    "convert": "trimtab.storage.checkpoints",
    "speed_up": "trimtab.speed",
    "Recipe": "trimtab.experiments.schema", "RecipeError": "trimtab.experiments.schema",
    "read_recipe": "trimtab.experiments.recipe:read",
    "run_recipe": "trimtab.experiments.run:run", "load_run": "trimtab.experiments.folder:load",
    "RunError": "trimtab.experiments.folder",
    "estimate_cost": "trimtab.experiments.estimate:estimate", "write_report": "trimtab.report.page",
}  # fmt: skip
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
