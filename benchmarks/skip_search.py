"""How many evaluations does a search need for a good plan? Regret of every search against all plans there are.

    python benchmarks/skip_search.py [--seeds 5] [--steps 200] [--out FILE] [--plot FILE]
    python benchmarks/skip_search.py --seeds 1 --steps 4 --batches 2 --train 64 --ks 1 2 --repeats 2      # to try it

For each seed `tiny-vilt` learns VQA with adapters while random blocks are skipped; then the loss of *every* plan with
k = 1..3 blocks skipped is computed on several validation batches. The oracle orders plans by the mean over all of
them. Searches are then played against that table, `--repeats` times with other draws: DAS asks on another batch at each
update, as published; the others on one fixed batch, and so does `random`, which takes the best of the plans it drew. A
plan's rank is its place among all plans, 0 for the best and 1 for the worst. Rewards are computed twice, with and
without reuse of what plans share; both times and the share of block calls are reported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from trimtab import recipe, run, training
from trimtab.data.cache import replace_file
from trimtab.methods.skip.bandit import BanditSettings, bandit
from trimtab.methods.skip.base import Supernet
from trimtab.methods.skip.budget import Target
from trimtab.methods.skip.das import Gates
from trimtab.methods.skip.evaluate import PlanLosses
from trimtab.methods.skip.greedy import greedy
from trimtab.methods.skip.influence import block_influence
from trimtab.methods.skip.linear import LinearSettings, linear
from trimtab.methods.skip.searched import train_evenly

BUDGETS = (3, 6, 9, 12, 15, 20, 30, 45, 60)  # evaluations; 60 is what DAS spends with its default settings
RAW = {
    "backbone": "tiny-vilt",
    "task": "vqa",
    "data": {"name": "pictograms", "style": "openmoji", "questions": ["is there", "how many", "where", "colour"]},
    "training": {"batch_size": 16, "learning_rate": 2.0e-3, "precision": "auto"},
}


def table(seed: int, options: argparse.Namespace) -> dict:
    """Train one model, and the losses of all its plans: {"losses": {plan: one a batch}, "influence": [...], ...}."""
    raw = {**RAW, "methods": [{"name": "greedy-skip", "skip": max(options.ks), "search_steps": options.steps}]}
    raw["data"] = {**RAW["data"], "train": options.train, "test": 8, "validation": options.rows * options.batches}
    r = replace(recipe.expand(raw, "skip-search")[0], seed=seed)
    parts = run.assemble(r)
    method = parts.methods[0]
    train, validation, _ = run.tables(r, parts)
    parts.model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts.model.backbone.requires_grad_(False)
    session = training.TrainingSession(parts.model, train, validation, r.training, seed, f"seed {seed}")
    candidates = method.candidates(session.anatomy)
    supernet = Supernet(session, candidates, method.settings)
    train_evenly(method, session, candidates, supernet, Target.count(len(candidates), 2))
    drawn = session.batches("validation", options.rows)
    batches = [next(drawn) for _ in range(options.batches)]
    plans = [p for k in options.ks for p in combinations(range(len(candidates)), k)]
    seconds, calls, found = {}, {}, []
    for reuse in (False, True):
        start = time.perf_counter()
        ask = [PlanLosses(supernet.model, supernet.switches, [b], reuse=reuse) for b in batches]
        found.append([a(plans) for a in ask])
        seconds[reuse], calls[reuse] = time.perf_counter() - start, sum(a.computed for a in ask)
    difference = (torch.tensor(found[0]) - torch.tensor(found[1])).abs().max()
    by_plan = {p: list(x) for p, x in zip(plans, zip(*found[1], strict=True), strict=True)}
    return {
        "losses": by_plan, "candidates": len(candidates), "seed": seed,
        "influence": block_influence(session.model, session.subject, candidates, batches[0]),
        "reuse": {"seconds_without": round(seconds[False], 3), "seconds_with": round(seconds[True], 3),
                  "block_calls_share": round(calls[True] / calls[False], 4), "largest_difference": float(difference)},
    }  # fmt: skip


def play(search: str, t: dict, k: int, evaluations: int, seed: int) -> tuple[tuple[int, ...], int]:
    """Play one search against the table: its plan, and how many evaluations it paid for."""
    losses, n = t["losses"], t["candidates"]
    generator = torch.Generator().manual_seed(seed)
    draws = random.Random(seed)
    batch = draws.randrange(len(next(iter(losses.values()))))
    asked: set[tuple[int, ...]] = set()

    def ask(plans):
        asked.update(tuple(sorted(p)) for p in plans)
        return [losses[tuple(sorted(p))][batch] for p in plans]

    target = Target.count(n, k)
    if search == "das":
        gates = Gates(n, target, 1.0, generator)
        spent = 0
        while spent + 3 <= evaluations:
            batch = draws.randrange(len(next(iter(losses.values()))))
            subsets = gates.subsets(3)
            gates.update(subsets, ask(subsets))
            spent += 3
        return tuple(gates.best()), spent
    if search == "random":
        plans = draws.sample([p for p in losses if len(p) == k], min(evaluations, sum(len(p) == k for p in losses)))
        found = ask(plans)
        return plans[found.index(min(found))], len(plans)
    if search == "greedy":
        plan = greedy(ask, target).plan
        return plan, len(asked)
    if search == "influence":
        return target.fill(sorted(range(n), key=lambda i: t["influence"][i])), 0
    influence = None if "even" in search else t["influence"]
    if search.startswith("linear"):
        return linear(ask, target, generator, LinearSettings(skip=k, evaluations=evaluations), influence).plan, len(
            asked
        )
    settings = BanditSettings(skip=k, evaluations=evaluations, draws=min(4, evaluations))
    return bandit(ask, target, generator, settings, influence).plan, len(asked)


def study(tables: list[dict], ks: list[int], repeats: int) -> list[dict]:
    """Rank and regret of every search with every number of evaluations, over seeds and repeats."""
    out = []
    for k in ks:
        for search in (
            "das",
            "random",
            "greedy",
            "influence",
            "bandit",
            "bandit, even start",
            "linear",
            "linear, even start",
        ):
            # Searches that decide themselves how much they ask are played once.
            for evaluations in BUDGETS if search not in ("greedy", "influence") else (max(BUDGETS),):
                ranks, regrets, spent = [], [], []
                for t in tables:
                    oracle = {p: statistics.fmean(x) for p, x in t["losses"].items() if len(p) == k}
                    order = sorted(oracle, key=oracle.get)
                    for repeat in range(repeats):
                        plan, paid = play(search, t, k, evaluations, 1000 * t["seed"] + repeat)
                        ranks.append(order.index(plan) / (len(order) - 1))
                        regrets.append(oracle[plan] - oracle[order[0]])
                        spent.append(paid)
                out.append({
                    "k": k, "search": search, "plans": len(order), "evaluations_at_most": evaluations,
                    "evaluations": round(statistics.fmean(spent), 1), "rank": round(statistics.fmean(ranks), 4),
                    "in_best_5_percent": round(sum(r <= 0.05 for r in ranks) / len(ranks), 3),
                    "regret": round(statistics.fmean(regrets), 5),
                })  # fmt: skip
    return out


def plot(results: list[dict], file: Path) -> None:
    """Mean rank against evaluations, one panel a k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ks = sorted({r["k"] for r in results})
    figure, axes = plt.subplots(1, len(ks), figsize=(4 * len(ks), 3.4), sharey=True, squeeze=False)
    for axis, k in zip(axes[0], ks, strict=True):
        for search in dict.fromkeys(r["search"] for r in results):
            rows = [r for r in results if r["k"] == k and r["search"] == search]
            axis.plot([r["evaluations"] for r in rows], [r["rank"] for r in rows], marker="o", ms=3, label=search)
        axis.set(title=f"{k} of 8 blocks skipped", xlabel="evaluations", ylim=(0, None))
    axes[0][0].set_ylabel("mean rank of the plan (0 = best)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(options: argparse.Namespace) -> None:
    if options.ks != list(range(1, max(options.ks) + 1)):
        raise SystemExit(f"--ks: expected 1 and so on without a gap (the greedy search needs them), found {options.ks}")
    settings = {k: getattr(options, k) for k in ("steps", "train", "rows", "batches", "ks")}
    report = {"settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "tables": []}
    if options.out and options.out.exists() and (kept := json.loads(options.out.read_text()))["settings"] == settings:
        report["tables"] = kept["tables"]  # their models are not trained again
    for seed in range(len(report["tables"]), options.seeds):
        start = time.perf_counter()
        made = table(seed, options)
        report["tables"].append({**made, "losses": [[p, x] for p, x in made["losses"].items()]})
        _write(report, options.out)
        print(f"seed {seed}: {len(made['losses'])} plans in {time.perf_counter() - start:.0f} s", flush=True)
    tables = [{**t, "losses": {tuple(p): x for p, x in t["losses"]}} for t in report["tables"][: options.seeds]]
    report["results"] = study(tables, options.ks, options.repeats)
    _write(report, options.out)
    if options.plot:
        plot(report["results"], options.plot)
    for r in report["results"]:
        print(json.dumps(r))
    print(json.dumps({"reuse": [t["reuse"] for t in tables]}))


def _write(report: dict, file: Path | None) -> None:
    if file is not None:
        with replace_file(file) as partial:
            partial.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="models, each trained with its own seed")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each")
    parser.add_argument("--train", type=int, default=2400, help="training rows")
    parser.add_argument("--rows", type=int, default=32, help="rows of a validation batch")
    parser.add_argument("--batches", type=int, default=10, help="validation batches; the oracle takes all of them")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 3], help="numbers of skipped blocks")
    parser.add_argument("--repeats", type=int, default=20, help="how often each search is played on each model")
    parser.add_argument("--out", type=Path, help="JSON file of everything; models in it are not trained again")
    parser.add_argument("--plot", type=Path, help="picture of rank against evaluations")
    main(parser.parse_args())
