"""What half precision this machine multiplies natively."""

from __future__ import annotations

import torch


def native_bf16() -> bool:
    """Whether bf16 products are faster than fp32 ones here: GPUs since Ampere, CPUs with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
