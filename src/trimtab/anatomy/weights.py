"""Which parameters of a model are prunable matrices, which are not, and why.

Told by the classes of modules alone: linear layers, transformers' `Conv1D`, the input projections of torch's attention,
convolutions, and the experts of mixtures that say how they store them. A parameter that stands by itself may be a
matrix or a table of positions: only a forward pass shows it (`methods/prune/products.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

from torch import nn
from torch.nn.parameter import UninitializedParameter

from trimtab.anatomy.parts import Block, Modality, Tower, Weight
from trimtab.anatomy.structure import AnatomyError, is_linear, plain_modules, trained_copies, under


class Described(Protocol):
    """What is asked of a description here; an `Anatomy` is one."""

    @property
    def heads(self) -> tuple[str, ...]: ...
    def modality(self, path: str) -> Modality | None: ...
    def owner(self, path: str) -> Tower | None: ...
    def blocks(self) -> Iterator[Block]: ...
    def weights(self, model: nn.Module) -> list[Weight]: ...


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_IN_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


SHARED = "of layers that share them with embeddings or heads"


class Whole(NamedTuple):
    """Parameters that are never pruned: what they are, how many numbers, how many parameters, and the first's path."""

    what: str
    numbers: int
    parameters: int
    first: str

    def __str__(self) -> str:
        several = f" and {self.parameters - 1} more" if self.parameters > 1 else ""
        return f"{self.numbers:,} {self.what}: '{self.first}'{several}"


def matrices(anatomy: Described, model: nn.Module, convolutions: bool = False) -> list[Weight]:
    """See `Anatomy.weights`."""
    for path in trained_copies(model):
        if anatomy.modality(path) is not None:
            raise AnatomyError(
                f"PEFT trains a copy of '{path}' (`modules_to_save`), and the model's own matrices there are not "
                "used: call `merge_and_unload` first, or leave it out of `modules_to_save`"
            )
    found: list[Weight] = []
    seen = _kept_whole(anatomy, model).keys()
    done: set[int] = set()
    for path, module in plain_modules(model):
        own = own_matrices(path, module, convolutions)
        modality = anatomy.modality(path) if own else None
        if modality is None:
            continue
        for weight in own:
            parameter = module._parameters[weight.parameter]
            if id(parameter) in seen or id(parameter) in done:
                continue
            done.add(id(parameter))
            weight = weight._replace(modality=modality)
            stack = len(parameter) if weight.expert is not None else 0  # type: ignore[arg-type]
            found += [weight._replace(expert=i) for i in range(stack)] or [weight]
    return found


def own_matrices(path: str, module: nn.Module, convolutions: bool = False) -> list[Weight]:
    """The matrices that a module is known to multiply by; of experts one `Weight` for all, with the number 0.

    A weight that is computed anew for each pass (weight norm) is no parameter, and not among them.
    """
    if isinstance(module, nn.MultiheadAttention):
        own = [Weight(path, name, "vision") for name in _IN_ATTENTION]
    elif is_linear(module):
        own = [Weight(path, "weight", "vision", not isinstance(module, nn.Linear))]
    elif convolutions and isinstance(module, _CONVOLUTIONS):
        own = [Weight(path, "weight", "vision", kernel=tuple(module.weight.shape[1:]))]
    elif isinstance(transposed := stored_transposed(module), bool):
        stacks = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3]
        own = [Weight(path, name, "vision", transposed, expert=0) for name in stacks]
    else:
        own = []
    return [w for w in own if module._parameters.get(w.parameter) is not None]


def stored_transposed(module: nn.Module) -> bool | None:
    """Whether experts in one parameter are stored as (in, out); None if the module does not say that it holds experts.

    transformers' `use_experts_implementation` writes both facts on the module.
    """
    says = getattr(module, "is_transposed", None)
    return says if isinstance(says, bool) and hasattr(module, "_is_expert_parallel") else None


def _kept_whole(anatomy: Described, model: nn.Module) -> dict[int, str]:
    """Parameters of embeddings and of heads: a matrix that shares one is never pruned."""
    found: dict[int, str] = {}
    for path, module in plain_modules(model):
        head = under(path, anatomy.heads)
        if head or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            what = "heads" if head else "embeddings"
            found |= {id(p): what for p in module._parameters.values() if p is not None and id(p) not in found}
    return found


def bare(anatomy: Described, model: nn.Module, weights: list[Weight]) -> dict[str, nn.Parameter]:
    """Parameters of two or three axes in the blocks of which nothing tells what they are, by their paths."""
    blocks, known = [b.path for b in anatomy.blocks()], {w.path for w in weights}
    whole = _kept_whole(anatomy, model)
    found = {}
    for path, module in plain_modules(model):
        if not under(path, blocks) or anatomy.owner(path) is None or own_matrices(path, module, convolutions=True):
            continue
        for name, parameter in module._parameters.items():
            fits = parameter is not None and parameter.ndim in (2, 3) and parameter.is_floating_point()
            if fits and id(parameter) not in whole and f"{path}.{name}".lstrip(".") not in known:
                found[f"{path}.{name}".lstrip(".")] = parameter
    return found  # type: ignore[return-value]


def left_whole(anatomy: Described, model: nn.Module, also: Collection[str] = ()) -> list[Whole]:
    """Everything of the plain model that is never pruned, by kind, the most numbers first; each parameter once.

    Args:
        anatomy: of the model.
        model: the plain model.
        also: paths that are prunable beside `anatomy.weights`: of convolutions, where these were asked for, and of what
            a pass showed.

    Raises:
        AnatomyError: as `Anatomy.weights`.
    """
    weights = anatomy.weights(model)
    pruned = {*also, *(w.path for w in weights)}
    sums: dict[str, list] = {}
    done = {id(w.of(model)) for w in weights}
    shared = _shared(anatomy, model)
    for path, module, name, parameter in _parameters(model):
        own = f"{path}.{name}".lstrip(".")
        if own in pruned or id(parameter) in done:
            continue
        done.add(id(parameter))
        kind = SHARED if id(parameter) in shared else _kind(anatomy, path, module, parameter)
        entry = sums.setdefault(kind, [0, 0, shared.get(id(parameter), own)])
        entry[0] += 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()
        entry[1] += 1
    return sorted((Whole(what, *entry) for what, entry in sums.items()), key=lambda w: -w.numbers)


def _shared(anatomy: Described, model: nn.Module) -> dict[int, str]:
    """Parameters of embeddings and heads that a matrix in a tower shares, and the path of that matrix."""
    whole = _kept_whole(anatomy, model)
    return {
        id(parameter): f"{path}.{name}"
        for path, module, name, parameter in reversed(list(_parameters(model)))
        if id(parameter) in whole and anatomy.owner(path) is not None and own_matrices(path, module)
    }


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for path, module in plain_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield path, module, name, parameter


def _kind(anatomy: Described, path: str, module: nn.Module, parameter: nn.Parameter) -> str:
    """What a parameter that is not pruned is, by what is known of it."""
    if under(path, anatomy.heads):
        return "heads"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embeddings"
    if anatomy.owner(path) is None:
        return "outside the towers"
    if not parameter.is_floating_point():
        return f"packed numbers ({str(parameter.dtype).removeprefix('torch.')})"
    if parameter.ndim < 2 or (parameter.ndim == 2 and stored_transposed(module) is not None):  # a bias an expert
        return "vectors (norms, biases, scales)"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions (pruned where they are asked for)"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers"
    return "of unknown use (positions, tables, state spaces; matrices, if a calibration batch shows that they are)"
