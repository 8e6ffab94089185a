"""The parts of a block, seen by running it: what is added into its stream, and what that was computed from.

A hand-written description says where the parts of a block read and write. Here it is found out: the block runs alone,
every tensor in it is followed (`provenance`), and the sums on its stream are taken apart (`residual`). Each result is
proved by running the block again: what is added at `write` must arrive in the sum, and what moves when some tokens of
the stream are changed tells whether the part mixes tokens. Names of modules decide nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trimtab.anatomy.calls import parameter_names, passed, stream_name
from trimtab.anatomy.parts import Block, Layout, Sublayer, Tap
from trimtab.anatomy.seen.memo import Memo
from trimtab.anatomy.seen.proof import Part, Proof, Unknown
from trimtab.anatomy.seen.provenance import Node, elements, record, rerun
from trimtab.anatomy.seen.residual import (
    BrokenStream,
    Stream,
    Sum,
    ancestors,
    begun,
    channel_axes,
    factor_of,
    follow,
    root,
    scaled,
    shifted,
    summed,
)
from trimtab.anatomy.structure import AnatomyError, module_at
from trimtab.randomness import begin, drawn_aside


@dataclass(frozen=True)
class SeenBlock:
    """What was seen of a block.

    Attributes:
        path: of the block.
        sublayers: its parts in the order of computation; those of which anything stayed unknown are left out.
        complete: whether these are all that is added into its streams; if not, `notes` say what else there is.
        keeps_shape: as in `Block`: shape kept, and nothing handed on but the stream and `also`.
        width: channels of its output; None if it was not seen which axis holds them.
        layout: `tokens` for (B, L, D) or (L, D), `grid` for (B, C, H, W), `map` for (B, H, W, D) and more axes of the
            kind; None for anything else, see `notes`.
        returns_tuple: as in `Block`.
        also: as in `Block`; `output_1` stands for a second element that is no argument, whatever it is called.
        made: which elements of what it returns are neither None nor an argument: attention weights, a position bias
            that it makes for all. `keeps_shape` is False with one; that nothing reads it cannot be seen from here.
        deterministic: whether it computes the same twice.
        notes: a sentence for everything that stayed unknown, and why; and for what is worth to know.
        settled: the value of the stream after which no part mixes tokens any more; None if that was not seen.
    """

    path: str
    sublayers: tuple[Sublayer, ...]
    complete: bool
    keeps_shape: bool
    width: int | None
    layout: Layout | None
    returns_tuple: bool
    also: tuple[str, ...]
    made: tuple[int, ...]
    deterministic: bool
    notes: tuple[str, ...]
    settled: Node | None = field(default=None, compare=False, repr=False)


def see_sublayers(
    model: nn.Module, block: Block, args: tuple, kwargs: dict, memory: Collection[str | int] = (),
    memo: Memo | None = None,
) -> SeenBlock:  # fmt: skip
    """Run a block alone, a few times, and tell its parts.

    Args:
        model: the whole model, in evaluation mode; nothing of it runs but the block.
        block: which; only `path` and `stream` are read.
        args: what it was called with by position in a forward pass, without a key-value cache; nothing is changed.
        kwargs: and by keyword.
        memory: names, or positions, of all arguments that come from another tower. Empty if that is not known: then a
            float (B, M, C) that weights multiply before it meets the stream is taken for one, with a note, if it gives
            the values of an attention.
        memo: of the block on these arguments, where it has run on them.

    Raises:
        AnatomyError: if a part of the block is in training mode, or if it was called without its stream.
    """
    module = module_at(model, block.path)
    if (training := next((n for n, m in module.named_modules() if m.training), None)) is not None:
        raise AnatomyError(
            f"block '{block.path}': expected it in evaluation mode, found '{training or 'itself'}' in training mode: "
            "call model.eval() first"
        )
    block.stream_of(module, args, kwargs)
    with torch.no_grad(), drawn_aside(), _module_by_module():
        return _Watch(model, block, args, kwargs, memory, memo or Memo(module)).see()


@contextmanager
def _module_by_module() -> Iterator[None]:
    """Torch's transformer layers compute all at once where no hook is set; what a method sets hooks on does not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class _Place:
    """A sum on a stream, and the shape in which its values are looked for."""

    stream: Stream
    total: Sum
    shape: torch.Size


class _Watch:
    """The looks at one block; `notes` grow on the way."""

    def __init__(self, model: nn.Module, block: Block, args: tuple, kwargs: dict, memory: Collection[str | int],
                 memo: Memo):  # fmt: skip
        self.memo = memo
        self.model, self.block, self.args, self.kwargs = model, block, args, kwargs
        self.module = module_at(model, block.path)
        name = stream_name(block.path, block.stream, self.module, args, kwargs)
        self.stream_argument = "0" if name is None else name
        names = parameter_names(self.module)
        self.memory = {names[m] if isinstance(m, int) and m < len(names) else str(m) for m in memory}
        self.own = {id(t) for t in (*self.module.parameters(), *self.module.buffers())}
        self.notes: list[str] = []

    def see(self) -> SeenBlock:
        first = self._alone(seed=0)  # also fills what is made once
        begin(Proof.SEED)
        with self.memo:
            self.trace = record(self.model, self.block.path, self.args, self.kwargs)
        same = _equal(first, self.trace.output)
        self.source = self.trace.given[self.stream_argument]
        also, made = self._returned()
        out = self.trace.outputs.get(next((key for key, _ in elements(self.trace.output)), 0))
        keeps = also is not None and not made and out is not None and out.shape == self.source.shape
        axis = None if out is None else self._axis(out)
        layout = self._layout(axis)
        found, complete = ([], False) if out is None or layout == "grid" else self._parts(out, also or ())
        if (found or complete or layout == "grid") and (why := self._unprovable(same, layout, axis)):
            self._note(why)
            found, complete = [], False
        proof = Proof(self.model, self.block, self.args, self.kwargs, self.trace, self.memory, self._note,
                      self.memo)  # fmt: skip
        sublayers = proof.sublayers(found)
        complete = complete and len(sublayers) == len(found)
        return SeenBlock(
            self.block.path, tuple(sublayers), complete, keeps,
            None if out is None or axis is None else out.shape[axis], layout,
            isinstance(self.trace.output, (tuple, list)), also or (), made, same, tuple(self.notes),
            _settled(found, sublayers) if complete and same else None,
        )  # fmt: skip

    def _unprovable(self, same: bool, layout: str | None, axis: int | None) -> str:
        """Why no part can be told; empty if they can."""
        if not same and not _equal(self._alone(Proof.SEED), self.trace.output):
            return "it keeps something from call to call and computes differently each time: its parts stay unknown"
        if layout == "grid":
            return "its stream is a grid (B, C, H, W): parts are told for tokens only"
        if axis != len(self.source.shape) - 1:
            return "its parts stay unknown, since its channels do not stand on the last axis"
        return ""

    def _alone(self, seed: int) -> object:
        begin(seed)
        try:
            with self.memo:
                return rerun(self.model, self.block.path, self.args, self.kwargs)[2]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise AnatomyError(
                f"block '{self.block.path}' ({type(self.module).__name__}) cannot be run by itself with what it was "
                f"called with, {passed(self.args, self.kwargs)}: {type(error).__name__}: {error}. Give it as in a pass "
                "without a key-value cache, and before anything was changed"
            ) from error

    def _note(self, text: str) -> None:
        sentence = f"block '{self.block.path}': {text}"
        if sentence not in self.notes:
            self.notes.append(sentence)

    # --- what goes in and comes out -----------------------------------------------------------------------------------

    def _returned(self) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
        """(arguments that are returned behind the stream, elements that are made anew); (None, ()) for no tuple."""
        output = self.trace.output
        if not isinstance(output, (Tensor, tuple, list)):
            self._note(f"it returns a {type(output).__name__}, expected its stream alone or a tuple")
            return None, ()
        also: list[str] = []
        made: list[int] = []
        for key, value in elements(output)[1:]:
            name = None if value is None else self._handed_on(self.trace.outputs.get(key))
            if name is None and value is not None:
                made.append(int(key))
                self._note(
                    f"element {key} of what it returns is none of its arguments: without the block it is missing"
                )
            also.append(name or f"output_{key}")
        return tuple(also), tuple(made)

    def _axis(self, out: Node) -> int | None:
        axes = channel_axes(self.source, ancestors(out))
        return axes.pop() if len(axes) == 1 else None

    def _handed_on(self, node: Node | None) -> str | None:
        """The argument that an element of the output carries on, changed by sums or not at all."""
        if node is None:
            return None
        for name, given in self.trace.given.items():
            if given is self.source or "." in name:
                continue
            try:
                follow(node, given)
            except BrokenStream:
                continue
            return name
        return None

    def _layout(self, axis: int | None) -> Layout | None:
        rank = len(self.source.shape)
        if axis is None:
            self._note("it was not seen which axis of its stream holds the channels")
            return None
        if axis == rank - 1 and rank > 1:
            return "tokens" if rank < 4 else "map"
        if axis == 1 and rank == 4:
            return "grid"
        self._note(f"its stream {tuple(self.source.shape)} has its channels on axis {axis}: neither (B, L, D), "
                   "(B, C, H, W) nor (B, H, W, D)")  # fmt: skip
        return None

    # --- the sums -----------------------------------------------------------------------------------------------------

    def _parts(self, out: Node, also: tuple[str, ...]) -> tuple[list[Part], bool]:
        """(parts of all streams in the order of computation, whether these are all)."""
        found: list[Part] = []
        complete = True
        streams = [(0, out, self.source)]
        streams += [(i + 1, self.trace.outputs[i + 1], self.trace.given[name]) for i, name in enumerate(also)
                    if name in self.trace.given]  # fmt: skip
        for number, end, start in streams:
            try:
                stream = follow(end, start)
            except BrokenStream as error:
                self._note(str(error))
                complete = False
                if (begins := begun(end, start)) is None:
                    continue
                stream = begins
            for text in stream.notes:
                self._note(text)
            complete = complete and not stream.notes
            for total in stream.sums:
                parts, whole = self._of_sum(stream, total, number)
                found += parts
                complete = complete and whole
        return sorted(found, key=lambda p: p.value.index), complete

    def _of_sum(self, stream: Stream, total: Sum, number: int) -> tuple[list[Part], bool]:
        where = f"what is added to the stream in '{total.node.where}' stays unknown: "
        if total.addend is None:
            self._note(f"{where}'{total.node.op}' multiplies and adds at once, so that no module puts it out")
            return [], False
        why = ""
        for shape in dict.fromkeys((stream.source.shape, total.node.shape)):  # as it is, else as the sum has it
            try:
                place = _Place(stream, total, shape)
                found = [self._reading(part, place, number) for part in self._addends(total.addend, place)]
            except Unknown as error:
                why = why or str(error)
                continue
            if len(shape) != len(stream.source.shape):
                self._note(f"'{found[0].write.path}' puts its part out in the shape {tuple(shape)}, the tokens of all "
                           "samples in one row")  # fmt: skip
            return found, True
        self._note(where + why)
        return [], False

    def _addends(self, node: Node, place: _Place) -> list[Part]:
        """The values of modules that a node is the sum of; Unknown if it is not one of such values."""
        node = root(node)
        if place.stream.source.sources.isdisjoint(node.sources):
            raise Unknown("it does not depend on the stream")
        computing, passing = self._putting_out(node, place)
        if computing:
            return [Part(computing[0], node, place.total, (place.total.factor,))]
        if (pair := summed(node)) is not None:
            try:
                return [p for side, factor in pair for p in self._times(self._addends(side, place), factor)]
            except Unknown:
                if not passing:
                    raise
        if passing:
            return [Part(passing[-1], node, place.total, (place.total.factor,))]
        if (inner := shifted(node)) is not None:
            return self._addends(inner, place)
        if (times := scaled(node)) is not None:
            value, factor = times
            known = factor_of(factor, self.own) if isinstance(factor, Node) else factor
            if isinstance(known, str):
                raise Unknown(known)
            found = self._times(self._addends(value, place), known)
            self._note(f"what '{found[0].write.path}' puts out is multiplied by a fixed factor before it is added to "
                       "the stream, and what is added to it is too")  # fmt: skip
            return found
        raise Unknown(f"no module that runs once puts it out in the shape of the stream (it comes from '{node.op}' in "
                       f"'{node.where}')")  # fmt: skip

    @staticmethod
    def _times(parts: list[Part], factor: Tensor | float) -> list[Part]:
        return [replace(p, factors=(*p.factors, factor)) for p in parts]

    def _putting_out(self, node: Node, place: _Place) -> tuple[list[Tap], list[Tap]]:
        """Outputs of modules that are this value: of those that compute it, outermost first; of those that hand it on.

        Only in that shape, and of modules that are called once: a hook there meets this value alone.
        """
        computing: list[Tap] = []
        passing: list[Tap] = []
        for call in self.trace.calls[1:]:
            for key, value in call.outputs.items():
                if root(value) is not node or value.shape != place.shape or not self.trace.once(call):
                    continue
                if call.exit > place.total.node.index:  # it has been added before the module returns it
                    continue
                handed_on = any(root(given) is node for given in call.inputs.values())
                (passing if handed_on else computing).append(Tap(call.path, key=key))
        return computing, passing

    # --- where a part reads -------------------------------------------------------------------------------------------

    def _reading(self, part: Part, place: _Place, number: int) -> Part:
        on_way = set(place.stream.nodes)
        behind = ancestors(part.value, on_way)
        starts = [n for n in place.stream.nodes if n in behind]
        if not starts:
            raise Unknown(f"what '{part.write.path}' puts out does not depend on the stream")
        if len(starts) > 1:
            raise Unknown(f"what '{part.write.path}' puts out was computed from the stream at {len(starts)} places")
        (start,) = starts
        tap = self._taking_in(start, behind, place) or self._given_out(start, part, place)
        if tap is None:
            raise Unknown(f"no module takes the stream in where the part before '{part.write.path}' begins")
        return replace(part, read=tap, start=start, stream=number)

    def _taking_in(self, start: Node, behind: set[Node], place: _Place) -> Tap | None:
        """The first and outermost module that takes the stream in and leads to the part, without the sum itself."""
        for call in self.trace.calls[1:]:
            if call.enter <= place.total.node.index < call.exit or not self.trace.once(call):
                continue
            if not any(root(v) in behind and root(v) is not start for v in call.outputs.values()):
                continue
            for key, value in call.inputs.items():
                if root(value) is start and value.shape in (place.shape, (1, *place.shape[1:])):
                    return Tap(call.path, "input", key)
        return None

    def _given_out(self, start: Node, part: Part, place: _Place) -> Tap | None:
        """The outermost module that puts the stream out there; the block itself where its argument is meant."""
        if start.op == "argument" and start.shape == place.shape:
            name = next(iter(start.sources))
            names = parameter_names(self.module)
            key = names.index(name) if name in names[: len(self.args)] else name
            return Tap(self.block.path, "input", int(key) if isinstance(key, str) and key.isdigit() else key)
        written = next(c.exit for c in self.trace.calls if c.path == part.write.path)
        for call in self.trace.calls[1:]:
            for key, value in call.outputs.items():
                if root(value) is start and value.shape == place.shape and call.exit <= written:
                    return Tap(call.path, key=key) if self.trace.once(call) else None
        return None


def _settled(parts: Sequence[Part], sublayers: Sequence[Sublayer]) -> Node | None:
    """The sum with the last part that may mix tokens, of parts of one stream, all of which were proved."""
    mixing = [part.total.node for part, seen in zip(parts, sublayers, strict=True) if seen.kind != "mlp"]
    return max(mixing, key=lambda n: n.index) if mixing and not any(part.stream for part in parts) else None


def _equal(a: object, b: object) -> bool:
    """Whether two outputs hold the same numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (tuple, list)) or hasattr(a, "items"):
        one, two = elements(a), elements(b)
        return len(one) == len(two) and all(_equal(x, y) for (_, x), (_, y) in zip(one, two, strict=True))
    return True
