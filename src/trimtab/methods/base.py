"""What a method is: one lever on a model, seen only through its `Anatomy`.

    prepare(session)            what needs data: calibration of a pruner, search of a plan -> fills the method's state
    attach(model, anatomy)      changes the model from outside, from settings and state alone; nothing else does
    callbacks()                 what must happen during training (zeros kept, gates updated)

A saved run stores settings and state, so that loading is `load_state` and `attach` again: no search, no calibration.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy
from trimtab.registry import Registry, unknown
from trimtab.settings import build

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from trimtab.methods.prune.masks import Masks
    from trimtab.methods.session import Session

_NOUNS = {"prune": "pruner", "skip": "search", "tune": "tuning method"}


class MethodRegistry(Registry[Any]):
    """The methods by name, and the one way to make one from its settings."""

    def make(self, name: str, /, lever: str | None = None, **settings: Any) -> Any:
        """A `Method` with its settings, as they stand in a recipe.

        Args:
            name: registered name.
            lever: `prune`, `skip` or `tune`, if only methods of that lever are meant.
            settings: checked and converted by the types in the method's `Settings`; lists become tuples.

        Raises:
            ValueError: if no such method is there, a setting is unknown (with the nearest), or has a wrong value.
        """
        names = sorted(n for n, cls in self.items() if lever in (None, cls.lever))
        if name not in names:
            raise ValueError(unknown(_NOUNS.get(lever or "", self.kind), name, names))
        checked = build(self[name].Settings, settings, name)
        return self[name](**{k: getattr(checked, k) for k in settings})


METHODS = MethodRegistry("method")


def placed(module: nn.Module, place: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A new module moved to the device of a model's parameter, and to a type if one is given.

    What is there already is left alone: modules of fake tensors, with which costs are estimated, cannot be moved.
    """
    if all(t.device == place.device and dtype in (None, t.dtype) for t in module.parameters()):
        return module
    return module.to(place.device, dtype)


class Method(ABC):
    """One lever. What a method may be combined with is decided in `stack.py`, from the facts below and nothing else.

    Attributes:
        name: registered name, which the registry sets.
        lever: `prune`, `skip` or `tune`.
        Settings: frozen dataclass; its attribute docstrings are the method's help text.
        trains: what it trains: `nothing` (pruners, the linear probe), the model's `own` parameters (full, BitFit),
            or parameters that it `added` (LoRA, adapters, prompts, side networks).
        changes: what it does to the model: to the `values` of its weights (pruners, full), to the module `tree` (blocks
            taken out, layers wrapped), `inside` its blocks (adapters, prompts), `beside` it (side networks), `nothing`.
        keeps: why a transformers folder cannot hold what it added; empty if `fold` makes it part of the plain model.
        mixes_tokens: whether it lets every token see every other, beside a model that may forbid it.
        one_token: whether it hands on a tower's first token alone.
        state: what `prepare` found, as plain JSON (a plan, say).
        tensors: what `prepare` found, as tensors (masks, say).
    """

    name: ClassVar[str]
    lever: ClassVar[Literal["prune", "skip", "tune"]]
    Settings: ClassVar[type]
    trains: ClassVar[Literal["nothing", "own", "added"]]
    changes: ClassVar[Literal["values", "tree", "inside", "beside", "nothing"]]
    keeps: str = ""
    mixes_tokens: ClassVar[bool] = False
    one_token: bool = False

    def __init__(self, **settings: Any):
        self.settings = self.Settings(**settings)
        self.state: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def prepare(self, session: Session) -> None:  # noqa: B027 (most methods need no data)
        """Find what needs data and keep it in `state` and `tensors`."""

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        """Change the model in place; returns the anatomy that the next method shall see.

        Everything is frozen when the first method is attached; a method sets `requires_grad` on what it trains.

        Raises:
            ValueError: if the method does not apply to this model, with the reason.
        """

    def assume(self, model: nn.Module, anatomy: Anatomy, session: Session | None = None) -> None:  # noqa: B027
        """Fill `state` with something of the right size without data, so that costs can be counted beforehand.

        `session` has the model with its task and no data, for methods that must run it to know (a budget of MACs, say).
        """

    def costs_as(self) -> dict[str, Any]:
        """What its costs depend on: methods that say the same cost the same on the same model."""
        return self.describe()

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def fold(self, model: nn.Module) -> None:  # noqa: B027 (most methods that fold have changed nothing but weights)
        """Make what the method added part of the plain model's own weights, so that it can be saved without trimtab.

        Called from the last method to the first, so that a pruner has the last word about what a later one adds.
        """

    def detaches(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Names of the towers through which no gradient passes once this is attached."""
        return ()

    def follow(self, masks: Masks, model: nn.Module) -> None:  # noqa: B027 (few add to weights)
        """Let what it adds to weights keep the zeros of a pruner's masks, which are named by plain paths."""

    def replaces(self) -> tuple[str, ...]:
        """Paths of modules whose output it takes the place of, once it is attached: they get no gradient."""
        return ()

    @property
    def learns(self) -> bool:
        """Whether its preparation trains what it adds."""
        return False

    def told(self) -> str:
        """What it did, in a line for a person; here: its name, and the settings that are not the defaults."""
        usual = asdict(self.Settings())
        own = [f"{k} {v}" for k, v in asdict(self.settings).items() if v != usual[k]]
        return f"{self.name}: {', '.join(own)}" if own else self.name

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.state, self.tensors = state, tensors

    def plain_settings(self) -> dict[str, Any]:
        """Its settings as plain JSON."""
        return json.loads(json.dumps({k: v for k, v in self.describe().items() if k != "name"}))

    def describe(self) -> dict[str, Any]:
        """Name and settings, as they stand in a recipe."""
        return {"name": self.name, **asdict(self.settings)}
