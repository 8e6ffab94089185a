"""Facts that are measured by changing something and looking what moves: which mask hides a token, who sees whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trimtab.anatomy.parts import Block
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.record import Example, hooked, run
from trimtab.anatomy.structure import module_at
from trimtab.anatomy.taps import pick


class Ends(NamedTuple):
    """What went into a tower and came out of it in one pass, (B, L, D)."""

    entry: Tensor
    result: Tensor


def ends(model: nn.Module, example: Example, towers: Mapping[str, Sequence[Link]]) -> dict[str, Ends]:
    """One pass: of each tower what enters its first block and what its last block makes; without what did not run."""
    first, last = ({links[i].path: (name, links[i]) for name, links in towers.items()} for i in (0, -1))
    entries: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}

    def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if path in first and first[path][0] not in entries:
            name, link = first[path]
            block = Block(path, 1, stream=link.name)
            entries[name] = block.stream_of(module, args, kwargs).detach().clone()

    def after(path: str, module: nn.Module, weighs: bool, out: Any) -> None:
        if path in last and last[path][0] not in results:
            name, link = last[path]
            value = element(out, link.where)
            results[name] = value.detach().clone()

    with hooked(model, before, after):
        run(model, example)
    return {name: Ends(entries[name], results[name]) for name in towers if name in entries and name in results}


def element(out: Any, where: tuple) -> Tensor:
    """An element of a module's result."""
    for key in where:
        out = pick(out, key)
    return out


def leaks(model: nn.Module, changed: Example, first: Mapping[str, Ends], towers: Mapping[str, Sequence[Link]]
          ) -> dict[str, bool]:  # fmt: skip
    """One pass: whether other tokens of a tower move when another thing stands at the hidden place.

    Args:
        model: as it is watched.
        changed: the example with a hidden place, and something else there.
        first: of the pass without the change.
        towers: the blocks of each; one that changes the number of its tokens is left out.
    """
    found = {}
    for name, now in ends(model, changed, towers).items():
        before = first.get(name)
        if before is not None and len({x.shape[:-1] for x in (*before, *now)}) == 1:
            own = moved(before.entry, now.entry)
            found[name] = bool((moved(before.result, now.result) & ~own).any())
    return found


def moved(a: Tensor, b: Tensor) -> Tensor:
    """Which tokens of (B, L, D) differ by more than rounding, (B, L)."""
    if a.shape != b.shape:
        return torch.ones(a.shape[:-1], dtype=torch.bool)
    a, b = a.float().nan_to_num(), b.float().nan_to_num()
    scale = max(float(a.abs().amax()), 1e-6)
    return (a - b).abs().amax(-1) > 1e-5 * scale


class Sight(NamedTuple):
    """Who sees whom in a block.

    Attributes:
        back: whether a token sees one that comes after it.
        mixes: whether tokens see each other at all.
        problem: why that could not be seen.
    """

    back: bool = False
    mixes: bool = False
    problem: str = ""


def sight(model: nn.Module, block: Block, link: Link) -> Sight:
    """Run one block again by itself, with another token at one place, and see which tokens move."""
    assert link.call.held is not None
    args, kwargs = link.call.held
    module = module_at(model, block.path)
    stream = block.stream_of(module, args, kwargs)
    again = call(module, args, kwargs, link)
    if again is not None and again.shape[:-1] != stream.shape[:-1]:
        return Sight()  # it makes another number of tokens
    if again is None:
        return Sight(problem="it cannot be run again by itself")
    if bool(moved(again, link.call.result).any()):
        return Sight(problem="it computes differently when it is run again")
    length = stream.shape[-2]
    if length < 4:
        return Sight(
            problem=f"its stream has {length} tokens, by which it cannot be told who sees whom; give 4 or more"
        )
    draw = torch.Generator(device="cpu").manual_seed(0)
    # The latest place decides at which tokens mix at all: of a prefix that sees all of itself the end is causal.
    for place in dict.fromkeys((length - 2, length - 3, 3 * length // 4, length // 2, length // 3, 1)):
        if not 0 < place < length - 1:
            continue
        new = stream.clone()
        noise = torch.randn(stream.shape[-1], generator=draw).to(new) * new.float().std().clamp_min(1e-3).to(new)
        new[..., place, :] += noise
        out = call(module, *block.with_stream(module, args, kwargs, new), link)
        assert out is not None
        where = moved(again, out).reshape(-1, length).any(0)
        if bool(where[:place].any()):
            return Sight(back=True, mixes=True)
        if bool(where[place + 1 :].any()):
            return Sight(back=False, mixes=True)
    return Sight()


def call(module: nn.Module, args: tuple, kwargs: dict, link: Link) -> Tensor | None:
    """What a block makes of its stream, run by itself; None if it does not run so."""
    try:
        with torch.no_grad():
            out = element(module(*_fresh(args), **_fresh(kwargs)), link.where)
    except Exception:
        return None
    return out if isinstance(out, Tensor) else None


def _fresh(given: Any) -> Any:
    """Copies: a block may write into what it is given."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, given)
