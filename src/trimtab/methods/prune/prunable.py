"""Which weights of a model are pruned, as matrices (out, in), and how much of its blocks is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Weight
from trimtab.anatomy.structure import is_wrapped, plain_modules, under
from trimtab.methods.prune.scores import matrix


def prunable(
    model: nn.Module, anatomy: Anatomy, convolutions: bool = False, experts: bool = False
) -> dict[Weight, Tensor]:
    """The prunable matrices (out, in) of a model.

    Raises:
        ValueError: if there is none, one is not finite or not stored as floating point, or LoRA's update is merged into
            the model at the moment.
    """
    weights = {}
    for path, module in model.named_modules():
        if is_wrapped(module) and getattr(module, "merged", False):
            raise ValueError(
                f"the update of '{path}' is merged into its weight, and taking it off again would revive what was "
                "pruned: call `unmerge_adapter()`, or merge for good (`merge_and_unload()`) before pruning"
            )
    for weight in matrices(model, anatomy, convolutions, experts):
        parameter = weight.of(model)
        if not parameter.is_floating_point():
            raise ValueError(
                f"the weight '{weight.path}' is stored as {str(parameter.dtype).removeprefix('torch.')} (quantised): "
                "prune the model before it is quantised"
            )
        if not torch.isfinite(parameter).all():
            raise ValueError(f"the weight '{weight.path}' is not finite (NaN or infinite): check the checkpoint")
        weights[weight] = matrix(model, weight)
    return weights


def matrices(model: nn.Module, anatomy: Anatomy, convolutions: bool = False, experts: bool = False) -> list[Weight]:
    """The prunable weights of a model, in the order of its modules; ValueError if there is none.

    Args:
        model: the plain model.
        anatomy: of the model.
        convolutions: those of the towers too.
        experts: the experts of mixtures too, where one parameter (experts, ., .) holds them all.
    """
    weights = anatomy.weights(model, convolutions)
    if experts and (found := _experts(model, anatomy)):
        order = {path: i for i, (path, _) in enumerate(plain_modules(model))}
        weights = sorted(weights + found, key=lambda w: order[w.module])
    if not weights:
        kinds = "linear layer or convolution" if convolutions else "linear layer"
        stay = "embeddings stay whole" if convolutions else "embeddings stay whole, convolutions without `convolutions`"
        raise ValueError(
            f"nothing to prune: the towers of this anatomy ({anatomy.source}) hold no {kinds} "
            f"(scopes: {', '.join(p for t in anatomy.towers for p in t.scope)}); {stay}"
        )
    return weights


def _experts(model: nn.Module, anatomy: Anatomy) -> list[Weight]:
    """Parameters (experts, ., .) of modules inside blocks whose class says that they are experts.

    As a matrix, each has one row an expert: scores that compare the weights of one matrix compare all its experts.
    """
    blocks = [b.path for b in anatomy.blocks()]
    found = []
    for path, module in plain_modules(model):
        modality = anatomy.modality(path) if "expert" in type(module).__name__.lower() and under(path, blocks) else None
        if modality is not None:
            own = [(n, p) for n, p in module._parameters.items() if p is not None and p.ndim == 3]
            found += [Weight(path, name, modality, kernel=tuple(p.shape[1:])) for name, p in own]
    return found


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
