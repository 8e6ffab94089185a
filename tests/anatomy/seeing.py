"""Blocks run alone, as tests of what is seen in them need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Block, Tap, pick, read, rewrite
from trimtab.anatomy.seen.sublayers import SeenBlock, see_sublayers
from trimtab.anatomy.structure import module_at

Called = tuple[tuple, dict]


def calls(model: nn.Module, paths: list[str], batch: dict) -> dict[str, Called]:
    """With what modules are called first in a forward pass, without its key-value cache."""
    found: dict[str, Called] = {}

    def uncached(value: Any) -> Any:
        return None if type(value).__name__.endswith("Cache") else value

    def keep(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            own = (tuple(map(uncached, args)), {k: uncached(v) for k, v in kwargs.items()})
            found.setdefault(path, own)

        return hook

    handles = [module_at(model, p).register_forward_pre_hook(keep(p), with_kwargs=True) for p in paths]
    torch.manual_seed(1)  # transformers' ViLT draws an order of the patches
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def run(
    model: nn.Module, path: str, called: Called, taps: list[Tap] | tuple = (), changes: dict | None = None
) -> tuple[Tensor, dict[Tap, Tensor]]:
    """(the stream that a block returns, tapped values), of the block alone; `changes`: tap -> what becomes of it."""
    seen: dict[Tap, Tensor] = {}
    handles = [rewrite(model, tap, change) for tap, change in (changes or {}).items()]
    handles += [read(model, tap, lambda v, tap=tap: seen.__setitem__(tap, v.clone())) for tap in taps]
    with torch.no_grad():
        out = module_at(model, path)(*called[0], **called[1])
    for handle in handles:
        handle.remove()
    return pick(out, 0), seen


def see(block: nn.Module, *args: Any, stream: str = "x", **kwargs: Any) -> SeenBlock:
    """What is seen of a block that is a model of its own, as its child `block`."""
    model = nn.ModuleDict({"block": block}).eval()
    return see_sublayers(model, Block("block", 0, stream=stream), args, kwargs)


def parts(seen: SeenBlock) -> list[tuple]:
    """(kind, read, write, stream) of the parts of `see`; a path that is read as an input has `>` behind it."""
    named = []
    for part in seen.sublayers:
        read_, write = (tap.path.removeprefix(f"{seen.path}.") for tap in (part.read, part.write))
        named.append((part.kind, read_ + (">" if part.read.side == "input" else ""), write, part.stream))
    return named
