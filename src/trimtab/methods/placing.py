"""Where a model's weights are, and in which form: what `device_map`, offloading and quantisation did to it."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab.sizes import counting


def check_in_one_place(model: nn.Module) -> None:
    """Raise a ValueError that names a parameter if a model's weights are not all on one device, with their values.

    Side networks read the hidden states of all blocks and hand on one result, masks and plans change weights: neither
    follows the hooks by which Accelerate moves states and weights from one device to another.
    """
    kind, first = type(model).__name__, None
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"'{name}' of this {kind} is on the meta device and has no values: load the weights first, without "
                "offloading: `device_map={'': 0}` puts all on one GPU, where a large model has room in a quantised "
                "form (docs/scale.md); to count its costs without weights, make it, adapt it and call `fit.cost` "
                "inside `with trimtab.sizes.sizes_only():`"
            )
        if isinstance(parameter, FakeTensor) and not counting():
            raise ValueError(
                f"'{name}' of this {kind} is a fake tensor without values, made elsewhere: make the model, adapt it "
                "and call `fit.cost` inside `with trimtab.sizes.sizes_only():`"
            )
        if first is None:
            first = (name, parameter.device)
        if parameter.device != first[1]:
            raise ValueError(
                f"the weights of this {kind} are spread over devices: '{first[0]}' is on {first[1]}, '{name}' on "
                f"{parameter.device} (as `device_map='auto'` does it): load it on one, with `device_map={{'': 0}}`, in "
                "a quantised form if it has no room there (docs/scale.md)"
            )


def computing(module: nn.Module) -> Tensor:
    """A parameter whose type is that in which a module computes: not the integers of a quantised weight, where it has
    others."""
    parameters = list(module.parameters())
    return next((p for p in parameters if p.is_floating_point()), parameters[0])
