"""Half precision: what this machine multiplies natively, and what a recipe's `precision` means on it."""

from __future__ import annotations

import torch


def native_bf16() -> bool:
    """Whether bf16 products are faster than fp32 ones here: GPUs since Ampere, CPUs with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def half_of(precision: str) -> torch.dtype | None:
    """In what a model trains in mixed precision (autocast): None for `fp32`, and for `auto` without fast bf16."""
    auto = torch.bfloat16 if native_bf16() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": auto}.get(precision)
