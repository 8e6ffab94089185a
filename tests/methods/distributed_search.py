"""What `test_distributed.py` starts in one and in two processes: a search, its gates as JSON on the last line."""

from __future__ import annotations

import json
import os
import sys

from trimtab.experiments import assembly, recipe, training

if __name__ == "__main__":
    rows = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    raw = {
        "backbone": {"name": "tiny-vilt", "pretrained": False},
        "task": "vqa",
        "data": {"name": "pictograms", "train": 64, "test": 8, "validation": 32},
        "methods": [{"name": "das", "skip": 2, "search_steps": 4, "turn": 1, "warmup": 0.2, "gate_rate": 2000.0,
                     "dropout_in_rewards": False}],
        "training": {"steps": 1, "batch_size": rows},
    }  # fmt: skip
    r = recipe.expand(raw, "distributed")[0]
    parts = assembly.assemble(r)
    tables = [parts.source.load("vqa", split) for split in ("train", "validation")]
    parts.model.backbone.requires_grad_(False)
    parts.methods[0].prepare(training.TrainingSession(parts.model, *tables, r.training, r.seed, "test"))
    state = parts.methods[0].state
    line = {
        "gates": list(state["gates"].values()),
        "skip": state["skip"],
        "subsets": [u["subsets"] for u in state["updates"]],
    }
    sys.stdout.write(json.dumps(line) + "\n")
