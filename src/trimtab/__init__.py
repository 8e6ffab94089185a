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
    "load": "trimtab.backbones",
    "save_pretrained": "trimtab.checkpoints", "from_pretrained": "trimtab.checkpoints",
    "convert": "trimtab.checkpoints",
    "METHODS": "trimtab.methods", "TASKS": "trimtab.tasks", "BACKBONES": "trimtab.backbones",
    "DAS": "trimtab.methods.skip.das", "LoRA": "trimtab.methods.tune.lora", "UniPT": "trimtab.methods.tune.unipt",
    "Multiflow": "trimtab.methods.prune.multiflow",
    "prune": "trimtab.methods.prune.api", "Masks": "trimtab.methods.prune.masks",
    "speed_up": "trimtab.semistructured",
    "Recipe": "trimtab.recipe", "RecipeError": "trimtab.recipe", "read_recipe": "trimtab.recipe:read",
    "run_recipe": "trimtab.run:run", "load_run": "trimtab.run:load", "RunError": "trimtab.run",
    "estimate_cost": "trimtab.cost:estimate", "write_report": "trimtab.report",
}  # fmt: skip
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
