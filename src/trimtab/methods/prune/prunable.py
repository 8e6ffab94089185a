"""Which weights of a model are pruned, as matrices (out, in), and how much of its blocks is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trimtab.anatomy import Anatomy, Weight
from trimtab.anatomy.structure import is_wrapped, plain_modules, under
from trimtab.methods.prune.made import Made, pieces
from trimtab.methods.prune.scores import matrix

# What computes a layer's weight anew before each pass, and how to make it a plain parameter again.
_COMPUTED = {
    "parametrizations": "torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})",
    "_g": "torch.nn.utils.remove_weight_norm(module, {name!r})",
    "_u": "torch.nn.utils.remove_spectral_norm(module, {name!r})",
    "_mask": "torch.nn.utils.prune.remove(module, {name!r})",
}
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # of quantised weights; tables of indices are int64


def prunable(model: nn.Module, anatomy: Anatomy, convolutions: bool = False, seen: Sequence[Weight] = ()) -> Made:
    """The prunable matrices (out, in) of a model, in single precision or better: views of the parameters, or copies
    that are made when they are looked at.

    Args:
        model: the plain model.
        anatomy: of the model.
        convolutions: those of the towers too.
        seen: further matrices, which a pass over the model showed.

    Raises:
        ValueError: if there is none, one is not finite or not stored as a plain parameter of floating point, or LoRA's
            update is merged into the model at the moment.
    """
    for path, module in model.named_modules():
        if is_wrapped(module) and getattr(module, "merged", False):
            raise ValueError(
                f"the update of '{path}' is merged into its weight, and taking it off again would revive what was "
                "pruned: call `unmerge_adapter()`, or merge for good (`merge_and_unload()`) before pruning"
            )
    check_stored(model, anatomy, convolutions)
    sizes: dict[Weight, int] = {}
    looked_at = set()
    for weight in matrices(model, anatomy, convolutions, seen):
        parameter = weight.of(model)
        seen_before = weight.path in looked_at
        if not seen_before and not all(torch.isfinite(p).all() for p in pieces(parameter.detach())):
            raise ValueError(f"the weight '{weight.path}' is not finite (NaN or infinite): check the checkpoint")
        looked_at.add(weight.path)
        sizes[weight] = parameter.numel() // (1 if weight.expert is None else len(parameter))
    return Made(sizes, partial(matrix, model), lambda weight: weight.matrix(weight.of(model).detach()))


def matrices(
    model: nn.Module, anatomy: Anatomy, convolutions: bool = False, seen: Sequence[Weight] = ()
) -> list[Weight]:
    """The prunable weights of a model, in the order of its modules; ValueError if there is none.

    Arguments as of `prunable`.
    """
    weights = anatomy.weights(model, convolutions)
    if seen:
        order = {path: i for i, (path, _) in enumerate(plain_modules(model))}
        weights = sorted([*weights, *seen], key=lambda w: order[w.module])
    if not weights:
        kinds = "linear layer or convolution" if convolutions else "linear layer"
        stay = "embeddings stay whole" if convolutions else "embeddings stay whole, convolutions without `convolutions`"
        raise ValueError(
            f"nothing to prune: the towers of this anatomy ({anatomy.source}) hold no {kinds} "
            f"(scopes: {', '.join(p for t in anatomy.towers for p in t.scope)}); {stay}"
        )
    return weights


def check_stored(model: nn.Module, anatomy: Anatomy, convolutions: bool = False) -> None:
    """Raise a ValueError if weights in a tower are no plain numbers: quantised, computed anew, or not there."""
    for path, module in plain_modules(model):
        if anatomy.owner(path) is None:
            continue
        for name, tensor in _numbers(module):
            own = f"{path}.{name}".lstrip(".")
            if tensor.is_meta:
                raise ValueError(
                    f"'{own}' is on the meta device and has no values (offloaded, or not loaded): load the model whole "
                    "into memory, without `device_map` to disk or CPU offloading, prune it, and offload it afterwards"
                )
            if kind := _packed(tensor):
                raise ValueError(f"the weight '{own}' is stored as {kind} (quantised): prune the model before it is "
                                 "quantised")  # fmt: skip
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            raise ValueError(f"'{path}' is a {type(module).__name__} of packed numbers (quantised): prune the model "
                             "before it is quantised")  # fmt: skip
        if name := _computed(module, convolutions):
            end = next(e for e in _COMPUTED if _names_end(module, name, e))
            raise ValueError(
                f"the weight '{path}.{name}' ({type(module).__name__}) is computed anew before each pass, and zeros in "
                f"it would be lost: make it a plain parameter first, `{_COMPUTED[end].format(name=name)}`"
            )


def _numbers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own matrices: parameters, and the buffers that quantised layers keep theirs in."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None and p.ndim > 1)
    for name, buffer in () if module._modules else module._buffers.items():  # a block's own are masks, not weights
        stored = buffer is not None and name not in module._non_persistent_buffers_set
        if stored and buffer.ndim > 1 and buffer.dtype in _PACKED:  # type: ignore[union-attr]
            yield name, buffer  # type: ignore[misc]


def _packed(tensor: Tensor) -> str:
    """How a tensor that holds something else than plain numbers is stored; empty for plain ones."""
    if is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh"):  # torchao's; DTensor is plain
        return type(tensor).__name__
    plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # numbers of 8 bits have a scale beside them
    return "" if plain else str(tensor.dtype).removeprefix("torch.")


def _computed(module: nn.Module, convolutions: bool) -> str:
    """The name of a matrix that a layer computes anew for each pass; empty if there is none."""
    kinds = (nn.Linear, nn.MultiheadAttention, *((nn.modules.conv._ConvNd,) if convolutions else ()))
    if not isinstance(module, kinds):
        return ""
    names = ("in_proj_weight",) if isinstance(module, nn.MultiheadAttention) else ("weight",)
    return next((n for n in names if any(_names_end(module, n, end) for end in _COMPUTED)), "")


def _names_end(module: nn.Module, name: str, end: str) -> bool:
    if end == "parametrizations":
        return name in module._modules.get(end, ())  # type: ignore[operator]
    return name not in module._parameters and (
        f"{name}{end}" in module._parameters or f"{name}{end}" in module._buffers
    )


def left_out(model: nn.Module, anatomy: Anatomy, weights: list[Weight]) -> tuple[float, str]:
    """The share of the weights in the towers' blocks that stays whole, and the first; embeddings do not count.

    Weights are parameters of two or more axes: what multiplies the hidden states, not biases and norms.
    """
    blocks, pruned = [b.path for b in anatomy.blocks()], {w.path for w in weights}
    total = left = 0
    first = ""
    seen: set[int] = set()
    for path, module in plain_modules(model):
        if isinstance(module, nn.Embedding) or not under(path, blocks) or anatomy.owner(path) is None:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if f"{path}.{name}" not in pruned:
                left += parameter.numel()
                first = first or f"{path}.{name}"
    return left / max(total, 1), first
