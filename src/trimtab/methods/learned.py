"""What was learned on an adapted model: several sets of weights, of which the model computes with one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.registry import unknown
from trimtab.storage.learned import Trace, learned_part, named_tensors, trace


class Learned:
    """Learned weights, held and switched.

    Names of tensors begin with `learned.` (trained in the plain model), `kept.` (frozen, but not to be had from the
    base: adapters that a search has trained, weights that were trained before they were frozen) or `task.` (trained
    around it: a task's head).

    Attributes:
        model: the plain model.
        with_task: what is called with batches: the model itself, or a module that holds it.
        active: name of the weights with which the model computes.
    """

    def __init__(self, model: nn.Module, with_task: nn.Module):
        self.model, self.with_task = model, with_task
        self.active = "default"
        self.tuned = False  # whether a method has said what is trained
        self._held: dict[str, dict[str, Tensor]] = {}
        self._noted: dict[str, Trace] = {}  # every tensor as the last method left it
        self._carried: set[str] = set()  # tensors that were changed before that, by training or by hand

    @property
    def names(self) -> list[str]:
        """All learned weights that are held, the active ones included."""
        return sorted({self.active, *self._held})

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Copies of what was learned under a name; None for the active one.

        Raises:
            ValueError: if nothing is held under the name.
        """
        name = self.active if name is None else name
        if name == self.active:
            return {k: v.detach().clone() for k, v in self.current().items()}
        if name not in self._held:
            raise ValueError(unknown("name of learned weights", name, self.names))
        return self._held[name]

    def add(self, name: str) -> None:
        """Hold a copy of the active weights under another name, and go on with that one.

        Raises:
            ValueError: if the name is held, or no method has said what is trained.
        """
        if not self.tuned:
            raise ValueError("nothing says what is trained, so that there is nothing to hold: `fit.tune(...)` first")
        self._check_new(name)
        self._held[self.active] = self.tensors()
        self.active = name

    def switch(self, name: str) -> None:
        """Let the model compute with what is held under a name. An optimiser's moments stay: make a new one."""
        if name == self.active:
            return
        new = self.tensors(name)
        self._held[self.active] = self.tensors()
        self.copy(new, repr(name))
        if (masks := getattr(self, "masks", None)) is not None:
            masks.enforce(self.model)  # what was held before the model was pruned has no zeros
        del self._held[name]
        self.active = name

    def hold(self, name: str, tensors: dict[str, Tensor], where: str) -> None:
        """Hold tensors under a name; ValueError unless they are those that are learned here, shape by shape."""
        self._check_new(name)
        self._fitting(tensors, where)
        self._held[name] = tensors

    def _check_new(self, name: str) -> None:
        if name in self.names:
            raise ValueError(f"{name!r} is held already: {', '.join(self.names)}")

    def current(self) -> dict[str, Tensor]:
        """What has to be stored of the model beside what its methods found: the tensors themselves, by name."""
        # Of a model that is only pruned everything may be trained: what has not changed is had from the base.
        found = {f"learned.{path}": t for path, t in learned_part(self.model).items()} if self.tuned else {}
        if self.with_task is not self.model:
            inside = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
            around = learned_part(self.with_task)
            found |= {f"task.{path}": tensor for path, tensor in around.items() if id(tensor) not in inside}
        have, own = {id(t) for t in found.values()}, named_tensors(self.model, self.with_task)
        added = {name for name, (_, plain) in own.items() if not plain}
        return found | {n: own[n][0] for n in sorted(added | self.changed()) if id(own[n][0]) not in have}

    # --- what was changed and then frozen ---

    def note(self) -> None:
        """Remember every tensor as it is now, after a method: what differs later was trained, or changed by hand."""
        own = named_tensors(self.model, self.with_task)
        self._noted = {name: trace(t, self._noted.get(name)) for name, (t, _) in own.items()}

    def carry(self) -> None:
        """Before a method: what was changed since the last one is stored from here on, also when it is frozen."""
        self._carried |= self.changed()

    def changed(self) -> set[str]:
        """Names of the tensors whose values cannot be had from the base and what the methods found."""
        own = named_tensors(self.model, self.with_task)
        return {n for n, (t, _) in own.items() if n in self._carried or (n in self._noted and self._noted[n].left(t))}

    def copy(self, tensors: dict[str, Tensor], where: str, as_stored: bool = False) -> None:
        """Copy tensors into the model; ValueError unless they are exactly what is learned here.

        Args:
            tensors: by name.
            where: they come from, for errors.
            as_stored: a parameter of a coarser type than its tensor (bfloat16, where float32 was trained) takes the
                tensor's type over, so that no value is rounded.
        """
        own = self._fitting(tensors, where)
        with torch.no_grad():
            for key, tensor in tensors.items():
                mine = own[_place(key)]
                if as_stored and torch.promote_types(mine.dtype, tensor.dtype) != mine.dtype:
                    mine.data = mine.data.to(tensor.dtype)
                mine.copy_(tensor)

    def _fitting(self, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        own = {_place(k): v for k, v in self.current().items()}
        given = {_place(k): (k, v) for k, v in tensors.items()}
        wrong = [f"'{k}' has the shape {tuple(v.shape)}, expected {tuple(own[p].shape)}" for p, (k, v) in given.items()
                 if p in own and own[p].shape != v.shape]  # fmt: skip
        wrong += [f"'{p}' is missing" for p in own if p not in given]
        wrong += [f"'{k}' has no place here" for p, (k, _) in given.items() if p not in own]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
            raise ValueError(f"{where}: the learned weights do not fit the model: {wrong[0]}{more}")
        return own


def _place(key: str) -> str:
    """The name of a tensor, whether it is trained or was frozen since."""
    kind, _, path = key.partition(".")
    return key if kind == "task" else f"learned.{path}"
