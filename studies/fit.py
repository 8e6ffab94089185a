"""How good what `trimtab fit` finds is, and what it pays: against a grid, random search, single levers, and LoRA.

    python studies/fit.py tiny-vilt vqa --budget "macs <= -20%" --seeds 0 1 2 --out runs/fit-study [--steps 90]

grid       every candidate that fits, at every learning rate, trained to its end; the best on validation rows
fit        successive halving, as the command does it
warm       the same with warm starts (`--warm`)
random     candidates drawn evenly, each trained to its end, until the steps of `fit` are spent
single     one lever alone (prune, skip or tune) at the same budget, by `fit` with the same steps: the best of the three
lora       the default recipe with LoRA, whether it fits or not

All see the same rows, masks and plans. Results are a JSON line each in `results.jsonl`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.budgets.fit import _recipe, _searched, _space
from trimtab.budgets.halving import Search
from trimtab.budgets.limits import Budget, parse
from trimtab.budgets.prices import Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import TUNES, Candidate, Space
from trimtab.budgets.trial import Trial

TRIED = ("linear-probe", "lora-2", "lora-8", "adapter-8", "unipt-2", "skip-adapters", "full")


def search_of(options: argparse.Namespace, seed: int, folder: Path, only: tuple[str, ...] = ()) -> Search:
    """A search on the study's space; counts, masks and plans are shared by all of one seed."""
    overrides = [f"training.steps={options.steps}", f"seed={seed}", *options.overrides]
    recipe = _recipe(options.model, options.task, options.data, None, None, overrides)
    whole = _space(recipe)
    tunes = {k: TUNES[k] for k in TRIED}
    space = Space(sparsities=(0.3, 0.5), skips=whole.skips[:4], search=whole.search, tunes=tunes, multiples=(1.0, 3.0))
    space = space.narrowed(only)
    common = options.out / f"seed{seed}"
    common.mkdir(parents=True, exist_ok=True)
    prices = Prices(recipe, space, common / f"prices-{'-'.join(only) or 'all'}.json")
    prices.count_all()
    budget = Budget.of(parse(options.budget), prices.bases)
    shared = Shared(recipe, space, common / "shared", _searched(space, recipe))
    folder.mkdir(parents=True, exist_ok=True)
    search = Search(recipe, space, budget, prices, shared, folder, options.trials)
    shared.find({c.sparsity for c in search.fitting if c.sparsity}, {c.skip for c in search.fitting})
    return search


def trained(search: Search, candidates: Iterator[Candidate], steps: float) -> list[Trial]:
    """Train candidates to their end until so many steps are spent."""
    done: list[Trial] = []
    for candidate in candidates:
        if sum(t.steps for t in done) + search.rungs[-1] > steps:
            break
        trial = Trial(len(done), candidate, search.prices(candidate) or {})
        search.carry_out(trial, lambda step, score: False)
        done.append(trial)
    return done


def everything(search: Search) -> list[Candidate]:
    return [replace(c, multiple=m) for c in search.fitting for m in search.space.multiples]


def best(trials: list[Trial]) -> Trial | None:
    """The best on validation rows of those that were trained to the end."""
    return max((t for t in trials if t.status == "whole"), key=lambda t: t.score, default=None)


def told(way: str, seed: int, trial: Trial | None, steps: int, fits: bool = True) -> dict[str, Any]:
    if trial is None:
        return {"way": way, "seed": seed, "steps": steps, "found": None}
    return {"way": way, "seed": seed, "steps": steps, "found": str(trial.candidate), "validation": trial.score,
            "test": trial.test, "fits": fits, "costs": trial.costs}  # fmt: skip


def carry_out(options: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    folder = options.out / f"seed{seed}" / way
    if way == "single":
        found = [carry_out(options, f"single-{lever}", seed) for lever in ("prune", "skip", "tune")]
        chosen = max((f for f in found if f["found"]), key=lambda f: f["validation"], default=found[0])
        return {**chosen, "way": way, "steps": sum(f["steps"] for f in found)}
    if way.startswith("single-"):
        # Pruning and skipping alone still train: what they leave, in full, or the adapters of skipping.
        only = {"prune": ("prune", "full"), "skip": ("skip", "skip-adapters"),
                "tune": tuple(t for t in TRIED if t != "skip-adapters")}[way.removeprefix("single-")]  # fmt: skip
        search = search_of(options, seed, folder, only)
        if not search.fitting:
            return told(way, seed, None, 0)
        search.go()
        return told(way, seed, search.best, sum(t.steps for t in search.done))
    search = search_of(options, seed, folder)
    if way in ("fit", "warm"):
        search.warm = way == "warm"
        search.go()
        return told(way, seed, search.best, search.paid)
    if way == "lora":
        lora = Candidate(0.0, 0, "lora-8")
        free = replace(search, budget=Budget((), {}))
        trials = trained(free, iter([lora]), float("inf"))
        return told(way, seed, trials[0], trials[0].steps, not search.budget.over(trials[0].costs))
    candidates = everything(search)
    if way == "random":
        random.Random(seed).shuffle(candidates)
        spent = next(r["steps"] for r in read(options.out) if r["way"] == "fit" and r["seed"] == seed)
    else:
        spent = float("inf")
    trials = trained(search, iter(candidates), spent)
    return told(way, seed, best(trials), sum(t.steps for t in trials))


def read(out: Path) -> list[dict[str, Any]]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, such as data.train=2400")
    parser.add_argument("--data", default="pictograms")
    parser.add_argument("--budget", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--ways", nargs="+", default=["fit", "warm", "random", "single", "lora", "grid"])
    parser.add_argument("--out", type=Path, default=Path("runs/fit-study"))
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for way in options.ways:
        for seed in options.seeds:
            if any(r["way"] == way and r["seed"] == seed for r in read(options.out)):
                continue
            row = carry_out(options, way, seed)
            with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{way} seed {seed}: {row['found']} {row.get('test')} after {row['steps']} steps", flush=True)


if __name__ == "__main__":
    main()
