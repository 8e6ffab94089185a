"""MULTIFLOW's time and memory over the number of weights, on models with random weights.

    python benchmarks/growth.py [--sizes 0.1B 0.3B 1B 2B] [--dtype bfloat16] [--pruner multiflow]

Two CLIP towers of the same width and depth, built on the meta device and filled tensor by tensor; 4 calibration batches
of 2 pairs (49 patches, 16 tokens). Each size in a process of its own, one after another. The peak is that of the
resident set from the moment at which the model is whole (`/proc/self/clear_refs`) to that at which its weights are
pruned, activations and masks included; `ratio` is (weights + what the peak lies above the model) / weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CLIPConfig, CLIPModel

import trimtab
from trimtab.anatomy import Anatomy
from trimtab.memory import give_back

SHAPES = {"0.1B": (512, 16), "0.3B": (768, 21), "1B": (1280, 25), "2B": (1536, 35)}  # width, layers of each tower
SPARSITY = 0.63


def filled(make, dtype: torch.dtype) -> nn.Module:
    """A model built without its weights, in evaluation mode, with random ones put in one module after another."""
    with init_empty_weights():  # buffers are made: positions and frequencies could not be drawn
        model = make().to(dtype).eval()
    torch.manual_seed(0)
    made: dict[int, nn.Parameter] = {}  # a tied weight is one
    with torch.no_grad():
        for module in model.modules():
            for name, empty in module.named_parameters(recurse=False):
                if id(empty) not in made:
                    made[id(empty)] = nn.Parameter(torch.empty_like(empty, device="cpu"))
                    if not isinstance(module, (nn.Linear, nn.Embedding)):
                        made[id(empty)].normal_(0, 0.02)  # a parameter of a module's own, which nothing else may draw
                module.register_parameter(name, made[id(empty)])
            model._init_weights(module)  # transformers': matrices, norms
    return model


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now, or the most since `watch` (`VmHWM`)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what + ":"))
    return int(line.split()[1]) * 1024


def watch() -> int:
    """Begin a new peak; what is resident now, without what was freed before."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def batches(number: int = 4, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, 900, (rows, 16), generator=generator),
            "attention_mask": torch.ones(rows, 16, dtype=torch.long),
            "pixel_values": torch.randn(rows, 3, 112, 112, generator=generator),
        }
        for _ in range(number)
    ]


def towers(width: int, layers: int) -> CLIPModel:
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
             "num_attention_heads": width // 64, "projection_dim": 64}  # fmt: skip
    text = tower | {"vocab_size": 1000, "max_position_embeddings": 16, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=tower | {"image_size": 112, "patch_size": 16}))


def work(size: str, dtype: str, pruner: str) -> dict[str, float]:
    """Prune one model in this process."""
    began = time.perf_counter()
    model = filled(lambda: towers(*SHAPES[size]), getattr(torch, dtype))
    built = time.perf_counter() - began
    data = [{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches()]
    weights = sum(p.numel() for p in model.parameters())
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(**data[0])  # what is made once is made
        clock = time.process_time()
        for batch in data:
            model(**batch)
    forward = time.process_time() - clock
    before, clock, wall = watch(), time.process_time(), time.perf_counter()
    fit = trimtab.prune(model, pruner, SPARSITY, data, Anatomy.of(model))
    seconds, wall = time.process_time() - clock, time.perf_counter() - wall
    extra = resident("VmHWM") - before
    return {
        "weights": weights, "prunable": fit.masks.prunable, "sparsity": round(fit.sparsity, 4), "dtype": dtype,
        "weights_bytes": bytes_, "model_resident_bytes": before, "extra_bytes": extra,
        "ratio": round(1 + extra / bytes_, 3), "built_seconds": round(built, 1),
        "forward_processor_seconds": round(forward, 2), "processor_seconds": round(seconds, 2),
        "seconds": round(wall, 2),
        "processor_seconds_beside_passes_per_billion": round((seconds - forward) / fit.masks.prunable * 1e9, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pruner", default="multiflow")
    parser.add_argument("--here", action="store_true", help="one size, in this process")
    parser.add_argument("--out", type=Path, help="a JSON file, whose other results are kept")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(work(options.sizes[0], options.dtype, options.pruner)))
        return
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for size in options.sizes:
        command = [sys.executable, __file__, "--here", "--sizes", size, "--dtype", options.dtype]
        done = subprocess.run([*command, "--pruner", options.pruner], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{size}: exit status {done.returncode} (-9: out of memory)\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        result[f"{options.pruner}, {options.dtype}, {size}"] = found
        print(f"{size:>5} {json.dumps(found)}", flush=True)
        if options.out:
            info = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            options.out.write_text(json.dumps({**info, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
