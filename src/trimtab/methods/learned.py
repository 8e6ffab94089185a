"""What was learned on an adapted model: several sets of weights, of which the model computes with one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.anatomy.structure import plain_parameters
from trimtab.registry import unknown
from trimtab.storage.learned import learned_part


class Learned:
    """Learned weights, held and switched.

    Names of tensors begin with `learned.` (trained in the plain model), `kept.` (added to it, but frozen:
    adapters that a search has trained) or `task.` (trained around it: a task's head).

    Attributes:
        model: the plain model.
        with_task: what is called with batches: the model itself, or a module that holds it.
        active: name of the weights with which the model computes.
    """

    def __init__(self, model: nn.Module, with_task: nn.Module):
        self.model, self.with_task = model, with_task
        self.active = "default"
        self._held: dict[str, dict[str, Tensor]] = {}

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
        """Hold a copy of the active weights under another name, and go on with that one."""
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
        found = {f"learned.{path}": tensor for path, tensor in learned_part(self.model).items()}
        own = {id(t) for t in (*plain_parameters(self.model).values(), *found.values())}
        found |= {f"kept.{path}": p for path, p in self.model.named_parameters() if id(p) not in own}
        if self.with_task is not self.model:
            inside = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
            around = learned_part(self.with_task)
            found |= {f"task.{path}": tensor for path, tensor in around.items() if id(tensor) not in inside}
        return found

    def copy(self, tensors: dict[str, Tensor], where: str) -> None:
        """Copy tensors into the model; ValueError unless they are exactly what is learned here."""
        own = self._fitting(tensors, where)
        with torch.no_grad():
            for key, tensor in tensors.items():
                own[key].copy_(tensor)

    def _fitting(self, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        own = self.current()
        wrong = [f"'{k}' has the shape {tuple(v.shape)}, expected {tuple(own[k].shape)}" for k, v in tensors.items()
                 if k in own and own[k].shape != v.shape]  # fmt: skip
        wrong += [f"'{k}' is missing" for k in own if k not in tensors]
        wrong += [f"'{k}' has no place here" for k in tensors if k not in own]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
            raise ValueError(f"{where}: the learned weights do not fit the model: {wrong[0]}{more}")
        return own
