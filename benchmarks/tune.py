"""What every tuning method trains and what autograd keeps for it, on the built-in backbones, as a Markdown table.

    python benchmarks/tune.py [--batch 32]

The same figures as `trimtab cost` gives: counted on random weights, no data, no time measured. `head` is the task's
head, which every method trains too; it is in both columns. Saved bytes are of one training batch, in float32.
"""

from __future__ import annotations

import argparse

from trimtab.experiments.estimate import estimate
from trimtab.experiments.recipe import expand
from trimtab.methods import METHODS

BACKBONES = {"tiny-clip": "retrieval", "tiny-vilt": "vqa"}


def main(batch: int) -> None:
    names = sorted(n for n, m in METHODS.items() if m.lever == "tune")
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    for backbone, task in BACKBONES.items():
        for name in names:
            raw = {"backbone": backbone, "task": task, "data": "pictograms", "methods": [name],
                   "training": {"batch_size": batch}}  # fmt: skip
            costs = estimate(expand(raw, "cost")[0])
            rows[name].append((costs["trainable_params"], costs["saved_activation_bytes"]))
    heads = " | ".join(f"{b}: trained | {b}: saved" for b in BACKBONES)
    print(f"| method | {heads} |\n|---|" + "---|" * 2 * len(BACKBONES))
    for name in sorted(names, key=lambda n: rows[n][-1][1]):
        cells = " | ".join(f"{p / 1e3:,.0f} K | {b / 1e6:.1f} MB" for p, b in rows[name])
        print(f"| `{name}` | {cells} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    main(parser.parse_args().batch)
