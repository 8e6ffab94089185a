"""Levers on models of real size with random weights: what they take of time and memory on this machine.

    python benchmarks/real_size.py [--models smolvlm-256m siglip-so400m qwen3-vl-2b] [--works multiflow unipt]

Each model and work in a process of its own, one after another; weights in bfloat16, built on the meta device and filled
module by module. `multiflow` prunes 63 % after 2 calibration batches of one row; `unipt` is a training step (forward,
backward, AdamW) of one row. The peak is that of the resident set from the moment at which the model is whole;
`ratio` is (weights + what the peak lies above the model) / weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from growth import filled, resident, watch
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipModel, SmolVLMConfig, SmolVLMModel

import trimtab


def smolvlm() -> nn.Module:
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "pad_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    return SmolVLMModel(SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=49190, scale_factor=4))


def siglip() -> nn.Module:
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision, text = tower | {"image_size": 384, "patch_size": 14}, tower | {"vocab_size": 32000}
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text))


def qwen3_vl() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}}  # fmt: skip
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "out_hidden_size": 2048,
              "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def pair_of_smolvlm() -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[49190] * 64, *range(100, 116)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 1, 3, 512, 512)}


def pair_of_siglip() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 30000, (1, 64)), "pixel_values": torch.randn(1, 3, 384, 384)}


def pair_of_qwen() -> dict[str, Tensor]:
    ids = torch.tensor([[151652, *[151655] * 64, 151653, *range(100, 116)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(256, 3 * 2 * 16 * 16),
            "image_grid_thw": torch.tensor([[1, 16, 16]]), "mm_token_type_ids": (ids == 151655).long()}  # fmt: skip


MODELS = {"smolvlm-256m": (smolvlm, pair_of_smolvlm), "siglip-so400m": (siglip, pair_of_siglip),
          "qwen3-vl-2b": (qwen3_vl, pair_of_qwen)}  # fmt: skip


def multiflow(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    fit = trimtab.prune(model, "multiflow", 0.63, [batch, batch])
    return {"sparsity": round(fit.sparsity, 4), "prunable": fit.masks.prunable}


def unipt(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    fit = trimtab.tune(model, "unipt")
    optimizer = torch.optim.AdamW(fit.parameters())
    out = model(**batch)
    read = [out.text_embeds, out.image_embeds] if hasattr(out, "text_embeds") else [out.last_hidden_state]
    loss = torch.stack([r.float().square().mean() for r in read]).sum()
    loss.backward()
    optimizer.step()
    return {"loss": float(loss), "trained": sum(p.numel() for p in fit.parameters())}


WORKS = {"multiflow": multiflow, "unipt": unipt}


def work(name: str, what: str) -> dict[str, Any]:
    make, pair = MODELS[name]
    model = filled(make, torch.bfloat16)
    torch.manual_seed(0)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in pair().items()}
    with torch.no_grad():
        model(**batch)  # what is made once is made
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    before, clock, wall = watch(), time.process_time(), time.perf_counter()
    found = WORKS[what](model, batch)
    extra = resident("VmHWM") - before
    ratio = round(1 + extra / bytes_, 3)
    return {"weights": bytes_ // 2, "weights_bytes": bytes_, "extra_bytes": extra, "ratio": ratio,
            "processor_seconds": round(time.process_time() - clock, 1),
            "seconds": round(time.perf_counter() - wall, 1), **found}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--here", action="store_true", help="one model and work, in this process")
    parser.add_argument("--out", type=Path, help="a JSON file, whose other results are kept")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(work(options.models[0], options.works[0])))
        return
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name in options.models:
        for what in options.works:
            command = [sys.executable, __file__, "--here", "--models", name, "--works", what]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}, {what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
            result[f"{name}, {what}"] = json.loads(done.stdout.splitlines()[-1])
            print(name, what, json.dumps(result[f"{name}, {what}"]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
