"""The lever that all searches share: which blocks may go, a model without the plan's blocks, and its adapters.

prepare    a search (one file each) finds the plan, or `plan` gives it
attach     a skipped block is taken out with its weights and a small adapter stands in its place, kept blocks get
           adapters beside their parts; both are trained from the pretrained weights
fold       without adapters (`adapters: none`): an ordinary model with fewer layers, see `shorten`
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab.anatomy import Anatomy, Block
from trimtab.files import replace_file
from trimtab.methods.base import Method, Session
from trimtab.methods.skip.adapters import Skipped, Switch, add_adapters, replace_module, train_adapters
from trimtab.methods.skip.budget import BlockCosts, Indices, Target, Unit, measure, parse
from trimtab.methods.skip.plan import Plan, with_costs
from trimtab.methods.skip.search.evaluate import SearchError
from trimtab.methods.skip.shorten import close_gaps, hand_on_positions, shorten
from trimtab.registry import unknown


@dataclass(frozen=True)
class SkipSettings:
    """Settings of every way to skip."""

    skip: int = 2
    """How many blocks are skipped (k); 0 skips none and puts adapters in all."""
    budget: str | None = None
    """Instead of `skip`: at least so much less than the dense model, "30% macs", "30% params" or "30% latency"."""
    reduction: int = 8
    """In-block adapters are width / reduction wide (published: 768 / 8 = 96; LaVIN: 4096 / 512)."""
    skip_width: int | None = None
    """Width of the adapter in place of a block; None: as wide as those of the block together (LLaVA-DAS: 256 beside two
    of 64; LaVIN's routed ones: four times one)."""
    adapters: Literal["parallel", "sequential", "routed", "none"] = "parallel"
    """Form: `parallel` (METER, ViLT), `sequential` (LLaVA-DAS), `routed` (LaVIN), or `none`: only removal."""
    towers: tuple[str, ...] | None = None
    """Towers whose blocks are candidates, in the order of the search's indices; None for all."""
    plan: tuple[str, ...] | str | None = None
    """Paths of the blocks to skip, or a plan's JSON file or run folder; given, nothing is searched."""

    def __post_init__(self) -> None:
        if self.skip_width is not None and self.skip_width < 1:
            raise ValueError(f"skip_width must be at least 1, found {self.skip_width}")
        if self.skip < 0 or self.reduction < 1:
            raise ValueError(
                f"skip must be at least 0 and reduction at least 1, found {self.skip} and {self.reduction}"
            )
        if self.budget is not None:
            parse(self.budget)


class Supernet:
    """A copy of a session's model in which every candidate can be switched to its skip adapter.

    Attributes:
        with_task: the copy with its task.
        plain: the plain model in it.
        switches: one a candidate.
    """

    def __init__(self, session: Session, candidates: list[Block], settings: SkipSettings):
        self.with_task = copy.deepcopy(session.with_task)
        self.plain = session.plain_in(self.with_task)
        self.switches: list[Switch] = []
        for block in candidates:
            bottleneck = max(1, block.width // settings.reduction)
            other = Skipped(self.plain, block, bottleneck, settings.adapters, settings.skip_width)
            add_adapters(self.plain, block, bottleneck, settings.adapters)
            self.switches.append(Switch(self.plain.get_submodule(block.path), other))
            replace_module(self.plain, block.path, self.switches[-1])
        train_adapters(self.plain, session.anatomy.heads)

    def costs(self, unit: Unit, session: Session, candidates: list[Block]) -> BlockCosts:
        """What each candidate costs, kept and skipped, in one forward pass of one sample."""
        device = next(self.with_task.parameters()).device
        one = {k: v.to(device) for k, v in session.with_task.example(1).items()}
        blocks = [session.plain.get_submodule(b.path) for b in candidates]
        return measure(unit, (session.with_task, blocks, lambda: session.with_task(**one)),
                       (self.with_task, self.switches, lambda: self.with_task(**one)))  # fmt: skip


class Skipping(Method):
    """What every way to skip shares: candidates, and a model without the plan's blocks."""

    lever = "skip"

    changes = "tree"

    @property
    def trains(self) -> str:  # type: ignore[override]
        return "nothing" if self.settings.adapters == "none" else "added"

    @property
    def keeps(self) -> str:  # type: ignore[override]
        if self.settings.adapters == "none":
            return ""  # what is left is an ordinary model with fewer layers
        return "its adapters stand in the blocks and in place of some: skip with `adapters: none` to export"

    def candidates(self, anatomy: Anatomy) -> list[Block]:
        """Blocks that may be skipped, in the order of the search's indices.

        Raises:
            ValueError: if a tower is unknown, or fewer blocks can go than are to be skipped.
        """
        s = self.settings
        towers = s.towers or tuple(t.name for t in anatomy.towers)
        found = [
            b
            for name in towers
            for b in anatomy.blocks(name)
            # Without adapters what is skipped goes for good when the model is exported: only what can.
            if b.keeps_shape and (not b.stays if s.adapters == "none" else b.sublayers)
        ]
        if not found:
            blocks = [b for name in towers for b in anatomy.blocks(name)]
            fixed = sum(not b.keeps_shape for b in blocks)
            rest = f"; {len(blocks) - fixed} have no described parts for adapters: set `adapters: none`"
            raise ValueError(
                f"{self.name}: none of the {len(blocks)} blocks in {towers} can be skipped: {fixed} change the shape "
                f"of their stream, or the model needs them by number{rest if fixed < len(blocks) else ''}"
            )
        if s.budget is None and s.skip >= len(found):
            raise ValueError(
                f"{self.name}: {s.skip} of {len(found)} skippable blocks in {towers} cannot be skipped; skip at most "
                f"{max(0, len(found) - 1)}"
            )
        return found

    @property
    def wanted(self) -> str:
        """What was asked for, in words."""
        return self.settings.budget or f"{self.settings.skip} blocks"

    def set_plan(self, plan: Plan, **more: Any) -> None:
        """Take over a plan; `more` is kept beside it (a trace, say)."""
        scores = {b.path: b.score for b in plan.blocks if b.score is not None}
        self.state = {**plan.to_dict(), **({"gates": scores} if scores else {}), **more}

    def prepare(self, session: Session) -> None:
        candidates = self.candidates(session.anatomy)
        model = session.plain
        if self.settings.plan is not None:
            self.set_plan(self.given(candidates, model, session.anatomy))
        elif self.settings.budget is None and self.settings.skip == 0:
            self.set_plan(Plan.of(model, session.anatomy, candidates, (), method=self.name, target=self.wanted))
        else:
            kept = Keeping(self, session, candidates)
            if not kept.restore():
                kept.begin()
                self._search(session, candidates)
                kept.store()
        # However the plan was found, the adapters that `attach` draws are the same.
        torch.manual_seed(session.seed)

    def _search(self, session: Session, candidates: list[Block]) -> None:
        """Search, and put what the blocks cost into the plan."""
        supernet = Supernet(session, candidates, self.settings)
        macs = supernet.costs("macs", session, candidates)
        target = Target.count(len(candidates), self.settings.skip)
        if self.settings.budget is not None:
            share, unit = parse(self.settings.budget)
            target = (macs if unit == "macs" else supernet.costs(unit, session, candidates)).target(share)

        def plan(chosen: Indices, scores: list[float] | None = None, evaluations: int = 0) -> Plan:
            found = Plan.of(session.plain, session.anatomy, candidates, chosen, scores, method=self.name,
                            target=self.wanted, evaluations=evaluations)  # fmt: skip
            each = {b.path: (int(macs.blocks[i]), int(macs.savings[i])) for i, b in enumerate(candidates)}
            return with_costs(found, each, int(macs.dense), int(macs.of(chosen)))

        try:
            chosen, scores, evaluations, more = self.search(session, candidates, supernet, target)
        except SearchError as error:
            folder = search_folder(session)
            if error.plan is None or folder is None:
                raise
            plan(error.plan).save(folder / "so_far.json")
            raise SearchError(f"{self.name}: {error}; the plan so far is kept: {folder / 'so_far.json'}") from error
        self.set_plan(plan(chosen, scores, evaluations), **more)

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, target: Target
               ) -> tuple[Indices, list[float] | None, int, dict[str, Any]]:  # fmt: skip
        """Find a plan: its indices, a score for each candidate, the number of evaluations, and what else to keep."""
        raise NotImplementedError

    def given(self, candidates: list[Block], model: nn.Module, anatomy: Anatomy) -> Plan:
        """The plan that the settings name.

        Raises:
            PlanError: if it is a plan of another model.
            ValueError: if a path is no candidate.
        """
        wanted = self.settings.plan
        paths = [b.path for b in candidates]
        if isinstance(wanted, str) and wanted not in paths:
            plan = Plan.read(wanted)
            plan.check(candidates, model, wanted)
            return plan
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        for path in wanted:
            if path not in paths:
                raise ValueError(f"{self.name}: plan: {unknown('block', path, paths)}")
        return Plan.of(model, anatomy, candidates, [paths.index(p) for p in wanted], method=self.name, target="given")

    def assume(self, model: nn.Module, anatomy: Anatomy, session: Session | None = None) -> None:
        """The plan if it is given, else the last candidates: every block of a tower costs the same.

        Raises:
            ValueError: if a budget cannot be reached, or there is no session in which to see what blocks cost.
            RuntimeError: for a budget of latency on fake tensors, which take no time.
        """
        candidates = self.candidates(anatomy)
        if self.settings.plan is not None:
            self.set_plan(self.given(candidates, model, anatomy))
            return
        target = Target.count(len(candidates), self.settings.skip)
        if self.settings.budget is not None:
            share, unit = parse(self.settings.budget)
            if session is None:
                raise ValueError(f"{self.name}: budget: '{self.settings.budget}' needs a session to count blocks in")
            if unit == "latency" and isinstance(next(model.parameters()), FakeTensor):
                raise RuntimeError(f"{self.name}: fake tensors take no time")
            target = Supernet(session, candidates, self.settings).costs(unit, session, candidates).target(share)
        chosen = target.fill(range(len(candidates))[::-1])
        self.set_plan(Plan.of(model, anatomy, candidates, chosen, method=self.name, target=self.wanted))

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        skipped = set(self.state["skip"])
        tower_of = {b.path: t.blocks for t in anatomy.towers for b in t.blocks}
        for block in self.candidates(anatomy):
            bottleneck = max(1, block.width // self.settings.reduction)
            if block.path in skipped:
                hand_on_positions(model, block.path, [b.path for b in tower_of[block.path] if b.path not in skipped])
                gone = Skipped(model, block, bottleneck, self.settings.adapters, self.settings.skip_width)
                replace_module(model, block.path, gone)
            else:
                add_adapters(model, block, bottleneck, self.settings.adapters)
        close_gaps(model, anatomy, skipped)
        train_adapters(model, anatomy.heads)
        towers = tuple(replace(t, blocks=tuple(b for b in t.blocks if b.path not in skipped)) for t in anatomy.towers)
        return replace(anatomy, towers=towers)

    def fold(self, model: nn.Module) -> None:
        """Take the places of skipped blocks out of the model: fewer layers, an ordinary configuration."""
        shorten(model)


def search_folder(session: Session) -> Path | None:
    """Where a search keeps what an interrupted run needs to go on; None if the run has no folder."""
    folder = getattr(session, "folder", None)
    return None if folder is None else Path(folder) / "search"


class Keeping:
    """A finished search, kept until its run is finished: what is interrupted in training does not search again."""

    def __init__(self, method: Skipping, session: Session, candidates: list[Block]):
        folder = search_folder(session)
        self.file = None if folder is None else folder / "found.json"
        self.method = method
        self.key = search_key(method, session, candidates)

    def begin(self) -> None:
        """Leave nothing of a search with other settings, whose checkpoints the trainer would take for its own."""
        if self.file is None or int(os.environ.get("RANK", "0")) > 0:
            return
        mark = self.file.parent / "settings.json"
        if self.file.parent.exists() and not (mark.exists() and mark.read_text() == self.key):
            shutil.rmtree(self.file.parent)
        with replace_file(mark) as partial:
            partial.write_text(self.key)

    def restore(self) -> bool:
        if self.file is None or not self.file.exists():
            return False
        raw = json.loads(self.file.read_text())
        if raw["key"] != self.key:
            return False
        self.method.state = raw["state"]
        return True

    def store(self) -> None:
        if self.file is not None:
            with replace_file(self.file) as partial:
                partial.write_text(json.dumps({"key": self.key, "state": self.method.state}))


def search_key(method: Method, session: Session, candidates: list[Block]) -> str:
    """What a search depends on: its settings, the seed, the training settings and the candidates."""
    spec = getattr(session, "spec", None)
    settings = [method.describe(), session.seed, None if spec is None else asdict(spec), [b.path for b in candidates]]
    return json.dumps(settings)
