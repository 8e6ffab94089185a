"""Is a shortened model faster by what it computes less? Block part of ViLT, DAS's adapters in the kept blocks.

    python benchmarks/skip.py [--repeats 40] [--sizes tiny-vilt vilt-base]

For k skipped blocks: MACs, latency and resident memory of the encoder as shares of those with k = 0 (adapters in every
block), and latency over MACs, which is 1 when time falls in proportion. Models of one size are timed in turn, so that a
noisy machine is noisy for all of them. Resident memory is the growth of a fresh process's resident set (Linux) while it
builds the encoder. Random weights: time does not depend on them. Runs on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import ViltConfig, ViltModel

from trimtab import DAS, Anatomy
from trimtab.counting import count_macs

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


def resident(size: str, skip: int) -> int:
    """Bytes by which a fresh process grows when it holds the encoder and nothing else of it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = _resident_set()
        held = encoder(size, skip)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        os.write(write, str(_resident_set() - before).encode())
        os._exit(0 if held is not None else 1)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answer:
        return int(answer.read())


def _resident_set() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(repeats: int, sizes: list[str]) -> None:
    out = []
    counts_of = {size: range(0, SIZES[size]["num_hidden_layers"] // 2 + 1) for size in sizes}
    # First of all: a process that has computed already should not be forked.
    memory = {(size, k): resident(size, k) for size in sizes for k in counts_of[size]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in sizes:
        x = torch.randn(BATCH[size], TOKENS[size], SIZES[size]["hidden_size"], device=device)
        counts = counts_of[size]
        encoders = {k: encoder(size, k).to(device) for k in counts}
        macs = {k: count_macs(partial(e, x)) for k, e in encoders.items()}
        times: dict[int, list[float]] = {k: [] for k in counts}
        with torch.inference_mode():
            for repeat in range(repeats + 3):
                for k, e in encoders.items():
                    start = time.perf_counter()
                    e(x)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if repeat >= 3:
                        times[k].append(time.perf_counter() - start)
        median = {k: statistics.median(t) for k, t in times.items()}
        for k in counts:
            share, latency = macs[k] / macs[0], median[k] / median[0]
            out.append({
                "size": size, "batch": BATCH[size], "tokens": TOKENS[size], "skipped": k, "macs": macs[k],
                "milliseconds": round(1000 * median[k], 3), "macs_share": round(share, 4),
                "latency_share": round(latency, 4), "latency_over_macs": round(latency / share, 4),
                "params": sum(p.numel() for p in encoders[k].parameters()), "resident_bytes": memory[size, k],
                "resident_share": round(memory[size, k] / memory[size, 0], 4),
            })  # fmt: skip
    print(
        json.dumps(
            {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": device, "results": out}, indent=1
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    main(options.repeats, options.sizes)
