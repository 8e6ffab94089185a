"""Calibration: a model, the data that pruners look at it with, and the gradients of its loss on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Anatomy, Weight
from trimtab.anatomy.weights import bare
from trimtab.methods.fitting import evaluating
from trimtab.methods.prune.products import Products, one_by_one
from trimtab.methods.session import Session, own_loss
from trimtab.precision import half_of
from trimtab.progress import progress

Batch = dict[str, Any]


@dataclass
class Calibration:
    """A model and the data that pruners calibrate it on.

    Attributes:
        with_task: what is called, as `with_task(**batch)`.
        plain: the plain model inside it (or the same), to which the anatomy's paths belong.
        anatomy: of the plain model.
        source: gives an iterator over the batches, from the first one on.
        batches: how many batches a round takes; None: divide all that there are.
        loss: from the model's output to a scalar.
        precision: `fp32`, `bf16` (autocast) or `auto` of the model's passes; sums are in single precision all the same.
    """

    with_task: nn.Module
    plain: nn.Module
    anatomy: Anatomy
    source: Callable[[], Iterable[Batch]]
    batches: int | None = None
    loss: Callable[[Any], Tensor] = own_loss
    precision: str = "fp32"
    _ahead: tuple[Batch, Iterator[Batch]] | None = field(default=None, init=False, repr=False)
    _seen: list[Weight] | None = field(default=None, init=False, repr=False)
    alike: bool = field(default=False, init=False)  # whether all processes must be given the same batches
    blind: bool = field(default=False, init=False)  # whether there was something to look at, and no data to see it on

    @classmethod
    def of(cls, session: Session, batches: int, batch_size: int, precision: str = "fp32",
           once: int = 0) -> Calibration:  # fmt: skip
        """On the training data of a recipe's session.

        Args:
            session: gives endless batches: after the last row the first comes again.
            batches: how many a round takes.
            batch_size: rows a batch.
            precision: of the passes.
            once: if not 0: so many rounds together go at most once over the data, and take fewer batches for that, so
                that halves of a round have no rows in common.

        Raises:
            ValueError: if the data have no two batches a round, or it is not known how many they have.
        """
        if once:
            rows = session.rows("train") if hasattr(session, "rows") else None
            if rows is None:
                raise ValueError(
                    f"until: how many rows a {type(session).__name__} has before they begin again is not known, and "
                    "halves of the data must not share any: give `fit.prune` batches that end"
                )
            batches = min(batches, rows // batch_size // once)
            if batches < 2:
                raise ValueError(
                    f"until: {rows} rows have no 2 batches of {batch_size} for each of {once} rounds of calibration: "
                    "lower batch_size (or `steps`), or leave `until` out"
                )
        source = partial(session.batches, "train", batch_size)
        return cls(session.with_task, session.plain, session.anatomy, source, batches, precision=precision)

    def output(self, batch: Batch) -> Any:
        """What the model makes of a batch."""
        half = half_of(self.precision)
        with torch.autocast(next(self.with_task.parameters()).device.type, half, enabled=half is not None):
            return self.with_task(**batch)

    def seen(self, weights: list[Weight]) -> list[Weight]:
        """Matrices among the parameters of which nothing but a pass tells what they are, as the first batch shows them.

        Args:
            weights: the prunable matrices that are known without a pass.

        Returns:
            Parameters in blocks that are multiplied by and not used in any other way, one `Weight` an expert where a
            parameter holds several; none without data.
        """
        if self._seen is None:
            parameters = bare(self.anatomy, self.plain, weights)
            self._seen = self._watch(parameters) if parameters else []
        return self._seen

    def _watch(self, parameters: dict[str, nn.Parameter]) -> list[Weight]:
        iterator = iter(self.source())
        batch = next(iterator, None)
        if batch is None:
            self.blind = True
            return []
        self._ahead = (batch, iterator)
        ways: dict[str, set[bool]] = {}
        products = Products(parameters, lambda p: ways.setdefault(p.path, set()).add(p.transposed))
        with evaluating(self.with_task), one_by_one(self.plain), torch.no_grad(), products:
            self.output(_checked(batch, 1))
        found = []
        for path, (transposed, *more) in ways.items():
            if not more and path not in products.other:
                module, _, name = path.rpartition(".")
                modality = self.anatomy.modality(module)
                assert modality is not None  # of parameters in blocks of towers
                parts = range(len(parameters[path])) if parameters[path].ndim == 3 else (None,)
                found += [Weight(module, name, modality, transposed, expert=i) for i in parts]
        return found

    def _source(self) -> Iterable[Batch]:
        """The batches from the first on, what was looked at ahead among them."""
        ahead, self._ahead = self._ahead, None
        return self.source() if ahead is None else chain(ahead[:1], ahead[1])

    def rounds(self, count: int = 1) -> Iterator[Iterator[Batch]]:
        """The batches of each of `count` rounds, beginning with the first batch; take all of a round before the next.

        Raises:
            ValueError: while a round is taken, if the data end before it does, or there are none.
        """
        size = self.batches
        source = self._source()
        if size is None and count > 1:
            source = source if hasattr(source, "__len__") else list(source)
            size = len(source) // count  # type: ignore[arg-type]
            if not size:
                raise ValueError(
                    f"{count} rounds of calibration need a batch each, found {len(source)} batches in all: "  # type: ignore[arg-type]
                    "give more batches, or set fewer `steps`"
                )
        iterator = iter(source)
        for i in range(count):
            yield self._round(iterator, size, i)

    def _round(self, iterator: Iterator[Batch], size: int | None, number: int) -> Iterator[Batch]:
        found = 0
        with progress("calibration", size, "batch") as job:
            for batch in islice(iterator, size):
                found += 1
                if self.alike:
                    processes.same_batches([batch], f"from {found} on")
                yield _checked(batch, found)
                job.update(found)
        if not found and not number:
            raise ValueError("the calibration data are empty: expected at least one batch (was an iterator used up?)")
        if size is not None and found < size:
            raise ValueError(
                f"the calibration data ended after {found} of the {size} batches of round {number + 1}: "
                "give more data, or ask for fewer batches"
            )


def _checked(batch: Any, number: int) -> Batch:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration batch {number}: expected a dict of the model's keyword arguments, found "
            f"{type(batch).__name__}; give dicts such as {{'pixel_values': ..., 'input_ids': ...}}"
        )
    return dict(batch)


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(calibration: Calibration, weights: Iterable[Weight], batches: Iterable[Batch | None],
              train: bool = False) -> Iterator[Any]:  # fmt: skip
    """The loss's gradient at each matrix (out, in) for one batch after another, in single precision or better.

    Only the weights require gradients meanwhile; what required them before, gradients that were there, and the running
    statistics that training mode moves come back.
    A weight that the loss does not depend on has the gradient 0.

    Args:
        calibration: the model with its loss.
        weights: of which gradients are wanted.
        batches: one dictionary of gradients each; None, that of a process which has no batch left, gives None.
        train: compute the loss in training mode.

    Raises:
        ValueError: if the loss or a gradient is not finite, or depends on none of the weights.
    """
    weights = list(weights)
    found = {w.path: w.of(calibration.plain) for w in weights}
    everything = list(calibration.with_task.parameters()) + list(found.values())
    required = [(p, p.requires_grad) for p in everything]
    held = [(p, p.grad) for p in found.values()]
    running = [(b, b.clone()) for b in calibration.with_task.buffers()] if train else []
    try:
        for p in everything:
            p.requires_grad_(False)
        for p in found.values():
            p.requires_grad_(True)
            p.grad = None
        for own, batch in enumerate(batches):
            if batch is None:
                yield None
                continue
            number = processes.number(own)
            with evaluating(calibration.with_task, train), torch.enable_grad():
                loss = calibration.loss(calibration.output(batch))
                _check_loss(loss, number, calibration, batch)
                loss.backward()
            whole = {path: _gradient(path, p, number) for path, p in found.items()}
            yield {w: w.matrix(whole[w.path]) for w in weights}
    finally:
        for p, needed in required:
            p.requires_grad_(needed)
        for p, gradient in held:
            p.grad = gradient
        for buffer, value in running:
            buffer.copy_(value)


def _check_loss(loss: Tensor, number: int, calibration: Calibration, batch: Batch) -> None:
    if loss.numel() != 1:
        raise ValueError(f"calibration batch {number}: expected a scalar loss, found the shape {tuple(loss.shape)}")
    if not torch.isfinite(loss.detach()):
        raise ValueError(
            f"calibration batch {number}: the loss is {float(loss.detach())}; {_first_not_finite(calibration, batch)}"
        )
    if not loss.requires_grad:
        raise ValueError("the loss depends on none of the prunable weights: is it computed without gradients?")


def _first_not_finite(calibration: Calibration, batch: Batch) -> str:
    """Where a forward pass leaves the finite numbers, for an error message."""
    found: list[str] = []

    def look(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
            found.append(path)

    handles = [m.register_forward_hook(partial(look, path)) for path, m in calibration.plain.named_modules() if path]
    with torch.no_grad():
        calibration.output(batch)
    for handle in handles:
        handle.remove()
    if not found:
        return "every module's output is finite: check the batch's targets and the loss"
    return f"the first output that is not finite is that of '{found[0]}': check the batch and that module's weights"


def _gradient(path: str, parameter: nn.Parameter, number: int) -> Tensor:
    found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = None
    if not torch.isfinite(found).all():
        raise ValueError(
            f"calibration batch {number}: the gradient of '{path}' is not finite; "
            "use single precision, or a loss that stays finite"
        )
    return found if found.dtype == torch.float64 else found.float()
