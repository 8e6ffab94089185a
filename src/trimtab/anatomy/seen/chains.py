"""Which modules of a model are blocks: modules of one list that ran one after another, each on what the last made.

Nothing is told by names or classes: a list may mix classes, hold one block, or hold stages that hold blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from trimtab.anatomy.calls import parameter_names
from trimtab.anatomy.seen.record import Call, Recording, Trace
from trimtab.anatomy.structure import plain_module, plain_modules, under

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Link:
    """One block as it ran.

    Attributes:
        call: of the block.
        name: of the argument that carries the stream; `*0` if it has no name.
        stream: what came in.
        made: what went on to the next block.
        where: of that in the block's result: () if the result is the stream, (0,) if it is the first element.
        direct: whether the next block got the very tensor.
    """

    call: Call
    name: str
    stream: Trace
    made: Trace
    where: tuple
    direct: bool

    @property
    def path(self) -> str:
        return self.call.path

    @property
    def same_shape(self) -> bool:
        return self.stream.shape == self.made.shape


def candidates(model: nn.Module) -> set[str]:
    """Paths of modules that may be blocks: children of lists that hold two matrices or more; if none does, one."""
    lists = {p for p, m in plain_modules(model) if isinstance(m, LISTS)}
    found = {p: _matrices(m) for p, m in plain_modules(model) if p and p.rpartition(".")[0] in lists}
    return {p for p, n in found.items() if n > 1} or {p for p, n in found.items() if n}


def _matrices(module: nn.Module) -> int:
    """How many modules below a module have a weight of two axes or more."""
    inside = (m._parameters.values() for p, m in plain_modules(module) if p)
    return sum(any(q is not None and q.ndim > 1 for q in own) for own in inside)


def chains(recording: Recording) -> list[list[Link]]:
    """Every list of blocks that ran one after another, in the order in which they began."""
    found: list[list[Link]] = []
    covered: list[str] = []
    for path, module in plain_modules(recording.model):
        if not isinstance(module, LISTS) or under(path, covered):
            continue
        calls = _first_calls(recording, path)
        if calls and (chain := _chain(calls)):
            found.append(_inner(recording, chain) or chain)
            covered += [link.path for link in chain]
    return _merged(found)


def _first_calls(recording: Recording, path: str) -> list[Call]:
    """The first call of each child of a list that may be a block, in the order in which they ran."""
    seen: dict[str, Call] = {}
    for call in recording.calls:
        if call.path in recording.holds and call.path.rpartition(".")[0] == path and call.end >= 0 and call.made:
            seen.setdefault(call.path, call)
    return list(seen.values())


def _chain(calls: list[Call]) -> list[Link] | None:
    """The calls as blocks of one stream; None if they are none."""
    if len(calls) == 1:
        return _alone(calls[0])
    links: list[Link] = []
    for call, after in pairwise(calls):
        if (taken := _taken(call, after)) is None:
            return None
        name, where, made, direct = taken
        if links:
            links[-1] = Link(call, links[-1].name, links[-1].stream, made, where, direct)
        else:
            links.append(Link(call, name, _entry(call, name, made), made, where, direct))
        stream = next(t for t in after.given[name] if t.origins >> call.bit & 1)
        links.append(Link(after, name, stream, stream, where, False))
    last = links[-1]
    end = next((t for w, t in last.call.made if w == last.where), last.call.made[0][1])
    links[-1] = Link(last.call, last.name, last.stream, end, last.where, False)
    # Heads that only have something to do with each other are no blocks: those hand their stream on as it is.
    return links if any(link.direct or link.same_shape for link in links) else None


def _alone(call: Call) -> list[Link] | None:
    """A block that is the only one of its list: what it puts out has the shape of one of its arguments."""
    where, made = call.made[0]
    names = [n for n, t in call.given.items() if len(t) == 1 and t[0].shape == made.shape and t[0].floats]
    if not made.floats or len(made.shape) < 3 or not names:
        return None
    return [Link(call, names[0], call.given[names[0]][0], made, where, False)]


def _taken(call: Call, after: Call) -> tuple[str, tuple, Trace, bool] | None:
    """Through which argument a block takes what another has made: its name, which element, and whether as it was."""
    for where, made in call.made:
        for name, traces in after.given.items():
            if made.floats and any(t.number == made.number and t.shape == made.shape for t in traces):
                return name, where, made, True
    where, made = call.made[0]
    for name, traces in after.given.items():  # something is done to it in between
        for t in traces:
            if t.floats and t.origins >> call.bit & 1 and len(t.shape) == len(made.shape) > 2:
                return name, where, made, False
    return None


def _entry(call: Call, name: str, made: Trace) -> Trace:
    """The stream that enters the first block, by the name that it has in the others, if that is there."""
    if name in call.given:
        return call.given[name][0]
    names = parameter_names(call.module)
    return next((call.given[n][0] for n in (*names, *call.given) if n in call.given and call.given[n][0].floats), made)


def _inner(recording: Recording, chain: list[Link]) -> list[Link] | None:
    """The blocks of the stages, where a list holds stages: they keep the shape of their stream, and stages do not."""
    if all(link.same_shape for link in chain) and not isinstance(chain[0].call.module, LISTS):
        return None
    parts: list[Link] = []
    for stage in chain:
        found: list[Link] | None = None
        for path, module in plain_modules(plain_module(recording.model, stage.path)):
            if isinstance(module, LISTS) and (calls := _first_calls(recording, f"{stage.path}.{path}".rstrip("."))):
                found = _chain(calls)
                break
        if not found:
            return None
        parts += found
    return parts if sum(link.same_shape for link in parts) * 2 >= len(parts) else None


def _merged(found: list[list[Link]]) -> list[list[Link]]:
    """Lists that stand beside each other, of which one goes on with what the other made, as one tower (ResNet)."""
    done: list[list[Link]] = []
    for chain in sorted(found, key=lambda chain: chain[0].call.begin):
        before = done[-1] if done else None
        beside = before and _home(before[-1].path) == _home(chain[0].path)
        if before and beside and chain[0].stream.number == before[-1].made.number:
            before.extend(chain)
        else:
            done.append(list(chain))
    return done


def _home(path: str) -> str:
    return path.rpartition(".")[0].rpartition(".")[0]
