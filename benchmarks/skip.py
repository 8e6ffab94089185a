"""Is a shortened model faster by what it computes less? Block part of ViLT, DAS's adapters in the kept blocks.

    python benchmarks/skip.py [--repeats 40]

For k skipped blocks: MACs and latency of the encoder as shares of those with k = 0 (adapters in every block), and their
quotient, which is 1 when time falls in proportion. Models of one size are timed in turn, so that a noisy machine is
noisy for all of them. Random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

import torch
from transformers import ViltConfig, ViltModel

from trimtab import DAS, Anatomy
from trimtab.cost import count_macs

SIZES = {
    "tiny-vilt": {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 512},
    "vilt-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
TOKENS = {"tiny-vilt": 85, "vilt-base": 241}  # text and image together
BATCH = {"tiny-vilt": 32, "vilt-base": 1}


def encoder(size: str, skip: int) -> torch.nn.Module:
    """The encoder of a ViLT without its last `skip` blocks, adapters everywhere else."""
    torch.manual_seed(0)
    model = ViltModel(ViltConfig(**SIZES[size])).eval()
    anatomy = Anatomy.of(model)
    method = DAS(skip=skip)
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    return model.encoder


def main(repeats: int) -> None:
    out = []
    for size, config in SIZES.items():
        x = torch.randn(BATCH[size], TOKENS[size], config["hidden_size"])
        counts = range(0, config["num_hidden_layers"] // 2 + 1)
        encoders = {k: encoder(size, k) for k in counts}
        macs = {k: count_macs(partial(e, x)) for k, e in encoders.items()}
        times: dict[int, list[float]] = {k: [] for k in counts}
        with torch.inference_mode():
            for repeat in range(repeats + 3):
                for k, e in encoders.items():
                    start = time.perf_counter()
                    e(x)
                    if repeat >= 3:
                        times[k].append(time.perf_counter() - start)
        median = {k: statistics.median(t) for k, t in times.items()}
        for k in counts:
            share, latency = macs[k] / macs[0], median[k] / median[0]
            out.append({
                "size": size, "batch": BATCH[size], "tokens": TOKENS[size], "skipped": k, "macs": macs[k],
                "milliseconds": round(1000 * median[k], 3), "macs_share": round(share, 4),
                "latency_share": round(latency, 4), "latency_over_macs": round(latency / share, 4),
            })  # fmt: skip
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": out}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    main(parser.parse_args().repeats)
