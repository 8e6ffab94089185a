"""A side network at its tower: what it is shown of a forward pass, and where its result goes.

A `Listener` collects a tower's hidden maps during a forward pass, without gradients, and puts what the side network
makes of them in the place of what the tower hands on. It works from hooks, so that no model's code is touched, and
keeps nothing when the pass is over. Its hooks are bound methods: `copy.deepcopy` of the model copies the listener and
its side network with it, and the copy computes with its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from trimtab.anatomy import AnatomyError, Tap, Tower, pre_hook, read, rewrite
from trimtab.anatomy.structure import module_at, under
from trimtab.methods.tune.past import Past, growing, length
from trimtab.methods.tune.results import Results


@dataclass
class Seen:
    """What a side network gets to see of one forward pass.

    Attributes:
        maps: the chosen hidden maps in the order of computation, (B, L, D) or (B, C, H, W), as the tower made them. L
            and D are each map's own where the stages of a tower differ.
        mask: valid tokens as numbers 0 and 1, (B, L), or None if all are valid.
        value: what the tower was about to hand on, without gradient.
        position: (B,) of the token from which the tower's vector is read, None for the first.
        memory: what another side network made for this one to read, (B, M, d).
        memory_mask: its valid tokens, (B, M).
        past: what the side network has kept of earlier tokens, and keeps these in; the mask is then of all tokens. None
            without a key-value cache.
    """

    maps: list[Tensor]
    mask: Tensor | None
    value: Tensor
    position: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    past: Past | None = None

    def take(self) -> Iterator[Tensor]:
        """The maps in their order; the list lets go of each, so that one of which a copy is kept is freed at once."""
        self.maps.reverse()
        while self.maps:
            yield self.maps.pop()


@dataclass
class _Pass:
    """What a listener has seen of the pass that is under way.

    Attributes:
        shape: of the stream, as the last block that ran put it out; None before the first.
        found: hidden maps by number.
        given: tensors with which the first block was called, of a tower that reads another.
        past: of the side network, if the tower works with a cache that it can go on from.
    """

    shape: torch.Size | None = None
    found: dict[int, Tensor] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)
    past: Past | None = None


@dataclass(eq=False)
class Listener:
    """Hooks on one tower of a model; see the module's text.

    Attributes:
        method: name, for error messages.
        tower: to which it listens.
        side: the side network: `side(seen)` makes a new value from what was seen.
        maps: which hidden maps are kept: 0 is what enters the first block, i what block i puts out.
        place: where the value is put, an output; None keeps the result for other listeners.
        memory: the listener of another tower whose result this one reads.
        starts: how many blocks stand before each that may begin a stage of another number and width of tokens.
    """

    method: str
    tower: Tower
    side: nn.Module
    maps: Sequence[int]
    place: Tap | None
    memory: Listener | None = None
    starts: frozenset[int] = frozenset()
    handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = _Pass()
        self.mask: Tensor | None = None
        self.mask_seen = False
        self.results = Results(self.method, self.tower.name)
        self.handed: weakref.ref[Tensor] | None = None  # what the last block put out
        self.source: Callable[[], Seen] | None = None  # what the side network is shown, in place of what a pass shows

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to a pass."""
        return {**vars(self), "now": _Pass(), "mask": None, "mask_seen": False, "handed": None, "source": None}

    @property
    def goes_on(self) -> bool:
        """Whether the side network can go on from a key-value cache."""
        return self.tower.causal and self.place is not None and getattr(self.side, "goes_on", False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the side network."""
        return next(self.side.parameters()).dtype

    def attach(self, model: nn.Module) -> None:
        """Set the hooks.

        Raises:
            AnatomyError: if two blocks are one module: its calls cannot be told apart.
        """
        tower = self.tower
        check_blocks(self.method, model, tower)
        self.handles.append(pre_hook(model, tower.blocks[0].path, self._enter))
        for i, block in enumerate(tower.blocks[: max(self.maps)], 1):
            self.handles.append(read(model, Tap(block.path), partial(self._next, i)))
        if tower.mask is not None:
            self.handles.append(read(model, tower.mask, self._masked))
        if self.place is None:
            self.handles.append(read(model, tower.output, self._keep))
            around = _around(model, tower)
            self.results.around = bool(around)
            for i, module in enumerate(around, 1):
                self.handles.append(module.register_forward_hook(partial(self.results.also, i == len(around))))
            self.handles.append(model.register_forward_pre_hook(self.results.begin))
            self.handles.append(model.register_forward_hook(self.results.end, always_call=True))
        else:
            self.handles.append(rewrite(model, self.place, self._replace))
        self.handles.append(read(model, Tap(tower.blocks[-1].path), self._hand))

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the first block: a pass begins. No graph goes through a tower that a side network reads, also where
        its input has one (transformers sets `requires_grad` on embeddings for gradient checkpointing)."""
        if self.source is not None:
            return None
        block, past = self.tower.blocks[0], self._past(args, kwargs)
        stream = block.stream_of(module, args, kwargs)
        if self.handed is not None and self.handed() is stream:
            raise AnatomyError(
                f"{self.method}: block '{block.path}' takes in what '{self.tower.blocks[-1].path}' put out: tower "
                f"{self.tower.name!r} runs several times on its own result, and a side network reads one run; tune it "
                "with adapters, lora or prompts"
            )
        told = 0 in self.maps or 0 not in self.starts  # else the width of what enters is not described, and not read
        if self.tower.layout == "tokens" and told and stream.shape[-1] != block.width:
            raise AnatomyError(
                f"{self.method}: block '{block.path}' takes in {tuple(stream.shape)}, expected the width "
                f"{block.width}, as tower {self.tower.name!r} is described: correct the `width` of its blocks"
            )
        self.now = _Pass(stream.shape, past=past)
        if 0 in self.maps:
            self.now.found[0] = stream.detach()
        if self.memory is not None:
            self.now.given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        return block.with_stream(module, args, kwargs, stream.detach()) if stream.requires_grad else None

    def _past(self, args: tuple, kwargs: dict) -> Past | None:
        """Of a pass with a cache: what the side network has kept of earlier tokens, None if it keeps nothing.

        Raises:
            AnatomyError: if the cache holds tokens that the side network has not kept.
        """
        cache = growing(args, kwargs) if self.goes_on and not torch.is_grad_enabled() else None
        past = None if cache is None else Past(cache, f"{self.method}: {self.tower.name}")
        if not holds_tokens(args, kwargs):
            return past
        if past is not None and past.tokens == (length(cache) or past.tokens) > 0:
            return past
        path = self.tower.blocks[0].path
        if past is None:
            raise AnatomyError(
                f"{self.method}: block '{path}' was called with the newest token alone, and the side network reads "
                "all: use no key-value cache in generation (use_cache=False)"
            )
        raise AnatomyError(
            f"{self.method}: block '{path}' was called with a key-value cache of {length(cache)} tokens, of which the "
            f"side network has kept {past.tokens}: fill the cache without gradients and with the side network in "
            "place, or use none (use_cache=False)"
        )

    def _next(self, index: int, value: Tensor) -> None:
        tower, block, shape = self.tower, self.tower.blocks[index - 1], self.now.shape
        if self.source is not None:
            return
        if shape is None:
            raise AnatomyError(
                f"{self.method}: block '{block.path}' ran before the first block of tower {tower.name!r}, "
                f"'{tower.blocks[0].path}': correct the order of its blocks"
            )
        if not isinstance(value, Tensor):
            raise AnatomyError(
                f"{self.method}: block '{block.path}' put out a {type(value).__name__}, expected its stream, a tensor: "
                f"describe other modules as the blocks of tower {tower.name!r}"
            )
        if tower.layout != "tokens":
            wrong, expected = value.ndim != 4 or value.shape[1] != block.width, f"(B, {block.width}, H, W)"
        elif index - 1 in self.starts:
            wrong = value.ndim != 3 or len(value) != shape[0] or value.shape[-1] != block.width
            expected = f"({shape[0]}, L, {block.width}), as its tower {tower.name!r} is described"
        else:
            wrong, expected = value.shape != shape, f"{tuple(shape)}, which its tower {tower.name!r} takes in"
        if wrong:
            raise AnatomyError(f"{self.method}: block '{block.path}' put out {tuple(value.shape)}, expected {expected}")
        self.now.shape = value.shape
        if index in self.maps:
            self.now.found[index] = value.detach()

    def _hand(self, value: Any) -> None:
        """After the last block. Compiled code has no use for the reference, which it could not keep."""
        if isinstance(value, Tensor) and self.source is None and not torch.compiler.is_compiling():
            self.handed = weakref.ref(value)

    def _masked(self, mask: Tensor | None) -> None:
        self.mask, self.mask_seen = mask, self.source is None

    def _seen(self, value: Tensor) -> Seen:
        if self.source is not None:
            return self.source()
        tower, last = self.tower, self.tower.blocks[-1].path
        now, self.now = self.now, _Pass()  # nothing of this pass outlives it
        lost = [i for i in self.maps if i not in now.found]
        if lost:
            path = tower.blocks[max(lost[0] - 1, 0)].path
            raise AnatomyError(f"{self.method}: '{path}' of tower {tower.name!r} did not run before its result was due")
        chosen = [now.found[i] for i in self.maps]
        lengths = sorted({m.shape[1] for m in chosen}) if tower.layout == "tokens" else []
        if tower.mask is not None and len(lengths) > 1:
            raise AnatomyError(
                f"{self.method}: the maps of tower {tower.name!r} have {lengths} tokens, and its mask is of one "
                "number: name maps of one number in `layers`, or another tower in `towers`"
            )
        rows, tokens = chosen[-1].shape[:2]
        before = 0 if now.past is None else now.past.tokens
        out = Seen(chosen, self._valid((rows, before + tokens)), value.detach().to(self.dtype), past=now.past)
        if tower.pooled_token == "last":
            out.position = _last(out.mask, chosen[-1])
        if self.memory is not None:
            out.memory, out.memory_mask = self.memory.results.take(last, len(chosen[0]), now.given, self.memory.side)
        return out

    def _valid(self, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of this pass, for tokens (B, L), as numbers."""
        tower, last = self.tower, self.tower.blocks[-1].path
        mask, seen, self.mask, self.mask_seen = self.mask, self.mask_seen, None, False
        if tower.mask is not None and not seen:
            raise AnatomyError(
                f"{self.method}: block '{last}' has run, but the mask of its tower {tower.name!r} was not seen: it is "
                f"described at '{tower.mask.path}' ({tower.mask.side} {tower.mask.key!r}), which was not called"
            )
        if isinstance(mask, Tensor) and tower.mask is not None:
            mask = tower.mask.whole(mask, shape[1])
        found = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        if mask is not None and found != shape:
            raise AnatomyError(
                f"{self.method}: block '{last}' works on (B, L) = {shape}, but the mask of its tower {tower.name!r} is "
                f"{found}; give a mask of all tokens, and use no key-value cache in generation "
                "(use_cache=False)"
            )
        return None if mask is None else (mask != 0).to(self.dtype)

    def _replace(self, value: Tensor) -> Tensor:
        return self.side(self._seen(value)).to(value.dtype)

    def _keep(self, value: Tensor) -> None:
        seen = self._seen(value)
        mask = seen.mask
        self.results.keep(value, self.side(seen), mask, self.side)


def _around(model: nn.Module, tower: Tower) -> list[nn.Module]:
    """The modules that hold a tower's output and nothing that is not the tower's, from the innermost."""
    names = tower.output.path.split(".")
    paths = [".".join(names[:i]) for i in range(len(names) - 1, 0, -1)]
    found = [module_at(model, path) for path in paths if under(path, tower.scope)]
    return [module for module in found if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]  # never called


def check_blocks(method: str, model: nn.Module, tower: Tower) -> None:
    """AnatomyError if two of a tower's blocks are one module."""
    paths: dict[int, str] = {}
    for block in tower.blocks:
        module = module_at(model, block.path)
        if id(module) in paths:
            raise AnatomyError(
                f"{method}: blocks '{paths[id(module)]}' and '{block.path}' of tower {tower.name!r} are one module, "
                "whose runs hooks cannot tell apart: tune the tower with lora"
            )
        paths[id(module)] = block.path


def holds_tokens(args: tuple, kwargs: dict) -> bool:
    """Whether a block is called with a key-value cache that holds tokens already, in whatever place it takes one."""
    caches = [v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")]
    return any(_began(cache) for cache in caches)


def _began(cache: Any) -> bool:
    """Whether a cache holds anything; one of recurrent layers alone (Mamba) has a state and counts no tokens."""
    try:
        return bool(cache.get_seq_length())
    except ValueError:
        return bool(cache.has_previous_state())


def _last(valid: Tensor | None, tokens: Tensor) -> Tensor:
    """Position of the last valid token of each sample, (B,)."""
    if valid is None:
        return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    return (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).argmax(dim=1)
