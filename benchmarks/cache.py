"""What the activation cache saves: samples a second of LoRA, UniPT, and UniPT from the cache; bytes; accuracy.

    python benchmarks/cache.py [--steps 3] [--no-accuracy] > docs/tune/cache.json

A step is collation or reading from the cache, forward, backward and AdamW. Seconds are of the processor on one thread,
not of the clock; the cache's files come from the page cache. `tiny-clip` is the built-in backbone at 64 px; `vit-b-32`
is a CLIP of ViT-B/32's sizes at 224 px with random weights. Accuracy: the same short recipe on pretrained tiny-clip,
without a cache and from each kind; the cached runs see the captions of as many views as they have.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from trimtab.backbones import load
from trimtab.backbones.base import Backbone, Pictures
from trimtab.backbones.clip.features import ClipBackbone
from trimtab.data.pictograms import load as pictograms
from trimtab.experiments import run, training
from trimtab.experiments.cached import CachedModel, TableCache
from trimtab.experiments.recipe import expand
from trimtab.methods import METHODS
from trimtab.tasks import TASKS, TaskModel

BATCH = {"tiny-clip": 32, "vit-b-32": 8}
ROWS = {"tiny-clip": 256, "vit-b-32": 32}


def vit_b_32() -> Backbone:
    """CLIP ViT-B/32's towers with the built-in tokenizer's vocabulary."""
    tiny = load("tiny-clip", pretrained=False)
    config = CLIPConfig()  # transformers' defaults are ViT-B/32's
    config.text_config.vocab_size = len(tiny.tokenizer)
    config.text_config.eos_token_id = tiny.model.config.text_config.eos_token_id
    model = CLIPModel(config).eval()
    return ClipBackbone("vit-b-32", model, tiny.tokenizer, Pictures(224), config.projection_dim, 32)


def tuned(name: str, method: str, **settings) -> tuple[TaskModel, object]:
    torch.manual_seed(0)
    backbone = vit_b_32() if name == "vit-b-32" else load(name, pretrained=False)
    model = TaskModel(backbone.requires_grad_(False), TASKS["retrieval"]())
    made = METHODS[method](**settings)
    made.attach(backbone.model, backbone.anatomy)
    return model, made


def rate(model: torch.nn.Module, batch, size: int, steps: int) -> float:
    """Samples a second of processor time, from the second step on."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()
    times = []
    for step in range(steps + 1):
        start = time.process_time()
        model(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return size * steps / sum(times[1:])


def speed(name: str, steps: int) -> dict:
    size, reduction = BATCH[name], 1
    table = pictograms("retrieval", rows=ROWS[name], seed=0, progress=False)
    out: dict = {"backbone": name, "batch": size}
    for method, settings in (("lora", {}), ("unipt", {"reduction": reduction})):
        model, made = tuned(name, method, **settings)
        stream = training.batches(model, table, size, train=True, seed=0)
        out[method] = round(rate(model, lambda step, s=stream: next(s)[1], size, steps), 1)
    for precision in ("fp16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            cache = TableCache(model, made, table, Path(folder) / "cache", precision)
            start = time.process_time()
            cache.fill()
            filled = time.process_time() - start
            order = torch.randperm(len(table)).repeat(1 + size * (steps + 1) // len(table)).tolist()
            small = CachedModel(model, made)
            read = lambda step, c=cache, o=order: c.batch(o[step * size : (step + 1) * size])  # noqa: E731
            out[precision] = {
                "samples_a_second": round(rate(small, read, size, steps), 1),
                "disk_kilobytes_a_sample": round(cache.bytes_a_sample / 1e3, 1),
                "fill_samples_a_second": round(len(table) / filled, 1),
            }
            out[precision]["over_lora"] = round(out[precision]["samples_a_second"] / out["lora"], 1)
            out[precision]["over_unipt"] = round(out[precision]["samples_a_second"] / out["unipt"], 1)
    return out


def accuracy() -> dict:
    """Recall@1 of a short recipe without and with a cache."""
    out = {}
    for label, cache, views in (("none", None, 1), ("fp32", "fp32", 4), ("fp16", "fp16", 4), ("int8", "int8", 4)):
        raw = {
            "backbone": "tiny-clip", "task": "retrieval", "methods": ["unipt"],
            "data": {"name": "pictograms", "style": "openmoji", "train": 800, "test": 300, "validation": 32},
            "training": {"steps": 60, "learning_rate": 2e-3, "cache": cache, "cache_views": views},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            run.run(expand(raw, "cache")[0], Path(folder) / "run", measure_costs=False)
            metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        out[label] = round(metrics["test"]["recall@1"], 4)
    return out


def main(steps: int, with_accuracy: bool) -> None:
    torch.set_num_threads(1)
    training.keep_freed_memory()
    results: dict = {"torch": torch.__version__, "speed": [speed(name, steps) for name in BATCH]}
    if with_accuracy:
        results["recall@1"] = accuracy()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    main(options.steps, options.accuracy)
