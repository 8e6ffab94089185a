"""What the sparse layout takes on disk and in time, for a checkpoint of ViT-B's size.

    python benchmarks/sparse_file.py [--repeats 5] [--dtype float32]

Random weights; in every matrix a share of the elements is zero. Bytes are compared with the bound of non-zeros times
element size plus one bit a weight, and with dense safetensors. Seconds are medians; dense and sparse take turns, so
that a noisy machine is noisy for both. Reading gives tensors in memory of their own: dense files are copied out of the
mapped file. Files come from the page cache. `checksum_seconds` is the part of a sparse write or read that goes to
checksums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from trimtab.storage import sparse

SHARES = (0.63, 0.75, 0.90)


def checkpoint(share: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of ViT-B: matrices with a share of zeros, everything else dense."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ViTModel(ViTConfig()).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weight[torch.rand(shape, generator=generator) < share] = 0  # a product would leave -0.0, which is kept
        tensors[name] = weight.to(dtype)
    return tensors


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def once(tensors: dict[str, torch.Tensor], folder: Path) -> tuple[dict[str, float], sparse.Sizes, int]:
    """Seconds of each work, what the sparse file holds, and bytes of the dense one."""
    dense, packed = folder / "dense.safetensors", folder / "sparse"
    times = {
        "write_dense": seconds(lambda: save_file(tensors, dense)),
        "write_sparse": seconds(lambda: sparse.save_file(tensors, packed)),
        "read_dense": seconds(lambda: {k: v.clone() for k, v in load_file(dense).items()}),
        "read_sparse": seconds(lambda: sparse.load_file(packed)),
    }
    raw = (packed / "model.sparse.safetensors").read_bytes()
    times["checksum"] = seconds(lambda: zlib.crc32(raw))
    return times, sparse.sizes(packed), dense.stat().st_size


def measure(share: float, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    tensors = checkpoint(share, dtype)
    rounds = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            times, sizes, dense_bytes = once(tensors, Path(folder))
            rounds.append(times)
    median = {k: statistics.median(times[k] for times in rounds[1:]) for k in rounds[0]}  # the first is to warm up
    return {
        "share_of_zeros": share, "weights": sizes.weights, "nonzeros": sizes.nonzeros, "bytes": sizes.file_bytes,
        "bytes_over_bound": round(sizes.file_bytes / sizes.bound_bytes, 5),
        "bytes_over_dense": round(sizes.file_bytes / dense_bytes, 4),
        "write_seconds": round(median["write_sparse"], 3), "read_seconds": round(median["read_sparse"], 3),
        "write_over_dense": round(median["write_sparse"] / median["write_dense"], 2),
        "read_over_dense": round(median["read_sparse"] / median["read_dense"], 2),
        "checksum_seconds": round(median["checksum"], 3),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    results = [measure(share, getattr(torch, options.dtype), options.repeats) for share in SHARES]
    info = {"dtype": options.dtype, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**info, "repeats": options.repeats, "results": results}, indent=1))
