"""What methods share that train a network beside a frozen tower (UniPT, LST, SHERL, Side-Tuning).

A `Listener` collects a tower's hidden maps during a forward pass, without gradients, and puts what the side network
makes of them in the place of what the tower hands on. It works from hooks, so that no model's code is touched, and
keeps nothing when the pass is over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.anatomy import Anatomy, AnatomyError, Tap, Tower, read, rewrite
from trimtab.methods.base import Method, beside


@dataclass
class Seen:
    """What a side network gets to see of one forward pass.

    Attributes:
        maps: the chosen hidden maps in the order of computation, (B, L, D) or (B, C, H, W), as the tower made them.
        mask: valid tokens as numbers 0 and 1, (B, L), or None if all are valid.
        value: what the tower was about to hand on, without gradient.
        position: (B,) of the token from which the tower's vector is read, None for the first.
        memory: what another side network made for this one to read, (B, M, d).
        memory_mask: its valid tokens, (B, M).
    """

    maps: list[Tensor]
    mask: Tensor | None
    value: Tensor
    position: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None


@dataclass
class Listener:
    """Hooks on one tower of a model; see the module's text.

    Attributes:
        method: name, for error messages.
        tower: to which it listens.
        maps: which hidden maps are kept: 0 is what enters the first block, i what block i puts out.
        compute: makes a new value from what was seen.
        place: where the value is put, an output; None keeps the result for `readers`.
        dtype: of the side network.
        memory: the listener of another tower whose result this one reads.
        readers: how many others read the result of this one.
    """

    method: str
    tower: Tower
    maps: Sequence[int]
    compute: Callable[[Seen], Tensor]
    place: Tap | None
    dtype: torch.dtype
    memory: Listener | None = None
    readers: int = 0
    handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self.shape: torch.Size | None = None
        self.mask: Tensor | None = None
        self.mask_seen = False
        self.result: Tensor | None = None
        self.taken = 0
        self.result_mask: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Set the hooks."""
        tower = self.tower
        self.handles.append(read(model, Tap(tower.blocks[0].path, "input", 0), self._first))
        for i, block in enumerate(tower.blocks[: max(self.maps)]):
            self.handles.append(read(model, Tap(block.path), lambda value, i=i: self._next(i + 1, value)))
        if tower.mask is not None:
            self.handles.append(read(model, tower.mask, self._masked))
        if tower.causal:
            first = model.get_submodule(tower.blocks[0].path)
            self.handles.append(first.register_forward_pre_hook(self._cached, with_kwargs=True))
        if self.place is None:
            self.handles.append(read(model, tower.output, self._keep))
        else:
            self.handles.append(rewrite(model, self.place, self._replace))

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _cached(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if holds_tokens(kwargs):
            raise AnatomyError(
                f"{self.method}: block '{self.tower.blocks[0].path}' was called with the newest token alone, and the "
                "side network reads all: use no key-value cache in generation"
            )

    def _first(self, value: Tensor) -> None:
        self.found, self.shape = {}, value.shape
        if 0 in self.maps:
            self.found[0] = value.detach()

    def _next(self, index: int, value: Tensor) -> None:
        tower, block = self.tower, self.tower.blocks[index - 1]
        if self.shape is None:
            raise AnatomyError(
                f"{self.method}: block '{block.path}' ran before the first block of tower {tower.name!r}, "
                f"'{tower.blocks[0].path}': correct the order of its blocks"
            )
        tokens = tower.layout == "tokens"
        wrong = value.shape != self.shape if tokens else value.ndim != 4 or value.shape[1] != block.width
        if wrong:
            expected = f"{tuple(self.shape)}, which its tower {tower.name!r} takes in"
            raise AnatomyError(
                f"{self.method}: block '{block.path}' put out {tuple(value.shape)}, expected "
                f"{expected if tokens else f'(B, {block.width}, H, W)'}"
            )
        if index in self.maps:
            self.found[index] = value.detach()

    def _masked(self, mask: Tensor | None) -> None:
        self.mask, self.mask_seen = mask, True

    def _seen(self, value: Tensor) -> Seen:
        tower, last = self.tower, self.tower.blocks[-1].path
        maps, self.found, self.shape = self.found, {}, None  # nothing of this pass outlives it
        mask, mask_seen, self.mask, self.mask_seen = self.mask, self.mask_seen, None, False
        lost = [i for i in self.maps if i not in maps]
        if lost:
            path = tower.blocks[max(lost[0] - 1, 0)].path
            raise AnatomyError(f"{self.method}: '{path}' of tower {tower.name!r} did not run before its result was due")
        chosen = [maps[i] for i in self.maps]
        shape = tuple(chosen[0].shape[:2])
        if tower.mask is not None and not mask_seen:
            raise AnatomyError(
                f"{self.method}: block '{last}' has run, but the mask of its tower {tower.name!r} was not seen: it is "
                f"described at '{tower.mask.path}' ({tower.mask.side} {tower.mask.key!r}), which was not called"
            )
        if mask is not None and tuple(mask.shape) != shape:
            raise AnatomyError(
                f"{self.method}: block '{last}' works on (B, L) = {shape}, but the mask of its tower {tower.name!r} is "
                f"{tuple(mask.shape)}; give a mask of all tokens, and use no key-value cache in generation"
            )
        valid = None if mask is None else (mask != 0).to(self.dtype)
        out = Seen(chosen, valid, value.detach().to(self.dtype))
        if tower.pooled_token == "last":
            out.position = _last(valid, chosen[0])
        if self.memory is not None:
            out.memory, out.memory_mask = self.memory.take(last)
        return out

    def _replace(self, value: Tensor) -> Tensor:
        return self.compute(self._seen(value)).to(value.dtype)

    def _keep(self, value: Tensor) -> None:
        seen = self._seen(value)
        self.result, self.result_mask, self.taken = self.compute(seen), seen.mask, 0

    def take(self, reader: str) -> tuple[Tensor, Tensor | None]:
        """The kept result; a graph goes with it, so that it is not held longer than until the last reader has it."""
        result = self.result
        self.taken += 1
        if result is None:
            raise AnatomyError(
                f"{self.method}: block '{reader}' reads tower {self.tower.name!r}, which has not run yet"
            )
        if result.requires_grad and self.taken >= self.readers:
            self.result = None
        return result, self.result_mask


def holds_tokens(kwargs: dict) -> bool:
    """Whether a block is called with a key-value cache that holds tokens already."""
    cache = kwargs.get("past_key_values")
    return cache is not None and bool(cache.get_seq_length())


def _last(valid: Tensor | None, tokens: Tensor) -> Tensor:
    """Position of the last valid token of each sample, (B,)."""
    if valid is None:
        return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(dim=1)


class Beside(Method):
    """A method that sets side networks beside towers; the model keeps them as `model.<name>.<tower>`."""

    lever = "tune"
    trains = "added"
    changes = "beside"
    keeps = "its side networks stand beside the model, where the model's own class has no place for them"
    mixes_tokens = True

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        names = self.settings.towers or self.towers(anatomy)
        self._check_read(anatomy, names)
        self.listeners: dict[str, Listener] = {}
        sides = nn.ModuleDict({name: self.side(model, anatomy, anatomy.tower(name)) for name in names})
        beside(sides, next(model.parameters()))
        for name in names:
            self.listeners[name] = self.listen(model, anatomy.tower(name), sides[name])
            self.listeners[name].attach(model)
        model.add_module(self.name.replace("-", "_"), sides)
        model.eval()
        return anatomy

    def detaches(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(self.settings.towers or self.towers(anatomy))

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The towers that get a side network if the settings name none: those that no other tower reads, since nothing
        is back-propagated through the reader. Paired towers, which read each other, both get one."""
        return tuple(t.name for t in anatomy.towers if not anatomy.readers(t.name))

    def _check_read(self, anatomy: Anatomy, names: Sequence[str]) -> None:
        """ValueError if a tower is named with one whose stream its output becomes: it would get no gradient."""
        for name in names:
            readers = {t.name for t in anatomy.towers if name in t.reads}
            later = readers | {t.name for t in anatomy.towers if t.memory in readers}
            if found := sorted(later & set(names) - {name}):
                raise ValueError(
                    f"{self.name}: tower {found[0]!r} reads tower {name!r}, and nothing is back-propagated through it: "
                    f"name one of the two in `towers`"
                )

    def sides(self, model: nn.Module) -> nn.ModuleDict:
        """The side networks that are attached to a model, by tower."""
        return model.get_submodule(self.name.replace("-", "_"))  # type: ignore[return-value]

    def detach(self, model: nn.Module) -> None:
        """Take the side networks away; the model computes what it did before."""
        for listener in self.listeners.values():
            listener.detach()
        delattr(model, self.name.replace("-", "_"))

    @abstractmethod
    def side(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> nn.Module:
        """The side network of a tower; ValueError if the method does not apply to it."""

    @abstractmethod
    def listen(self, model: nn.Module, tower: Tower, side: nn.Module) -> Listener:
        """How it is set beside the tower."""


def token_width(method: str, tower: Tower) -> int:
    """Width of a tower of tokens; ValueError if it is no such tower."""
    widths = {b.width for b in tower.blocks}
    if tower.layout != "tokens" or len(widths) > 1:
        raise ValueError(
            f"{method}: tower {tower.name!r} is a {tower.layout} tower of widths {sorted(widths)}; it needs tokens of "
            "one width: name other towers in `towers`"
        )
    if tower.samples is not None:
        raise ValueError(
            f"{method}: the stream of tower {tower.name!r} does not begin with the samples, (B, L, D): name other "
            "towers in `towers`"
        )
    return widths.pop()
