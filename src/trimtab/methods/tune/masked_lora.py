"""LoRA over a pruned weight: the update is multiplied by the weight's mask, so that merging it keeps every zero.

    y = W x + ((alpha / r) B A * mask) x          W is zero where the mask is

What is trained is then exactly what is merged. The update is made whole for it, (out, in), once a call: in the layers
that LoRA wraps that is about one more product of the layer's own size.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from torch import Tensor
from torch.nn import functional as F

from trimtab.methods.tune.fused import FusedUpdate


class MaskedLinear(lora.Linear):
    """PEFT's layer with a buffer `kept`, the mask of its base weight, True = kept."""

    kept: Tensor

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the base weight, of its shape; PEFT merges this."""
        return super().get_delta_weight(adapter) * self.kept

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.lora_A:
                update = self.get_delta_weight(name)
                update = update.T if self.fan_in_fan_out else update
                out = out + F.linear(self.lora_dropout[name](x).to(update.dtype), update).to(out.dtype)
        return out


class MaskedFused(FusedUpdate):
    """The same for the fused weight of torch's attention."""

    kept: Tensor

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The update of the fused weight, (3 D, D)."""
        return super().get_delta_weight(adapter_name, *args, **kwargs) * self.kept


def follow(layer: Any, path: str, mask: Tensor) -> None:
    """Let the update of a layer keep the zeros of a mask.

    Raises:
        ValueError: if PEFT computes the layer in a way of its own (quantised, or a variant of LoRA).
    """
    fused = type(layer) in (FusedUpdate, MaskedFused)
    if not (fused or type(layer) in (lora.Linear, MaskedLinear)) or layer.lora_variant:
        raise ValueError(
            f"lora: '{path}' is pruned, and PEFT's {type(layer).__name__} computes its update in a way that keeps no "
            "zeros: leave the layer out of `targets`, or prune another model"
        )
    layer.__class__ = MaskedFused if fused else MaskedLinear
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    layer.register_buffer("kept", mask.to(weight.device), persistent=False)
