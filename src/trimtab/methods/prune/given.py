"""Masks that were found before: prune once, then adapt to one task after another (MULTIFLOW, section 1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner, summary
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.scores import parameter
from trimtab.methods.session import Session


@dataclass(frozen=True)
class MasksSettings:
    """Settings of masks that were found before."""

    path: str
    """A file that `Masks.save` wrote, or the folder of a run that pruned the same backbone."""
    sparsity: float = 0.63
    """What `trimtab cost` counts with while the path is not there; masks that are read have their own."""


@METHODS.register("masks")
class Given(Pruner):
    """The masks of an earlier pruning, and the kept weights where the pruner changed them."""

    name = "masks"
    finds = False
    Settings = MasksSettings
    settings: MasksSettings  # type: ignore[assignment]

    def prepare(self, session: Session) -> None:
        path = Path(self.settings.path)
        if path.is_dir():
            self._from_run(path, session)
        elif path.is_file():
            masks = Masks.load(path, session.plain)
            self.tensors = masks.packed()
            self.state = summary(masks, session.anatomy)
        else:
            raise ValueError(
                f"masks: nothing is at '{path}' (seen from {Path.cwd()}): give a file of masks or the folder of a run "
                "that pruned, or carry out the recipe that makes it first"
            )

    def _from_run(self, folder: Path, session: Session) -> None:
        try:
            states = json.loads((folder / "methods.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"masks: '{folder}' is not the folder of a finished run: it has no methods.json") from None
        found = [i for i, m in enumerate(states) if METHODS[m["name"]].lever == "prune"]
        if len(found) != 1:
            names = ", ".join(m["name"] for m in states) or "none"
            raise ValueError(f"masks: expected a run with one pruner at '{folder}', its methods are: {names}")
        prefix = f"methods.{found[0]}."
        with safe_open(folder / "weights.safetensors", "pt") as file:
            names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            self.tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in names}
        prunable = session.anatomy.weights(session.plain, convolutions=True)
        shapes = {w.path: parameter(session.plain, w).shape for w in prunable}
        if missing := [p for p in self.tensors if not p.endswith(".values") and p not in shapes]:
            raise ValueError(f"masks: those of '{folder}' are for another model: it has no prunable '{missing[0]}'")
        Masks.unpacked(self.tensors, shapes)  # raises if they are of another size
        self.state = {"from": str(folder), **states[found[0]]["state"]}
