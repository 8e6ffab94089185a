"""Sums over the inputs of matrices, taken while the model is called.

Hooks see the inputs of linear modules, behind what LoRA wrapped around them; those of convolutions are the patches that
they read (convolutions.py). `nn.MultiheadAttention` multiplies without calling any module, so it is read around it: the
fused input projection's inputs are the module's own (query, key and value, each for its rows where they differ), and
the output projection's input is what the attention gives with an identity in that projection's place, which is then
applied outside.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Anatomy, Block, Tap, Tower, Weight, entering, read, read_stream
from trimtab.anatomy.calls import arguments
from trimtab.anatomy.structure import is_linear, plain_module, plain_modules
from trimtab.methods.prune.attention import batch_first, projecting_outside
from trimtab.methods.prune.calibration import Batch
from trimtab.methods.prune.convolutions import Convolutions, patch_sums
from trimtab.methods.prune.products import Product, Products, one_by_one
from trimtab.methods.prune.rows import gram, single, squares
from trimtab.methods.prune.totals import Means, Sum, Sums, Totals, rows_and_columns


class _Reduced(NamedTuple):
    """What an input was reduced to: its samples if it tells, and the sum over its valid tokens of x_j^2 or of x x^T."""

    input: weakref.ref[Tensor]
    version: int
    mask: Tensor | None
    samples: int | None
    total: Tensor


@dataclass
class InputSums:
    """Sums over the inputs of matrices while the model is called, in forward hooks: nothing of a batch is kept.

    Padding tokens are left out where an input is as long as its tower's mask, be it (B, L, in) or all tokens in one row
    (B L, in), and where it is what a block reads of another tower (`Tower.memory`, `Tower.memories`), by that tower's
    mask. Any other input is counted whole. Without a described memory nothing tells image tokens that a text tower
    attends to from text of the same length: the text's mask is applied.

    A context manager: the hooks are gone and the model is as before when it is left.

    Attributes:
        model: the model that the anatomy describes.
        anatomy: its description.
        weights: the matrices to watch.
        gram: sum x x^T, not only x^2.
        halved: sum the batches 1, 3, 5 ... by themselves, too.
    """

    model: nn.Module
    anatomy: Anatomy
    weights: list[Weight]
    gram: bool = False
    halved: bool = False

    def __enter__(self) -> InputSums:
        self.totals = Totals(self.model, self.weights, self.gram, self.halved)
        self.attention_masks: dict[str, Tensor | None] = {}
        self.sources: dict[str, Tensor | None] = {}
        self.memories: dict[str, dict[tuple[int, torch.Size], str]] = {}
        self.valid: dict[str, bool] = {}  # whether a masked tower was given a valid token in any batch
        self.last: _Reduced | None = None
        self.number = 1  # of the batch that the model is given
        self.stack = ExitStack()
        self.holders: dict[int, list[str]] = {}  # paths of the layers that hold a weight: several may share it
        for path, module in plain_modules(self.model):
            for own in module._parameters.values():
                if own is not None:
                    self.holders.setdefault(id(own), []).append(path)
        self.towers = {w: tower for w in self.weights if (tower := self.anatomy.owner(w.module))}
        places = {path for w in self.weights for path in self.holders.get(id(w.of(self.model)), [])}
        towers = [*self.towers.values(), *filter(None, map(self.anatomy.owner, sorted(places)))]
        names = {t.name for t in towers} | {t.memory for t in towers if t.memory}
        names |= {read for t in towers for _, read in t.memories}
        self.watched = [t for t in self.anatomy.towers if t.name in names]
        for tower in self.watched:
            tower.need("calibration", "samples")
        # torch's fused encoder layers call no module inside; hooks would see nothing.
        self.stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self.samples = self.stack.enter_context(entering(self.model, self.watched))
        for tower in self.watched:
            if tower.mask is not None:
                source = tower.mask_source or tower.mask
                self._hold(read(self.model, source, partial(self.sources.__setitem__, tower.name)))
                self._hold(read(self.model, tower.mask, partial(self.attention_masks.__setitem__, tower.name)))
                if tower.mask.rest:
                    self._hold(read_stream(self.model, tower.blocks[0], partial(self._widen, tower.name, tower.mask)))
            for block in tower.blocks if tower.memory else ():
                hook = partial(self._memory, tower, block)
                self._hold(self.model.get_submodule(block.path).register_forward_pre_hook(hook, with_kwargs=True))
        self.stacked: dict[tuple[str, int | None], Weight] = {}
        for weight in self.weights:
            if not weight.kernel and _called(plain_module(self.model, weight.module)):
                self._watch(weight)
            elif not weight.kernel:
                self.stacked[weight.path, weight.expert] = weight
        if self.stacked:
            parameters = {w.path: w.of(self.model) for w in self.stacked.values()}
            self.stack.enter_context(one_by_one(self.model))
            self.products = self.stack.enter_context(Products(parameters, self._product))
        if convolutions := [w for w in self.weights if w.kernel]:
            kernels = [w.of(self.model) for w in convolutions]
            self.stack.enter_context(Convolutions(kernels, lambda i, call: self._convolve(convolutions[i], call)))
        return self

    def __exit__(self, *error: object) -> None:
        self.last = None
        self.stack.close()

    def _hold(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def _widen(self, tower: str, tap: Tap, stream: Tensor) -> None:
        """Of a mask of some of a stream's tokens, (B, M), one of all, (B, L), from the first block on."""
        mask = self.attention_masks.get(tower)
        if isinstance(mask, Tensor):
            self.attention_masks[tower] = tap.whole(mask, stream.shape[1])

    def _memory(self, tower: Tower, block: Block, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note of which tower is what a block is given beside its stream, by where it lies."""
        stream = block.stream_of(module, args, kwargs)
        named = arguments(module, args, kwargs)
        rest = [("", x) for x in args if not any(x is known for known in named.values())]  # what went into `*args`
        reads, memory = dict(tower.memories), str(tower.memory)
        self.memories[tower.name] = {
            (x.data_ptr(), x.shape): reads.get(name, memory)
            for name, x in (*named.items(), *rest)
            if isinstance(x, Tensor) and x.ndim == 3 and x is not stream
        }

    def _watch(self, weight: Weight) -> None:
        """Look at a weight in every layer that holds it: each has its own tower, whose mask and samples count."""
        for path in self.holders[id(weight.of(self.model))]:
            owner, _, name = path.rpartition(".")
            parent, module = plain_module(self.model, owner), plain_module(self.model, path)
            tower = self.anatomy.owner(path)
            if isinstance(module, nn.MultiheadAttention):
                hook = partial(self._attention, weight, tower)
                self._hold(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
                self.stack.enter_context(projecting_outside(parent, module, partial(self._add_one, weight, tower)))
            elif _called(module):
                hook = partial(self._layer, weight, tower)
                self._hold(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _layer(self, weight: Weight, tower: Tower | None, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Add what a linear layer, which has one argument, is given."""
        self._add(weight, tower, [args[0] if args else next(iter(kwargs.values()))])

    def _product(self, product: Product) -> None:
        """Add what a bare parameter, or an expert, is multiplied with."""
        weight = self.stacked[product.path, product.expert]
        if product.transposed != weight.transposed:
            stored = "(in, out)" if product.transposed else "(out, in)"
            raise ValueError(
                f"'{weight}' was expected as {'(in, out)' if weight.transposed else '(out, in)'}, and is multiplied as "
                f"{stored}: leave '{weight.module}' out of the towers' scopes"
            )
        self._add(weight, self.towers.get(weight), [product.input])

    def _attention(self, weight: Weight, tower: Tower | None, module: nn.MultiheadAttention, args: tuple,
                   kwargs: dict) -> None:  # fmt: skip
        names = ("query", "key", "value")
        given = [args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names)]
        if weight.parameter != "in_proj_weight":  # q_proj_weight and so on: key and value have widths of their own
            given = [given["qkv".index(weight.parameter[0])]]
        elif given[0] is given[1] is given[2]:
            given = given[:1]
        self._add(weight, tower, [batch_first(x, module) for x in given])

    def _add_one(self, weight: Weight, tower: Tower | None, given: Tensor) -> None:
        self._add(weight, tower, [given])

    def _add(self, weight: Weight, tower: Tower | None, inputs: list[Tensor]) -> None:
        """Add the inputs (..., in) of a weight's parts, in a layer of a tower."""
        found = [self._reduced(given, self._mask(tower, given)) for given in inputs]
        samples = found[0].samples
        if samples is None:
            samples = self.samples.get(tower.name if tower else "", len(inputs[0]) if inputs[0].ndim > 1 else 1)
        self._sum(weight, tower, [f.total for f in found], samples)

    def _reduced(self, given: Tensor, mask: Tensor | None) -> _Reduced:
        """The sums of an input. Linear layers that are called on one tensor after another (query, key and value) share
        them; only a weak reference to the tensor is kept."""
        last, version = self.last, -1 if given.is_inference() else given._version
        if last and last.input() is given and last.version == version >= 0 and last.mask is mask:
            return last
        x = given.detach()
        samples = None if x.ndim < 3 else len(x)  # a layer that is given all tokens in one row does not say how many
        if mask is not None and not mask.all():
            if x.ndim == 3 and mask.shape == x.shape[:2]:
                x = x[mask.bool()]
            elif x.ndim == 2 and mask.numel() == len(x):
                x = x[mask.flatten().bool()]
        x = x.reshape(-1, x.shape[-1])
        total = gram(x) if self.gram else squares(x)
        self.last = _Reduced(weakref.ref(given), version, mask, samples, total)
        return self.last

    def _convolve(self, weight: Weight, call: dict[str, Any]) -> None:
        """Add the patches that a convolution is about to read; of a padded text (B, C, L) those of padding are zero."""
        x = single(call["input"].detach())
        x = x if x.ndim == call["weight"].ndim else x[None]
        tower = self.towers.get(weight)
        mask = self._mask(tower, x)
        if mask is not None and x.ndim == 3 and mask.shape == (x.shape[0], x.shape[2]):
            x = x.masked_fill(~mask.bool()[:, None], 0)
        with torch.no_grad():
            self._sum(weight, tower, patch_sums({**call, "input": x}, self.gram), len(x))

    def _mask(self, tower: Tower | None, x: Tensor) -> Tensor | None:
        """The mask of the tower that an input comes from: its layer's own, or the one whose output is read."""
        if tower is None:
            return None
        return self.attention_masks.get(self.memories.get(tower.name, {}).get((x.data_ptr(), x.shape), tower.name))

    def _sum(self, weight: Weight, tower: Tower | None, totals: list[Tensor], samples: int) -> None:
        """Add the sums of a weight's parts; the tower's samples count, where its description tells them."""
        if tower is not None and tower.samples is not None:
            samples = self.samples.get(tower.name, samples)
        self.totals.add(weight, totals, samples, self.number)

    def checked(self, batches: Iterable[Batch | None]) -> Iterator[Any]:
        """The same batches; what the model was given and what it computed is checked after each.

        Raises:
            ValueError: if a tower's mask was not given or is none of tokens, or inputs of a module are not finite.
        """
        for own, batch in enumerate(batches):
            self.attention_masks.clear()
            self.sources.clear()
            self.samples.clear()
            self.number = number = processes.number(own)
            yield batch
            if batch is None:
                continue
            for tower in self.watched:
                self._check_mask(tower, number, batch)
            for weight, parts in self.totals.sums.items():
                if not all(torch.isfinite(part.total).all() for part in parts):
                    raise ValueError(
                        f"calibration batch {number}: the inputs of '{weight.module}' are not finite (NaN or "
                        "infinite); check the batch, or run the model in single precision"
                    )

    def _check_mask(self, tower: Tower, number: int, batch: Batch) -> None:
        tap = tower.mask_source or tower.mask
        if tap is None:
            self._check_unmasked(tower, number, batch)
            return
        where = f"calibration batch {number}, tower {tower.name!r}"
        if self.sources.get(tower.name) is None:
            if tower.mask_required:
                raise ValueError(
                    f"calibration batch {number} has no mask of valid tokens for the tower {tower.name!r}: expected "
                    f"one at the {tap.side} {tap.key!r} of {repr(tap.path) if tap.path else 'the described model'}, "
                    f"found the batch's fields {sorted(batch)}; give the mask, or an anatomy whose tower has none"
                )
            return
        mask = self.attention_masks.get(tower.name)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{where}: expected a mask of valid tokens (B, L), found {found}; give one number a token")
        self.valid[tower.name] = self.valid.get(tower.name, False) or bool(mask.any())

    def _check_unmasked(self, tower: Tower, number: int, batch: Batch) -> None:
        """Where it is not known which tokens of a tower a mask hides, nothing may be hidden."""
        unknown = dict(tower.unknown).get("mask")
        named = [k for k in batch if "mask" in k] if tower.may_hide is None else tower.may_hide
        masks = {k: v for k in named if isinstance(v := batch.get(k), Tensor)}
        if unknown and (holes := next((k for k, v in masks.items() if not v.all()), None)):
            raise ValueError(
                f"calibration batch {number}: {holes!r} hides tokens, and which of tower {tower.name!r} these are is "
                f"unknown: {unknown}; give batches without padding, or describe the tower's mask"
            )

    def halves(self) -> tuple[Means, Means]:
        """As `result`, of the batches 1, 3, 5 ... and of the others; 0 where a half has no sample."""
        first, second = self.totals.halves(self._complete(self.totals.whole()))
        return self.totals.means(first), self.totals.means(second)

    def result(self) -> Means:
        """For each part of a weight its rows and what was summed, over all processes, divided by the samples' number.

        Raises:
            ValueError: if a module was never called during calibration. An expert to which no token was routed, of a
                module that was called, has sums of 0, and so has one that was called with no token.
        """
        return self.totals.means(self._complete(self.totals.whole()))

    def _complete(self, sums: Sums) -> Sums:
        """The sums with those of experts without a token; errors as of `result`."""
        if processes.world()[1] > 1:
            seen = processes.everywhere(self.valid)
            self.valid = {tower: any(one.get(tower) for one in seen) for one in seen for tower in one}
        if self.stacked and self.products.other:
            path, function = next(iter(self.products.other.items()))
            raise ValueError(
                f"'{path}' is not only multiplied by, it is also given to `{function}`: what its inputs are cannot be "
                "told; leave its module out of the towers' scopes"
            )
        reached = {path for (path, _), weight in self.stacked.items() if weight in sums}
        for (path, _), weight in self.stacked.items():
            if path in reached and weight not in sums:
                rows, columns = rows_and_columns(self.model, weight)
                size = (columns, columns) if self.gram else (columns,)
                sums[weight] = [Sum(rows, torch.zeros(size, device=weight.of(self.model).device), 1)]
        for tower, valid in self.valid.items():
            if not valid:
                raise ValueError(
                    f"calibration, tower {tower!r}: no batch's mask marks a token as valid; expected non-zero where a "
                    "token counts"
                )
        silent = sorted(str(w) for w in self.weights if w not in sums)
        if silent:
            raise ValueError(
                f"calibration never reached {len(silent)} layers, first '{silent[0]}': give batches that use "
                "them, or leave them out of the anatomy's towers"
            )
        return sums


def _called(module: nn.Module) -> bool:
    """Whether a module's inputs are what it is called with, or torch's attention, which is read around."""
    return isinstance(module, nn.MultiheadAttention) or is_linear(module)
