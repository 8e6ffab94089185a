"""The small modules with which DAS works: bottleneck adapters beside kept blocks, one in place of a skipped block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.anatomy import Block, Tap, argument, read, rewrite


class Adapter(nn.Module):
    """LayerNorm -> Linear(D, b) -> ReLU -> Linear(b, D) [-> + input]; weights N(0, 0.02), biases 0 (DAS, `adapter.py`).

    Args:
        width: D of the stream, (B, L, D) in and out.
        bottleneck: b.
        residual: whether the input is added to the output.
        scale: factor of the output before the residual.
    """

    def __init__(self, width: int, bottleneck: int, residual: bool = False, scale: float = 1.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.residual, self.scale = residual, scale
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.down(self.norm(x)).relu()) * self.scale
        return x + out if self.residual else out


def add_parallel_adapters(model: nn.Module, block: Block, bottleneck: int) -> None:
    """Give every sublayer of a block an adapter that reads its input and is added to its output.

    They are stored in the block itself (`das_0`, `das_1`, ...), so that they go when the block goes.
    """
    owner = model.get_submodule(block.path)
    for i, part in enumerate(block.sublayers):
        adapter = Adapter(block.width, bottleneck)
        owner.add_module(f"das_{i}", adapter.to(next(owner.parameters()).device))
        seen: list[Tensor] = []  # the sublayer's input, from its read until its write in the same pass
        read(model, part.read, seen.append)
        rewrite(model, part.write, lambda out, adapter=adapter, seen=seen: out + adapter(seen.pop()))


class Skipped(nn.Module):
    """What stands in place of a skipped block: its adapter on the stream that the block would have carried on.

    It takes whatever the block took (masks, memories, caches) and uses the stream alone.
    """

    def __init__(self, block: Block, bottleneck: int):
        super().__init__()
        self.adapter = Adapter(block.width, bottleneck, residual=True)
        self.tap = Tap(block.path, "input", 0)
        self.keyword = block.stream
        self.returns_tuple = block.returns_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = kwargs[self.keyword] if self.keyword in kwargs else argument(self.tap, args, kwargs)
        out = self.adapter(stream)
        return (out,) if self.returns_tuple else out


class Switch(nn.Module):
    """A block and its replacement side by side, for the search: `skip` says which of them runs."""

    def __init__(self, block: nn.Module, replacement: Skipped):
        super().__init__()
        self.block, self.replacement = block, replacement
        self.skip = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.replacement if self.skip else self.block)(*args, **kwargs)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
