"""Masks: which weights stay. Keeping them on a model while it is trained, and in files.

A mask is boolean, of its weight's shape, True = kept. It is held as bits, and made when it is looked at; while a model
is trained, its masks are kept as booleans beside it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from trimtab import processes
from trimtab.anatomy.structure import under
from trimtab.files import replace_file
from trimtab.methods.prune.places import Places, check_complete, check_numbers, current_paths, find, note
from trimtab.storage.bits import Bits
from trimtab.storage.shards import open_safetensors

_FORMAT = "trimtab masks 1"
VALUES = ".values"  # suffix of the tensor that holds a weight's kept values, where a method has changed them


class Masks(Mapping[str, Tensor]):
    """What a pruner found: a boolean mask for each weight's path, and the kept weights where the pruner changed them.

    Paths are those of the plain model. A model to which masks are given may be wrapped, hold the plain model beside a
    task, carry LoRA or adapters, and be cast, moved or copied after `apply`. Of a model to which they were applied,
    blocks may be taken out afterwards: their masks have nothing to do then.

    `packed` is what a file of them holds: the masks as bits under the weights' paths, the changed values that are kept,
    in a row, under `PATH.values`.

    Attributes:
        bits: path of a parameter -> mask of its shape, True = kept, as bits; `masks[path]` makes the mask.
        weights: path of a parameter -> its new values, zero where pruned; only of pruners that change what they keep.
        found_by: name of the pruner that found them; empty if that is not known.
        calibration: where it was ended by the setting `until`: that, how many `batches` it took, the `distance` of two
            halves' masks, and whether they were `settled`.
        originals: path of a parameter with new values -> hash of those that it had before (`print_of`).
    """

    def __init__(self, masks: Mapping[str, Tensor | Bits], weights: dict[str, Tensor] | None = None,
                 found_by: str = "", calibration: dict[str, Any] | None = None,
                 originals: Mapping[str, str] | None = None):  # fmt: skip
        self.bits = {path: mask if isinstance(mask, Bits) else Bits.of(mask) for path, mask in masks.items()}
        self.weights, self.found_by, self.calibration = weights or {}, found_by, calibration or {}
        self.originals = dict(originals or {})
        self._mark = uuid.uuid4().hex  # tells these masks' notes on a model from those of others
        self._gone: dict[str, Tensor] = {}  # where weights of a model that is trained are pruned, on their device

    def __getitem__(self, path: str) -> Tensor:
        return self.bits[path].mask

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def __contains__(self, path: object) -> bool:
        return path in self.bits

    def __eq__(self, other: object) -> bool:
        """Whether the same weights are kept, and become the same values."""
        if not isinstance(other, Masks):
            return NotImplemented
        return (
            self.shapes == other.shapes
            and self.weights.keys() == other.weights.keys()
            and all(torch.equal(bits.packed, other.bits[path].packed) for path, bits in self.bits.items())
            and all(torch.equal(weight, other.weights[path]) for path, weight in self.weights.items())
        )

    def __repr__(self) -> str:
        by = f", {self.found_by}" if self.found_by else ""
        return f"Masks({len(self)} weights, sparsity {self.sparsity:.4f}{by})"

    @property
    def prunable(self) -> int:
        """How many weights the masks cover."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def kept(self) -> int:
        """How many of them stay."""
        return sum(bits.kept for bits in self.bits.values())

    @property
    def sparsity(self) -> float:
        """The share of them that goes."""
        return 1 - self.kept / max(self.prunable, 1)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Path -> shape of its weight."""
        return {path: bits.shape for path, bits in self.bits.items()}

    def from_first_process(self) -> Masks:
        """What process 0 of a group holds, in every process; without a group, these."""
        if processes.world()[1] == 1:
            return self
        masks = {path: Bits(processes.from_first(b.packed), b.shape) for path, b in self.bits.items()}
        weights = {path: processes.from_first(weight) for path, weight in self.weights.items()}
        return Masks(masks, weights, self.found_by, self.calibration, self.originals)

    # --- of a part ---

    def without(self, prefixes: Iterable[str]) -> Masks:
        """The masks of what does not stand at or below these paths, of blocks that are taken out, say.

        Raises:
            ValueError: if there is no mask at or below one of the paths.
        """
        prefixes = [prefixes] if isinstance(prefixes, str) else list(prefixes)
        for prefix in prefixes:
            if not any(under(path, [prefix]) for path in self):
                raise ValueError(
                    f"no mask stands at or below '{prefix}'; the first is that of '{next(iter(self), '')}'"
                )
        left = self._renamed({path: path for path in self if not under(path, prefixes)})
        left._mark = self._mark  # what `apply` noted on a model is true of them
        return left

    def restricted_to(self, model: nn.Module) -> Masks:
        """The masks of the weights that a plain model has, under the paths that they have there.

        Masks of skipped and removed blocks are left out. Where blocks were taken out of a list and the others numbered
        anew, that is possible only for a model to which these masks were applied before.

        Raises:
            ValueError: if the model has none of the weights, one of another shape, or shorter lists of blocks and
                nothing that tells which of them are gone.
        """
        places = find(model, self.shapes, self._mark)
        if not places.found:
            check_complete(model, places)
        check_numbers(places)
        return self._renamed(current_paths(model, places))

    def _renamed(self, names: dict[str, str]) -> Masks:
        """The masks of some paths, in the same order, under other paths."""
        names = {path: names[path] for path in self if path in names}
        masks = {new: self.bits[old] for old, new in names.items()}
        weights = {new: self.weights[old] for old, new in names.items() if old in self.weights}
        originals = {new: self.originals[old] for old, new in names.items() if old in self.originals}
        return Masks(masks, weights, self.found_by, self.calibration, originals)

    # --- on a model ---

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of a model to zero, and the kept ones to their new values where there are such.

        Raises:
            ValueError: if the masks are for another model; the first weight that differs is named, nothing is changed.
        """
        places = self._places(model)
        for path, several in places.found.items():
            for module, name in several if path in self.weights else ():
                module.get_parameter(name).copy_(self.weights[path])
        note(model, places, self._mark)
        self.enforce(model)

    @torch.no_grad()
    def enforce(self, model: nn.Module) -> None:
        """Set pruned weights to zero again, after a step of an optimiser or a merge that may have revived them.

        Raises:
            ValueError: if the masks are for another model.
        """
        for _, parameter, gone in self._pruned(model):
            parameter.masked_fill_(gone, 0)  # a product with the mask would leave -0.0

    @torch.no_grad()
    def revived(self, model: nn.Module, held: Mapping[str, Tensor] | None = None) -> list[str]:
        """Paths of the weights that are not zero where they were pruned: something has trained or loaded them.

        Args:
            model: that was pruned.
            held: values by the names of the model's parameters, which count in place of its own.

        Raises:
            ValueError: if the masks are for another model.
        """
        names = {id(p): name for name, p in model.named_parameters()} if held else {}
        values = ((path, (held or {}).get(names.get(id(p), ""), p), gone) for path, p, gone in self._pruned(model))
        revived = (path for path, p, gone in values if p.to(gone.device).masked_fill(~gone, 0).any())
        return list(dict.fromkeys(revived))

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Keep the zeros through every step of an optimiser: nothing is multiplied in the forward pass.

        Gradients of pruned weights are zeroed before a step, so that moments and momentum stay clean, and the weights
        after it, so that weight decay and what the moments held before cannot revive them.

        Args:
            model: to which the masks were applied.
            optimizer: of its parameters; a learning rate schedule and a gradient scaler may drive it.

        Returns:
            Two handles whose `remove()` ends it.

        Raises:
            ValueError: if the masks are for another model, or the optimiser has none of this model's parameters.
        """
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper takes no hooks
        self._places(model)
        steps = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in steps for p in model.parameters()):
            raise ValueError(
                f"this {type(optimizer).__name__} has none of the parameters of this {type(model).__name__}: give the "
                "model that it trains (a copy has parameters of its own)"
            )
        return [
            optimizer.register_step_pre_hook(lambda *_: self.before_step(model)),
            optimizer.register_step_post_hook(lambda *_: self.after_step(model)),
        ]

    def trained(self, model: nn.Module) -> bool:
        """Whether a step may change a pruned weight."""
        return any(True for _ in self._pruned(model, trained=True))

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Zero the gradients of pruned weights."""
        for _, parameter, gone in self._pruned(model, trained=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Zero the pruned weights that the optimiser may have changed."""
        for _, parameter, gone in self._pruned(model, trained=True):
            parameter.masked_fill_(gone, 0)

    def noted_on(self, model: nn.Module) -> set[str]:
        """Paths of the masks that were applied to a weight that still stands in the model, whatever its path is now."""
        return set(find(model, self.shapes, self._mark, paths=False).found)

    def by_parameter(self, model: nn.Module) -> dict[int, str]:
        """Path of the mask of each pruned parameter, by its id."""
        found = self._places(model).found
        return {id(module._parameters[name]): path for path, several in found.items() for module, name in several}

    def _places(self, model: nn.Module) -> Places:
        places = find(model, self.shapes, self._mark)
        check_complete(model, places)
        return places

    def _pruned(self, model: nn.Module, trained: bool = False) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Paths of masks, parameters, and where they are pruned; only what an optimiser may change, if `trained`."""
        for path, several in self._places(model).found.items():
            for module, name in several:
                parameter = module.get_parameter(name)
                if not trained or parameter.requires_grad or parameter.grad is not None:
                    yield path, parameter, self._where_gone(path, parameter, trained)

    def _where_gone(self, path: str, parameter: nn.Parameter, trained: bool) -> Tensor:
        """Where a weight is pruned, on its device. It is kept for a weight that is trained: every step asks for it."""
        gone = self._gone.get(path)
        if gone is None or gone.device != parameter.device:
            gone = ~self[path].to(parameter.device)
            if trained:
                self._gone[path] = gone
        return processes.divided_like(gone, parameter)

    # --- in files ---

    def packed(self) -> dict[str, Tensor]:
        """Masks as bits, and the kept values of changed weights, by the names that a file holds."""
        out = {path: bits.packed for path, bits in self.bits.items()}
        for path, weight in self.weights.items():
            out[path + VALUES] = weight[self[path].to(weight.device)].contiguous().cpu()
        return out

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]], found_by: str = "") -> Masks:
        """The inverse of `packed`, given the shapes of the weights.

        Raises:
            ValueError: if a mask is missing, a mask or the values of a weight have another size than its shape asks
                for, or there is a tensor for no weight.
        """
        masks, weights = {}, {}
        for path, sizes in shapes.items():
            if path not in tensors:
                raise ValueError(f"the mask of '{path}' is missing")
            bits = masks[path] = Bits(tensors[path], torch.Size(sizes))
            mask, values = bits.mask, tensors.get(path + VALUES)
            if values is not None:
                if not isinstance(mask, FakeTensor) and len(values) != bits.kept:
                    raise ValueError(f"the mask of '{path}' keeps {bits.kept} weights, found {len(values)}")
                weights[path] = _spread(values, mask)
        known = {*shapes, *(path + VALUES for path in shapes)}
        if extra := next((name for name in tensors if name not in known), None):
            raise ValueError(f"'{extra}' is there, but no weight of that name")
        return cls(masks, weights, found_by)

    def save(self, path: str | Path) -> None:
        """Write the masks as a safetensors file: a bit a weight, with the names and shapes that they belong to."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        info = {"format": _FORMAT, "shapes": json.dumps(shapes), "pruner": self.found_by}
        if self.calibration:
            info["calibration"] = json.dumps(self.calibration)
        if self.originals:
            info["originals"] = json.dumps(self.originals)
        with replace_file(Path(path)) as partial:
            save_file(self.packed(), partial, info)

    @classmethod
    def read(cls, path: str | Path, model: nn.Module | None = None) -> Masks:
        """Read masks from a file that `save` wrote, or from the folder of a run or of an adapted model.

        Args:
            path: the file or folder.
            model: refuse masks that are not for this model, now rather than when they are applied.

        Raises:
            ValueError: if there is nothing, or no masks, or masks for another model than the given one.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(
                f"masks: nothing is at '{path}' (seen from {Path.cwd()}): give a file of masks, or the folder of a run "
                "or adapted model that was pruned; or carry out the recipe that makes it first"
            )
        tensors, shapes, found_by, more = _folder(path) if path.is_dir() else _file(path)
        try:
            masks = cls.unpacked(tensors, shapes, found_by)
            masks.calibration, masks.originals = more["calibration"], more["originals"]
            if model is not None:
                masks._places(model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return masks


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of kept weights in their places, zero elsewhere."""
    if isinstance(mask, FakeTensor):
        return torch.empty(mask.shape, dtype=values.dtype)
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)


def print_of(weight: Tensor) -> str:
    """What tells the values of a weight from others: its type and a hash. A model in another type has other values of
    the same checkpoint."""
    plain = weight.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()[:16]
    return f"{str(plain.dtype).removeprefix('torch.')} {digest}"


# packed masks, shapes, name of the pruner, and what is told of its calibration and of the weights before
Stored = tuple[dict[str, Tensor], dict[str, list[int]], str, dict[str, Any]]


def _file(path: Path) -> Stored:
    with open_safetensors(path) as file:
        info = file.metadata() or {}
        if info.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a file of masks ('{_FORMAT}'), found {info.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    more = {key: json.loads(info.get(key, "{}")) for key in ("calibration", "originals")}
    return tensors, json.loads(info["shapes"]), info["pruner"], more


def _folder(folder: Path) -> Stored:
    """What the one pruner of a run or adapted model has found."""
    described = folder / "fit.json"
    if not described.is_file():
        raise ValueError(
            f"masks: '{folder}' is not the folder of a finished run or of an adapted model: it has no {described.name}"
        )
    methods: list[dict[str, Any]] = json.loads(described.read_text())["methods"]
    pruners = [i for i, method in enumerate(methods) if method["lever"] == "prune"]
    if len(pruners) != 1:
        found = ", ".join(m["name"] for m in methods) or "none"
        raise ValueError(f"masks: expected one pruner at '{folder}', its methods are: {found}")
    prefix, state = f"method.{pruners[0]}.", methods[pruners[0]]["state"]
    with open_safetensors(folder / "weights.safetensors") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return tensors, state["shapes"], state["pruner"], {key: state.get(key, {}) for key in ("calibration", "originals")}


def keep_zeros(masks: Masks) -> Any:
    """What `Masks.keep` does, as a trainer's callback, in the model that is trained."""
    from transformers import TrainerCallback

    class KeepZeros(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            masks.before_step(model)

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            masks.after_step(model)

    return KeepZeros()
