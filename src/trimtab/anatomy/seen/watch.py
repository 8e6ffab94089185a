"""A description of a model that was seen: it is run on an example, and its towers are read off what happened.

`record` notes one pass, `chains` finds the blocks, `probe` measures masks and causality, `sublayers` looks into blocks.
What could not be seen is noted as unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor, nn

from trimtab.anatomy.description import Anatomy
from trimtab.anatomy.parts import Block, Layout, Modality, Tap, Tower, with_paths
from trimtab.anatomy.seen.again import brought, otherwise, repeats
from trimtab.anatomy.seen.chains import Link, candidates, chains
from trimtab.anatomy.seen.inputs import Hidden, kind_of, ready, watched
from trimtab.anatomy.seen.masks import mask_of, untold
from trimtab.anatomy.seen.order import order
from trimtab.anatomy.seen.probe import Ends, Sight, rows_apart
from trimtab.anatomy.seen.record import Call, Example, Recording, record, shapes
from trimtab.anatomy.seen.rows import Rows, leaks_of
from trimtab.anatomy.seen.towers import (
    SeenTower,
    block_of,
    closed,
    compress,
    heard,
    held_stream,
    layout_of,
    likeness,
    stem,
)
from trimtab.anatomy.structure import AnatomyError, plain_modules, refuse_wrapper, repeated, under


def watch(model: nn.Module, example: Example) -> Anatomy:
    """The anatomy of a model as it shows when it runs on an example: at most three passes, and its blocks alone.

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
        return _Watch(model, example, given, hidden, recording, found).anatomy()


def _recorded(model: nn.Module, given: Example) -> tuple[Hidden, Recording]:
    """One pass with a place hidden; a model that refuses a mask with a hole gets one cut at an end, or as it is."""
    blocks = candidates(model)
    for place, words in product(("middle", "first"), (False, True)):
        hidden = Hidden.of(given, place, words)  # type: ignore[arg-type]
        try:
            return hidden, record(model, hidden.hidden, blocks, hidden.masks)
        except AnatomyError:
            if not hidden.masks:
                raise
    masks: dict[str, list[str]] = {k: [] for k in hidden.masks}
    return Hidden(dict(given), [], masks), record(model, given, blocks, masks)


class _Watch:
    def __init__(self, model: nn.Module, given: Example, example: Example, hidden: Hidden, recording: Recording,
                 found: list[list[Link]]):  # fmt: skip
        self.model, self.example, self.hidden, self.recording = model, example, hidden, recording
        self.given = given  # the example as it was; a mask that was added to it is one that the model does without
        self.kinds: dict[Hashable, Block] = {}  # of blocks that are alike, the first, with its parts
        self.layouts: dict[Hashable, Layout | None] = {}  # of their streams, as their channels tell
        self.sights: dict[Hashable, Sight] = {}
        self.rows = Rows(model)
        self.towers = [self._begin(links) for links in found]
        self._name()
        for tower in self.towers:
            self._relate(tower)
            tower.used = self._used(tower)
            if not recording.flows & tower.bits:
                tower.unknown["gradient"] = (
                    "what the model returns depends on it by indices or truth values alone, to which none goes back"
                )
        first, links = self._ends(), {t.name: t.links for t in self.towers}
        self.leaks = [leaks_of(model, hidden, changed, first, links) for changed in hidden.changed]

    def _begin(self, links: list[Link]) -> SeenTower:
        paths = {link.path for link in links}
        bits = sum({1 << c.bit for c in self.recording.calls if c.path in paths and c.bit >= 0})
        return SeenTower("", links, bits)

    def _ends(self) -> dict[str, Ends]:
        """What entered and left each tower in the pass that was recorded."""
        found = {}
        for t in self.towers:
            last = t.links[-1].call
            stream = held_stream(t.links[0])
            if stream is not None and isinstance(last.result, Tensor):
                found[t.name] = Ends(stream, last.result)
        return found

    # --- how the towers are related ---

    def _reach(self, origins: int, but: SeenTower | None = None) -> list[SeenTower]:
        """The towers from whose blocks something was computed."""
        return [t for t in self.towers if t is not but and origins & t.bits]

    def _relate(self, tower: SeenTower) -> None:
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

    def _nearest(self, towers: Sequence[SeenTower]) -> list[SeenTower]:
        """Without those that are only seen through another of them."""
        return [
            t for t in towers if not any(self._before(t, o) and not self._before(o, t) for o in towers if o is not t)
        ]

    @staticmethod
    def _before(tower: SeenTower, other: SeenTower) -> bool:
        """Whether something of a tower went into another."""
        traces = [other.entry, *(t for _, t in other.given), *(link.stream for link in other.links)]
        return any(t.origins & tower.bits for t in traces)

    def _used(self, tower: SeenTower) -> int:
        """How many blocks come before the last whose result goes on to a tower or to what the model returns."""
        others = [t for other in self.towers if other is not tower for t in (other.entry, *(x for _, x in other.given))]
        ends = [t.origins for t in (*others, *self.recording.output)]
        used = [i for i, link in enumerate(tower.links, 1) if any(e >> link.call.bit & 1 for e in ends)]
        return max(used, default=len(tower.links))

    def _inputs(self, tower: SeenTower, stream_only: bool = False) -> list[str]:
        """Keys of the inputs that a tower's stream was computed from, or that it is given beside."""
        origins = tower.entry.origins
        if not stream_only:
            for _, trace in tower.given:
                origins |= trace.origins
        return [key for key, bit in self.recording.inputs.items() if origins >> bit & 1]

    def _modality(self, tower: SeenTower) -> Modality | None:
        keys = {*self._inputs(tower), *brought(self.recording, tower.links)}
        kinds = {kind_of(k, self.example[k]) for k in keys} - {None}
        return None if not kinds else kinds.pop() if len(kinds) == 1 else "fusion"

    def _name(self) -> None:
        kinds = [self._modality(t) or "tower" for t in self.towers]
        taken: set[str] = set()
        for tower, kind in zip(self.towers, kinds, strict=True):
            name = kind if kinds.count(kind) == 1 else stem(tower.links[0].path)
            base, count = name, 1
            while name in taken or hasattr(nn.ModuleDict, name):
                count += 1
                name = f"{base}_{count}"
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
        ran = {call.path for call in self.recording.calls}
        idle = tuple(p for p, children in repeated(self.model) if not any(under(call, children) for call in ran))
        source = f"seen on an example ({shapes(self.example)})"
        return Anatomy(towers, tuple(heads), ignored, source, True, idle, self.recording.severed())

    def _tower(self, tower: SeenTower, scope: tuple[str, ...]) -> Tower:
        links = tower.links[: tower.used]
        modality = self._modality(tower)
        if modality is None:
            tower.unknown["modality"] = (
                "what enters it is computed from none of the inputs that bring pictures, words or sound "
                f"({', '.join(self._inputs(tower)) or 'none'})"
            )
        if (again := repeats(self.recording, links)) is not None:
            tower.unknown["blocks"] = f"'{again}' runs several times in one pass, each time on what it made before"
        elif why := otherwise(self.recording, links, self.hidden.masks):
            tower.unknown["mask"] = tower.unknown["causal"] = why
        blocks, layout = self._blocks(tower, links)
        sights = self._sights(tower, links, blocks, layout)
        tokens = sights if layout == "tokens" else []  # of a map, only whether samples see each other
        mask, valid = self._mask(tower, links, tokens)
        causal, apart = order(tokens, valid, modality == "vision")
        if apart:
            tower.unknown.setdefault("causal", apart)
        first = held_stream(links[0])
        blank = first is not None and not bool(first.any())
        samples = self._samples(tower, links, sights)
        if tokens and "samples" not in tower.unknown and samples is None and not any(s.mixes for s in sights):
            tower.unknown.setdefault("causal", "no tokens were seen to mix in its blocks")
        memory = max((name for _, name in tower.beside), key=tower.readers, default=None)
        return Tower(
            tower.name, modality or "fusion", tuple(blocks), scope, self._output(tower, links), layout,
            mask=mask, mask_required=mask is None or (not mask.pairs and (mask.path != "" or mask.key in self.given)),
            may_hide=tower.may_hide,
            samples=samples, memory=memory,
            memories=tuple(dict.fromkeys(p for p in tower.beside if p[1] != memory)), reads=tuple(tower.reads),
            causal=causal, starts_blank=blank, closed=closed(links, tower), unknown=tuple(tower.unknown.items()),
        )  # fmt: skip

    def _blocks(self, tower: SeenTower, links: Sequence[Link]) -> tuple[list[Block], Layout]:
        """The blocks with their parts, and the layout of the stream, which these tell."""
        numbered = list(enumerate(links))
        parts = [self._parts(tower, block_of(self.recording, x, i, tower, "tokens"), x) for i, x in numbered]
        layout, why = layout_of(self.recording, links, [self.layouts.get(likeness(link)) for link in links])
        if why:
            tower.unknown["layout"] = why
        if layout != "tokens":  # whose width stands on another axis
            bare = [block_of(self.recording, x, i, tower, layout) for i, x in numbered]
            parts = [replace(b, width=o.width, begins=o.begins) for b, o in zip(parts, bare, strict=True)]
        return [heard(part) for part in parts], layout

    def _parts(self, tower: SeenTower, block: Block, link: Link) -> Block:
        """With the parts that are seen in a block, which runs alone; of blocks of one kind, in the first."""
        kind = likeness(link)
        if kind in self.kinds:
            old, path = self.kinds[kind], block.path
            moved = with_paths(old.sublayers, lambda p: path + p.removeprefix(old.path))
            return replace(block, sublayers=moved, unknown=tuple(dict.fromkeys((*block.unknown, *old.unknown))))
        self.kinds[kind] = found = self._seen_parts(tower, block, link)
        return found

    def _seen_parts(self, tower: SeenTower, block: Block, link: Link) -> Block:
        if link.call.held is None or (block.unknown and block.unknown[0][0] == "blocks"):
            return block
        try:
            seen = self.rows.parts(block, link, {name for name, _ in tower.beside})
        except AnatomyError as error:
            return replace(block, unknown=(*block.unknown, ("sublayers", str(error))))
        self.layouts[likeness(link)] = seen.layout
        if seen.layout is None:
            block = replace(block, unknown=(*block.unknown, ("layout", "; ".join(seen.notes))))
        if seen.sublayers:
            rest = () if seen.complete else (("other sublayers", "; ".join(seen.notes)),)
            return replace(block, sublayers=seen.sublayers, unknown=(*block.unknown, *rest))
        why = "; ".join(seen.notes) or "nothing is added into its stream"
        return replace(block, unknown=(*block.unknown, ("sublayers", why)))

    def _sights(self, tower: SeenTower, links: Sequence[Link], blocks: list[Block], layout: Layout) -> list[Sight]:
        """Who sees whom in each block of tokens; blocks of one kind are looked at once."""
        if layout == "grid" or len(links[0].stream.shape) < 2 or any(held_stream(link) is None for link in links):
            return []
        found: list[Sight] = []
        for block, link in zip(blocks, links, strict=True):
            kind = likeness(link)
            if kind not in self.sights:
                self.sights[kind] = self.rows.sight(block, link, {name for name, _ in tower.beside})
            seen = self.sights[kind]
            if seen.problem and layout == "tokens":
                tower.unknown["causal"] = f"'{block.path}': {seen.problem}"
            found.append(seen)
        return found

    def _output(self, tower: SeenTower, links: Sequence[Link]) -> Tap:
        """The norm that alone takes the last block's result as it is, or else that result."""
        last, made = links[-1], links[-1].made
        where = last.where[0] if last.where else 0
        tap, own = Tap(last.path, key=where), [link.path for link in tower.links]
        for _ in range(2):
            takers = [
                c for c in self.recording.calls
                if c.begin > last.call.end and not under(c.path, own)
                and any(t.number == made.number for ts in c.given.values() for t in ts)
                and not any(True for p in c.module.parameters() if p.ndim > 1)
                and c.made and c.made[0][1].shape == made.shape and c.made[0][1].number != made.number
            ]  # fmt: skip
            # A norm that is called again is also for something else (BLIP's, and decoders' with a result a block).
            if len({c.path for c in takers}) != 1 or sum(c.path == takers[0].path for c in self.recording.calls) > 1:
                break
            tap, made = Tap(takers[0].path), takers[0].made[0][1]
        return tap

    def _samples(self, tower: SeenTower, links: Sequence[Link], sights: list[Sight]) -> Tap | None:
        """None if the stream begins with the samples, or with several pictures of each; else where they are counted."""
        shape = links[0].stream.shape
        keys = [k for k in self._inputs(tower) if isinstance(self.example[k], Tensor) and self.example[k].ndim]
        lengths = {len(self.example[k]) for k in keys}
        if max(lengths, default=0) < 2:
            tower.unknown["samples"] = "the example has one row, by which the axis of samples cannot be told; give two"
            return None
        if len(shape) >= 3:
            second = shape[1] in lengths
            if shape[0] in lengths and second:
                if rows_apart(self.model, links, sights):
                    return None
                tower.unknown["samples"] = f"its stream is {shape}, with as many tokens as samples; give another number"
                return None
            several = [shape[0] // n for n in lengths if n > 1 and shape[0] % n == 0]  # rows that a sample may have
            if not second and several:
                if any(s.rows >= min(several) for s in sights):
                    tower.unknown["samples"] = (
                        f"a row of its stream {shape} moves when one of another sample is changed: its first axis is "
                        "not that of samples, or samples see each other"
                    )
                return None
        return Tap("", "input", min(keys, key=lambda k: len(self.example[k])))

    def _mask(self, tower: SeenTower, links: Sequence[Link], sights: list[Sight]) -> tuple[Tap | None, Tensor | None]:
        """Where the mask of valid tokens is seen, and which tokens of the example are valid by it, (B, L)."""
        own = self._inputs(tower, stream_only=True)  # a mask of what another tower reads is not this one's
        bits = {k: 1 << self.recording.inputs[k] for k, of in self.hidden.masks.items() if not of or set(of) & set(own)}
        acting = [k for k, bit in bits.items() if any(t.origins & bit for _, t in tower.given)]
        if acting:
            leak = self._leak(tower, acting)
            tap, valid, why = mask_of(self.recording, self.hidden.masks, links, acting, sights, leak)
        else:
            others = [k for k in self._inputs(tower) if k not in own and k not in self.hidden.masks]
            tap, valid, why = None, None, untold(self.example, others, links, sights)
        if why and "mask" not in tower.unknown:
            tower.unknown["mask"], tower.may_hide = why, tuple(acting) or None
        return tap, valid

    def _leak(self, tower: SeenTower, acting: Collection[str]) -> str:
        """Why it cannot be said that masks hide what is 0 in them; empty if it can."""
        seen = [
            found[tower.name] for found, changed in zip(self.leaks, self.hidden.changed, strict=True)
            if tower.name in found and any(self.hidden.alters(changed, k) for k in acting)
        ]  # fmt: skip
        if seen and not any(seen):
            return ""
        why = "but what stands there is still seen by others" if seen else "but that could not be seen"
        return f"{' and '.join(acting)} reach it and were made to hide a token, {why}"

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
