"""What it costs to rank pictures and captions with a cross-encoder, and what batching over pairs and candidates save.

python benchmarks/reranking.py [PICTURES]

tiny-vilt on scenes of the built-in world, four captions each: pairs a second by how many are fused in one pass, and the
seconds of a whole evaluation of all pairs. An X-VLM of random weights with candidates: the same, by k. Best of three.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn

from trimtab import backbones
from trimtab.backbones.xvlm.model import Xvlm, XvlmConfig
from trimtab.data.pictograms import load
from trimtab.tasks.reranking import Reranking


def seconds(backbone: Any, table: Any, **settings: Any) -> float:
    """Of an evaluation, the best of three."""
    task, found = Reranking(**settings), []
    for _ in range(3):
        start = time.perf_counter()
        with torch.inference_mode():
            records = []
            for first in range(0, len(table), 16):
                rows = [table[i] for i in range(first, min(first + 16, len(table)))]
                records += task.predict(backbone, nn.Identity(), task.collate(backbone, rows, train=False))
            task.score(backbone, nn.Identity(), records, table)
        found.append(time.perf_counter() - start)
    return min(found)


def xvlm(tokenizer: Any) -> Any:
    """Small, at 64 pixels, with tiny-vilt's words."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    text = {**sizes, "num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    vision = {**sizes, "model_type": "clip_vision_model", "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    model = Xvlm(XvlmConfig(text, vision, fusion_layer=2, embed=64, task="retrieval", local_layers=1))
    return backbones.FAMILIES["xvlm"].backbone("random X-VLM", model, tokenizer).eval()


def main(pictures: int = 48) -> None:
    table = load("retrieval", rows=pictures, progress=False)
    vilt = backbones.load("tiny-vilt").eval()
    texts = sum(len(c) for c in table["captions"])
    pairs = pictures * texts
    batched = [
        {"pairs_a_pass": n, "pairs_a_second": round(pairs / seconds(vilt, table, pairs=n))} for n in (1, 16, 256)
    ]
    other = xvlm(vilt.tokenizer)
    chosen = [{"k": k, "seconds": round(seconds(other, table, k=k), 2)} for k in (0, 4, 16)]
    print(json.dumps({"pictures": pictures, "texts": texts, "threads": torch.get_num_threads(), "tiny-vilt": batched,
                      "X-VLM, candidates": chosen}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
