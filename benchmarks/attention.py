"""Attention on a CPU in bfloat16 and float32: torch's fused kernel beside plain products, forward and backward.

python benchmarks/attention.py [--repeats 5]

Shapes (samples, heads, tokens, channels a head) with a mask of padding: LST's side blocks beside MiniLM, MiniLM,
tiny-vilt, ViT-B/16. Medians of milliseconds, and the time of both passes as a multiple of the plain products'.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {
    "lst beside minilm": (128, 6, 38, 16),
    "minilm": (128, 12, 38, 32),
    "tiny-vilt": (16, 4, 80, 32),
    "vit-b16": (16, 12, 197, 64),
}


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=seen)


def passes(
    attend: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, repeats: int
) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))
    seen = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
    seen[::2, :, :, -shape[2] // 4 :] = False
    found: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = attend(q, k, v, seen)
        between = time.perf_counter()
        out.sum().backward()
        found.append((1e3 * (between - start), 1e3 * (time.perf_counter() - between)))
    return median(f for f, _ in found[1:]), median(b for _, b in found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    results: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            one, other = (passes(f, shape, dtype, repeats) for f in (fused, plain))
            results.append({
                "shape": name, "type": str(dtype).removeprefix("torch."),
                "fused_ms": [round(x, 1) for x in one], "plain_ms": [round(x, 1) for x in other],
                "fused / plain": round(sum(one) / sum(other), 2),
            })  # fmt: skip
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
