"""What is found once and serves every candidate: masks of all sparsities, plans of all sizes.

masks   one calibration of the dense model; each sparsity cuts the same scores
plans   one search for the largest number of blocks; the plan of k blocks takes the k that the search holds the most
        redundant. Of `greedy-skip` and `block-influence` these are the plans that a search for k alone would find; of
        other searches they are an approximation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.budgets.space import Space
from trimtab.experiments import training
from trimtab.experiments.assembly import assemble, tables
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.methods import METHODS
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.skip.plan import Plan


@dataclass
class Shared:
    """Finds what is shared, and keeps it in a folder, to go on from.

    Attributes:
        steps: training steps that were paid for the search of plans.
        searched: settings of that search beside its name.
    """

    recipe: Recipe
    space: Space
    folder: Path
    searched: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    plans: dict[int, list[str]] = field(default_factory=dict)
    masks: dict[float, str] = field(default_factory=dict)

    def find(self, sparsities: set[float], skips: set[int]) -> None:
        """Find masks for these sparsities and plans for these numbers of blocks, unless the folder holds them.

        Raises:
            ValueError: as pruners and searches do.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.masks = {s: str(self._mask_file(s)) for s in sorted(sparsities)}
        if any(not Path(file).exists() for file in self.masks.values()):
            self._prune(sorted(sparsities))
        skips = {k for k in skips if k}
        if skips:
            file = self.folder / "plans.json"
            kept = json.loads(file.read_text()) if file.exists() else None
            if kept is None or not skips <= {int(k) for k in kept["plans"]}:
                kept = self._search(max(skips))
                with replace_file(file) as partial:
                    partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            self.plans, self.steps = {int(k): v for k, v in kept["plans"].items()}, kept["steps"]

    def _mask_file(self, sparsity: float) -> Path:
        return self.folder / f"masks-{self.space.pruner}-{sparsity:g}.safetensors"

    def _session(self) -> tuple[Any, training.TrainingSession]:
        parts = assemble(replace(self.recipe, methods=()))
        parts.freeze()
        train, validation, _ = tables(self.recipe, parts)
        spec, seed = self.recipe.training, self.recipe.seed
        return parts, training.TrainingSession(parts.model, train, validation, spec, seed, self.recipe.name)

    def _prune(self, sparsities: list[float]) -> None:
        _, session = self._session()
        pruner = METHODS.make(self.space.pruner, batches=self.space.batches)
        settings = pruner.settings
        calibration = Calibration.of(session, settings.batches, settings.batch_size, settings.precision)
        for sparsity, masks in zip(sparsities, pruner.masks(calibration, sparsities), strict=True):
            masks.save(self._mask_file(sparsity))

    def _search(self, most: int) -> dict[str, Any]:
        _, session = self._session()
        search = METHODS.make(self.space.search, skip=most, **self.searched)
        search.prepare(session)
        plan: Plan = search.plan
        first = sorted(plan.blocks, key=lambda b: (not b.skipped, -(b.score or 0.0)))
        order = [b.path for b in plan.blocks]
        plans = {k: sorted((b.path for b in first[:k]), key=order.index) for k in range(1, most + 1)}
        return {"plans": plans, "steps": int(getattr(search.settings, "search_steps", 0))}
