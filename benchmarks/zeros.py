"""Whether zeros make a ViT-B-sized layer run faster in torch on this CPU: in dense storage, and as CSR matrices.

    python benchmarks/zeros.py [--repeats 15] [--tokens 197] [--out FILE]

A linear layer (768 to 3072), an MLP (768, 3072, 768 with GELU) and a transformer block with random weights, in single
precision; a share of each matrix's elements is zero, at random places. `dense` has no zeros; `zeros` the same storage
with zeros in it; `csr` the weights as `torch.sparse_csr` matrices, multiplied as `weight @ x.T`. All variants of a work
take turns. Ratios are to `dense` in the same turn, as median, lowest and highest; below 1 is faster. `over_dense` is by
the clock, `processor_over_dense` of the time that the process ran for, which other programs disturb less: with one
thread and an idle machine the two are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHARES = (0.63, 0.75, 0.90)
WIDTH, HIDDEN, HEADS = 768, 3072, 12


class Linear(nn.Module):
    """A linear layer whose weight may be a CSR matrix."""

    def __init__(self, inputs: int, outputs: int, share: float, csr: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(inputs + outputs)
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weight[torch.rand(weight.shape, generator=generator) < share] = 0
        self.csr = csr
        self.weight = weight.to_sparse_csr() if csr else weight
        self.bias = torch.zeros(outputs)

    def forward(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        if not self.csr:
            return F.linear(x, self.weight, self.bias)
        return (self.weight @ x.t()).t() + self.bias


class MLP(nn.Module):
    def __init__(self, share: float, csr: bool):
        super().__init__()
        self.up, self.down = Linear(WIDTH, HIDDEN, share, csr), Linear(HIDDEN, WIDTH, share, csr)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block of one image."""

    def __init__(self, share: float, csr: bool):
        super().__init__()
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH, share, csr), Linear(WIDTH, WIDTH, share, csr)
        self.mlp = MLP(share, csr)

    def forward(self, x: Tensor) -> Tensor:  # (N, D)
        q, k, v = self.qkv(F.layer_norm(x, (WIDTH,))).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(x), WIDTH))
        return x + self.mlp(F.layer_norm(x, (WIDTH,)))


WORKS = {"linear": lambda share, csr: Linear(WIDTH, HIDDEN, share, csr), "mlp": MLP, "block": Block}


@torch.no_grad()
def measure(name: str, tokens: int, repeats: int) -> list[dict]:
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    variants = {("dense", 0.0): WORKS[name](0.0, False)}
    for share in SHARES:
        variants |= {("zeros", share): WORKS[name](share, False), ("csr", share): WORKS[name](share, True)}
    times: dict[tuple[str, float], list[tuple[float, float]]] = {key: [] for key in variants}
    for turn in range(repeats + 2):
        for key, module in variants.items():
            clock, processor = time.perf_counter(), time.process_time()
            module(x)
            if turn >= 2:  # the first two are to warm up
                times[key].append((time.perf_counter() - clock, time.process_time() - processor))
    for share in SHARES:
        torch.testing.assert_close(variants["csr", share](x), variants["zeros", share](x), rtol=1e-3, atol=1e-4)
    rows = []
    for (storage, share), own in times.items():
        row: dict = {"work": name, "storage": storage, "share_of_zeros": share}
        for i, kind in enumerate(("", "processor_")):
            ratios = [a[i] / b[i] for a, b in zip(own, times["dense", 0.0], strict=True)]
            row[f"{kind}median_ms"] = round(1000 * statistics.median(t[i] for t in own), 3)
            row[f"{kind}over_dense"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=197, help="of one image of 224 px in patches of 16")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    result = {
        "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "tokens": options.tokens, "repeats": options.repeats,
        "results": [row for name in WORKS for row in measure(name, options.tokens, options.repeats)],
    }  # fmt: skip
    print(text := json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
