"""What a part of a block does, told by running the block again with one value changed on the way.

something added at `write`        -> the sum must move by it, times the fixed factors between
some tokens of the stream changed -> other tokens move: the part mixes tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy.parts import Block, Sublayer, Tap
from trimtab.anatomy.seen.memo import Memo
from trimtab.anatomy.seen.provenance import Node, Trace, elements, rerun
from trimtab.anatomy.seen.residual import Sum, ancestors
from trimtab.randomness import begin

Kind = Literal["attention", "cross-attention", "mlp"]
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")


class Unknown(Exception):
    """Why something stays unknown, as the end of a sentence."""


@dataclass(frozen=True)
class Part:
    """A part of a block while it is looked at.

    Attributes:
        write: the output that is added to the stream.
        value: the node of it.
        total: the sum.
        factors: by what it is multiplied on the way to the sum.
        read: where the stream enters the part.
        start: the node of it.
        stream: as in `Sublayer`.
    """

    write: Tap
    value: Node
    total: Sum
    factors: tuple[Tensor | float, ...] = ()
    read: Tap | None = None
    start: Node | None = None
    stream: int = 0


class Proof:
    """Tells the kinds of parts.

    Args:
        model: the whole model.
        block: the block.
        args: what it is called with by position.
        kwargs: and by keyword.
        trace: what was recorded of such a call, with the random numbers of `seed`.
        memory: names of arguments from other towers; empty if that is not known.
        note: called with a sentence for everything that is worth to know.
        memo: of the block, on what it is called with.
    """

    SEED = 1

    def __init__(self, model: nn.Module, block: Block, args: tuple, kwargs: dict, trace: Trace,
                 memory: set[str], note: Callable[[str], None], memo: Memo):  # fmt: skip
        self.memo = memo
        self.model, self.block, self.args, self.kwargs = model, block, args, kwargs
        self.trace, self.memory, self.note = trace, memory, note

    def sublayers(self, parts: list[Part]) -> list[Sublayer]:
        """Those of the parts that can be proved, in their order; a note for each other one."""
        if not parts:
            return []
        before, plain, _ = self._run(watch=[p.total.node for p in parts], taps=list({p.write for p in parts}))
        found = []
        for part in parts:
            assert part.read is not None
            try:
                self._arrives(part, plain[part.write], before)
                found.append(Sublayer(self._kind(part, plain[part.write]), part.read, part.write, part.stream))
            except Unknown as error:
                self.note(f"the part that '{part.write.path}' puts out stays unknown: {error}")
        return found

    def _run(self, **options: Any) -> tuple[dict[Node, Tensor], dict[Tap, Tensor], Any]:
        begin(self.SEED)
        with self.memo:
            return rerun(self.model, self.block.path, self.args, self.kwargs, **options)

    def _arrives(self, part: Part, plain: Tensor, before: dict[Node, Tensor]) -> None:
        """Unknown unless adding something at a part's write is the same as adding it to the sum."""
        total = part.total.node
        if total not in before:
            raise Unknown("the block takes another way each time it runs")
        delta = torch.randn(plain.shape, device=plain.device, dtype=plain.dtype) * size(before[total])
        arriving = delta
        for factor in part.factors:
            arriving = arriving * factor
        if not bool(arriving.any()):
            raise Unknown("it is multiplied by 0 before it is added")
        if torch.finfo(plain.dtype).eps < 1e-5:  # what arrives is taken away again
            _, _, out = self._run(add=(part.write, delta), at=total, by=-arriving)
            expected = self.trace.output
        else:  # in half precision the sum would not be what it was
            _, _, out = self._run(add=(part.write, delta))
            _, _, expected = self._run(at=total, by=arriving)
        for (key, one), (_, two) in zip(elements(out), elements(expected), strict=True):
            if isinstance(one, Tensor) and one.is_floating_point() and not _alike(one, two):
                raise Unknown(f"output {key} of the block is another one when something is added there than when it is "
                              "added to the sum: it goes elsewhere too")  # fmt: skip

    def _kind(self, part: Part, plain: Tensor) -> Kind:
        assert part.start is not None
        mixes = self._mixes(part, part.start, plain)
        way = _Way(part.value, part.start)
        names = self._memories(way, mixes)
        if not names:
            if mixes:
                return "attention"
            if way.products:
                raise Unknown(
                    "it multiplies values of tokens with each other, but no token moved another one: give an example "
                    "with more tokens, or name the arguments that come from another tower"
                )
            return "mlp"
        if mixes and any(query in way.made_of(self.trace.given[n]) for query, _ in way.products for n in names):
            raise Unknown(f"it mixes tokens and reads {', '.join(names)} for more than keys and values")
        return "cross-attention"

    def _mixes(self, part: Part, start: Node, plain: Tensor) -> bool:
        """Whether tokens move that were not changed themselves.

        Raises:
            Unknown: if none moves at all, or if there is only one.
        """
        generator = torch.Generator().manual_seed(0)
        shape = plain.shape if plain.numel() == start.shape.numel() else start.shape  # one row for all samples
        eps = torch.finfo(plain.dtype).eps
        least = (plain.nan_to_num().abs().amax(-1) * eps**0.5).clamp_min(size(plain) * eps).cpu()
        moves = False
        for i, some in enumerate(_halves(shape[:-1], generator)):
            # Of every second token along each axis, the next row has the others.
            for chosen in (some,) if not i and len(shape) > 2 and len(some) > 1 else (some, ~some):
                # One step for all tokens, that a mean over tokens shows, and one for each, that differences show.
                by = torch.randn(shape, generator=generator) + torch.randn(shape[-1:], generator=generator)
                by = by * chosen[..., None] * size(start.value)
                _, kept, _ = self._run(at=start, by=by.to(plain.device, start.value.dtype), taps=[part.write],
                                       stop=True)  # fmt: skip
                moved = (kept[part.write] - plain).nan_to_num().abs().amax(-1).cpu() > least
                if bool(moved[~chosen.expand_as(moved)].any()):
                    return True
                moves = moves or bool(moved.any())
        if not moves:
            raise Unknown("it does not move when the stream changes, so that it cannot be told what it does")
        if shape[:-1].numel() < 2 or (len(shape) > 2 and shape[1] == 1):
            raise Unknown("the example has one token, so that it cannot be told whether tokens mix: give a longer one")
        return False

    def _memories(self, way: _Way, mixes: bool) -> list[str]:
        """Arguments that a part reads beside the stream: those named, or what looks like another tower's output.

        That is a float (B, M, C) or (M, B, C) that weights multiply before it meets the stream. Position embeddings
        may be so too: where there is attention, it must give the values, else no token may have moved another one.
        """
        others = {n: g for n, g in self.trace.given.items() if g in way.nodes and g is not way.start}
        if self.memory:
            return [n for n in others if n.split(".")[0] in self.memory]
        found = []
        for name, given in others.items():
            shape, own = given.shape, way.start.shape
            batched = len(shape) == 3 and (shape[0] == own[0] or shape[1] == own[1] or own[0] == 1)
            if not batched or not given.value.is_floating_point() or not way.weighs(given):
                continue
            if any(value in way.made_of(given) for _, value in way.products) if way.products else not mixes:
                found.append(name)
                self.note(f"its argument {name!r} is taken for another tower's output: it has the shape (B, M, C), and "
                          "weights multiply it before it meets the stream")  # fmt: skip
        return found


class _Way:
    """How a part was computed from the stream that it reads.

    Attributes:
        nodes: everything on the way.
        products: (query, value) of every attention in it: values multiplied by a softmax of the query's products.
    """

    def __init__(self, value: Node, start: Node):
        self.start = start
        self.nodes = ancestors(value, {start})
        self._children: dict[Node, list[Node]] = {}
        for node in self.nodes - {start}:
            for parent in node.parents:
                self._children.setdefault(parent, []).append(node)
        self._made: dict[Node, set[Node]] = {}
        self.products = [pair for node in self.nodes if (pair := self._attention(node)) is not None]

    def made_of(self, given: Node) -> set[Node]:
        """What was computed from a value, on this way; the value included."""
        if given not in self._made:
            found, todo = {given}, [given]
            while todo:
                new = [n for n in self._children.get(todo.pop(), ()) if n not in found]
                found.update(new)
                todo.extend(new)
            self._made[given] = found
        return self._made[given]

    def weighs(self, given: Node) -> bool:
        """Whether weights multiply an argument that has not met the stream, but for standing beside it in one row."""
        return any(self._beside(side, given) for n in self.made_of(given) if (side := _weighed(n)) is not None)

    def _beside(self, node: Node, given: Node) -> bool:
        """Whether a value was made of an argument alone, or of it and the stream in one row."""
        todo, done = [node], set()
        while todo:
            node = todo.pop()
            if node is given:
                return True
            if node in done or node not in self.made_of(given):
                continue
            done.add(node)
            if node.op == "cat" or node not in self.made_of(self.start):
                todo.extend(node.parents)
            elif len(whole := [p for p in _data(node) if p.shape == node.shape or len(_data(node)) == 1]) == 1:
                todo.extend(whole)  # a norm multiplies a value by its own mean
        return False

    def _attention(self, node: Node) -> tuple[Node, Node] | None:
        if "scaled_dot_product" in node.op or node.op == "_native_multi_head_attention":
            return node.args[0], node.args[2]
        if node.op not in ("bmm", "baddbmm", "matmul"):
            return None
        weights, value = [a for a in node.args if isinstance(a, Node)][-2:]
        if not value.sources or not weights.sources:
            return None
        scores = [n for n in ancestors(weights, {self.start}) if n.op in ("_softmax", "_safe_softmax")]
        products = {n for s in scores for n in ancestors(s, {self.start}) if n.op in ("bmm", "baddbmm", "matmul")}
        queries = [[a for a in n.args if isinstance(a, Node)][-2] for n in products if len(_data(n)) > 1]
        return (queries[0], value) if queries else None


def _data(node: Node) -> list[Node]:
    return [p for p in node.parents if p.sources]


def _weighed(node: Node) -> Node | None:
    """What an operation multiplies by weights; None if it does no such thing."""
    sides = _data(node)
    return sides[0] if node.op in _PRODUCTS and len(sides) == 1 else None


def _halves(shape: torch.Size, generator: torch.Generator) -> Iterator[Tensor]:
    """Two ways to choose half of all tokens: every second one along each axis, and any."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
    yield places.sum(0) % 2 == 0
    count = shape.numel()
    some = torch.zeros(count, dtype=torch.bool)
    some[torch.randperm(count, generator=generator)[: count // 2]] = True
    yield some.view(shape)


def size(value: Tensor) -> float:
    """The usual size of a value's elements; 1 if they are all 0."""
    finite = value[value.isfinite()].float().abs()
    return (float(finite.mean()) if len(finite) else 0.0) or 1.0


def _alike(one: Tensor, two: Tensor) -> bool:
    """Whether two values differ by no more than rounding."""
    finite = one.isfinite() & two.isfinite()
    eps = torch.finfo(one.dtype).eps
    limit = 2 * eps**0.5 * size(one) + 4 * eps * torch.maximum(one.abs(), two.abs())
    return bool(finite.any()) and bool(((one - two).abs() <= limit)[finite].all())
