"""What every candidate costs, before any of them is trained.

Counted on fake tensors, by `experiments/estimate.py`. Candidates share parts: the learning rate costs nothing, and of
two sparsities of one pruner only zeros differ. So a count is made for each (pruned or not, blocks skipped, way to
tune), and the rest is composed. Where even that takes too long, numbers of blocks between two that were counted are
laid on the line between them and called predicted; whatever is tried is counted by itself before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.budgets.limits import Base
from trimtab.budgets.space import Candidate, Space, Tune
from trimtab.experiments import estimate
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file

Costs = dict[str, Any]
Plans = Mapping[int, Sequence[str]]  # names of skipped blocks by their number
COUNTED = ("params", "nonzero_params", "trainable_params", "macs", "saved_activation_bytes", "training_peak_bytes",
           "checkpoint_bytes")  # fmt: skip


class Part(NamedTuple):
    """What a count is made for."""

    pruned: bool
    skip: int
    tune: str


@dataclass
class Prices:
    """Costs of candidates on one recipe.

    Args:
        recipe: its methods are those of the candidates in turn.
        space: of candidates.
        file: where counts are kept, to go on from; None keeps none.
        seconds: after which numbers of blocks in the middle are predicted.
        count: how a recipe is counted.
        exports: whether bytes of the exported model are wanted, for which more is counted.

    Attributes:
        refused: why a combination cannot be used.
    """

    recipe: Recipe
    space: Space
    file: Path | None = None
    seconds: float = 90.0
    count: Callable[[Recipe], Costs] = estimate.estimate
    exports: bool = True
    refused: dict[Part, str] = field(default_factory=dict)
    _counted: dict[Part, Costs] = field(default_factory=dict)
    _predicted: dict[Part, Costs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._full = self._of([{"name": "full"}])
        self._bare = self._of([{"name": "linear-probe"}])
        if self.file is not None and self.file.exists():
            for row in json.loads(self.file.read_text()):
                part = Part(row["pruned"], row["skip"], row["tune"])
                if "refused" in row:
                    self.refused[part] = row["refused"]
                else:
                    self._counted[part] = row["costs"]

    def _of(self, methods: list[dict[str, Any]]) -> Costs:
        return self.count(replace(self.recipe, methods=tuple(methods)))

    @property
    def bases(self) -> dict[Base, Costs]:
        """What the dense model costs, and what full tuning does."""
        bare = self._bare
        dense = {"macs": bare["dense_macs"], "params": bare["dense_params"], "nonzero_params": bare["dense_params"],
                 "export_bytes": 4 * (bare["params"] - bare["trainable_params"])}  # fmt: skip
        return {"dense": dense, "full": {**self._full, "export_bytes": dense["export_bytes"]}}

    def count_all(self, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Count every part; those in the middle of the numbers of blocks only while there is time."""
        skips = sorted({0, *self.space.skips})
        ends = [skips[0], *skips[1:2], *skips[-1:]]
        order = list(dict.fromkeys([*ends, *reversed(skips)]))  # if the largest is refused, the next takes its place
        parts = [Part(pruned, skip, tune) for skip in order for pruned in ((False, True) if self.space.sparsities
                 else (False,)) for tune in self._tunes(skip)]  # fmt: skip
        started = time.monotonic()
        for done, part in enumerate(parts):
            if part.skip in ends or time.monotonic() - started < self.seconds:
                self._part(part)
            elif part not in self._counted and part not in self.refused:
                self._predict(part, skips)
            progress(done + 1, len(parts))
        self._write()

    def _tunes(self, skip: int) -> list[str]:
        return list(dict.fromkeys(c.tune for c in self.space if c.skip == skip))

    def _part(self, part: Part) -> Costs | None:
        """The count of a part; None if it is refused."""
        if part in self._counted:
            return self._counted[part]
        if part in self.refused:
            return None
        sparsity = self.space.sparsities[0] if part.pruned else 0.0
        try:
            found = self._of(self.space.methods(Candidate(sparsity, part.skip, part.tune)))
        except Exception as error:  # a combination that breaks shall not keep the others from being counted
            self.refused[part] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return None
        self._counted[part] = {k: found[k] for k in COUNTED}
        return self._counted[part]

    def _predict(self, part: Part, skips: list[int]) -> None:
        known = sorted(k for k in skips if part._replace(skip=k) in self._counted and k > 0)
        below, above = [k for k in known if k < part.skip], [k for k in known if k > part.skip]
        if not below or not above:
            self._part(part)
            return
        low, high = below[-1], above[0]
        a, b = (self._counted[part._replace(skip=k)] for k in (low, high))
        at = (part.skip - low) / (high - low)
        self._predicted[part] = {k: round(a[k] + at * (b[k] - a[k])) for k in COUNTED}

    def __call__(self, candidate: Candidate) -> Costs | None:
        """The costs of a candidate; None if its levers do not go together (see `refused`)."""
        part = Part(candidate.sparsity > 0, candidate.skip, candidate.tune)
        costs = self._predicted.get(part) or self._part(part)
        if costs is None:
            return None
        out = dict(costs)
        if part.pruned:  # counted with the first sparsity
            zeros = (costs["params"] - costs["nonzero_params"]) / self.space.sparsities[0]
            out["nonzero_params"] = costs["params"] - round(zeros * candidate.sparsity)
        return out | self._exported(candidate)

    def predicted(self, candidate: Candidate) -> bool:
        """Whether its costs are predicted from others'."""
        return Part(candidate.sparsity > 0, candidate.skip, candidate.tune) in self._predicted

    def exact(self, candidate: Candidate, plans: Plans | None = None) -> Costs:
        """The costs of a candidate counted by itself, with the blocks that it skips.

        Args:
            plans: skipped blocks by their number.

        Raises:
            ValueError: if its levers do not go together.
        """
        found = self._of(self.space.methods(candidate, plans))
        return {**{k: found[k] for k in COUNTED}, **self._exported(candidate, plans)}

    def _exported(self, candidate: Candidate, plans: Plans | None = None) -> Costs:
        return {"export_bytes": self._export_bytes(candidate, plans)} if self.exports else {}

    def _export_bytes(self, candidate: Candidate, plans: Plans | None) -> int | None:
        """Bytes of the exported model in the sparse layout: four a number that is not zero, a bit a prunable one;
        headers of the files are not counted.

        None if what the candidate adds cannot be folded into the model.
        """
        for entry in self.space.methods(candidate):
            if _keeps(entry):
                return None
        # What is folded leaves no numbers of its own: the model is that of a probe without its head.
        probe = self._probe(Part(candidate.sparsity > 0, candidate.skip, "linear-probe"), plans)
        if probe is None:
            return None
        numbers = probe["params"] - probe["trainable_params"]
        if not candidate.sparsity:
            return 4 * numbers
        prunable = (probe["params"] - probe["nonzero_params"]) / self.space.sparsities[0]
        return round(4 * (numbers - prunable * candidate.sparsity) + prunable / 8)

    def _probe(self, part: Part, plans: Plans | None) -> Costs | None:
        """The count of a part that trains heads alone; with these blocks if they are known."""
        known = bool(plans) and part.skip in (plans or {})
        if not known and (part in self._counted or part in self.refused or "linear-probe" in self.space.tunes):
            return self._part(part)
        one = replace(self.space, tunes={"linear-probe": Tune({"name": "linear-probe"}, 1.0)})
        sparsity = self.space.sparsities[0] if part.pruned else 0.0
        try:
            found = self._of(one.methods(Candidate(sparsity, part.skip, "linear-probe"), plans))
        except ValueError:
            return None
        costs = {k: found[k] for k in COUNTED}
        return costs if known else self._counted.setdefault(part, costs)

    def _write(self) -> None:
        if self.file is None:
            return
        rows: list[Mapping[str, Any]] = [{**p._asdict(), "costs": c} for p, c in self._counted.items()]
        rows += [{**p._asdict(), "refused": why} for p, why in self.refused.items()]
        with replace_file(self.file) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _keeps(entry: dict[str, Any]) -> str:
    from trimtab.methods import METHODS

    return METHODS.make(entry["name"], **{k: v for k, v in entry.items() if k != "name"}).keeps
