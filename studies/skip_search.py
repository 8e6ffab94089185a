"""How many evaluations does a search need for a good plan? Regret of every search against all plans there are.

    python studies/skip_search.py [--task vqa] [--seeds 5] [--steps 200] [--out FILE] [--plot FILE]
    python studies/skip_search.py --seeds 1 --steps 4 --train 64 --batches 2 --held 2 --repeats 2      # to try it

For each seed `tiny-vilt` learns the task with adapters while random blocks are skipped; then the loss of *every* plan
with k = 1..3 blocks skipped is computed, on `--batches` batches of the validation split and on `--held` batches of
the test split. Searches are then played against the table, `--repeats` times with other draws, and judged in two ways:

`validation`  every search compares plans on all validation rows, and the oracle orders them by the same rows. No chance
              but the search's own: how many plans must be tried? (`das` takes another batch at each update, as
              published; `das, all rows` is DAS on the same rows as the others.)
`test`        an evaluation is one plan on `batches` validation batches, which a search keeps and DAS draws anew at each
              update. The oracle orders plans by the test rows, which no search sees: how good is the plan in the end?
              `all plans` knows the loss of every plan on those batches: what no search on so many rows surpasses.

A plan's rank is its place among all plans of its k, 0 for the best and 1 for the worst. `as_good` is the share of plans
that the rows do not tell from the last of the best 5 %: in the best 5 %, or less than two standard errors of the
difference above it (over test batches). `halves` is how often the best plan of half of the test batches is in the best
5 % of the other half. `random` takes the best of the plans it drew.

Rewards of one batch are computed twice, with and without reuse of what plans share; both times and the share of block
calls are reported.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import torch

from trimtab.experiments import assembly, recipe, training
from trimtab.files import replace_file
from trimtab.methods.skip.budget import Goal
from trimtab.methods.skip.search.bandit import BanditSettings, bandit
from trimtab.methods.skip.search.das import Gates
from trimtab.methods.skip.search.evaluate import PlanLosses
from trimtab.methods.skip.search.greedy import greedy
from trimtab.methods.skip.search.influence import block_influence
from trimtab.methods.skip.search.linear import LinearSettings, linear
from trimtab.methods.skip.search.searched import train_evenly
from trimtab.methods.skip.search.supernet import Supernet

BUDGETS = (3, 8, 15, 30, 60)  # evaluations; 60 is what DAS spends with its default settings
SEARCHES = ("das", "random", "greedy", "influence", "bandit", "linear")
TASKS = {
    "vqa": {"questions": ["is there", "how many", "where", "colour"]},
    "matching": {},
}


def table(seed: int, options: argparse.Namespace) -> dict:
    """Train one model, and the losses of all its plans: {"losses": {plan: one a validation batch}, "held": {plan: one
    a test batch}, "influence": [...], ...}."""
    raw = {
        "backbone": "tiny-vilt",
        "task": options.task,
        "data": {"name": "pictograms", "style": "openmoji", **TASKS[options.task], "train": options.train,
                 "validation": options.rows * options.batches, "test": options.rows * options.held},
        "training": {"batch_size": 16, "learning_rate": 2.0e-3, "precision": "auto"},
        "methods": [{"name": "greedy-skip", "skip": max(options.ks), "search_steps": options.steps}],
    }  # fmt: skip
    r = replace(recipe.expand(raw, "skip-search")[0], seed=seed)
    parts = assembly.assemble(r)
    method = parts.methods[0]
    train, validation, test = assembly.tables(r, parts)
    parts.model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts.model.backbone.requires_grad_(False)
    session = training.TrainingSession(parts.model, train, validation, r.training, seed, f"seed {seed}")
    candidates = method.candidates(session.anatomy)
    supernet = Supernet(session, candidates, method.settings)
    train_evenly(method, session, supernet, Goal.count(len(candidates), 2))
    torch.manual_seed(seed)  # the matching task draws its batches' masks and wrong captions
    drawn = session.batches("validation", options.rows)
    batches = [next(drawn) for _ in range(options.batches)]
    others = training.TrainingSession(parts.model, train, test, r.training, seed, "")
    drawn = others.batches("validation", options.rows)
    held = [next(drawn) for _ in range(options.held)]
    plans = [p for k in options.ks for p in combinations(range(len(candidates)), k)]

    def by_plan(batches: list, reuse: bool = True) -> tuple[dict, int]:
        ask = [PlanLosses(supernet.with_task, supernet.switches, [b], reuse=reuse) for b in batches]
        found = [a(plans) for a in ask]
        return {p: list(x) for p, x in zip(plans, zip(*found, strict=True), strict=True)}, sum(a.computed for a in ask)

    seconds, calls, found = {}, {}, {}
    for reuse in (False, True):
        start = time.perf_counter()
        found[reuse], calls[reuse] = by_plan(batches[:1], reuse)
        seconds[reuse] = time.perf_counter() - start
    return {
        "losses": by_plan(batches)[0], "held": by_plan(held)[0], "candidates": len(candidates), "seed": seed,
        "influence": block_influence(session.with_task, session.plain, candidates, batches[0]),
        "dense": PlanLosses(supernet.with_task, supernet.switches, held)([()])[0],
        "reuse": {"seconds_without": round(seconds[False], 3), "seconds_with": round(seconds[True], 3),
                  "block_calls_share": round(calls[True] / calls[False], 4),
                  "largest_difference": max(abs(found[True][p][0] - found[False][p][0]) for p in plans)},
    }  # fmt: skip


class Table:
    """What one model's table says about plans with k blocks skipped."""

    def __init__(self, raw: dict, k: int, judged: str):
        self.plans = [p for p in raw["losses"] if len(p) == k]
        self.losses = {p: raw["losses"][p] for p in self.plans}
        self.held = {p: raw["held"][p] for p in self.plans}
        self.batches = len(self.losses[self.plans[0]])
        self.influence, self.candidates, self.k = raw["influence"], raw["candidates"], k
        self.smaller = raw["losses"]  # of any size: the greedy search asks for them
        judge = self.losses if judged == "validation" else self.held
        self.judge = {p: statistics.fmean(x) for p, x in judge.items()}
        self.order = sorted(self.plans, key=lambda p: self.judge[p])

    def rank(self, plan: tuple[int, ...]) -> float:
        return self.order.index(plan) / (len(self.order) - 1)

    def as_good(self, plan: tuple[int, ...]) -> bool:
        """Whether test rows do not tell the plan from the last of the best 5 %."""
        last = self.order[int(0.05 * (len(self.order) - 1))]
        if self.judge[plan] <= self.judge[last]:
            return True
        above = [a - b for a, b in zip(self.held[plan], self.held[last], strict=True)]
        return statistics.fmean(above) < 2 * statistics.stdev(above) / len(above) ** 0.5


def play(search: str, t: Table, evaluations: int, batches: int, seed: int) -> tuple[tuple[int, ...], int]:
    """Play one search on so many batches: its plan, and how many evaluations it paid for."""
    generator, draws = torch.Generator().manual_seed(seed), random.Random(seed)
    mine = draws.sample(range(t.batches), batches)
    asked: set[tuple[int, ...]] = set()

    def ask(plans):
        asked.update(tuple(sorted(p)) for p in plans)
        return [statistics.fmean(t.smaller[tuple(sorted(p))][b] for b in mine) for p in plans]

    target = Goal.count(t.candidates, t.k)
    if search.startswith("das"):
        gates = Gates(t.candidates, target, 1.0, generator)
        for _ in range(evaluations // 3):
            subsets = gates.subsets(3)
            gates.update(subsets, ask(subsets))
            mine = draws.sample(range(t.batches), batches)
        return tuple(gates.best()), evaluations // 3 * 3
    if search in ("random", "all plans"):
        plans = t.plans if search == "all plans" else draws.sample(t.plans, min(evaluations, len(t.plans)))
        found = ask(plans)
        return plans[found.index(min(found))], len(plans)
    if search == "influence":
        return target.fill(sorted(range(t.candidates), key=lambda i: t.influence[i])), 0
    if search == "greedy":
        plan = greedy(ask, target).plan
    elif search == "linear":
        plan = linear(ask, target, generator, LinearSettings(skip=t.k, evaluations=evaluations), t.influence).plan
    else:
        settings = BanditSettings(skip=t.k, evaluations=evaluations, draws=min(4, evaluations))
        plan = bandit(ask, target, generator, settings, t.influence).plan
    return plan, len(asked)


def study(tables: list[dict], ks: list[int], repeats: int) -> list[dict]:
    """How good the plans of each search are by its number of evaluations, over seeds and repeats."""
    whole = len(next(iter(tables[0]["losses"].values())))
    views = [("validation", whole), *(("test", b) for b in sorted({1, min(4, whole), whole}))]
    out = []
    for (judged, batches), k in product(views, ks):
        games = [(t["seed"], Table(t, k, judged)) for t in tables]
        names = [*SEARCHES, "das, all rows"] if judged == "validation" else [*SEARCHES, "all plans"]
        if judged == "test" and batches == whole:
            names = ["all plans"]
        for search in names:
            # Searches that decide themselves how much they ask are played once.
            fixed = search in ("greedy", "influence", "all plans")
            for evaluations in (max(BUDGETS),) if fixed else BUDGETS:
                plays = []
                for (seed, t), repeat in product(games, range(repeats)):
                    rows = 1 if judged == "validation" and search == "das" else batches
                    plan, paid = play(search, t, evaluations, rows, 1000 * seed + repeat)
                    above = (t.judge[plan] - t.judge[t.order[0]]) / statistics.pstdev(t.judge.values())
                    plays.append((paid, t.rank(plan), t.rank(plan) <= 0.05, t.as_good(plan), above))
                paid, rank, best, as_good, above = (round(statistics.fmean(c), 4) for c in zip(*plays, strict=True))
                out.append({
                    "judged": judged, "batches": rows, "k": k, "plans": len(games[0][1].plans), "search": search,
                    "evaluations_at_most": evaluations, "evaluations": paid, "rank": rank, "in_best_5_percent": best,
                    "as_good": as_good, "regret_in_spreads": above, "plays": len(plays),
                })  # fmt: skip
    return out


def halves(tables: list[dict], ks: list[int]) -> dict[int, float]:
    """How often the best plan of every other test batch is in the best 5 % of the rest: what the test rows can tell."""
    out = {}
    for k in ks:
        hits = []
        for t in tables:
            for first, second in ((0, 1), (1, 0)):
                one, other = (
                    {p: statistics.fmean(x[half::2]) for p, x in t["held"].items() if len(p) == k}
                    for half in (first, second)
                )
                place = sorted(other, key=other.__getitem__).index(min(one, key=one.__getitem__))
                hits.append(place / (len(other) - 1) <= 0.05)
        out[k] = round(statistics.fmean(hits), 3)
    return out


def markdown(results: list[dict], judged: str, quarter: int = 15) -> str:
    """A table: what DAS finds with all evaluations, and what the others find with at most a quarter of them."""
    ks = sorted({r["k"] for r in results})
    lines = ["| search | batches | evaluations | " + " | ".join(f"k = {k}" for k in ks) + " |",
             "|---|---|---|" + "---|" * len(ks)]  # fmt: skip
    rows: dict[tuple, dict[int, dict]] = {}
    for r in results:
        most = max(BUDGETS) if r["search"] in ("das", "das, all rows", "greedy", "influence", "all plans") else quarter
        if r["judged"] == judged and r["evaluations_at_most"] in (most, quarter):
            rows.setdefault((r["search"], r["batches"], r["evaluations_at_most"]), {})[r["k"]] = r
    for (search, batches, _), by_k in rows.items():
        spent = sorted({round(r["evaluations"]) for r in by_k.values()})
        cells = []
        for k in ks:
            r = by_k[k]
            good = f", as good {100 * r['as_good']:.0f} %" if judged == "test" else ""
            cells.append(f"{100 * r['in_best_5_percent']:.0f} %{good}; {100 * r['rank']:.1f}")
        times = f"{spent[0]}" if len(spent) == 1 else f"{spent[0]} to {spent[-1]}"
        lines.append(f"| {search} | {batches} | {times} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict], file: Path) -> None:
    """Mean rank against evaluations, one panel a k, judged by validation rows above and by test rows below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ks = sorted({r["k"] for r in results})
    figure, axes = plt.subplots(2, len(ks), figsize=(3.6 * len(ks), 6), sharex=True, sharey="row", squeeze=False)
    for (row, judged), (column, k) in product(enumerate(("validation", "test")), enumerate(ks)):
        axis = axes[row][column]
        for i, search in enumerate(n for n in (*SEARCHES, "das, all rows") if n != "influence"):
            points = [r for r in results if (r["judged"], r["k"], r["search"]) == (judged, k, search)]
            if judged == "test":
                points = [r for r in points if r["batches"] == 1]
            xs, ys = [r["evaluations"] for r in points], [r["rank"] for r in points]
            axis.plot(xs, ys, marker="o", ms=3, label=search, color=f"C{i}")
        for r in results:
            if (r["judged"], r["k"], r["search"]) == ("test", k, "all plans") and judged == "test":
                axis.axhline(r["rank"], color="0.6", lw=0.8, ls="--")
                axis.text(max(BUDGETS), r["rank"], f"all plans, {r['batches']} batch(es)", fontsize=6, ha="right")
        axis.set(ylim=(0, None), title=f"{k} of 8 blocks skipped" if row == 0 else None)
        if row:
            axis.set_xlabel("evaluations")
    axes[0][0].set_ylabel("mean rank by the rows searched on")
    axes[1][0].set_ylabel("mean rank by test rows\n(search on one batch)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(options: argparse.Namespace) -> None:
    if options.ks != list(range(1, max(options.ks) + 1)):
        raise SystemExit(f"--ks: expected 1 and so on without a gap (the greedy search needs them), found {options.ks}")
    if options.held < 2:
        raise SystemExit(f"--held: expected at least 2 batches (one half judges the other), found {options.held}")
    settings = {k: getattr(options, k) for k in ("task", "steps", "train", "rows", "batches", "held", "ks")}
    report = {"settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(), "tables": []}
    if options.out and options.out.exists() and (kept := json.loads(options.out.read_text()))["settings"] == settings:
        report["tables"] = kept["tables"]  # their models are not trained again
    for seed in range(len(report["tables"]), options.seeds):
        start = time.perf_counter()
        made = table(seed, options)
        rounded = {key: [[p, [round(v, 6) for v in x]] for p, x in made[key].items()] for key in ("losses", "held")}
        report["tables"].append({**made, **rounded})
        _write(report, options.out)
        print(f"seed {seed}: {len(made['losses'])} plans in {time.perf_counter() - start:.0f} s", flush=True)
    keys = ("losses", "held")
    tables = [{**t, **{key: {tuple(p): x for p, x in t[key]} for key in keys}} for t in report["tables"]]
    tables = tables[: options.seeds]
    report["results"] = study(tables, options.ks, options.repeats)
    report["halves"] = halves(tables, options.ks)
    _write(report, options.out)
    if options.plot:
        plot(report["results"], options.plot)
    print(markdown(report["results"], "validation"), markdown(report["results"], "test"), sep="\n")
    print(json.dumps({"halves": report["halves"], "reuse": [t["reuse"] for t in tables]}))


def _write(report: dict, file: Path | None) -> None:
    if file is not None:
        with replace_file(file) as partial:
            partial.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="vqa")
    parser.add_argument("--seeds", type=int, default=5, help="models, each trained with its own seed")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each")
    parser.add_argument("--train", type=int, default=2400, help="training rows")
    parser.add_argument("--rows", type=int, default=32, help="rows of a validation batch")
    parser.add_argument("--batches", type=int, default=10, help="validation batches that searches may ask on")
    parser.add_argument("--held", type=int, default=16, help="test batches, by whose mean plans are judged")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 3], help="numbers of skipped blocks")
    parser.add_argument("--repeats", type=int, default=8, help="how often each search is played on each model")
    parser.add_argument("--out", type=Path, help="JSON file of everything; models in it are not trained again")
    parser.add_argument("--plot", type=Path, help="picture of rank against evaluations")
    main(parser.parse_args())
