"""The model in which a search looks: every candidate block with its skip adapter beside it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.anatomy import Block
from trimtab.anatomy.structure import replace_module
from trimtab.methods.session import Session
from trimtab.methods.skip.adapters import add_adapters, train_adapters
from trimtab.methods.skip.budget import BlockCosts, Unit, measure
from trimtab.methods.skip.skipped import Handed, HandsOn, Skipped, Switch, adapters_in

if TYPE_CHECKING:
    from trimtab.methods.skip.base import SkipSettings


class Supernet:
    """A copy of a session's model in which every candidate can be switched to its skip adapter.

    Of the plain model nothing is trained but adapters and, beside them, heads; what the model with task has around it
    (a task's head) is trained if it was.

    Args:
        session: whose model is copied.
        candidates: the blocks that may be skipped.
        settings: of the search.

    Attributes:
        with_task: the copy with its task.
        plain: the plain model in it.
        switches: one a candidate.
    """

    def __init__(self, session: Session, candidates: list[Block], settings: SkipSettings):
        self.session, self.candidates = session, candidates
        self.trains = settings.adapters != "none" and getattr(settings, "search_steps", 0) > 0
        self.with_task = copy.deepcopy(session.with_task)
        self.plain = session.plain_in(self.with_task)
        self.plain.requires_grad_(False)  # the model's own weights, zeros of a pruner among them, stay as they are
        self.switches: list[Switch] = []
        for block in candidates:
            bottleneck = max(1, block.width // settings.reduction)
            other = Skipped(self.plain, block, bottleneck, settings.adapters, settings.skip_width)
            add_adapters(self.plain, block, bottleneck, settings.adapters)
            self.switches.append(Switch(self.plain.get_submodule(block.path), other))
            replace_module(self.plain, block.path, self.switches[-1])
        if settings.adapters != "none":
            train_adapters(self.plain, session.anatomy.heads)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss on a batch with the blocks skipped that are chosen now, a scalar."""
        return self.session.loss(self.with_task, batch)

    def costs(self, unit: Unit) -> BlockCosts:
        """What each candidate costs, kept and skipped, in one forward pass of the session's example.

        Raises:
            ValueError: if the session has no data.
        """
        session, one = self.session, self.session.example()
        if one is None:
            raise ValueError(f"{unit} are counted on a batch, and there are no data: pass `train=`, a list of batches")
        blocks = [session.plain.get_submodule(b.path) for b in self.candidates]
        pairs = zip(blocks, self.candidates, strict=True)
        handles = [module.register_forward_hook(HandsOn(block, Handed()).after) for module, block in pairs]
        try:
            return measure(unit, (session.with_task, blocks, lambda: session.with_task(**one)),
                           (self.with_task, self.switches, lambda: self.with_task(**one)))  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()

    def learned(self, plan: Collection[int]) -> dict[str, Tensor]:
        """What the adapters of a plan have learned, by the names that they have in a model with the plan attached.

        Empty if the search trains none.
        """
        found: dict[str, Tensor] = {}
        for i, (block, switch) in enumerate(zip(self.candidates, self.switches, strict=True)):
            part = switch.replacement if i in plan else switch.block
            for where, adapter in adapters_in(part, "") if self.trains else ():
                for name, value in adapter.named_parameters():
                    found[f"{block.path}{where}.{name}"] = value.detach().cpu().clone()
        return found
