"""Levers on models of real size with random weights: what they take of time and memory on this machine.

    python benchmarks/real_size.py [--models smolvlm-256m meter siglip-so400m qwen3-vl-2b] [--works multiflow unipt]

Each model and work in a process of its own, one after another; weights in bfloat16, built without memory and filled
module by module. Of one row, all:

    multiflow   prunes 63 % after 2 calibration batches
    unipt       a training step: forward, backward, AdamW
    das         a search of one step: the supernet, a training step, three plans compared, 2 blocks skipped
    cost        `fit.cost` of the model with UniPT

`extra_bytes` is what the peak of the resident set lies above the whole model at rest; `ratio` is (weights + that) /
weights; `peak_bytes` is the whole process's, torch's code and the making of the model included; `code_bytes` is what
of torch's and other libraries' code was first needed by the work, `forward_extra_bytes` the peak above the model of a
forward pass alone; both are among `extra_bytes`. What trimtab imports for a work (some 13 MB for any model) is imported
before, with the model.
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
from trimtab.backbones import build


def smolvlm() -> nn.Module:
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "pad_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    return SmolVLMModel(SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=49190, scale_factor=4))


def meter() -> nn.Module:
    return build("meter", tasks=["vqa"], image_size=384)


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


def pair_of_meter() -> dict[str, Tensor]:
    ids = torch.randint(5, 1000, (1, 40))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 384, 384)}


def pair_of_siglip() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 30000, (1, 64)), "pixel_values": torch.randn(1, 3, 384, 384)}


def pair_of_qwen() -> dict[str, Tensor]:
    ids = torch.tensor([[151652, *[151655] * 64, 151653, *range(100, 116)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(256, 3 * 2 * 16 * 16),
            "image_grid_thw": torch.tensor([[1, 16, 16]]), "mm_token_type_ids": (ids == 151655).long()}  # fmt: skip


MODELS = {"smolvlm-256m": (smolvlm, pair_of_smolvlm), "meter": (meter, pair_of_meter),
          "siglip-so400m": (siglip, pair_of_siglip), "qwen3-vl-2b": (qwen3_vl, pair_of_qwen)}  # fmt: skip


def loss_of(out: Any) -> Tensor:
    """A scalar that depends on all towers."""
    read = next([out[n] for n in names] for names in (("text_embeds", "image_embeds"), ("pooled",),
                                                      ("last_hidden_state",)) if names[0] in out)  # fmt: skip
    return torch.stack([r.float().square().mean() for r in read]).sum()


def multiflow(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    fit = trimtab.prune(model, "multiflow", 0.63, [batch, batch])
    return {"sparsity": round(fit.sparsity, 4), "prunable": fit.masks.prunable}


def unipt(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    fit = trimtab.tune(model, "unipt")
    optimizer = torch.optim.AdamW(fit.parameters())
    loss = loss_of(model(**batch))
    loss.backward()
    optimizer.step()
    return {"loss": float(loss), "trained": sum(p.numel() for p in fit.parameters())}


def das(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    fit = trimtab.skip(model, "das", train=[batch], validation=[batch], loss=loss_of, skip=2, search_steps=1,
                       warmup=0, turn=1)  # fmt: skip
    (update,) = fit.methods[0].state["updates"]
    return {"skipped": fit.plan.skipped, "compared": update["subsets"], "losses": update["losses"],
            "trained": sum(p.numel() for p in fit.parameters())}  # fmt: skip


def cost(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    found = trimtab.tune(model, "unipt").cost(batch, loss_of)
    return {"parameters": found.parameters, "trained": found.trained, "macs": found.macs, "saved": found.saved_bytes}


WORKS = {"multiflow": multiflow, "unipt": unipt, "das": das, "cost": cost}


def work(name: str, what: str) -> dict[str, Any]:
    make, pair = MODELS[name]
    model = filled(make, torch.bfloat16)
    torch.manual_seed(0)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in pair().items()}
    built, clock = resident("VmHWM"), time.process_time()
    with torch.no_grad():
        out = model(**batch)  # what is made once is made
    passed = time.process_time() - clock
    assert torch.isfinite(loss_of(out)), f"{name}: the model puts out numbers that are not finite"
    del out
    before = watch()
    with torch.no_grad():
        model(**batch)
    activations = resident("VmHWM") - before
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    for lever in ("prune", "skip", "tune"):
        getattr(trimtab, lever)  # imports what it needs, which is as large for every model
    before, code, clock = watch(), resident("RssFile"), time.process_time()
    found = WORKS[what](model, batch)
    seconds, peak = time.process_time() - clock, resident("VmHWM")
    return {"weights": bytes_ // 2, "weights_bytes": bytes_, "extra_bytes": peak - before,
            "ratio": round(1 + (peak - before) / bytes_, 3), "peak_bytes": max(peak, built),
            "forward_extra_bytes": activations, "code_bytes": resident("RssFile") - code,
            "forward_processor_seconds": round(passed, 1), "processor_seconds": round(seconds, 1),
            **found}  # fmt: skip


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
