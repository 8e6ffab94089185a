"""Where the graph of a training step begins: at what is trained, and not before it.

    embeddings --(x)--> block 0 ... block k-1 --> block k, of which something is trained --> ...

transformers makes the output of embeddings require a gradient (`enable_input_require_grads`, as gradient checkpointing
and PEFT's `prepare_model_for_kbit_training` do), so that checkpointing of the older kind (`use_reentrant=True`) has a
graph to begin with. Nobody wants that gradient, and a frozen tower would keep a graph for it. So it is cut off before
the first block of a tower (x), except where the older kind needs it. There it is also made where a model lacks it (a
tower of pictures): weights inside checkpointed blocks would get no gradient otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from trimtab.anatomy import Anatomy, Block, pre_hook
from trimtab.anatomy.structure import module_at
from trimtab.methods.modes import graphless


class Beginnings:
    """Where the graphs of a tuned model's towers begin; `remove()` takes the hooks away.

    Args:
        model: the plain model.
        anatomy: its description.
        cut: names of towers through which no gradient passes.
        placed: paths of modules whose output a side network takes the place of: behind them is a graph again.
        around: what is called with batches: the model, or a module that holds it.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, cut: Collection[str], placed: Collection[str], around: nn.Module
    ):
        self.handles: list[RemovableHandle] = []
        self.still: list[nn.Module] = []
        for tower in anatomy.towers:
            if not tower.blocks:  # all of them are skipped
                continue
            blocks = [module_at(model, block.path) for block in tower.blocks]
            begin = Begin(tower.blocks[0], blocks, tower.name in cut, around)
            self.handles.append(pre_hook(model, tower.blocks[0].path, begin))
            if tower.name in cut:
                ends = [i for i, block in enumerate(tower.blocks, 1) if block.path in placed]
                self.still += blocks[: ends[-1] if ends else None]
        for block in self.still:
            graphless(block)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for block in self.still:
            graphless(block, False)
        self.handles, self.still = [], []


class Begin:
    """A hook before the first block of a tower: the stream with the gradient that training needs, and no other."""

    def __init__(self, block: Block, blocks: list[nn.Module], cut: bool, around: nn.Module):
        self.block, self.blocks, self.cut, self.around = block, blocks, cut, around
        self.detached = False  # by the last pass; the same is done when that pass is computed again

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        stream = self.block.stream_of(module, args, kwargs)
        if not stream.is_floating_point():
            return None
        if torch._C._current_graph_task_id() == -1:  # else a backward pass, which computes a forward pass again
            self.detached = stream.requires_grad and self._in_vain(stream)
        if self.detached:
            return self.block.with_stream(module, args, kwargs, stream.detach())
        if not stream.requires_grad and not self.cut and self._trained() and self._reentrant():
            return self.block.with_stream(module, args, kwargs, stream.detach().requires_grad_())
        return None

    def _in_vain(self, stream: Tensor) -> bool:
        """Whether nothing needs the stream's gradient."""
        if self.cut:
            return True
        asked = any(getattr(m, "_require_grads_hooks", None) for m in self.around.modules())
        return asked and not leads_to_parameters(stream) and not (self._trained() and self._reentrant())

    def _trained(self) -> bool:
        return any(p.requires_grad for block in self.blocks for p in block.parameters())

    def _reentrant(self) -> bool:
        """Whether any of the blocks is checkpointed in the older way, which asks for a gradient of what goes in."""
        return any(_older(m) for block in self.blocks for m in block.modules())


def _older(module: nn.Module) -> bool:
    if not module.training or getattr(module, "gradient_checkpointing", False) is not True:
        return False
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is not False


def leads_to_parameters(tensor: Tensor) -> bool:
    """Whether a graph hangs on a tensor that may end in a parameter: one of its leaves is, or a function of Python
    hides what it computed with (a checkpointed module)."""
    if tensor.grad_fn is None:
        return isinstance(tensor, nn.Parameter)
    known, todo = {tensor.grad_fn}, [tensor.grad_fn]
    while todo:
        node: Any = todo.pop()
        if isinstance(node, BackwardCFunction) or isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        more = {n for n, _ in node.next_functions if n is not None} - known
        known |= more
        todo += more
    return False
