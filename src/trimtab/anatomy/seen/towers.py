"""What is read off the calls of a tower's blocks: shapes, what they hand on, and which modules belong to the tower."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trimtab.anatomy.calls import arguments
from trimtab.anatomy.parts import Block, Layout
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.record import Recording, Trace
from trimtab.anatomy.structure import under


@dataclass(eq=False)
class SeenTower:
    """A tower that is being described."""

    name: str
    links: list[Link]
    bits: int  # of its blocks, in origins
    used: int = 0  # blocks whose results go on to anything
    reads: list[str] = field(default_factory=list)
    beside: list[tuple[str, str]] = field(default_factory=list)  # argument, tower
    unknown: dict[str, str] = field(default_factory=dict)
    may_hide: tuple[str, ...] | None = None  # masks that reach it, where it was not seen how they act
    counts: dict[str, int] = field(default_factory=dict)  # tower -> how many arguments of its blocks come from it

    @property
    def entry(self) -> Trace:
        return self.links[0].stream

    def readers(self, name: str) -> int:
        """How many arguments of its blocks come from another tower."""
        return self.counts.get(name, 0)

    @property
    def given(self) -> Iterable[tuple[str, Trace]]:
        """Everything but the stream that its blocks are called with."""
        for link in self.links:
            for name, traces in link.call.given.items():
                if name != link.name:
                    yield from ((name, t) for t in traces)


_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "block_index", "idx", "index"}


def likeness(link: Link) -> Hashable:
    """What blocks have in common that compute in the same way: class, shapes, plain settings, what they are given."""
    module = link.call.module
    settings = [
        (path, type(m).__name__, key, value) for path, m in module.named_modules() for key, value in vars(m).items()
        if isinstance(value, (bool, int, float, str)) and not key.startswith("_") and key not in _NUMBERS
    ]  # fmt: skip
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    given = tuple((name, tuple(t.shape for t in traces)) for name, traces in link.call.given.items())
    return type(module), shapes, tuple(settings), given, link.call.size


def copied(held: tuple[tuple, dict]) -> tuple[tuple, dict]:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, held)


def held_stream(link: Link) -> Tensor | None:
    """The stream that a block was called with, as it was kept; None if it stands inside another argument."""
    if link.call.held is None:
        return None
    args, kwargs = link.call.held
    named = arguments(link.call.module, args, kwargs)
    value = named.get(link.name, args[0] if args and link.name.startswith("*") else None)
    return value if isinstance(value, Tensor) else None


def compress(chosen: Collection[str], every: Collection[str]) -> tuple[str, ...]:
    """The fewest prefixes that cover some paths and no other of all; never the whole model."""
    others = [p for p in every if p not in set(chosen)]
    found: list[str] = []
    for path in chosen:
        if under(path, found):
            continue
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            if not any(under(o, [prefix]) for o in others):
                found.append(prefix)
                break
    return tuple(found)


def block_of(recording: Recording, link: Link, index: int, tower: SeenTower, layout: Layout) -> Block:
    """What was seen of one block."""
    call, unknown = link.call, []
    width = link.made.shape[1 if layout == "grid" else -1]
    also, why = _also(recording, tower.links, index)
    if link.where not in ((), (0,)):
        why = f"its stream is {link.where[0]!r} of what it returns, expected the first or only element"
        unknown.append(("blocks", why))
    if call.held is not None and held_stream(link) is None:
        why = f"its stream is inside {link.name!r}, expected an argument of its own, a tensor"
        unknown.append(("blocks", why))
    stays = ""
    if index + 1 == tower.used < len(tower.links):
        stays = "the model reads what it puts out by its number, and not what the last block does"
    if why:
        unknown.append(("skip", why))
    keeps = link.same_shape and not why
    begins = index > 0 and link.stream.shape[1:-1] != tower.links[index - 1].made.shape[1:-1] and layout == "tokens"
    return Block(
        call.path, width, keeps_shape=keeps, stream="hidden_states" if link.name.startswith("*") else link.name,
        returns_tuple=issubclass(call.kind, (tuple, list)), also=tuple(also), begins=begins, stays=stays,
        unknown=tuple(unknown),
    )  # fmt: skip


def heard(block: Block) -> Block:
    """A block without the parts that add to a further stream which nobody reads after it (in the last block, say)."""
    lost = {i for i, name in enumerate(block.also, 1) if name.startswith("none_")}
    return replace(block, sublayers=tuple(part for part in block.sublayers if part.stream not in lost))


def _also(recording: Recording, links: Sequence[Link], index: int) -> tuple[list[str], str]:
    """Names of the arguments that stand in a block's result after the stream; or why they cannot be told."""
    call = links[index].call
    after = links[index + 1].call if index + 1 < len(links) else None
    names: list[str] = []
    for place in range(1, call.size):
        if place in call.told:  # whoever reads it leaves no trace
            return [], f"element {place} of what it returns is no tensor but numbers, which are not known without it"
        traces = [t for where, t in call.made if where and where[0] == place]
        used = {t.number for t in recording.output} | {n for n, step in recording.read.items() if step > call.end}
        if used.isdisjoint(t.number for t in traces):
            names.append(f"none_{place}")  # nobody asked for it, such as attention weights
            continue
        (number, *more) = (t.number for t in traces)
        name = next((n for n, ts in call.given.items() if not more and any(t.number == number for t in ts)), None)
        if name is None and after is not None:  # changed, and handed on by its name; not what the block makes itself
            taken = (n for n, ts in after.given.items() if not more and any(t.number == number for t in ts))
            name = next((n for n in taken if n in call.given), None)
        if name is None and index:
            name = next(iter(_also(recording, links, index - 1)[0][place - 1 : place]), None)
        if name is None:
            return [], f"element {place} of what it returns is none of its arguments, and is handed on"
        names.append(name)
    return names, ""


def closed(links: Sequence[Link], tower: SeenTower) -> str:
    """Why no tokens can be set before the tower's own: between its blocks something is done to its stream."""
    if changed := next((a for a, _ in pairwise(links) if not a.direct), None):
        return f"something is done to its stream after '{changed.path}'"
    return ""


def layout_of(recording: Recording, links: Sequence[Link], seen: Sequence[Layout | None]) -> tuple[Layout, str]:
    """The layout of a tower's stream; why it is not known, if it is not.

    Args:
        recording: of the pass.
        links: the tower's blocks.
        seen: of each block, on which axis it was seen to compute with channels.
    """
    shape = links[0].stream.shape
    if len(shape) < 4:
        return "tokens", ""
    inside = [c for c in recording.calls if any(c.path.startswith(f"{link.path}.") for link in links)]
    channels = {link.stream.shape[1] for link in links}
    convolved = len(shape) == 4 and any(
        isinstance(c.module, nn.Conv2d) and next(iter(c.given.values()))[0].shape[1] in channels
        for c in inside if c.given
    )  # fmt: skip
    kinds = set(seen) - ({None} if convolved and "map" not in seen else set())
    if kinds <= {"grid"} and (kinds or convolved):
        return "grid", ""
    if kinds == {"map"}:
        return "map", ""
    what = "neither (B, L, D) nor (B, C, H, W)" if kinds <= {"tokens", None} else "not of one layout in all its blocks"
    return "tokens", f"its stream is {shape}: {what}, and it was not seen that its channels stand last, (B, H, W, D)"


def numbers(shape: tuple[int, ...]) -> int:
    """How many numbers a row has."""
    count = 1
    for n in shape[1:]:
        count *= n
    return count


def stem(path: str) -> str:
    """A name from the path of a block: without its number and the list."""
    parts = [p for p in path.split(".") if not p.isdigit()]
    return "_".join(parts[:-1] or parts) or "tower"
