"""What an adapted model costs on a batch of training, counted before training; and how it is shown to a person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from trimtab.anatomy import AnatomyError
from trimtab.anatomy.weights import left_whole
from trimtab.counting import count_macs, safetensors_size, saved_bytes
from trimtab.methods.modes import modes_kept
from trimtab.randomness import drawn_aside

if TYPE_CHECKING:
    from trimtab.methods.adapted import Adapted


@dataclass(frozen=True)
class Costs:
    """Counts for one training batch.

    Attributes:
        parameters: numbers in the model with its task, what methods added included.
        nonzero: those of them that no mask makes zero.
        trained: numbers that get a gradient.
        macs: multiply-adds of one forward pass of the batch.
        saved_bytes: what autograd keeps for the backward pass of the batch.
        disk_bytes: of the folder that `save` writes. A model that is pruned and nothing else is counted as it is; if
            all of it is trained afterwards, the weights that have changed come on top.
        idle: names of parameters that are called trained, but get no gradient from this batch's loss.
    """

    parameters: int
    nonzero: int
    trained: int
    macs: int
    saved_bytes: int
    disk_bytes: int
    idle: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trained / max(1, self.parameters)
        rows = [
            ("parameters", f"{self.parameters:,}"), ("not zero", f"{self.nonzero:,}"),
            ("trained", f"{self.trained:,} ({share:.2g} %)"), ("multiply-adds of the batch", f"{self.macs:,}"),
            ("saved for backward", f"{self.saved_bytes:,} bytes"), ("on disk", f"{self.disk_bytes:,} bytes"),
        ]  # fmt: skip
        if self.idle:
            rows.append(("called trained, no gradient", f"{len(self.idle)}: {', '.join(self.idle[:2])}, ..."))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def objective(output: Any, loss: Callable[[Any], Tensor] | None = None) -> Tensor:
    """A scalar to send gradients from: `loss(output)`, else the output's own `loss`, else the sum of its tensors."""
    if loss is not None:
        return loss(output)
    own = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = leaves or [x for x in vars(output).values() if isinstance(x, Tensor) and x.is_floating_point()]
    if not leaves:
        raise ValueError(
            f"the model's output ({type(output).__name__}) holds no tensor to count gradients from: give `loss`"
        )
    return torch.stack([x.float().sum() for x in leaves]).sum()


def count(fit: Adapted, batch: dict[str, Any], loss: Callable[[Any], Tensor] | None = None) -> Costs:
    """The costs of an adapted model; its mode, buffers and gradients and the random state are as before afterwards."""
    model = fit.with_task
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    held = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]  # running statistics move in training mode
    parameters = list(model.parameters())
    with drawn_aside(), modes_kept(model):
        try:
            model.eval()
            macs = count_macs(lambda: model(**batch))
            model.train()
            found: list[Tensor] = []

            def forward() -> Tensor:
                found.append(objective(model(**batch), loss))
                return found[-1]

            kept = saved_bytes(forward, model)
            idle = without_gradient(model, found.pop())
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
    if isinstance(parameters[0], FakeTensor):
        pruned = sum(m.state["prunable"] - m.state["kept"] for m in fit.methods if m.lever == "prune")
    else:
        pruned = 0 if fit.masks is None else fit.masks.prunable - fit.masks.kept
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in idle)
    return Costs(total, total - pruned, trained, macs, kept, disk_bytes(fit), tuple(idle))


def without_gradient(model: nn.Module, loss: Tensor) -> list[str]:
    """Names of trained parameters that a loss does not depend on."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        return list(trained)
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return [n for n, g in zip(trained, found, strict=True) if g is None]


def disk_bytes(fit: Adapted) -> int:
    """Bytes of the two files that `save` writes."""
    saved = fit.saved()
    return safetensors_size(saved.all_tensors()) + len(saved.text().encode())


def described(fit: Adapted) -> str:
    """An adapted model in a few lines: towers, where the description came from, what is attached, what is trained."""
    lines = [f"{type(fit.model).__name__}, {fit.anatomy.source}"]
    rows = [(t.name, t.modality, f"{len(t.blocks)} blocks", _widths(t), t.layout) for t in fit.anatomy.towers]
    widths = [max(len(row[i]) for row in rows) for i in range(5)] if rows else []
    how = "seen" if fit.anatomy.seen else "described"
    for tower, row in zip(fit.anatomy.towers, rows, strict=True):
        lines.append("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {how}: {told}"] if (told := tower.told()) else []
    lines += [f"  unknown: {sentence}" for sentence in fit.anatomy.unknown()]
    lines += _prunable(fit)
    lines += [f"  {m.lever}: {m.told()}" for m in fit.methods] or ["  nothing is attached yet"]
    parameters = list(fit.with_task.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    lines.append(f"  trained: {trained:,} of {sum(p.numel() for p in parameters):,} parameters")
    return "\n".join(lines)


def _prunable(fit: Adapted) -> list[str]:
    """What can be pruned and what never is, as lines."""
    try:
        weights = fit.anatomy.weights(fit.model)
        whole = left_whole(fit.anatomy, fit.model, fit.masks or ())
    except AnatomyError as error:
        return [f"  prunable: nothing: {error}"]
    matrices = {(w.path, w.expert): w.matrix(w.of(fit.model)).numel() for w in weights}
    return [f"  prunable: {sum(matrices.values()):,} numbers in {len(matrices)} matrices"] + [
        f"  never pruned: {kind}" for kind in whole
    ]


def _widths(tower: Any) -> str:
    return "width " + "-".join(map(str, sorted({b.width for b in tower.blocks})))
