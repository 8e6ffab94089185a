"""Methods in order on a model: what goes with what, attaching, callbacks, what is saved and restored, folding.

    plain model  ->  prune  ->  skip  ->  tune        each lever once; pruning may also come later

What may be combined is decided by `refusal`, from the facts that methods declare; recipes, estimates, the matrix and
users all come through here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import HANDLE, is_wrapped
from trimtab.methods.base import Method
from trimtab.methods.beginning import Beginnings
from trimtab.methods.learned import Learned
from trimtab.methods.modes import note_idle
from trimtab.methods.patches import SavePretrained, Train, checkpoint_callback, keep_dense, release
from trimtab.methods.prune.masks import Masks
from trimtab.methods.saved import Saved, identity, short
from trimtab.methods.session import Session
from trimtab.methods.skip.plan import Plan
from trimtab.methods.skip.reach import Reach
from trimtab.randomness import drawn_aside
from trimtab.storage.learned import named_tensors

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import TrainerCallback


def refusal(before: Sequence[Method], new: Method, anatomy: Anatomy) -> str:
    """Why a method cannot be attached after others, with the way out; empty if it can.

    Args:
        before: what is attached, in order.
        new: what is to be attached.
        anatomy: of the model as it is.
    """
    for old in before:
        if old.lever == new.lever:
            return f"{new.name}: {TWICE[new.lever].format(old=old.name)}"
        if new.lever == "skip" and old.lever == "tune":
            return (
                f"{new.name}: the model is tuned already with {old.name}, and what that learned in or beside the "
                "blocks that go would be lost: skip first, then tune"
            )
        if old.lever == "skip" and old.trains == "added" and new.detaches(anatomy) and not old.learns:
            return (
                f"{new.name}: no gradient passes through the towers under it, so that the adapters of {old.name} would "
                f"stay as they were drawn: nothing has trained them. Skip with `adapters: none`, or with a search that "
                "trains its adapters (das, linear-skip, greedy-skip, ...)"
            )
    return ""


TWICE = {
    "prune": "the model is pruned already with {old}: load the base again to prune it in another way; masks are kept "
             "alone by `fit.masks.save`",
    "skip": "blocks are skipped already by {old}: load the base again to skip others; a plan is kept alone by "
            "`fit.plan.save`",
    "tune": "the model is tuned already with {old}: hold another result of it with `fit.add(name)`, or load the base "
            "again to tune it in another way",
}  # fmt: skip


def detached(anatomy: Anatomy, towers: Iterable[str]) -> set[str]:
    """Towers that get no gradient when none passes through these: they, and all whose results flow into them alone."""
    found = set(towers)
    while True:
        more = {
            t.name for t in anatomy.towers
            if t.name not in found and (readers := anatomy.readers(t.name)) and all(r.name in found for r in readers)
        }  # fmt: skip
        if not more:
            return found
        found |= more


class Stack(Learned):
    """A model with methods attached in order.

    Attributes:
        model: the plain model.
        with_task: what is called with batches: the model itself, or a module that holds it.
        anatomy: of the model as it is: without the blocks that were skipped.
        methods: in order.
        active: name of the learned weights with which the model computes.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, with_task: nn.Module | None = None):
        super().__init__(model, with_task or model)
        self.anatomy = self._described = anatomy
        self.methods: list[Method] = []
        self._base: dict[str, Any] | None = None
        self._begins: Beginnings | None = None

    @property
    def base(self) -> dict[str, Any]:
        """What tells the model from others, as it was before any method."""
        if self._base is None:
            if self.methods:
                raise ValueError("the base was not looked at before methods changed it: adapt a model loaded anew")
            self._base = identity(self.model, self._described)
            if not is_fake(self.model):
                self.note()
        return self._base

    def check(self, method: Method) -> None:
        """Raise a ValueError unless a method goes with what is attached."""
        if why := refusal(self.methods, method, self.anatomy):
            raise ValueError(why)

    def pull(self, method: Method, session: Session, example: Mapping[str, Any] | None = None) -> None:
        """Let a method find what it needs in a session's data, and attach it.

        A plan is refused if without its blocks the model does not run on a batch, or what it returns no longer depends
        on a tower: a model may count on a block in a way nobody saw.

        Args:
            method: neither prepared nor loaded.
            session: with data or without.
            example: that batch, keyword arguments of `with_task`; None: the session's.

        Raises:
            ValueError: if the method does not go with what is attached, does not find what it needs, or as above.
        """
        self.check(method)
        session.anatomy = self.anatomy
        method.prepare(session)
        if method.lever != "skip":
            self.attach(method)
            return
        with drawn_aside():  # a task draws wordings
            batch = session.example() if example is None else example
        if batch is None:
            self.attach(method)
            return
        skipped = set(Plan.from_dict(method.state).skipped)
        reach = Reach(self.model, self.anatomy, skipped, self.with_task, batch)
        self.attach(method)
        reach.check(method.name)

    def attach(self, method: Method, restored: bool = False) -> None:
        """Attach a method that has found what it needs; see `adapt` and `refusal` for the rules.

        Args:
            method: checked, prepared or loaded.
            restored: from a folder: what it trained, or keeps, is copied into it afterwards.
        """
        self.check(method)
        real = not is_fake(self.model)
        _ = self.base
        if real:
            self.carry()
        blocks = {b.path for b in self.anatomy.blocks()}
        with self._unchanged_on_error():
            if method.lever != "prune" and all(m.lever == "prune" for m in self.methods):
                self.model.requires_grad_(False)
            if towers := detached(self.anatomy, method.detaches(self.anatomy)):
                self._detach(towers, restored)
            self.anatomy = method.attach(self.model, self.anatomy)
        self.methods.append(method)
        if self.masks is not None and method.lever != "skip":
            for other in self.levers("tune"):
                other.follow(self.masks, self.model)
        if gone := blocks - {b.path for b in self.anatomy.blocks()}:
            for pruner in self.levers("prune"):
                pruner.forget(gone, self.anatomy, self.model)
        if real:
            self.note()
        self._take_over()

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """What is trained stays as it was if a method does not fit; a model that was changed in part is said to be."""
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        modules = [id(m) for m in self.model.modules()]
        try:
            yield
        except ValueError as error:
            for parameter, needed in trained:
                parameter.requires_grad_(needed)
            if modules != [id(m) for m in self.model.modules()]:
                raise ValueError(f"{error} (the model was changed in part: load it again)") from error
            raise

    def _detach(self, towers: set[str], restored: bool) -> None:
        """Freeze what no gradient reaches any more; adapters of a search keep what they learned in it."""
        changed = {name.removeprefix("kept.") for name in self.changed()}
        for method in self.levers("skip"):
            if method.trains == "added" and not restored:
                method.keep_trained(self.model, towers, changed)
        for path, parameter in self.model.named_parameters():
            owner = self.anatomy.owner(path)
            if owner is None or owner.name in towers:
                parameter.requires_grad_(False)

    def _take_over(self) -> None:
        """Let the model train and save as an adapted one."""
        self.tuned = any(m.lever != "prune" for m in self.methods)
        if self._begins is not None:
            self._begins.remove()
            self._begins = None
        if self.tuned:
            cut = detached(self.anatomy, {t for m in self.methods for t in m.detaches(self.anatomy)})
            placed = {path for m in self.methods for path in m.replaces()}
            self._begins = Beginnings(self.model, self.anatomy, cut, placed, self.with_task)
            keep_dense(self.model)
            self.model.train = Train(self.model)  # type: ignore[method-assign]
            if self.model.training:
                self.model.train()
        if self.lost() and hasattr(type(self.model), "save_pretrained"):
            self.model.save_pretrained = SavePretrained(self)  # type: ignore[assignment]

    # --- what is attached ---

    def levers(self, lever: str) -> list[Any]:
        """The attached methods of a lever."""
        return [m for m in self.methods if m.lever == lever]

    @property
    def masks(self) -> Masks | None:
        """The masks on the model as it is; None if it was not pruned."""
        return next((m.attached for m in self.levers("prune")), None)

    @property
    def plan(self) -> Plan | None:
        """Which blocks are skipped; None if the lever was not pulled."""
        return next((Plan.from_dict(m.state) for m in self.levers("skip")), None)

    def lost(self) -> list[str]:
        """Names of the methods that a plain transformers folder of the model as it stands would lose."""
        return [m.name for m in self.methods if m.lever == "skip" or m.trains == "added"]

    # --- training ---

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, for an optimiser."""
        return (p for p in self.with_task.parameters() if p.requires_grad)

    def callbacks(self) -> list[TrainerCallback]:
        """For `transformers.Trainer` and those that build on it: zeros are kept, checkpoints get fit.json."""
        return [*(c for m in self.methods for c in m.callbacks()), checkpoint_callback(self)]

    def keep(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Keep the zeros through every step of an optimiser, in a loop of one's own; `remove()` of a handle ends it."""
        if self.masks is None or not self.masks.trained(self.model):
            return []  # no step changes a pruned weight
        return self.masks.keep(self.model, optimizer)

    # --- stored and restored ---

    def _check_zeros(self, held: Mapping[str, Tensor] | None = None) -> None:
        """ValueError if pruned weights of the model, or those that are held under another name, are not zero."""
        if is_fake(self.model):
            return
        if self.masks is not None and (revived := self.masks.revived(self.model, held or {})):
            raise ValueError(
                f"{len(revived)} of {len(self.masks)} pruned matrices have regained non-zeros, first '{revived[0]}': "
                "the training loop did not keep the zeros: give `callbacks=fit.callbacks()` to the trainer, or call "
                "`fit.keep(optimizer)` before a loop of your own; `fit.masks.enforce(fit.model)` sets them to 0 again"
            )

    def stored(self) -> dict[str, Tensor]:
        """The tensors that `save` writes, by their names in the file."""
        return Saved({}, [], [dict(m.tensors) for m in self.methods], self.tensors()).all_tensors()

    def saved(self, name: str | None = None) -> Saved:
        """What `save` writes; errors as there."""
        learned = self.tensors(name)
        held = {} if name in (None, self.active) else learned
        self._check_zeros({key.partition(".")[2]: t for key, t in held.items() if not key.startswith("task.")})
        methods = [{"name": m.name, "lever": m.lever, "settings": m.plain_settings(), "state": m.state}
                   for m in self.methods]  # fmt: skip
        return Saved(self.base, methods, [dict(m.tensors) for m in self.methods], learned, name or self.active)

    def restore(self, saved: Saved, where: str) -> None:
        """Take over what was learned: what was trained is trained from here on, and nothing else."""
        self.active = saved.name
        plain, around = (dict(m.named_parameters(remove_duplicate=False)) for m in (self.model, self.with_task))
        before = [p for p in plain.values() if p.requires_grad]
        for parameter in around.values() if self.tuned else ():
            parameter.requires_grad_(False)
        for key in saved.learned:
            kind, _, path = key.partition(".")
            learned = {"learned": plain, "task": around}.get(kind, {}).get(path)
            if learned is not None:
                learned.requires_grad_(True)
        note_idle(self.model, [p for p in before if not p.requires_grad])
        self._carried |= saved.learned.keys() & named_tensors(self.model, self.with_task).keys()
        self.copy(saved.learned, where, as_stored=True)
        self.carry()
        self.note()
        self._take_over()

    def write(self, folder: Path) -> None:
        """As `save`, into a folder that is there, beside other files."""
        self.saved().write(folder)

    def folded(self) -> nn.Module:
        """An ordinary model that computes the same: a copy in which every method is part of the weights."""
        for method in self.methods:
            if method.keeps:
                raise ValueError(
                    f"{method.name} cannot be exported as a plain model: {method.keeps}; `fit.save` keeps it"
                )
        self._check_zeros()
        twin = copy.deepcopy(self.model)
        fit: Stack = getattr(twin, HANDLE)
        if fit._begins is not None:
            fit._begins.remove()
        release(twin)
        # Masks name blocks as they are numbered before any goes.
        for lever in ("tune", "prune", "skip"):
            for method in fit.levers(lever):
                method.fold(twin)
        if wrapped := [path for path, module in twin.named_modules() if is_wrapped(module)]:
            raise ValueError(
                f"'{wrapped[0]}' is one of {len(wrapped)} layers that PEFT wrapped before the model was adapted: merge "
                "them first (`merge_and_unload`), and adapt the merged model; `fit.save` works as it is"
            )
        return twin


def differing(theirs: Saved, own: Saved) -> str:
    """How the methods of a folder differ from those attached; empty if they do not."""
    if (names := [m["name"] for m in theirs.methods]) != [m["name"] for m in own.methods]:
        return f"made with {', '.join(names) or 'no method'}, here are {', '.join(m['name'] for m in own.methods)}"
    for i, (a, b) in enumerate(zip(theirs.to_json()["methods"], json.loads(own.text())["methods"], strict=True)):
        for what in ("settings", "state"):
            if wrong := [k for k in {**a[what], **b[what]} if k not in TIMES and a[what].get(k) != b[what].get(k)]:
                return (
                    f"{a['name']} with {wrong[0]} {short(a[what].get(wrong[0]))}, here {short(b[what].get(wrong[0]))}"
                )
        other = theirs.tensors[i]
        if other.keys() != own.tensors[i].keys() or any(
            not torch.equal(v.cpu(), other[k]) for k, v in own.tensors[i].items()
        ):
            return f"{a['name']} found others than here"
    return ""


TIMES = ("seconds",)  # what a method's state tells of the hour, not of the model


def is_fake(model: nn.Module) -> bool:
    """Whether a model has sizes and no values: costs are counted on such."""
    return isinstance(next(model.parameters(), None), FakeTensor)
