"""The types that a safetensors file can hold, and how it names them."""

from __future__ import annotations

import torch

# In the order in which the library writes them, and within a type by name. Older releases of torch lack some.
_NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "float4_e2m1fn_x2": "F4",
    "bool": "BOOL",
}  # fmt: skip
NAMES: dict[torch.dtype, str] = {getattr(torch, dtype): name for dtype, name in _NAMES.items() if hasattr(torch, dtype)}


def shape_of(tensor: torch.Tensor) -> list[int]:
    """As the file has it: in elements, of which torch packs two of four bits into one of its own."""
    packed = 2 if NAMES[tensor.dtype] == "F4" else 1
    return [*tensor.shape[:-1], packed * tensor.shape[-1]] if tensor.ndim else []
