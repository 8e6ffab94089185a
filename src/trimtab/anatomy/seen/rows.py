"""Fewer rows: what a block or a model does to one row it does to every row that is given the same.

Nothing is taken for granted: run on some of its rows alone, a block must make of them what it made of them among all.
The first and the last row are always there and some between are not, so that rows which see each other would show.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from trimtab.anatomy.calls import arguments
from trimtab.anatomy.parts import Block
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.inputs import Hidden
from trimtab.anatomy.seen.memo import Memo
from trimtab.anatomy.seen.probe import Ends, Sight, call, leaks, look, moved, sight
from trimtab.anatomy.seen.provenance import Node
from trimtab.anatomy.seen.record import Example, rows_of
from trimtab.anatomy.seen.sublayers import SeenBlock, see_sublayers
from trimtab.anatomy.seen.towers import copied, held_stream
from trimtab.anatomy.structure import AnatomyError, module_at


class Few(NamedTuple):
    """A call of a block on some of its rows.

    Attributes:
        args: by position.
        kwargs: and by keyword.
        made: what the block makes of its stream, (rows, ...).
    """

    args: tuple
    kwargs: dict
    made: Tensor


def alike(link: Link, contents: Collection[str] = ()) -> tuple[int, ...]:
    """Of each row of a block's stream another that is given the same beside it; of all rows as few as can be.

    Args:
        link: the block as it ran.
        contents: names of arguments that tokens are read from. These and the stream may differ from row to row, but
            for where they hold nothing (0) or no number.

    Returns:
        As many numbers as there are rows; the first and the last row stand for themselves. Empty where fewer rows
        would not do, or where it cannot be told what a row is given.
    """
    stream = held_stream(link)
    if stream is None or stream.ndim < 3 or len(stream) < 3 or not _told(link.call.held, len(stream)):
        return ()
    count = len(stream)
    given: list[list[bytes]] = [[] for _ in range(count)]
    for name, value in _named(link):
        for tensor in tree_leaves(value):
            if _by_row(tensor, count):
                read = name in contents or name == link.name
                for row, seen in zip(given, _bytes(_holes(tensor) if read else tensor), strict=True):
                    row.append(seen)
    keys = [tuple(row) for row in given]
    chosen = {key: i for i, key in enumerate(keys) if i in (0, count - 1)}
    found = tuple(count - 1 if i == count - 1 else 0 if i == 0 else chosen.setdefault(k, i) for i, k in enumerate(keys))
    return found if len(set(found)) < count else ()


class Rows:
    """Looks at the blocks of a model, on few of their rows where these tell as much."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._known: dict[tuple, Few | None] = {}
        self._memos: dict[tuple, Memo] = {}
        self._settled: dict[str, Node | None] = {}

    def sight(self, block: Block, link: Link, contents: Collection[str]) -> Sight:
        """As `sight`, of rows that are given the same in one of them; `contents` as in `alike`."""
        like = alike(link, contents)
        rows = tuple(sorted(set(like)))
        some = self._few(block, link, rows) if like else None
        stream = held_stream(link)
        if some is None or stream is None or some.made.shape[:-1] != (len(rows), *stream.shape[1:-1]):
            return self._sight(block, link)
        if not bool(some.made.isfinite().all(-1).any()):  # there may be numbers in another row
            return self._sight(block, link)
        seen = look(module_at(self.model, block.path), block, link, *some, self._memo(block, rows),
                    self._settled.get(block.path))  # fmt: skip
        near = int(seen.moves.sum()) < 0.95 * int(seen.stirs.sum())  # `clear`, which other rows may decide
        if near or seen.rows:  # or rows see each other: which do, all of them tell
            return self._sight(block, link)
        places = [rows.index(row) for row in like]
        moves, stirs = (_spread(m, places, len(rows)) for m in (seen.moves, seen.stirs))
        return seen._replace(moves=moves, stirs=stirs)

    def parts(self, block: Block, link: Link, memory: set[str]) -> SeenBlock:
        """As `see_sublayers`, of two rows; of all where those do not tell everything."""
        seen = self._parts(block, link, memory)
        self._settled[block.path] = seen.settled
        return seen

    def _parts(self, block: Block, link: Link, memory: set[str]) -> SeenBlock:
        assert link.call.held is not None
        stream = held_stream(link)
        if stream is not None and stream.ndim > 2 and len(stream) > 2:
            rows = (0, len(stream) - 1)
            some = self._few(block, link, rows)
            if some is not None:
                with suppress(AnatomyError):
                    seen = see_sublayers(self.model, block, some.args, some.kwargs, memory, self._memo(block, rows))
                    if seen.complete or seen.layout == "grid":
                        return seen
        return see_sublayers(self.model, block, *copied(link.call.held), memory, self._memo(block))

    def _sight(self, block: Block, link: Link) -> Sight:
        """Of all rows."""
        return sight(self.model, block, link, self._memo(block), self._settled.get(block.path))

    def _memo(self, block: Block, rows: tuple[int, ...] = ()) -> Memo:
        """What a block has computed on some rows, or on all."""
        if (block.path, rows) not in self._memos:
            self._memos[block.path, rows] = Memo(module_at(self.model, block.path))
        return self._memos[block.path, rows]

    def _few(self, block: Block, link: Link, rows: tuple[int, ...]) -> Few | None:
        """A block run on some of its rows; None if it does not make of them what it made of them among all.

        Also where their number is that of something else, which would then look like an axis of rows.
        """
        if (block.path, rows) not in self._known:
            self._known[block.path, rows] = self._run(block, link, rows)
        return self._known[block.path, rows]

    def _run(self, block: Block, link: Link, rows: tuple[int, ...]) -> Few | None:
        stream, count = held_stream(link), len(rows)
        tensors = [t for t in tree_leaves(link.call.held) if isinstance(t, Tensor) and t.ndim]
        if stream is None or link.call.held is None or not _told(link.call.held, len(stream)):
            return None
        if count in stream.shape[1:] or any(len(t) == count for t in tensors):
            return None
        length, chosen = len(stream), list(rows)
        args, kwargs = tree_map(lambda v: v[chosen] if _by_row(v, length) else v, link.call.held)
        with self._memo(block, rows):
            made = call(module_at(self.model, block.path), args, kwargs, link)
        among: Any = link.call.result
        if made is None or len(among) != length or made.shape != among[chosen].shape:
            return None
        return None if bool(moved(among[chosen], made).any()) else Few(args, kwargs, made)


def _spread(moves: Tensor, places: list[int], rows: int) -> Tensor:
    """What was seen in some rows for all of them; a row may have several of tokens, as a map has."""
    return moves.unflatten(0, (rows, -1))[places].flatten(0, 1) if moves.ndim == 3 else moves


def leaks_of(model: nn.Module, hidden: Hidden, changed: Example, first: dict[str, Ends],
             towers: dict[str, list[Link]]) -> dict[str, bool]:  # fmt: skip
    """As `leaks`, on two rows if these tell that nothing is seen, else on all; nothing of a model that refuses both."""
    if rows := _two(hidden, changed):
        length = rows_of(changed)
        some = {k: v for k, e in first.items() if (v := _ends(e, rows, length)) is not None}
        whole = {k for k, e in first.items() if e.entry.shape[:-1] == e.result.shape[:-1]}
        cut = tree_map(lambda v: v[rows] if _by_row(v, length) else v, dict(changed))
        try:
            found = leaks(model, cut, some, towers)
        except AnatomyError:
            found = {}
        if found.keys() == whole and not any(found.values()):
            return found
    try:
        return leaks(model, changed, first, towers)
    except AnatomyError:  # another number of placeholders, say
        return {}


def _two(hidden: Hidden, changed: Example) -> list[int]:
    """The row with most and the one with least that is valid, among those in which something was changed."""
    length = rows_of(changed)
    tensors = [t for t in tree_leaves(dict(changed)) if isinstance(t, Tensor) and t.ndim]
    if length < 3 or any(len(t) != length for t in tensors) or not _told(dict(changed), length):
        return []
    other = [k for k, v in changed.items() if v is not hidden.hidden[k]]
    rows = [i for i in range(length) if all(bool((changed[k][i] != hidden.hidden[k][i]).any()) for k in other)]
    valid = [sum(int(hidden.hidden[k][i].sum()) for k in hidden.masks) for i in rows]
    order = [row for _, row in sorted(zip(valid, rows, strict=True))]
    return sorted((order[0], order[-1])) if len(order) > 1 else []


def _ends(ends: Ends, rows: list[int], length: int) -> Ends | None:
    """Of some samples alone, of which each may have several rows; None if they are not the first axis."""
    if any(len(value) % length for value in ends):
        return None
    return Ends(*(v.unflatten(0, (length, -1))[rows].flatten(0, 1) for v in ends))


def _named(link: Link) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that a block was called with; what has no name is `*i`."""
    assert link.call.held is not None
    args, kwargs = link.call.held
    named = arguments(link.call.module, args, kwargs)
    yield from named.items()
    yield from ((f"*{i}", a) for i, a in enumerate(args) if not any(a is v for v in named.values()))


def _by_row(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == length


def _told(given: Any, length: int) -> bool:
    """Whether all that is given is tensors, settings and nothing else, which might tell of rows."""
    if isinstance(given, dict):
        given = list(given.values())
    elif isinstance(given, (list, tuple)):
        if len(given) == length and any(isinstance(v, (int, float, str)) for v in given):
            return False
    else:
        plain = given is None or isinstance(given, (bool, int, float, str, torch.dtype, torch.device))
        return plain or type(given) in (Tensor, nn.Parameter)
    return all(_told(v, length) for v in given)


def _holes(contents: Tensor) -> Tensor:
    """Which places hold nothing, and which no number, (rows, ...)."""
    if contents.ndim < 2:
        return contents
    return torch.stack([(contents == 0).all(-1), ~contents.isfinite().all(-1)], -1)


def _bytes(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of each row."""
    flat = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
    yield from (row.tobytes() for row in flat.view(torch.uint8).numpy())
