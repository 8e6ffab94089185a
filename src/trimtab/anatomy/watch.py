"""A description of a model that was seen: it is run on an example, and its towers are read off what happened.

`record` notes one pass, `chains` finds the blocks, `probe` measures masks and causality, `sublayers` looks into blocks.
What could not be seen is noted as unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trimtab.anatomy.chains import Link, candidates, chains
from trimtab.anatomy.description import Anatomy
from trimtab.anatomy.inputs import Hidden, kind_of, ready, watched
from trimtab.anatomy.parts import Block, Modality, Tap, Tower
from trimtab.anatomy.probe import Ends, Sight, leaks, sight
from trimtab.anatomy.record import Call, Example, Recording, Trace, record, shapes
from trimtab.anatomy.structure import AnatomyError, plain_modules, refuse_wrapper, repeated, under
from trimtab.anatomy.sublayers import see_sublayers


def watch(model: nn.Module, example: Example) -> Anatomy:
    """The anatomy of a model as it shows when it runs on an example; at most three passes, and its blocks by themselves.

    Args:
        model: the plain model, which is left as it is.
        example: a batch of its keyword arguments, of two rows or more.

    Raises:
        AnatomyError: if the model is wrapped, does not run on the example, or no blocks are seen in it.
    """
    refuse_wrapper(model)
    with watched(model):
        given = ready(model, example)
        hidden, recording = _recorded(model, given)
        found = chains(recording)
        if not found:
            raise AnatomyError(
                f"no blocks were seen in {type(model).__name__} on the example ({shapes(example)}): no modules of a "
                "list ran one after another, each on what the last made: describe it (docs/your-own-model.md)"
            )
        return _Watch(model, given, hidden, recording, found).anatomy()


def _recorded(model: nn.Module, given: Example) -> tuple[Hidden, Recording]:
    """One pass with a place hidden; a model that refuses a mask with a hole gets one with an end cut off, or as it is."""
    blocks = candidates(model)
    for place in ("middle", "first"):
        hidden = Hidden.of(given, place)  # type: ignore[arg-type]
        try:
            return hidden, record(model, hidden.hidden, blocks)
        except AnatomyError:
            if not hidden.masks:
                raise
    masks: dict[str, list[str]] = {k: [] for k in hidden.masks}
    return Hidden(dict(given), [], masks), record(model, given, blocks)


@dataclass(eq=False)
class _Seen:
    """A tower that is being described."""

    name: str
    links: list[Link]
    bits: int  # of its blocks, in origins
    used: int = 0  # blocks whose results go on to anything
    reads: list[str] = field(default_factory=list)
    beside: list[tuple[str, str]] = field(default_factory=list)  # argument, tower
    unknown: dict[str, str] = field(default_factory=dict)
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


class _Watch:
    def __init__(self, model: nn.Module, example: Example, hidden: Hidden, recording: Recording, found: list[list[Link]]):
        self.model, self.example, self.hidden, self.recording = model, example, hidden, recording
        self.towers = [self._begin(links) for links in found]
        self._name()
        for tower in self.towers:
            self._relate(tower)
            tower.used = self._used(tower)
        first, links = self._ends(), {t.name: t.links for t in self.towers}
        self.leaks = [self._leaks(changed, first, links) for changed in hidden.changed]

    def _leaks(self, changed: Example, first: dict[str, Ends], links: dict[str, list[Link]]) -> dict[str, bool]:
        """As `leaks`; of a model that refuses the change (another number of placeholders, say) nothing."""
        try:
            return leaks(self.model, changed, first, links)
        except AnatomyError:
            return {}

    def _begin(self, links: list[Link]) -> _Seen:
        paths = {link.path for link in links}
        bits = sum({1 << c.bit for c in self.recording.calls if c.path in paths and c.bit >= 0})
        return _Seen("", links, bits)

    def _ends(self) -> dict[str, Ends]:
        """What entered and left each tower in the pass that was recorded."""
        found = {}
        for t in self.towers:
            first, last = t.links[0].call, t.links[-1].call
            if first.held is not None and isinstance(last.result, Tensor):
                stream = Block(first.path, 1, stream=t.links[0].name).stream_of(first.module, *first.held)
                found[t.name] = Ends(stream, last.result)
        return found

    # --- how the towers are related ---

    def _reach(self, origins: int, but: _Seen | None = None) -> list[_Seen]:
        """The towers from whose blocks something was computed."""
        return [t for t in self.towers if t is not but and origins & t.bits]

    def _relate(self, tower: _Seen) -> None:
        into = self._reach(tower.entry.origins, tower)
        for link, before in zip(tower.links[1:], tower.links, strict=False):
            into += [t for t in self._reach(link.stream.origins & ~before.made.origins, tower) if t not in into]
        tower.reads = [t.name for t in self._nearest(into)]
        for name, trace in tower.given:
            if not trace.floats:
                continue
            for other in self._nearest(self._reach(trace.origins, tower)):
                tower.counts[other.name] = tower.counts.get(other.name, 0) + 1
                if (name, other.name) not in tower.beside and other.name not in tower.reads:
                    tower.beside.append((name, other.name))

    def _nearest(self, towers: Sequence[_Seen]) -> list[_Seen]:
        """Without those that are only seen through another of them."""
        return [t for t in towers if not any(self._before(t, o) and not self._before(o, t) for o in towers if o is not t)]

    @staticmethod
    def _before(tower: _Seen, other: _Seen) -> bool:
        """Whether something of a tower went into another."""
        traces = [other.entry, *(t for _, t in other.given), *(link.stream for link in other.links)]
        return any(t.origins & tower.bits for t in traces)

    def _used(self, tower: _Seen) -> int:
        """How many blocks come before the last whose result goes on to a tower or to what the model returns."""
        others = [t for other in self.towers if other is not tower for t in (other.entry, *(x for _, x in other.given))]
        ends = [t.origins for t in (*others, *self.recording.output)]
        used = [i for i, link in enumerate(tower.links, 1) if any(e >> link.call.bit & 1 for e in ends)]
        return max(used, default=len(tower.links))

    def _inputs(self, tower: _Seen, stream_only: bool = False) -> list[str]:
        """Keys of the inputs that a tower's stream was computed from, or that it is given beside."""
        origins = tower.entry.origins
        if not stream_only:
            for _, trace in tower.given:
                origins |= trace.origins
        return [key for key, bit in self.recording.inputs.items() if origins >> bit & 1]

    def _modality(self, tower: _Seen) -> Modality | None:
        kinds = {kind_of(k, self.example[k]) for k in self._inputs(tower)} - {None}
        return None if not kinds else kinds.pop() if len(kinds) == 1 else "fusion"

    def _name(self) -> None:
        kinds = [self._modality(t) or "tower" for t in self.towers]
        taken: set[str] = set()
        for tower, kind in zip(self.towers, kinds, strict=True):
            name = kind if kinds.count(kind) == 1 else _stem(tower.links[0].path)
            stem, count = name, 1
            while name in taken or hasattr(nn.ModuleDict, name):
                count += 1
                name = f"{stem}_{count}"
            taken.add(name)
            tower.name = name

    # --- the description ---

    def anatomy(self) -> Anatomy:
        scopes, heads = self._places()
        towers = tuple(self._tower(t, scopes[t.name]) for t in self.towers)
        described = [b.path for t in towers for b in t.blocks]
        ignored = tuple(
            p for p, children in repeated(self.model)
            if not under(p, heads) and any(
                c not in described and not any(d.startswith(f"{c}.") for d in described) for c in children
            ) and not any(p.startswith(f"{d}.") for d in described)
        )  # fmt: skip
        ignored += tuple(sorted({link.path.rpartition(".")[0] for t in self.towers for link in t.links[t.used :]}))
        source = f"seen on an example ({shapes(self.example)})"
        return Anatomy(towers, tuple(heads), ignored, source, seen=True)

    def _tower(self, tower: _Seen, scope: tuple[str, ...]) -> Tower:
        links = tower.links[: tower.used]
        layout, why = _layout(self.recording, links)
        modality = self._modality(tower)
        if modality is None:
            tower.unknown["modality"] = (
                "what enters it is computed from none of the inputs that bring pictures, words or sound "
                f"({', '.join(self._inputs(tower)) or 'none'})"
            )
        if why:
            tower.unknown["layout"] = why
        if (repeats := self._repeats(links)) is not None:
            tower.unknown["blocks"] = f"'{repeats}' runs several times in one pass, each time on what it made before"
        blocks = [self._parts(tower, _block(self.recording, link, i, tower, layout), link) for i, link in enumerate(links)]
        causal, blocks = self._causal(tower, links, blocks, layout)
        blank = links[0].call.held is not None and self._blank(links[0], blocks[0])
        memory = max((name for _, name in tower.beside), key=tower.readers, default=None)
        return Tower(
            tower.name, modality or "fusion", tuple(blocks), scope, self._output(tower, links), layout,
            mask=self._mask(tower, links), samples=self._samples(tower, links, layout), memory=memory,
            memories=tuple(dict.fromkeys(p for p in tower.beside if p[1] != memory)), reads=tuple(tower.reads),
            causal=causal, starts_blank=blank, closed=_closed(links, tower), unknown=tuple(tower.unknown.items()),
        )  # fmt: skip

    def _parts(self, tower: _Seen, block: Block, link: Link) -> Block:
        """With the parts that are seen in a block, which runs alone."""
        if link.call.held is None or block.unknown and block.unknown[0][0] == "blocks":
            return block
        memory = {name for name, _ in tower.beside}
        try:
            seen = see_sublayers(self.model, block, *_copied(link.call.held), memory=memory)
        except AnatomyError as error:
            return replace(block, unknown=(*block.unknown, ("sublayers", str(error))))
        if seen.layout is None:
            block = replace(block, unknown=(*block.unknown, ("layout", "; ".join(seen.notes))))
        if seen.sublayers:
            rest = () if seen.complete else (("other sublayers", "; ".join(seen.notes)),)
            return replace(block, sublayers=seen.sublayers, unknown=(*block.unknown, *rest))
        why = "; ".join(seen.notes) or "nothing is added into its stream"
        return replace(block, unknown=(*block.unknown, ("sublayers", why)))

    def _repeats(self, links: Sequence[Link]) -> str | None:
        """A block that runs again on what it has made (ALBERT's)."""
        for link in links:
            for call in self.recording.calls:
                if call.path == link.path and call.begin > link.call.end:
                    if any(t.origins >> link.call.bit & 1 for traces in call.given.values() for t in traces):
                        return link.path
        return None

    @staticmethod
    def _blank(link: Link, block: Block) -> bool:
        assert link.call.held is not None
        return not bool(block.stream_of(link.call.module, *link.call.held).any())

    def _causal(self, tower: _Seen, links: Sequence[Link], blocks: list[Block], layout: str) -> tuple[bool, list[Block]]:
        """Whether a token sees only those before it: in every block in which tokens mix, no earlier one moves."""
        if layout != "tokens" or len(links[0].stream.shape) < 2:
            return False, blocks
        found: list[Sight] = []
        for block, link in zip(blocks, links, strict=True):
            seen = sight(self.model, block, link) if link.call.held is not None else Sight(problem="it was not kept")
            if seen.problem:
                tower.unknown["causal"] = f"'{block.path}': {seen.problem}"
            found.append(seen)
        return any(s.mixes for s in found) and not any(s.back for s in found if s.mixes), blocks

    def _output(self, tower: _Seen, links: Sequence[Link]) -> Tap:
        """The norm that alone takes the last block's result as it is, or else that result."""
        last, made = links[-1], links[-1].made
        where = last.where[0] if last.where else 0
        tap, own = Tap(last.path, key=where), [link.path for link in tower.links]
        for _ in range(2):
            takers = [
                c for c in self.recording.calls
                if c.begin > last.call.end and not under(c.path, own) and any(t.number == made.number for ts in c.given.values() for t in ts)
                and not any(True for p in c.module.parameters() if p.ndim > 1)
                and c.made and c.made[0][1].shape == made.shape and c.made[0][1].number != made.number
            ]  # fmt: skip
            if len({c.path for c in takers}) != 1:
                break
            tap, made = Tap(takers[0].path), takers[0].made[0][1]
        return tap

    def _samples(self, tower: _Seen, links: Sequence[Link], layout: str) -> Tap | None:
        shape, rows = links[0].stream.shape, self.recording.rows
        if rows < 2:
            tower.unknown["samples"] = "the example has one row, by which the axis of samples cannot be told; give two"
            return None
        if len(shape) >= 3 and shape[0] % rows == 0:
            return None
        keys = [k for k in self._inputs(tower) if isinstance(self.example[k], Tensor)]
        if not keys:
            tower.unknown["samples"] = f"its stream is {shape}, and none of its inputs has one row a sample"
            return None
        return Tap("", "input", min(keys, key=lambda k: len(self.example[k])))

    def _mask(self, tower: _Seen, links: Sequence[Link]) -> Tap | None:
        """Where the mask of valid tokens is seen: the outermost place with one number a token of the stream."""
        stream = links[0].stream
        own = self._inputs(tower, stream_only=True)  # a mask of what another tower reads is not this one's
        bits = {k: 1 << self.recording.inputs[k] for k, of in self.hidden.masks.items() if not of or set(of) & set(own)}
        acting = [k for k, bit in bits.items() if any(t.origins & bit for _, t in tower.given)]
        if not acting:
            return None
        seen = [
            found[tower.name] for found, changed in zip(self.leaks, self.hidden.changed, strict=True)
            if tower.name in found and any(self.hidden.alters(changed, k) for k in acting)
        ]  # fmt: skip
        if not seen or any(seen):
            why = "but what stands there is still seen by others" if seen else "but that could not be seen"
            tower.unknown["mask"] = f"{' and '.join(acting)} reach it and were made to hide a token, {why}"
            return None
        blocks = [link.path for link in links]
        for call in self.recording.calls:
            if not any(b.startswith(f"{call.path}.") or not call.path for b in blocks):
                continue
            for name, traces in call.given.items():
                if len(traces) == 1 and self._is_mask(traces[0], stream.shape, acting):
                    return Tap(call.path, "input", name, flat=len(traces[0].shape) > 2)
        for call in self.recording.calls:
            for where, trace in call.made:
                if len(where) == 1 and call.begin < links[0].call.begin and self._is_mask(trace, stream.shape, acting):
                    return Tap(call.path, key=where[0], flat=len(trace.shape) > 2)
        tower.unknown["mask"] = (
            f"{' and '.join(acting)} act in it, but no argument around its blocks has one number a token "
            f"({stream.shape[:2]})"
        )
        return None

    def _is_mask(self, trace: Trace, stream: tuple[int, ...], acting: Collection[str]) -> bool:
        """Whether a tensor has one number a token of a stream, and comes from masks alone, or is nothing but 0 and 1."""
        sources = [key for key, bit in self.recording.inputs.items() if trace.origins >> bit & 1]
        if len(stream) < 3 or trace.shape[:1] != stream[:1] or _numbers(trace.shape) != stream[1]:
            return False
        alone = set(sources) <= set(self.hidden.masks)
        return not set(sources).isdisjoint(acting) and (alone or trace.binary)

    # --- what belongs to which tower ---

    def _places(self) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """Of each tower the prefixes of what belongs to it; and those of heads, which come after a tower or between."""
        owner: dict[str, str] = {}
        blocks = {link.path: t.name for t in self.towers for link in t.links}
        ran: dict[str, Call] = {}
        for call in self.recording.calls:
            if any(p is not None for p in call.module._parameters.values()):
                ran.setdefault(call.path, call)
        weighty = [p for p, m in plain_modules(self.model) if any(q is not None for q in m._parameters.values())]
        outputs = {self._output(t, t.links[: t.used]).path: t.name for t in self.towers}
        for path in weighty:
            if (block := next((b for b in blocks if under(path, [b])), None)) is not None:
                owner[path] = blocks[block]
            elif path in outputs:
                owner[path] = outputs[path]
            elif path in ran:
                owner[path] = self._owner(ran[path])
            else:
                owner[path] = ""
        scopes = {t.name: compress([p for p in weighty if owner[p] == t.name], weighty) for t in self.towers}
        return scopes, list(compress([p for p in weighty if p and not owner[p]], weighty))

    def _owner(self, call: Call) -> str:
        """The tower whose stream comes from a module, before its first block or between two; empty for what comes after
        a tower."""
        before = 0
        for traces in call.given.values():
            for trace in traces:
                before |= trace.origins
        for tower in self._reach(before):
            between = any(link.stream.origins >> call.bit & 1 for link in tower.links)
            return tower.name if between and self._reach(before) == [tower] else ""
        for tower in self.towers:
            if any(t.origins >> call.bit & 1 for t in (tower.entry, *(x for _, x in tower.given))):
                return tower.name
        return ""


def _copied(held: tuple[tuple, dict]) -> tuple[tuple, dict]:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, held)


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


def _block(recording: Recording, link: Link, index: int, tower: _Seen, layout: Literal["tokens", "grid"]) -> Block:
    """What was seen of one block."""
    call, unknown = link.call, []
    width = link.made.shape[1 if layout == "grid" else -1]
    also, why = _also(recording, tower.links, index)
    if link.where not in ((), (0,)):
        why = f"its stream is {link.where[0]!r} of what it returns, expected the first or only element"
        unknown.append(("blocks", why))
    stays = ""
    if index + 1 == tower.used < len(tower.links):
        stays = "the model reads what it puts out by its number, and not what the last block does"
    if why:
        unknown.append(("skip", why))
    keeps = link.same_shape and not why
    return Block(
        call.path, width, keeps_shape=keeps, stream="hidden_states" if link.name.startswith("*") else link.name,
        returns_tuple=issubclass(call.kind, (tuple, list)), also=tuple(also), stays=stays, unknown=tuple(unknown),
    )  # fmt: skip


def _also(recording: Recording, links: Sequence[Link], index: int) -> tuple[list[str], str]:
    """Names of the arguments that stand in a block's result after the stream; or why they cannot be told."""
    call = links[index].call
    after = links[index + 1].call if index + 1 < len(links) else None
    names: list[str] = []
    for place in range(1, call.size):
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


def _closed(links: Sequence[Link], tower: _Seen) -> str:
    """Why no tokens can be set before the tower's own: between its blocks something is done to its stream."""
    if changed := next((a for a, b in zip(links, links[1:], strict=False) if not a.direct), None):
        return f"something is done to its stream after '{changed.path}'"
    return ""


def _layout(recording: Recording, links: Sequence[Link]) -> tuple[Literal["tokens", "grid"], str]:
    """`grid` if convolutions in the blocks read a stream of four axes; why it is neither, if it is not."""
    shape = links[0].stream.shape
    if len(shape) < 4:
        return "tokens", ""
    inside = [c for c in recording.calls if any(c.path.startswith(f"{link.path}.") for link in links)]
    convolved = any(
        isinstance(c.module, nn.Conv2d) and next(iter(c.given.values()))[0].shape[1] in {x.stream.shape[1] for x in links}
        for c in inside if c.given
    )  # fmt: skip
    if len(shape) == 4 and convolved:
        return "grid", ""
    return "tokens", f"its stream is {shape}: neither (B, L, D) nor (B, C, H, W)"


def _numbers(shape: tuple[int, ...]) -> int:
    """How many numbers a row has."""
    count = 1
    for n in shape[1:]:
        count *= n
    return count


def _stem(path: str) -> str:
    """A name from the path of a block: without its number and the list."""
    parts = [p for p in path.split(".") if not p.isdigit()]
    return "_".join(parts[:-1] or parts) or "tower"
