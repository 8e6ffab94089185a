"""The lever that all searches share: which blocks may go, a model without the plan's blocks, and its adapters.

prepare        a search (one file each) finds the plan, or `plan` gives it
attach         a skipped block is taken out with its weights and a small adapter stands in its place, kept blocks get
               adapters beside their parts; both are trained from the pretrained weights
keep_trained   where no gradient reaches them: the adapters as the search has trained them, frozen
fold           without adapters (`adapters: none`): an ordinary model with fewer layers, see `shorten`
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab.anatomy import Anatomy, Block
from trimtab.anatomy.structure import replace_module
from trimtab.methods.base import Method
from trimtab.methods.session import Session
from trimtab.methods.skip.adapters import add_adapters, train_adapters
from trimtab.methods.skip.budget import Goal, Indices, parse, with_costs
from trimtab.methods.skip.plan import Plan, PlanError
from trimtab.methods.skip.search.evaluate import SearchError
from trimtab.methods.skip.search.journal import Journal
from trimtab.methods.skip.search.supernet import Supernet
from trimtab.methods.skip.shorten import close_gaps, hand_on_positions, take_out
from trimtab.methods.skip.skipped import Handed, HandsOn, Skipped, adapters_in, spare_blank
from trimtab.randomness import drawn_aside
from trimtab.registry import unknown
from trimtab.settings import within


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
    plan: tuple[str, ...] | str | Plan | None = None
    """Paths of the blocks to skip, or a plan, its JSON file, or the folder of a model in which blocks are skipped;
    given, nothing is searched."""

    def __post_init__(self) -> None:
        if isinstance(self.plan, os.PathLike):
            object.__setattr__(self, "plan", os.fspath(self.plan))
        within(vars(self), skip="[0, inf)", reduction="[1, inf)", skip_width="[1, inf)")
        if self.budget is not None:
            parse(self.budget)


class Skipping(Method):
    """What every way to skip shares: candidates, and a model without the plan's blocks.

    Attributes:
        trained: what the adapters of the plan have learned in the search, by the parameters' names after `attach`;
            empty if nothing has trained them.
    """

    lever = "skip"
    changes = "tree"
    teaches: ClassVar[bool] = False  # whether its search trains adapters
    settings: SkipSettings
    drawn: int | None = None  # from which seed adapters are drawn; None: from torch's own state

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.trained: dict[str, Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """Name and settings; a plan is told by the paths of its skipped blocks."""
        plan = self.settings.plan
        bare = replace(self.settings, plan=tuple(plan.skipped)) if isinstance(plan, Plan) else self.settings
        return {"name": self.name, **asdict(bare)}

    @property
    def plan(self) -> Plan | None:
        """The plan that was found or given; None before."""
        return Plan.from_dict(self.state, self.name) if self.state else None

    @property
    def trains(self) -> str:  # type: ignore[override]
        return "nothing" if self.settings.adapters == "none" else "added"

    @property
    def learns(self) -> bool:
        """Whether its search trains the adapters that it sets: a plan that is given has taught them nothing."""
        s = self.settings
        searched = s.plan is None and (s.budget is not None or s.skip > 0)
        return self.teaches and searched and s.adapters != "none" and getattr(s, "search_steps", 0) > 0

    def told(self) -> str:
        plan = self.plan
        if plan is None:
            return self.name
        return f"{self.name}: {len(plan.skipped)} of {len(plan.blocks)} blocks are skipped ({', '.join(plan.skipped)})"

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
        for name in towers if s.adapters == "routed" else ():
            if anatomy.tower(name).layout == "map":
                raise ValueError(
                    f"{self.name}: routed adapters weigh by the first token, and tower {name!r} is a map, "
                    "(B, H, W, D), which has none: set `adapters: parallel`, or name other towers in `towers`"
                )
        found = [
            b
            for name in towers
            for b in anatomy.blocks(name)
            # Without adapters what is skipped goes for good when the model is exported: only what can.
            if b.keeps_shape
            and b.knows("blocks", "layout")
            and anatomy.tower(name).knows("blocks", "layout")
            and (not b.stays if s.adapters == "none" else b.sublayers and anatomy.tower(name).knows("gradient"))
        ]
        if not found:
            for name in towers:
                anatomy.tower(name).need(
                    self.name, "blocks", "layout", "skip", *(() if s.adapters == "none" else ("sublayers", "gradient"))
                )
            blocks = [b for name in towers for b in anatomy.blocks(name)]
            fixed = sum(not b.keeps_shape for b in blocks)
            rest = f"; {len(blocks) - fixed} have no described parts for adapters: set `adapters: none`"
            raise ValueError(
                f"{self.name}: none of the {len(blocks)} blocks in {towers} can be skipped: {fixed} change the shape "
                f"of their stream, or the model needs them by number{rest if fixed < len(blocks) else ''}"
            )
        if s.plan is None and s.budget is None and s.skip >= len(found):
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
        """Find the plan, and what the search's adapters learned on the way; the session's model stays as it is.

        Raises:
            ValueError: if no block can be skipped, or the session's data do not suffice.
            PlanError: if a given plan is of another model.
            SearchError: if a search cannot go on.
        """
        candidates = self.candidates(session.anatomy)
        model = session.plain
        if self.settings.plan is not None:
            self.set_plan(self.given(candidates, model, session.anatomy))
        elif self.settings.budget is None and self.settings.skip == 0:
            self.set_plan(Plan.of(model, session.anatomy, candidates, (), method=self.name, target=self.wanted))
        else:
            journal = Journal.of(self, session, candidates)
            journal.begin()
            if (found := journal.read("found")) is not None:
                self.state, self.trained = found, journal.tensors("found") or {}
            else:
                with drawn_aside(session.seed):  # the same search, whatever was drawn before
                    self._search(session, candidates, journal)
                if self.trained:
                    journal.keep("found", self.trained)
                journal.write("found", self.state)
        self.drawn = session.seed

    def _search(self, session: Session, candidates: list[Block], journal: Journal) -> None:
        """Search, and put what the blocks cost into the plan."""
        supernet = Supernet(session, candidates, self.settings)
        macs = None if session.example() is None else supernet.costs("macs")
        goal = Goal.count(len(candidates), self.settings.skip)
        if self.settings.budget is not None:
            share, unit = parse(self.settings.budget)
            goal = (macs if macs and unit == "macs" else supernet.costs(unit)).goal(share)

        def plan(chosen: Indices, scores: list[float] | None = None, evaluations: int = 0) -> Plan:
            found = Plan.of(session.plain, session.anatomy, candidates, chosen, scores, method=self.name,
                            target=self.wanted, evaluations=evaluations)  # fmt: skip
            return found if macs is None else with_costs(found, macs)

        try:
            chosen, scores, evaluations, more = self.search(session, candidates, supernet, goal, journal)
        except SearchError as error:
            if error.plan is None or journal.folder is None:
                raise
            journal.write("so_far", plan(error.plan).to_dict())
            file = journal.file("so_far.json")
            raise SearchError(f"{self.name}: {error}; the plan so far is kept: {file}") from error
        self.set_plan(plan(chosen, scores, evaluations), **more)
        self.trained = supernet.learned(chosen)

    def search(self, session: Session, candidates: list[Block], supernet: Supernet, goal: Goal, journal: Journal
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
        if isinstance(wanted, Plan) or (isinstance(wanted, str) and wanted not in paths):
            plan = wanted if isinstance(wanted, Plan) else Plan.read(wanted)
            plan.check(candidates, model, f"{self.name}: plan" if isinstance(wanted, Plan) else wanted)
            return plan
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
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
        goal = Goal.count(len(candidates), self.settings.skip)
        if self.settings.budget is not None:
            share, unit = parse(self.settings.budget)
            if session is None:
                raise ValueError(f"{self.name}: budget: '{self.settings.budget}' needs a session to count blocks in")
            if unit == "latency" and isinstance(next(model.parameters()), FakeTensor):
                raise RuntimeError(f"{self.name}: fake tensors take no time")
            goal = Supernet(session, candidates, self.settings).costs(unit).goal(share)
        chosen = goal.fill(range(len(candidates))[::-1])
        self.set_plan(Plan.of(model, anatomy, candidates, chosen, method=self.name, target=self.wanted))

    def _put(self, model: nn.Module, block: Block, skipped: set[str], tower: tuple[Block, ...], handed: Handed) -> None:
        """Take a block out, or set adapters in it."""
        bottleneck = max(1, block.width // self.settings.reduction)
        if block.path in skipped:
            hand_on_positions(model, block.path, [b.path for b in tower if b.path not in skipped])
            gone = Skipped(model, block, bottleneck, self.settings.adapters, self.settings.skip_width, handed)
            replace_module(model, block.path, gone)
            return
        add_adapters(model, block, bottleneck, self.settings.adapters)
        if skipped:
            hands_on = HandsOn(block, handed)
            model.get_submodule(block.path).register_forward_pre_hook(hands_on.before, with_kwargs=True)
            model.get_submodule(block.path).register_forward_hook(hands_on.after)

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Take the plan's blocks out, and set new adapters in their places and in the kept blocks.

        Adapters are set to be trained, and with them, as published, everything in the anatomy's heads but the map to a
        vocabulary; without adapters nothing is. Whether a head gets a gradient depends on what the model is trained for
        (a task that reads tokens leaves a pooler without): whoever counts what is trained must look at the gradients.

        Raises:
            ValueError: if there is no plan yet, or it skips a block that is no candidate here.
        """
        candidates = self.candidates(anatomy)
        if not self.state and self.settings.plan is not None:
            self.set_plan(self.given(candidates, model, anatomy))
        if not self.state:
            raise ValueError(
                f"{self.name}: there is no plan yet: call `prepare(session)`, which searches, give `plan`, or load one"
            )
        skipped = set(self.state["skip"])
        if strange := sorted(skipped - {b.path for b in candidates}):
            raise PlanError(f"{self.name}: the plan skips '{strange[0]}', which is no block that can be skipped here")
        tower_of = {b.path: t.blocks for t in anatomy.towers for b in t.blocks}
        handed = {t.blocks: Handed() for t in anatomy.towers}
        with drawn_aside(self.drawn):  # however the plan was found, the adapters are the same
            for block in candidates:
                self._put(model, block, skipped, tower_of[block.path], handed[tower_of[block.path]])
        close_gaps(model, anatomy, skipped)
        if self.settings.adapters != "none":
            train_adapters(model, anatomy.heads)
            for first in (t.blocks[0].path for t in anatomy.towers if t.starts_blank):
                spare_blank(model, first)
        towers = tuple(replace(t, blocks=tuple(b for b in t.blocks if b.path not in skipped)) for t in anatomy.towers)
        return replace(anatomy, towers=towers)

    def keep_trained(self, model: nn.Module, towers: Collection[str], changed: Collection[str] = ()) -> None:
        """Give the adapters in some towers what the search has taught them, and freeze them.

        Adapters that were trained after the search stay as they are.

        For a side network over these towers, through which no gradient reaches their adapters.

        Args:
            model: to which this is attached.
            towers: names of the towers.
            changed: names of parameters that were trained since this was attached.

        Raises:
            ValueError: if there are adapters in these towers which nothing has trained.
        """
        assert self.plan is not None
        paths = [b.path for b in self.plan.blocks if b.tower in towers]
        wanted = {f"{path}.{n}": p for b in paths for path, m in adapters_in(model, b) for n, p in m.named_parameters()}
        if untrained := [name for name in wanted if name not in self.trained and name not in changed]:
            raise ValueError(
                f"{self.name}: nothing has trained the adapters in {', '.join(map(repr, sorted(towers)))} "
                f"('{untrained[0]}', ...), and no gradient reaches them there: skip with `adapters: none`, or by a "
                "search that trains (das, linear-skip, ...)"
            )
        for name, parameter in wanted.items():
            if name not in changed:
                parameter.data.copy_(self.trained[name])
            parameter.requires_grad_(False)

    def fold(self, model: nn.Module) -> None:
        """Take the places of skipped blocks out of the model: fewer layers, an ordinary configuration."""
        take_out(model)
