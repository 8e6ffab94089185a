"""LoRA of torch's own attention, which multiplies by one weight for queries, keys and values and calls no layer.

W_qkv + (alpha / r) B A        made whole before each call, (3 D, D), by PEFT's wrapper of a parameter
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

FUSED = "in_proj_weight"


def is_fused(module: nn.Module) -> bool:
    """Whether a module is torch's attention with one weight for queries, keys and values."""
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


class FusedUpdate(ParamWrapper):
    """PEFT's wrapper, of which the attention's own facts can be asked: torch's transformer layers ask for some."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "parameter_name"):
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention, by position or keyword; its parameters stay in their order, which PEFT changes."""
        first = args[:1] or (kwargs.pop("query"),)
        own = self.get_base_layer()._parameters
        order = list(own)
        try:
            return super().forward(*first, *args[1:], **kwargs)
        finally:
            for name in order:
                own[name] = own.pop(name)


def transparent(module: nn.Module) -> nn.Module:
    """A layer as PEFT wrapped it; of a wrapped attention, one that tells what the attention tells."""
    if type(module) is ParamWrapper:
        module.__class__ = FusedUpdate
    return module
