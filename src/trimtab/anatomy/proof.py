"""What a part of a block does, told by running the block again with one value changed on the way.

something added at `write`        -> the sum must move by it, times the fixed factors between
some tokens of the stream changed -> other tokens move: the part mixes tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy.parts import Block, Sublayer, Tap
from trimtab.anatomy.provenance import Node, Trace, rerun
from trimtab.anatomy.residual import Sum, ancestors

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
        source: the node of the block's stream.
        memory: names of arguments from other towers; empty if that is not known.
        note: called with a sentence for everything that is worth to know.
    """

    SEED = 1

    def __init__(self, model: nn.Module, block: Block, args: tuple, kwargs: dict, trace: Trace, source: Node,
                 memory: set[str], note: Callable[[str], None]):  # fmt: skip
        self.model, self.block, self.args, self.kwargs = model, block, args, kwargs
        self.trace, self.source, self.memory, self.note = trace, source, memory, note

    def sublayers(self, parts: list[Part]) -> list[Sublayer]:
        """Those of the parts that can be proved, in their order; a note for each other one."""
        if not parts:
            return []
        before, plain = self._run(watch=[p.total.node for p in parts], taps=list({p.write for p in parts}))
        found = []
        for part in parts:
            assert part.read is not None
            try:
                self._arrives(part, before)
                found.append(Sublayer(self._kind(part, plain[part.write]), part.read, part.write, part.stream))
            except Unknown as error:
                self.note(f"the part that '{part.write.path}' puts out stays unknown: {error}")
        return found

    def _run(self, **options: Any) -> tuple[dict[Node, Tensor], dict[Tap, Tensor]]:
        torch.manual_seed(self.SEED)
        seen, kept, _ = rerun(self.model, self.block.path, self.args, self.kwargs, **options)
        return seen, kept

    def _arrives(self, part: Part, before: dict[Node, Tensor]) -> None:
        """Unknown unless what is added at a part's write arrives in the sum."""
        total = part.total.node
        if total not in before:
            raise Unknown("the block takes another way each time it runs")
        delta = torch.randn_like(before[total]) * size(before[total])
        after, _ = self._run(watch=[total], add=(part.write, delta))
        if total not in after:
            raise Unknown("the block takes another way when something is added there")
        for factor in part.factors:
            delta = delta * factor
        if not _close(after[total] - before[total], delta, size(before[total])):
            raise Unknown("what is added there does not arrive in the sum as it is")

    def _kind(self, part: Part, plain: Tensor) -> Kind:
        assert part.start is not None
        mixes = self._mixes(part, part.start, plain)
        behind = ancestors(part.value, {part.start})
        names = self._memories(behind)
        if not names:
            return "attention" if mixes else "mlp"
        if mixes and self._asks(behind, names):
            raise Unknown(f"it mixes tokens and reads {', '.join(names)} for more than keys and values")
        return "cross-attention"

    def _mixes(self, part: Part, start: Node, plain: Tensor) -> bool:
        """Whether tokens move that were not changed themselves.

        Raises:
            Unknown: if none moves at all, or if there is only one.
        """
        generator = torch.Generator().manual_seed(0)
        shape = part.total.node.shape
        count = shape[:-1].numel()
        if count < 2:
            raise Unknown("the example has one token, so that it cannot be told whether tokens mix: give a longer one")
        least = size(plain, largest=True) * torch.finfo(plain.dtype).eps ** 0.5
        moves = False
        for _ in range(2):
            some = torch.zeros(count, dtype=torch.bool)
            some[torch.randperm(count, generator=generator)[: count // 2]] = True
            for chosen in (some, ~some):
                # One step for all tokens, that a mean over tokens shows, and one for each, that differences show.
                by = torch.randn(shape, generator=generator) + torch.randn(shape[-1:], generator=generator)
                by = by * chosen.view(*shape[:-1], 1) * size(start.value)
                _, kept = self._run(at=start, by=by.to(plain.device, start.value.dtype), taps=[part.write])
                moved = (kept[part.write] - plain).nan_to_num().abs().amax(-1).flatten().cpu() > least
                if bool(moved[~chosen].any()):
                    return True
                moves = moves or bool(moved.any())
        if not moves:
            raise Unknown("it does not move when the stream changes, so that it cannot be told what it does")
        return False

    def _memories(self, behind: set[Node]) -> list[str]:
        """Arguments that a part reads beside the stream: those named, or what looks like another tower's output.

        Args:
            behind: what the part was computed from, back to the stream that it reads.
        """
        others = {n: g for n, g in self.trace.given.items() if g in behind and g is not self.source}
        if self.memory:
            return [n for n in others if n.split(".")[0] in self.memory]
        found = []
        for name, node in others.items():
            batched = len(node.shape) == 3 and node.shape[0] == self.source.shape[0] and node.value.is_floating_point()
            if batched and any(_weighs(n, node, self.source) for n in behind):
                found.append(name)
                self.note(f"its argument {name!r} is taken for another tower's output: it has the shape (B, M, C), "
                          "and weights multiply it before it meets the stream")  # fmt: skip
        return found

    def _asks(self, behind: set[Node], names: list[str]) -> bool:
        """Whether queries are computed from these arguments: of a product of two values, they come first."""
        for node in behind:
            if "scaled_dot_product" in node.op or node.op in ("bmm", "baddbmm", "matmul"):
                sides = [p for p in node.parents if p.sources]
                if len(sides) < 2 or any(n.op in ("_softmax", "_safe_softmax") for n in ancestors(sides[0])):
                    continue  # a product with weights of the layer, or with attention weights
                if not sides[0].sources.isdisjoint(names):
                    return True
        return False


def _weighs(node: Node, given: Node, stream: Node) -> bool:
    """Whether an operation multiplies an argument by weights that has not met the stream."""
    if node.op not in _PRODUCTS:
        return False
    sides = [p for p in node.parents if p.sources]
    return len(sides) == 1 and given in ancestors(sides[0]) and sides[0].sources.isdisjoint(stream.sources)


def size(value: Tensor, largest: bool = False) -> float:
    """The usual size of a value's elements, or the largest; 1 if they are all 0."""
    finite = value[value.isfinite()].float().abs()
    if not len(finite):
        return 1.0
    return float(finite.max() if largest else finite.mean()) or 1.0


def _close(moved: Tensor, expected: Tensor, usual: float) -> bool:
    finite = moved.isfinite()
    if not bool(finite.any()):
        return False
    limit = torch.finfo(moved.dtype).eps ** 0.5 * (usual + float(expected.abs().max()))
    return bool(((moved - expected)[finite].abs() <= limit).all())
