"""A run of seconds: a tiny ViLT answers questions about noise; its recipe, and what is compared of two such runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file

from tests.models.official import tokenizer
from trimtab.experiments.recipe import expand

PRUNE = {"name": "multiflow", "sparsity": 0.5, "batches": 2, "batch_size": 4}


def made_in(folder: Path) -> Path:
    """A tiny ViLT that drops out, and pictures with questions, in a folder."""
    torch.manual_seed(0)
    config = hf.ViltConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                           vocab_size=40, image_size=16, patch_size=4, max_position_embeddings=12,
                           hidden_dropout_prob=0.2)  # fmt: skip
    hf.ViltForImageAndTextRetrieval(config).save_pretrained(folder / "vilt")
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder / "vilt")
    tokenizer(folder / "vilt", 40)
    for split, count in (("train", 20), ("validation", 9), ("test", 5)):
        rows = []
        for i in range(count):
            noise = random.Random(f"{split} {i}").randbytes(3 * 16 * 16)
            Image.frombytes("RGB", (16, 16), noise).save(folder / f"{split}-{i}.png")
            rows.append({"image": f"{split}-{i}.png", "question": "is it " + ["red", "blue"][i % 2],
                         "answer": "yes" if i % 3 else "no"})  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(place: Path, methods: list[Any], **settings: Any) -> Any:
    raw = {
        "backbone": {"name": str(place / "vilt"), **({"pictures": "squash"} if "cache" in settings else {})},
        "task": "vqa", "methods": methods, "costs": False,
        "data": {"name": "files", **{s: str(place / f"{s}.jsonl") for s in ("train", "validation", "test")}},
        "training": {"steps": 6, "batch_size": 8, "evaluation_batch": 4, "log_every": 1, "workers": 0, **settings},
    }  # fmt: skip
    return expand(raw, "plateau")[0]


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(folder / "weights.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
