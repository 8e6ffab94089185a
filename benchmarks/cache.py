"""What the activation cache saves: samples a second of LoRA and of methods that train from the cache; bytes; accuracy.

    python benchmarks/cache.py --out FILE [--steps 3] [--photographs FOLDER] [--only BACKBONE] [--no-accuracy]

A step is collation or reading from the cache, forward, backward and AdamW. Seconds are of the processor on one thread,
not of the clock; the cache's files come from the page cache. Each ratio is the median over rounds of steps that follow
each other: one of LoRA, one of the same method without a cache, and those from the cache. `tiny-clip` is the built-in
backbone at 64 px; `vit-b-32` is a CLIP of ViT-B/32's sizes at 224 px with random weights; `lite0-minilm` has real
weights at 96 px, and photographs (a folder of Flickr8k) or built-in pictures. Its LoRA is in the text tower: the other
has no attention. `parts` are milliseconds of a cached step: reading, forward, backward, optimiser. `gflop` are the
operations of a cached step's matrix products; `at_most_over_lora` is the ratio if there were nothing else and all ran
as fast as products of 1024 x 1024 matrices do at that time. Accuracy: the same short recipe on pretrained tiny-clip,
without a cache and from each kind; the cached runs see the captions of as many views as they have. What stands in the
file is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from trimtab.backbones import load
from trimtab.backbones.base import Backbone, Pictures
from trimtab.backbones.clip.features import ClipBackbone
from trimtab.data.pictograms import load as pictograms
from trimtab.data.sources import SOURCES
from trimtab.experiments import run, training
from trimtab.experiments.cached import CachedModel, TableCache
from trimtab.experiments.recipe import expand
from trimtab.methods import METHODS
from trimtab.tasks import TASKS, TaskModel

BATCH = {"tiny-clip": 32, "vit-b-32": 16, "lite0-minilm": 64}
ROWS = {"tiny-clip": 256, "vit-b-32": 64, "lite0-minilm": 256}
GPO = {"pooling": "gpo", "objective": "triplet", "all_negatives": 46}
GRIDS = (1, 3, 5)  # of EfficientNet-Lite0, larger than its last; of MiniLM the same numbers
# backbone -> name of what is compared: task, method and its settings
CACHED: dict[str, dict[str, tuple[dict, str, dict]]] = {
    "tiny-clip": {"unipt": ({}, "unipt", {"reduction": 1}), "linear-probe": ({}, "linear-probe", {})},
    "vit-b-32": {
        "unipt": ({}, "unipt", {"reduction": 1}),
        "lst": ({}, "lst", {}),
        "side-tuning": ({}, "side-tuning", {}),
        "linear-probe": ({}, "linear-probe", {}),
    },
    "lite0-minilm": {
        "unipt text": ({}, "unipt", {"towers": ("text",)}),
        "unipt both": ({}, "unipt", {"layers": GRIDS}),
        "linear-probe": ({}, "linear-probe", {}),
        "unipt text, gpo": (GPO, "unipt", {"towers": ("text",)}),
        "unipt both, gpo": (GPO, "unipt", {"layers": GRIDS}),
        "linear-probe, gpo": (GPO, "linear-probe", {}),
    },
}


def vit_b_32() -> Backbone:
    """CLIP ViT-B/32's towers with the built-in tokenizer's vocabulary."""
    tiny = load("tiny-clip", pretrained=False)
    config = CLIPConfig()  # transformers' defaults are ViT-B/32's
    config.text_config.vocab_size = len(tiny.tokenizer)
    config.text_config.eos_token_id = tiny.model.config.text_config.eos_token_id
    model = CLIPModel(config).eval()
    return ClipBackbone("vit-b-32", model, tiny.tokenizer, Pictures(224), config.projection_dim, 32)


def tuned(name: str, task: dict, method: str, settings: dict) -> tuple[TaskModel, Any]:
    torch.manual_seed(0)
    backbone = vit_b_32() if name == "vit-b-32" else load(name, pretrained=name == "lite0-minilm")
    model = TaskModel(backbone, TASKS["retrieval"](**task))
    backbone.requires_grad_(False)
    made = METHODS[method](**settings)
    made.attach(backbone.model, backbone.anatomy)
    return model, made


class Stepper:
    """Training steps of a model, one at a time."""

    def __init__(self, model: torch.nn.Module, batch: Callable[[int], dict]):
        self.model, self.batch, self.count = model.train(), batch, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(self) -> list[float]:
        """Seconds of reading, forward, backward and optimiser."""
        marks = [time.process_time()]
        batch = self.batch(self.count)
        marks.append(time.process_time())
        loss = self.model(**batch)["loss"]
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.process_time())
        self.count += 1
        return [b - a for a, b in itertools.pairwise(marks)]

    def gflop(self) -> float:
        """Of the matrix products of a step."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops() / 1e9


def gflop_a_second() -> float:
    """Of a product of large matrices."""
    a, times = torch.randn(1024, 1024), []
    for _ in range(10):
        start = time.process_time()
        a @ a
        times.append(time.process_time() - start)
    return 2 * 1.024**3 / statistics.median(times)


def lora(name: str, task: dict, table: Any) -> Stepper:
    settings = {"towers": ("text",)} if name == "lite0-minilm" else {}
    model, _ = tuned(name, task, "lora", settings)
    stream = training.batches(model, table, BATCH[name], train=True, seed=0)
    return Stepper(model, lambda step: next(stream)[1])


def compared(name: str, table: Any, base: Stepper, task: dict, method: str, settings: dict, precision: str,
             steps: int) -> dict:  # fmt: skip
    """One method from the cache, step by step beside LoRA."""
    size = BATCH[name]
    model, made = tuned(name, task, method, settings)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        cache = TableCache(model, [made], table, Path(folder) / "cache", precision)  # type: ignore[arg-type]
        watched = time.process_time()
        cache.fill()
        filled = time.process_time()
        order = torch.randperm(len(table)).repeat(1 + size * 5 * (steps + 1) // len(table)).tolist()
        quick = Stepper(CachedModel(cache), lambda step: cache.batch(order[step * size : (step + 1) * size]))
        stream = training.batches(model := tuned(name, task, method, settings)[0], table, size, train=True, seed=0)
        plain = Stepper(model, lambda step: next(stream)[1])
        quick.step(), plain.step()
        rounds = [(sum(base.step()), sum(plain.step()), [quick.step() for _ in range(5)]) for _ in range(steps)]
        parts = [statistics.median(one[i] for *_, found in rounds for one in found) for i in range(4)]
        times = [statistics.median(sum(one) for one in found) for *_, found in rounds]
        over = [statistics.median(r[i] / t for r, t in zip(rounds, times, strict=True)) for i in (0, 1)]
        gflop, slow = quick.gflop(), statistics.median(r[0] for r in rounds)
        return {
            "over_lora": round(over[0], 1),
            "over_uncached": round(over[1], 1),
            "gflop": round(gflop, 3),
            "at_most_over_lora": round(slow / gflop * gflop_a_second(), 1),
            "samples_a_second": round(size / statistics.median(times), 1),
            "parts": [round(1e3 * p, 1) for p in parts],
            "disk_kilobytes_a_sample": round(cache.bytes_a_sample / 1e3, 1),
            "fill_samples_a_second": round(len(table) / (filled - watched), 1),
            "watching_seconds": round(watched - start, 1),
        }


def speed(name: str, steps: int, photographs: str | None, out: dict, keep: Callable[[], None]) -> None:
    """Everything of one backbone that is not in `out`."""
    if name == "lite0-minilm" and photographs:
        table = SOURCES["flickr8k"](root=photographs).load("retrieval", "train").select(range(ROWS[name]))
    else:
        table = pictograms("retrieval", rows=ROWS[name], seed=0, progress=False)
    bases: dict[str, Stepper] = {}
    seen = "photographs" if photographs and name == "lite0-minilm" else "built-in"
    out |= {"batch": BATCH[name], "rows": ROWS[name], "steps": steps, "pictures": seen}
    for label, (task, method, settings) in CACHED[name].items():
        kind = task.get("pooling", "own")
        for precision in ("fp16", "int8") if label == "unipt" else ("fp16",):
            if f"{label}, {precision}" in out:
                continue
            if kind not in bases:
                bases[kind] = lora(name, task, table)
                out[f"lora gflop, {kind}"] = round(bases[kind].gflop(), 1)
            found = compared(name, table, bases[kind], task, method, settings, precision, steps)
            out[f"{label}, {precision}"] = found
            out[f"lora samples_a_second, {kind}"] = round(BATCH[name] / sum(bases[kind].step()), 1)
            print(f"{name}, {label}, {precision}: {found}", file=sys.stderr, flush=True)
            keep()


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


def main(steps: int, photographs: str | None, only: str | None, with_accuracy: bool, file: Path) -> None:
    torch.set_num_threads(1)
    training.keep_freed_memory()
    results = json.loads(file.read_text()) if file.exists() else {}
    results["torch"] = torch.__version__

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")

    for name in [only] if only else list(BATCH):
        speed(name, steps, photographs, results.setdefault(name, {}), keep)
    if with_accuracy and "recall@1" not in results:
        results["recall@1"] = accuracy()
    keep()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--photographs", help="folder of Flickr8k, for lite0-minilm")
    parser.add_argument("--only", choices=list(BATCH))
    parser.add_argument("--accuracy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, whose results are kept")
    options = parser.parse_args()
    main(options.steps, options.photographs, options.only, options.accuracy, options.out)
