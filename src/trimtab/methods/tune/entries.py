"""Calls of modules as they were watched, and which of them are outermost."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from trimtab.methods.tune.leaves import Call, Key, Leaf

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass
class Entry:
    """A call of a module that was watched."""

    key: Key
    outside: list[int]
    trains: bool
    parts: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    prints: tuple = ()
    grad: bool = False


def sources(memory: Tensor, made: Mapping[Key, Any]) -> tuple[Key, ...]:
    """Which results of side networks a memory is, one behind the other; none if it is something else."""
    for name in dict.fromkeys(key[0] for key in made):
        found = {key: out for key, out in made.items() if key[0] == name}
        for key, out in found.items():
            if out is memory:
                return (key,)
        if all(o.ndim == memory.ndim for o in found.values()):
            whole = torch.cat(list(found.values()), dim=1)
            if whole.shape == memory.shape and torch.equal(whole, memory):
                return tuple(found)
    return ()


def without_values(found: tuple[list[Any], TreeSpec], entry: Entry) -> tuple[list[Any], TreeSpec | None]:
    """The parts of a result, whose values are noted as prints."""
    parts, spec = found
    tensors = [p[1] for p in parts if isinstance(p, tuple) and isinstance(p[0], Leaf)]
    entry.grad = any(t.requires_grad for t in tensors)
    bare = [p[0] if isinstance(p, tuple) and isinstance(p[0], Leaf) else p for p in parts]
    if not all(isinstance(p, (Leaf, *_PLAIN)) for p in bare):
        return [], None
    if not entry.grad and not entry.trains:
        entry.prints = (*map(print_of, tensors), *(repr(p) for p in bare if not isinstance(p, Leaf)))
    return bare, spec


def print_of(tensor: Tensor) -> tuple:
    """What tells a tensor from another."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(raw.data)


def outermost(watched: Mapping[Key, Entry], stay: set[Key]) -> dict[Key, Call]:
    """The calls that stay and are in no other such call."""
    order = list(watched.values())
    inside: dict[Key, Counter[str]] = {}
    for entry in order:
        outer = next((order[i].key for i in entry.outside if order[i].key in stay), None)
        if outer is not None:
            inside[outer][entry.key[0]] += 1
        elif entry.key in stay:
            inside[entry.key] = Counter()
    paths = {path for path, _ in inside}
    calls = {}
    for key, below in inside.items():
        entry = watched[key]
        assert entry.spec is not None
        calls[key] = Call(key, entry.spec, tuple(entry.parts), Counter({p: n for p, n in below.items() if p in paths}))
    return calls
