"""What it costs to see a model at work: time of `Anatomy.of(model, example)` over that of one forward pass.

    python benchmarks/watch.py [--rounds 3] [--out FILE]

Models with random weights at the published width, with fewer blocks: a decoder of grouped heads, an encoder, a vision
transformer. Both take turns; the ratio is the median over rounds. Passes counts how often the whole model ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from trimtab.anatomy.seen.watch import watch

SIZE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
WORDS = torch.randint(5, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_key_value_heads=4, vocab_size=1000)), TEXT),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SIZE, vocab_size=1000)), TEXT),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**SIZE)), {"pixel_values": torch.randn(4, 3, 224, 224)}),
}


def timed(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of the process of one pass and of watching, and their ratio."""
    build, batch = MODELS[name]
    model = build().eval()
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    forward()
    ones, whole = [], []
    for _ in range(rounds):
        ones.append(timed(forward))
        handle = model.register_forward_hook(count)
        whole.append(timed(lambda: watch(model, batch)))
        handle.remove()
    ratio = statistics.median(w / o for w, o in zip(whole, ones, strict=True))
    return {
        "model": name, "parameters": sum(p.numel() for p in model.parameters()), "passes": passes // rounds,
        "forward_s": round(statistics.median(ones), 3), "watch_s": round(statistics.median(whole), 3),
        "over_forward": round(ratio, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for name in MODELS:
        found.append(measure(name, options.rounds))
        print(found[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
