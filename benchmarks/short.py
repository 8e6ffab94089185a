"""A variant of a recipe for so many steps, whatever its own schedule waits for."""

from __future__ import annotations

from trimtab.experiments import recipe

FIXED = ("training.schedule=linear", "training.evaluate_every=null", "training.patience=null", "training.cache=null")


def short(name: str, variant: str, steps: int, *overrides: str) -> recipe.Recipe:
    """The recipe, without a cache."""
    return recipe.read(name, [*FIXED, f"training.steps={steps}", f"variants=[{variant}]", *overrides])[0]
