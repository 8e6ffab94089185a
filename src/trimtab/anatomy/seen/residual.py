"""The residual stream inside a recorded call: from what a block returns back to its argument, sum by sum.

    x --+--------------(+)--[norm]--+--------------(+)--[norm]--> out        [norm]: there in post-norm blocks only
        +--> part one --+           +--> part two --+

A step back leads through a sum to the side that comes from the stream; the other side is what was added. It leads
through norms, and through whatever treats each element by itself (activations, masks, scales by a parameter). It ends
where values are multiplied with each other or with a matrix: what comes before that is not the stream. A stream may be
cut into pieces of its tokens, each with parts of its own, and put together again; other tokens may stand beside its own
for a while; and one that is the same for all samples may become one of each, when something of each is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy.seen.provenance import Node

# Operations after which the same values stand in the same order, whatever the shape is.
_SAME = {"view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "detach", "clone", "_to_copy", "squeeze",
         "unsqueeze", "lift_fresh"}  # fmt: skip
# Those that are so if the shape stays: a slice of everything, a padding by nothing.
_SAME_SHAPE = {"slice", "expand", "constant_pad_nd"}
_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
          "_fused_rms_norm", "rms_norm", "batch_norm", "cudnn_batch_norm", "_batch_norm_impl_index"}  # fmt: skip
_BY_CHANNEL = _NORMS - {"native_layer_norm", "_fused_rms_norm", "rms_norm"}
_FUSED = {"addmm", "baddbmm", "addbmm", "addmv", "addcmul", "addcdiv"}  # their first argument is added to a product
_SUMS = {"add", "sub"}
_PIECES = {"slice", "split", "split_with_sizes"}  # some of the tokens; `cat` puts pieces together


def root(node: Node) -> Node:
    """The node that first held the same values in the same order."""
    while (node.op in _SAME or node.op in _SAME_SHAPE) and node.args and isinstance(node.args[0], Node):
        before = node.args[0]
        if node.op in _SAME_SHAPE and before.shape != node.shape:
            break
        node = before
    return node


@dataclass(eq=False)
class Sum:
    """A sum on the stream: stream before + factor * addend.

    Attributes:
        node: the sum.
        addend: what is added; None if it is no tensor of its own (fused with the product that gives it).
        factor: 1, or what a sum with a weight or a difference multiplies it by.
    """

    node: Node
    addend: Node | None
    factor: float = 1.0


@dataclass(eq=False)
class Stream:
    """A stream through a block.

    Attributes:
        nodes: its values in the order of computation, the argument first, what is returned last; each a `root`.
        sums: the sums among them.
        notes: what is added without being a part: values spread over tokens.
    """

    nodes: list[Node]
    sums: list[Sum]
    notes: list[str]

    @property
    def source(self) -> Node:
        return self.nodes[0]


class BrokenStream(Exception):
    """What a block returns does not come from its argument by sums; the message says where that ends."""


def follow(out: Node, source: Node) -> Stream:
    """The stream from an argument `source` of a call to what it returned, `out`.

    Raises:
        BrokenStream: if there is no such way, or more than one.
    """
    known: dict[Node, bool] = {source: True}
    nodes, sums, notes = {source}, [], []
    todo = [root(out)]
    while todo:
        node = todo.pop()
        if node in nodes:
            continue
        nodes.add(node)
        steps = [s for s in _steps(node) if _reaches(s[0], source, known)]
        if not steps:
            raise BrokenStream(f"the stream cannot be followed through '{node.op}' in '{node.where}'")
        if len(steps) > 1 and node.op != "cat":
            raise BrokenStream(
                f"both sides of a sum in '{node.where}' carry the stream on: there is no one way through"
            )
        for before, found in steps:
            if found is not None:
                sums.append(found)
            elif node.op == "add" and (other := _spread(node, before)):
                notes.append(f"a value of shape {tuple(other.shape)} that depends on the block's input is added to "
                             f"every token in '{node.where}': it is no part of (B, L, D)")  # fmt: skip
            todo.append(before)
    return Stream(sorted(nodes, key=lambda n: n.index), sorted(sums, key=lambda s: s.node.index), notes)


def begun(out: Node, source: Node) -> Stream | None:
    """The stream that leaves a block in which it begins, as where the width changes: back from what is returned, as far
    as of the two sides of each sum one is computed from the other. None if no sum is on the way, or a way leads back to
    the argument."""
    nodes: list[Node] = [root(out)]
    sums: list[Sum] = []
    if _reaches(nodes[0], source, {source: True}):
        return None
    while True:
        steps = list(_steps(nodes[-1]))
        if len(steps) == 2:  # of a sum
            behind = {before: ancestors(f.addend) for before, f in steps if f is not None and f.addend is not None}
            steps = [(before, found) for before, found in steps if before in behind.get(before, ())]
        if len(steps) != 1:
            return Stream(nodes[::-1], sums[::-1], []) if sums else None
        before, found = steps[0]
        if found is not None and found.addend is None:  # what is fused with a product is no stream of its own
            return Stream(nodes[::-1], sums[::-1], []) if sums else None
        sums += [] if found is None else [found]
        nodes.append(before)


def _reaches(node: Node, source: Node, known: dict[Node, bool]) -> bool:
    """Whether steps back from a node lead to `source`."""
    todo = [node]
    while todo:
        if todo[-1] in known:
            todo.pop()
            continue
        steps = [before for before, _ in _steps(todo[-1])]
        if missing := [b for b in steps if b not in known]:
            todo.extend(missing)
        else:
            known[todo.pop()] = any(known[b] for b in steps)
    return known[node]


def _steps(node: Node) -> Iterator[tuple[Node, Sum | None]]:
    """Ways back along a stream: (the root before, the sum if this is one)."""
    if node.op in _NORMS or node.op in _FUSED:
        if isinstance(node.args[0], Node) and node.args[0].sources and node.args[0].shape == node.shape:
            yield root(node.args[0]), Sum(node, None) if node.op in _FUSED else None
        return
    if (pair := summed(node, grown=True)) is not None:
        for (stream, weight), (addend, factor) in (pair, pair[::-1]):
            if weight == 1.0 and addend.shape == node.shape:
                yield root(stream), Sum(node, root(addend), factor)
        return
    if node.op in _PIECES or node.op == "cat":
        whole = node.args[0] if node.op == "cat" else node.args[:1]
        pieces = [p for p in whole if isinstance(p, Node) and p.sources]
        if all(len(p.shape) == len(node.shape) and p.shape[-1] == node.shape[-1] for p in pieces):
            yield from ((p, None) for p in dict.fromkeys(map(root, pieces)))
        return
    if not node.pointwise:
        return
    whole = [p for p in node.parents if p.sources and p.shape == node.shape and p.value.is_floating_point()]
    if len(whole) == 1:
        yield root(whole[0]), None


def summed(node: Node, grown: bool = False) -> tuple[tuple[Node, float], tuple[Node, float]] | None:
    """The two values that a node is the sum of, each with its factor; None if it is no sum of two whole values.

    Args:
        node: of any operation.
        grown: whether one of the two may have one row, which is added to every row of the other.
    """
    if node.op not in _SUMS or not all(isinstance(a, Node) for a in node.args[:2]):
        return None
    first, second = node.args[:2]
    alpha = float(node.kwargs.get("alpha", 1.0)) * (1.0 if node.op == "add" else -1.0)
    shapes = {node.shape, torch.Size((1, *node.shape[1:]))} if grown and len(node.shape) > 2 else {node.shape}
    whole = all(p.sources and p.shape in shapes for p in (first, second))
    return ((first, 1.0), (second, alpha)) if whole and node.shape in (first.shape, second.shape) else None


def scaled(node: Node) -> tuple[Node, Node | float] | None:
    """(value, factor) of a node that is a whole value times something smaller or constant; None if it is not."""
    if node.op not in ("mul", "div") or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    for value, factor in ((a, b), (b, a)) if node.op == "mul" else ((a, b),):
        if isinstance(value, Node) and value.sources and value.shape == node.shape:
            if isinstance(factor, Node) and factor.sources and factor.shape == node.shape:
                continue
            if isinstance(factor, Node):
                return (value, factor) if node.op == "mul" else None
            return value, float(factor) if node.op == "mul" else 1.0 / float(factor)
    return None


def shifted(node: Node) -> Node | None:
    """The value of a node that is it and a constant; None if it is not."""
    if node.op not in _SUMS or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = (*node.args[:2], None)[:2]
    for value, other in ((a, b), (b, a)) if node.op == "add" else ((a, b),):
        constant = not isinstance(other, Node) or not other.sources
        if isinstance(value, Node) and value.sources and value.shape == node.shape and constant:
            return value
    return None


def _spread(node: Node, before: Node) -> Node | None:
    """What a sum adds to the stream that is smaller than it and no constant."""
    others = [p for p in node.parents if p.sources and root(p) is not before]
    return next((p for p in others if p.shape[-1:] != (1,)), None)


def ancestors(node: Node, stop: set[Node] = frozenset()) -> set[Node]:  # type: ignore[assignment]
    """Every node that a node was computed from, itself included; what lies behind `stop` is left out."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.add(one)
        if one not in stop:
            todo.extend(one.parents)
    return found


# --- which axis holds the channels ------------------------------------------------------------------------------------


def channel_axes(stream: Node, nodes: set[Node]) -> set[int]:
    """Which axes of a stream are taken for channels by what first works on it with weights: one, if all is clear.

    Args:
        stream: the stream that enters the block.
        nodes: what was computed in the block.
    """
    places = (_carried(before, axis % len(before.shape), stream) for n in nodes for before, axis in _weighed(n))
    return {axis for axis in places if axis is not None}


def _weighed(node: Node) -> Iterator[tuple[Node, int]]:
    """(value, axis of its channels) for an operation that works on a value with weights."""
    args = node.args

    def is_data(i: int) -> bool:
        return i < len(args) and isinstance(args[i], Node) and bool(args[i].sources)

    if node.op in ("mm", "bmm", "linear") and is_data(0) and not is_data(1):
        yield args[0], -1
    elif node.op in ("addmm", "baddbmm") and is_data(1) and not is_data(2):
        yield args[1], -1
    elif node.op == "native_layer_norm" and is_data(0) and len(args[1]) == 1:
        yield args[0], -1
    elif (node.op == "convolution" and is_data(0) and not is_data(1)) or (node.op in _BY_CHANNEL and is_data(0)):
        yield args[0], 1
    elif node.op in ("mul", "add"):
        yield from _by_vector(node)


def _by_vector(node: Node) -> Iterator[tuple[Node, int]]:
    a, b = (*node.args, None, None)[:2]
    for value, vector in ((a, b), (b, a)):
        if isinstance(value, Node) and isinstance(vector, Node) and value.sources and not vector.sources:
            long = [i - len(vector.shape) for i, n in enumerate(vector.shape) if n > 1]
            if len(long) == 1 and value.shape == node.shape:
                yield value, long[0]


def _carried(node: Node, axis: int, stream: Node) -> int | None:
    """Where an axis of a value stood in the stream that it was made of; None if it was made of something else."""
    while node is not stream:
        before: Any = node.args[0] if node.args else None
        if node.op == "cat":  # other tokens beside its own
            before = next((p for p in before if isinstance(p, Node) and stream in ancestors(p)), None)
        if not isinstance(before, Node):
            return None
        if node.op in ("permute", "transpose", "t"):
            axis = _turned(node, axis, len(before.shape))
        elif node.op == "constant_pad_nd":
            pass
        elif node.op in _SAME or node.op in _SAME_SHAPE or node.op in ("roll", "index", "cat"):
            if node.shape != before.shape:
                if axis != len(node.shape) - 1 or node.shape[-1] != before.shape[-1]:
                    return None
                axis = len(before.shape) - 1
        elif not (node.op in _NORMS or (node.pointwise and before.shape == node.shape)):
            return None
        node = before
    return axis


def _turned(node: Node, axis: int, rank: int) -> int:
    if node.op == "permute":
        return node.args[1][axis] % rank
    a, b = (0, 1) if node.op == "t" else (node.args[1] % rank, node.args[2] % rank)
    return {a: b, b: a}.get(axis, axis)


def factor_of(node: Node, parameters: set[int]) -> Tensor | str:
    """The values of a constant factor: a parameter, or what is computed from parameters alone (a gate, `tanh(g)`); or
    why they may be anything, zero included.

    Args:
        node: what a value is multiplied by.
        parameters: `id` of all parameters and buffers of the block.
    """
    first = root(node)
    if first.sources:
        return "it is multiplied by a value that depends on the block's arguments"
    behind = ancestors(first)
    if any(n.drawn for n in behind) or any(n.op != "constant" for n in behind if not n.parents):
        return f"it is multiplied by a factor that '{first.op}' makes of random or new numbers"
    if not all(id(n.value) in parameters for n in behind if n.op == "constant"):
        return f"it is multiplied by a factor that '{first.op}' computes from what is no parameter of the block"
    if not bool((first.value == 0).any()):
        return node.value
    made = "a parameter" if first.op == "constant" else f"what '{first.op}' makes of parameters, a gate"
    return f"it is multiplied by {made} that has zeros: what is added there does not arrive, and learns nothing"
