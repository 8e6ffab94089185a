"""Scores and shares apart: what pruned models still do without training, for every score under every allocation.

    python studies/shares.py [tiny-blip] [tiny-vilt] [--seeds 0] [--levels 0.63 0.75]       measure what is missing
    python studies/shares.py --tables

A pruner is a score for each weight and a share for each tensor. Here each of four scores is given each of seven shares,
`multimodal:0.5` being MULTIFLOW's with a floor: every tensor keeps at least half of what is kept on average. The model
is pruned as in recipes/prune/find_MODEL.yaml, and asked what it was pretrained for: to find the caption of a picture
among those of 25 (tiny-blip) or 20 (tiny-vilt), for 1,000 pictures. One line a model in `studies/results/shares.jsonl`,
with each picture's answer, so that differences are paired, and with what the most starved tensor keeps; what is
there is not measured again. The same for real weights: `studies/real_weights.py --shares`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from each import MatchingEach

from trimtab import Masks
from trimtab.experiments.recipe import expand, find
from trimtab.experiments.run import run
from trimtab.metrics.intervals import interval

RESULTS = Path(__file__).parent / "results" / "shares.jsonl"
MODELS = ("tiny-blip", "tiny-vilt")
SCORES = {"multiflow": "flow", "omp": "magnitude", "wanda": "Wanda", "snip": "SNIP"}
DENSE = "dense"
SHARES = ("uniform", "global", "modality", "multimodal", "multimodal:0.5", "multimodal:0.75", "ecoflap")


def measure(model: str, pruner: str, shares: str, level: float, seed: int) -> dict[str, Any]:
    """Prune, ask, and tell."""
    allocation, _, floor = shares.partition(":")
    method = {"name": pruner, "sparsity": level, "batches": 8, "allow_empty_tower": True, "allocation": allocation,
              "floor": float(floor or 0) * (1 - level)}  # fmt: skip
    raw = yaml.safe_load(find(f"prune/find_{model}").read_text())
    raw = {k: v for k, v in raw.items() if k not in ("variants", "grid")}
    raw["methods"] = [] if pruner == DENSE else [method]
    recipe = expand(raw, "shares", ["task.name=matching-each", "data.test=1000", f"seed={seed}"])[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = run(recipe, Path(scratch) / "run")
        told = json.loads((folder / "metrics.json").read_text())
        kept: dict[str, Any] = {}
        if recipe.methods:
            masks = Masks.read(folder)
            each = {path: bits.kept / bits.shape.numel() for path, bits in masks.bits.items()}
            poorest = min(each, key=lambda path: each[path])
            kept = {"sparsity found": round(masks.sparsity, 4), "least": round(each[poorest], 4), "poorest": poorest}
    score = round(told["test"]["image to text recall@1"], 5)  # of which `each` tells
    return {"score": score, **kept, "each": MatchingEach.each}


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def fill(options: argparse.Namespace) -> None:
    done = {(r["model"], r["pruner"], r["shares"], r["level"], r["seed"]) for r in lines()}
    wanted = [(m, DENSE, "", 0.0, 0) for m in options.models]
    wanted += [(m, p, s, x, seed) for seed in options.seeds for m in options.models for x in options.levels
               for p in SCORES for s in SHARES]  # fmt: skip
    for key in wanted:
        if key in done:
            continue
        row = dict(zip(("model", "pruner", "shares", "level", "seed"), key, strict=True)) | measure(*key)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({k: v for k, v in row.items() if k != "each"}, flush=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables() -> Iterator[str]:
    """A table a model and sparsity: recall@1 of each score under each share, and how far it is from that score under
    uniform shares, paired, with a 95 % interval."""
    rows = lines()
    for model in MODELS:
        mine = [r for r in rows if r["model"] == model]
        dense = next((r["score"] for r in mine if r["pruner"] == DENSE), None)
        for level in sorted({r["level"] for r in mine} - {0.0}):
            yield f"**{model}, {100 * level:g} %**, image to text recall@1 in %; dense {100 * (dense or 0):.1f}\n"
            yield f"| shares | {' | '.join(SCORES.values())} | the poorest tensor keeps, % |"
            yield "|---|" + "---:|" * (len(SCORES) + 1)
            for shares in SHARES:
                here = [r for r in mine if (r["shares"], r["level"]) == (shares, level)]
                cells = [cell(mine, pruner, shares, level) for pruner in SCORES]
                least = sorted(100 * r["least"] for r in here)
                yield f"| {shares} | {' | '.join(cells)} | " + (
                    f"{least[0]:.1f} to {least[-1]:.1f} |" if least else "- |"
                )
            yield ""


def cell(rows: list[dict[str, Any]], pruner: str, shares: str, level: float) -> str:
    of = {s: {r["seed"]: r for r in rows if (r["pruner"], r["shares"], r["level"]) == (pruner, s, level)}
          for s in (shares, "uniform")}  # fmt: skip
    if not of[shares]:
        return "-"
    text = f"{100 * fmean(r['score'] for r in of[shares].values()):.1f}"
    seeds = sorted(of[shares].keys() & of["uniform"].keys())
    if shares == "uniform" or not seeds:
        return text
    gap = np.mean([np.subtract(of[shares][s]["each"], of["uniform"][s]["each"]) for s in seeds], axis=0) * 100
    if not gap.any():
        return text + " (the same)"
    low, high = interval(gap.tolist())
    return f"{text} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="tiny-blip, tiny-vilt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--levels", type=float, nargs="+", default=[0.63, 0.75])
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    options = parser.parse_args()
    if options.tables:
        print("\n".join(tables()))
    else:
        fill(options)


if __name__ == "__main__":
    main()
