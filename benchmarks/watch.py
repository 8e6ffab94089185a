"""What it costs to see a model at work: time of `Anatomy.of(model, example)` over that of one forward pass.

    python benchmarks/watch.py [--rounds 3] [--out FILE]

Models with random weights and twelve blocks: a decoder of grouped heads, an encoder, a vision transformer. Both take
turns; the ratio of times is the median over rounds. Passes counts how often the whole model ran. Products counts the
multiply-adds that torch was asked for while watching, of whole passes and of single blocks together, over those of one
forward pass; on examples of few and more rows, short and long, padded alike and each row otherwise. It depends neither
on the machine nor on what a call costs apart from its numbers.
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
from torch.utils.flop_counter import FlopCounterMode

from trimtab.anatomy.seen.watch import watch

SIZE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 12, "num_hidden_layers": 12}
MODELS: dict[str, Callable[[dict[str, int]], nn.Module]] = {
    "llama": lambda size: hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_key_value_heads=4, vocab_size=1000)),
    "bert": lambda size: hf.BertModel(hf.BertConfig(**size, vocab_size=1000)),
    "vit": lambda size: hf.ViTModel(hf.ViTConfig(**size)),
}


def example(name: str, rows: int, tokens: int, padded: bool) -> dict[str, torch.Tensor]:
    """A batch; `padded`: row i ends in i places of padding."""
    draw = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=draw)}
    words = torch.randint(5, 1000, (rows, tokens), generator=draw)
    lengths = tokens - torch.arange(rows) if padded else torch.full((rows,), tokens)
    return {"input_ids": words, "attention_mask": (torch.arange(tokens) < lengths[:, None]).long()}


def examples(name: str) -> list[tuple[int, int, bool]]:
    """(rows, tokens, padded) of those on which products are counted."""
    if name == "vit":
        return [(rows, 197, False) for rows in (2, 3, 4)]
    return [(rows, tokens, padded) for rows in (2, 4, 8) for tokens in (8, 32, 128) for padded in (False, True)]


def products(work: Callable[[], Any]) -> int:
    """Multiply-adds of all products that a piece of work asks torch for, times two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count(name: str) -> list[dict[str, Any]]:
    """Products of watching over those of one pass, on each example, with a narrow model."""
    model = MODELS[name](SMALL).eval()
    found = []
    for rows, tokens, padded in examples(name):
        batch = example(name, rows, tokens, padded)
        with torch.no_grad():
            one = products(lambda: model(**batch))  # noqa: B023 (called at once)
        whole = products(lambda: watch(model, batch))  # noqa: B023
        found.append({"rows": rows, "tokens": tokens, "padded": padded, "products": round(whole / one, 2)})
    return found


def timed(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of the process of one pass and of watching, and their ratio."""
    batch = example(name, 4, 128, padded=False)
    model = MODELS[name](SIZE).eval()
    passes = 0

    def ran(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    forward()
    ones, whole = [], []
    for _ in range(rounds):
        ones.append(timed(forward))
        handle = model.register_forward_hook(ran)
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
        found.append({**measure(name, options.rounds), "examples": count(name)})
        print(found[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
