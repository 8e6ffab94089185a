"""Facts that are measured by changing something and looking what moves: which mask hides a token, who sees whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trimtab.anatomy.calls import arguments, replaced
from trimtab.anatomy.parts import Block
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.memo import Memo
from trimtab.anatomy.seen.provenance import Node, until
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


def moved(a: Tensor, b: Tensor, rounding: float = 1e-5) -> Tensor:
    """Which tokens of (B, L, D) differ by more than rounding, (B, L)."""
    if a.shape != b.shape:
        return torch.ones(a.shape[:-1], dtype=torch.bool)
    a, b = a.float().nan_to_num(), b.float().nan_to_num()
    scale = max(float(a.abs().amax()), 1e-6)
    return (a - b).abs().amax(-1) > rounding * scale


class Sight(NamedTuple):
    """Who sees whom in a block, which was run again with another token at some places.

    Attributes:
        places: of the tokens that were changed.
        moves: whether token i of a row moves when the one at a place is changed, (B, L, places).
        stirs: the same, by however little.
        rows: the last row that moves when the first one is changed; 0 if no other does.
        problem: why that could not be seen.
    """

    places: tuple[int, ...] = ()
    moves: Tensor = torch.zeros(0)
    stirs: Tensor = torch.zeros(0)
    rows: int = 0
    problem: str = ""

    @property
    def mixes(self) -> bool:
        """Whether tokens see each other at all."""
        return self.moves.ndim == 3 and bool(others(self).any())

    @property
    def clear(self) -> bool:
        """Whether a token that is seen moves others by more than rounding: then one that moves none is not seen.

        With very small weights what is seen may be lost in the sum with the stream.
        """
        return self.mixes and int(self.moves.sum()) >= 0.9 * int(self.stirs.sum())


def others(sight: Sight) -> Tensor:
    """`moves`, without what a token does to itself."""
    own = torch.arange(sight.moves.shape[1])[:, None] == torch.tensor(sight.places)
    return sight.moves & ~own


MANY = 32  # tokens, up to which each is changed; of more some, in pairs of neighbours


def sight(model: nn.Module, block: Block, link: Link, memo: Memo, settled: Node | None = None) -> Sight:
    """Run one block again by itself, with another token at one place, and see which tokens move.

    Args:
        model: of the block.
        block: which.
        link: the block as it ran.
        memo: of the block, on all its rows.
        settled: the value after which its tokens do not mix, if that is known.
    """
    assert link.call.held is not None
    args, kwargs = link.call.held
    module = module_at(model, block.path)
    stream = block.stream_of(module, args, kwargs)
    with memo:
        again = call(module, args, kwargs, link)
    if again is not None and again.shape[:-1] != stream.shape[:-1]:
        return Sight()  # it makes another number of tokens
    if again is None:
        return Sight(problem="it cannot be run again by itself")
    if not bool(again.isfinite().all(-1).any()):
        return Sight(problem="what it makes of the example is no number (NaN or infinite); give an example of numbers")
    if bool(moved(again, link.call.result).any()):
        return Sight(problem="it computes differently when it is run again")
    return look(module, block, link, args, kwargs, again, memo, settled)


def look(module: nn.Module, block: Block, link: Link, args: tuple, kwargs: dict, again: Tensor, memo: Memo,
         settled: Node | None = None) -> Sight:  # fmt: skip
    """As `sight`, of a call of a block that made `again`, (B, L, D)."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    stream = block.stream_of(module, args, kwargs)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape[-1], generator=draw).to(like) * like.float().std().clamp_min(1e-3).to(like)

    def changed(new: Tensor) -> Tensor:
        with memo:
            out = call(module, *block.with_stream(module, args, kwargs, new), link)
        return again if out is None else out

    def early(new: Tensor) -> Tensor | None:
        with memo:
            return None if settled is None else until(module, *block.with_stream(module, args, kwargs, new), settled)

    last, length = 0, stream.shape[-2]
    if stream.ndim > 2 and len(stream) > 1:
        new = stream.clone()
        new[0] += noise(stream)
        rounding = max(1e-5, 8 * torch.finfo(again.dtype).eps)  # experts multiply other rows' tokens together
        last = max(moved(again, changed(new), rounding).flatten(1).any(1).nonzero().flatten().tolist(), default=0)
    why = f"its stream has {length} tokens, by which it cannot be told who sees whom; give 4 or more"
    some = (0, 1, 2, length // 3, length // 3 + 1, length // 2, length // 2 + 1, 3 * length // 4)
    places = tuple(range(length)) if length <= MANY else (*dict.fromkeys((*some, length - 3, length - 2, length - 1)),)
    before = early(stream)
    if before is not None and before.shape != stream.shape:
        before = None
    moves: list[Tensor] = []
    stirs: list[Tensor] = []
    for place in places:
        new = stream.clone()
        new[..., place, :] += noise(stream)
        now = None if before is None else early(new)
        seen = None if before is None or now is None else _which(before, now, length)
        if seen is None or not moves:
            whole = _which(again, changed(new), length)
            if seen is not None and not all(map(torch.equal, seen, whole)):  # what follows says something else
                before = None
            seen = whole
        moves.append(seen[0])
        stirs.append(seen[1])
    return Sight(places, torch.stack(moves, -1).cpu(), torch.stack(stirs, -1).cpu(), last, why if length < 4 else "")


def _which(before: Tensor, now: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`moves` and `stirs` of one change, (B, L) each."""
    return moved(before, now).reshape(-1, length), moved(before, now, 0.0).reshape(-1, length)


def rows_apart(model: nn.Module, links: Sequence[Link], sights: Sequence[Sight]) -> bool:
    """Whether the first axis of a stream (N, N, D) is that of samples: no row sees another one, and the tokens of a row
    see each other, or go with the same row of what their block reads beside them, (N, M, C)."""
    if not sights or any(s.rows or s.moves.ndim != 3 for s in sights):
        return False
    return any(s.mixes for s in sights) or any(_goes_with_row(model, link) for link in links)


def _goes_with_row(model: nn.Module, link: Link) -> bool:
    """Whether all tokens of the first row move, and no other, when the first row of another argument is changed."""
    assert link.call.held is not None
    args, kwargs = link.call.held
    module, block = module_at(model, link.path), Block(link.path, 1, stream=link.name)
    stream, plain = block.stream_of(module, args, kwargs), call(module, args, kwargs, link)
    for name, value in arguments(module, args, kwargs).items():
        other = isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point() and name != link.name
        if plain is None or not other or len(value) != len(stream) or value.shape[1] == len(stream):
            continue
        new = value.clone()
        new[0] = new[0].flip(-1) + 0.5
        out = call(module, *replaced(module, args, kwargs, name, new), link)
        where = None if out is None else moved(plain, out)
        if where is not None and bool(where[0].all()) and not bool(where[1:].any()):
            return True
    return False


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
