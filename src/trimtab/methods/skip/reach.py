"""Whether a model still runs without its skipped blocks, and still returns something of every tower.

A block may be the only one in which tokens see each other before the model reads one of them alone (PVT's last stage
with one block, of which the class token is read). Without it the model runs, and what it returns no longer depends on
its input. So each tower's stream is changed where it enters the first kept block: what the model returned moved before
and must move after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block
from trimtab.methods.skip.proof import same
from trimtab.methods.skip.running import Seen, run


class Reach:
    """The towers of a model of which something is in what it returns for a batch.

    Costs a forward pass, and one for each tower; the same again for `check`.

    Args:
        model: the plain model, with the blocks that will be skipped.
        anatomy: of it.
        skipped: paths of these blocks.
        with_task: what is called with the batch.
        batch: its keyword arguments.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, skipped: set[str], with_task: nn.Module,
                 batch: Mapping[str, Any]):  # fmt: skip
        self.model, self.skipped, self.with_task, self.batch = model, skipped, with_task, batch
        first = {t.name: next((b for b in t.blocks if b.path not in skipped), None) for t in anatomy.towers}
        self.first: dict[str, Block] = {name: block for name, block in first.items() if block is not None}
        self.before: set[str] = set()
        self.runs = False
        try:
            self.before = self._moving(run(with_task, batch)) if skipped else set()
        except Exception:  # a batch that the model does not run on says nothing about what comes
            return
        self.runs = True

    def check(self, name: str) -> None:
        """A ValueError unless the model runs without its skipped blocks, and returns something of each tower still.

        Args:
            name: of the method, for the message.
        """
        if not self.runs:
            return
        gone = ", ".join(sorted(self.skipped))
        another = "load it again, and skip other blocks (`plan=`, `towers=`)"
        try:
            now = self._moving(run(self.with_task, self.batch))
        except Exception as error:
            raise ValueError(
                f"{name}: {type(self.model).__name__} does not run without {gone} ({type(error).__name__}: {error}): "
                + another
            ) from error
        if lost := [t for t in self.first if t in self.before and t not in now]:
            raise ValueError(
                f"{name}: what {type(self.model).__name__} returns depends on tower {lost[0]!r}, and without {gone} no "
                f"longer: {another}"
            )

    def _moving(self, plain: Seen) -> set[str]:
        """The towers by whose streams what is returned moves, of those for which it is to be known."""
        return {name for name, block in self.first.items() if self._moves(block, plain)}

    def _moves(self, block: Block, plain: Seen) -> bool:
        """Whether what is returned moves with what enters a block."""

        def changed(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            stream = block.stream_of(module, args, kwargs)
            draw = torch.Generator(stream.device).manual_seed(0)
            noise = torch.randn(stream.shape, generator=draw, device=stream.device)
            return block.with_stream(module, args, kwargs, stream + (_spread(stream) * noise).to(stream.dtype))

        hook = self.model.get_submodule(block.path).register_forward_pre_hook(changed, with_kwargs=True)
        try:
            moved = run(self.with_task, self.batch)
        finally:
            hook.remove()
        return moved.keys() != plain.keys() or not all(same(moved[k], plain[k]) for k in plain)


def _spread(stream: Tensor) -> Tensor:
    return stream.float().std().clamp_min(1e-3)
