"""What of a training step never changes: found by watching the step, then recorded, then played back.

    watched     every call of a module in a step                        -> which results stay, whatever is trained
    recorded    the outermost of these calls, what side networks see    -> leaves: tensors whose rows are samples
    played      the same step: those calls hand on what was recorded    -> no frozen block runs

Nothing is told from names. A call stays if its results are the same to the bit after every trained parameter was
changed and with other random numbers. A leaf is stored if the loss depends on it, which is followed from operation to
operation, and if its rows belong to samples, which a batch of other rows shows. All other results of these calls are
filled with NaN when they are played back, so that a mistake cannot stay unseen. What a side network reads it says
itself (`Listener`). `watching` finds a `Plan`; `Recording` and `Playing` carry it out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from trimtab.methods.tune.entries import print_of
from trimtab.methods.tune.leaves import Call, Key, Leaf, Plan, Values
from trimtab.methods.tune.listener import Listener, Seen
from trimtab.methods.tune.results import Result, joined

# --- standing between a model and its modules -------------------------------------------------------------------------


class _Ear(nn.Module):
    """Stands before a side network; `hear(seen, side)` gives the result."""

    def __init__(self, side: nn.Module, hear: Callable[[Seen, nn.Module], Any]):
        super().__init__()
        self.side, self.hear = side, hear

    def forward(self, seen: Seen) -> Any:
        return self.hear(seen, self.side)


@contextmanager
def between(
    modules: Mapping[str, nn.Module],
    called: Callable[[str, Callable, tuple, dict], Any],
    listeners: Mapping[str, Listener],
    heard: Callable[[str, Seen, nn.Module], Any],
) -> Iterator[None]:
    """While this is open, `called(path, forward, args, kwargs)` gives the results of modules, and `heard(name, seen,
    side)` those of side networks. Hooks go on as before."""
    before: dict[str, Any] = {path: vars(module).get("forward") for path, module in modules.items()}
    sides = {name: listener.side for name, listener in listeners.items()}

    def stand(path: str, forward: Callable) -> Callable:
        @functools.wraps(forward)  # whoever asks for its signature gets the module's own
        def instead(*args: Any, **kwargs: Any) -> Any:
            return called(path, forward, args, kwargs)

        return instead

    try:
        for path, module in modules.items():
            module.forward = stand(path, module.forward)
        for name, listener in listeners.items():
            listener.side = _Ear(listener.side, functools.partial(heard, name))
        yield
    finally:
        for path, module in modules.items():
            if before[path] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before[path]
        for name, listener in listeners.items():
            listener.side = sides[name]


class _Counted:
    """How often each module and side network has been called in a step."""

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan):
        self.model, self.listeners, self.plan = model, listeners, plan
        self.counts: Counter[str] = Counter()
        self.modules = {path: model.get_submodule(path) for path, _ in plan.calls}

    def next(self, name: str) -> Key:
        self.counts[name] += 1
        return name, self.counts[name] - 1


class _Done(Exception):
    """All that is recorded of a step has been."""


class Recording(_Counted):
    """Runs steps and keeps what a plan names, with samples as the first axis.

    Args:
        model: the model with its task, whose forward takes a batch.
        listeners: of its side networks by name.
        plan: what is kept.
        only: leaves to keep, by name; None for all that are needed.
        skip: calls that need not run, for nothing that is kept depends on them.
    """

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan, only: set[str] | None = None,
                 skip: set[Key] | None = None):  # fmt: skip
        super().__init__(model, listeners, plan)
        self.only = {x.name for x in plan.kept()} if only is None else only
        self.skip = skip or set()

    @torch.no_grad()
    def run(self, batch: Values, take: Callable[[Tensor], Tensor] = torch.clone) -> Values:
        """What one batch shows; `take` copies a value, before anything writes into it."""
        self.counts.clear()
        out: Values = {}
        left = self.only - {x.name for x in self.plan.batch}
        rows, device = next((len(v), v.device) for v in batch.values())

        def blank(leaf: Leaf) -> Tensor:
            return leaf.blank(rows, None, None, device, self.plan.dense)

        def keep(leaf: Leaf, value: Tensor) -> None:
            if leaf.name in self.only:
                out[leaf.name] = take(leaf.stored(value.detach()) if leaf.axis is not None else value.detach())
                left.discard(leaf.name)
            if not left:
                raise _Done

        def called(path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            key = self.next(path)
            if key in self.skip:
                idle = self.plan.calls[key]
                self.counts.update(idle.inside)
                return tree_unflatten([blank(x) if isinstance(x, Leaf) else x for x in idle.leaves], idle.spec)
            result = forward(*args, **kwargs)
            if call := self.plan.calls.get(key):
                values = _as_watched(call, result)
                for leaf, value in zip(call.leaves, values, strict=True):
                    if isinstance(leaf, Leaf):
                        keep(leaf, value)
            return result

        def heard(name: str, seen: Seen, side: nn.Module) -> Any:
            ear = self.plan.heard[self.next(name)]
            for leaf, value in zip(ear.maps, seen.maps, strict=True):
                keep(leaf, value)
            for part, leaf in ear.rest.items():
                keep(leaf, getattr(seen, part))
            if not any(p.requires_grad for p in side.parameters()):
                return side(seen)  # it is a part of what stays
            return seen.value  # the side network itself need not run

        for leaf in self.plan.batch:
            if leaf.name in self.only:
                out[leaf.name] = batch[leaf.name.removeprefix("batch.")].detach().clone()
        try:
            with between(self.modules, called, self.listeners, heard):
                if left:
                    self.model(**batch)
        except _Done:
            pass
        if missing := sorted(left):
            raise ValueError(f"cache: '{missing[0]}' was seen in a first step and not in a later one: the model takes "
                             "another way through its modules; train it without `training.cache`")  # fmt: skip
        return out


def _as_watched(call: Call, result: Any) -> list[Any]:
    """The parts of a result.

    Raises:
        ValueError: if they are others than in the first step, or if one is another value that is played back as it was
            there: a number, or a tensor that all its rows shared.
    """
    values, spec = tree_flatten(result)
    same = spec == call.spec and all(
        (isinstance(value, Tensor) and (leaf.fixed is None or print_of(value) == print_of(leaf.fixed)))
        if isinstance(leaf, Leaf) else repr(leaf) == repr(value)
        for leaf, value in zip(call.leaves, values, strict=True)
    )  # fmt: skip
    if not same:
        raise ValueError(f"cache: what '{call.key[0]}' hands on beside its rows (a number, None, a tensor of the whole "
                         "batch) is not what it was in the first step: it depends on the batch, and cannot be played "
                         "back row by row; train it without `training.cache`")  # fmt: skip
    return values


class Playing(_Counted):
    """Runs steps on what was recorded of them."""

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan):
        super().__init__(model, listeners, plan)
        self.given: dict[Key, Result] = {}

    def run(self, values: Values, rows: int) -> Any:
        """The model's own result of a batch.

        Args:
            values: leaves by name, those that are needed; their first axis is the sample.
            rows: samples of the batch.
        """
        self.counts.clear()
        self.given.clear()
        device = next(iter(values.values())).device
        length = self._length(values)

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Leaf):
                return leaf
            if leaf.fixed is not None:
                return leaf.fixed.clone()  # a model may write into it
            if leaf.name in values:
                found = values[leaf.name]
                return leaf.handed(found) if leaf.axis is not None else found
            return leaf.blank(rows, length, self.plan.length, device, self.plan.dense)

        def called(path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            call = self.plan.calls.get(self.next(path))
            if call is None:
                return forward(*args, **kwargs)
            self.counts.update(call.inside)
            return tree_unflatten([value(leaf) for leaf in call.leaves], call.spec)

        def heard(name: str, seen: Seen, side: nn.Module) -> Any:
            key = name, self.counts[name] - 1
            out = side(seen)
            self.given[key] = Result(out, seen.mask, ())
            return out

        def show(name: str) -> Seen:
            ear = self.plan.heard[self.next(name)]
            seen = Seen([value(leaf) for leaf in ear.maps], None, None, None)  # type: ignore[arg-type]
            for part, leaf in ear.rest.items():
                setattr(seen, part, value(leaf))
            if read := joined([self.given[key] for key in ear.memory]):
                seen.memory, seen.memory_mask = read.tokens, read.mask
            return seen

        batch = {leaf.name.removeprefix("batch."): value(leaf) for leaf in self.plan.batch}
        try:
            for name, listener in self.listeners.items():
                listener.source = functools.partial(show, name)
            with between(self.modules, called, self.listeners, heard):
                return self.model(**batch)
        finally:
            for listener in self.listeners.values():
                listener.source = None
            self.given.clear()

    def _length(self, values: Values) -> int | None:
        """Of this batch's texts."""
        if self.plan.length is None:
            return None
        for leaf in self.plan.leaves():
            if leaf.name in values and leaf.texts and leaf.axis is not None:
                axis = leaf.text_axes[0]
                return self.plan.length + values[leaf.name].shape[axis] - leaf.shape[leaf.texts[0]]
        return self.plan.length
