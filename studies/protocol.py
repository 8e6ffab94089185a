"""A recipe carried out by the rules of README.md: each variant at as many learning rates, with as many seeds.

    python studies/protocol.py compose/retrieval [--ways full lora] [--seeds 0 1 2 3 4]         train what is missing
    python studies/protocol.py compose/retrieval --ways full --seeds 0 --rates 5e-4             at one rate more
    python studies/protocol.py compose/retrieval --tables [--against full lora] [--plot docs/images/FILE.png]
    python studies/protocol.py compose/retrieval --summary
    python studies/protocol.py compose/retrieval --compare prune-skip-full full

Each variant is trained with seed 0 at the learning rate that the recipe gives it and at half of that, and at those that
`--rates` adds; the rate with the best validation score at the end is taken for the other seeds. One line a training in
`studies/results`, in a file named like the recipe, with its costs and with what each test row gives to the score: what
is there is not trained again, so a study may end and go on. Differences are of means over all seeds, paired on test
rows, with intervals over rows and seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tables import cell

from trimtab.experiments.folder import BusyError
from trimtab.experiments.recipe import read
from trimtab.experiments.run import run
from trimtab.metrics.intervals import over_seeds
from trimtab.report.canvas import assign_styles
from trimtab.report.plots import Panel, Point, pareto_figure
from trimtab.report.runs import BYTES, COSTS, Cost
from trimtab.report.tables import amount, spread

HERE = Path(__file__).parent / "results"
TRIALS = (0.5, 1.0)  # times the recipe's learning rate
SHOWN = [c for c in COSTS if c.key not in ("steps", "latency_ms")]  # counted, not measured: other work is no matter

Row = dict[str, Any]


def table_of(folder: Path) -> str | None:
    """A hash of the test rows."""
    return json.loads((folder / "rows.json").read_text())["table"]


def skipped_in(folder: Path) -> list[str]:
    """The blocks that a run left out, by a search, by chance or by a plan."""
    file = folder / "fit.json"
    methods = json.loads(file.read_text())["methods"] if file.exists() else []
    return [path for method in methods if method["lever"] == "skip" for path in method["state"]["skip"]]


def processor() -> float:
    """Seconds of the processor so far, those of processes that read rows among them."""
    return sum(os.times()[:4])


def print_of(recipe: Any) -> str:
    """A hash of what decides a training beside its seed: of the backbone and the training what differs from the
    defaults, so that a new setting changes no line. Where files of data lie is no matter."""
    told = recipe.to_dict()
    parts = [{f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
             for part in (recipe.backbone, recipe.training)]  # fmt: skip
    data = told["data"] if told["data"]["name"] != "files" else "files"
    made_of = [*parts, data, *(told[k] for k in ("task", "methods", "policy"))]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def nothing(folder: Path) -> None:
    return None


@dataclass(frozen=True)
class Trials:
    """The trainings of a study: its file of results, the learning rates of each way, the recipe of one training, and
    what each test row of the run that has just finished gives to the score. A line keeps hashes of its recipe and, of
    recipes, of the test rows: a line of another recipe is refused, other rows are not paired."""

    results: Path
    rates: Mapping[str, tuple[float, ...]]
    recipe: Callable[[str, float, int], Any]
    each: Callable[[Path], list[float]]
    print_of: Callable[[Any], str] = print_of
    table: Callable[[Path], str | None] = nothing

    def lines(self) -> list[Row]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def fill(self, ways: list[str], seeds: list[int], work: Path, more: tuple[float, ...] = ()) -> None:
        """Train what is missing, seed after seed; seed 0 at these learning rates too."""
        for seed in seeds:
            for way in ways:
                if seed and (missing := self.untried(way)):
                    print(f"{way} seed {seed}: left out: seed 0 is not trained at {min(missing):g} yet", flush=True)
                    continue
                for rate in (*self.rates[way], *more) if seed == 0 else (self.chosen(way),):
                    self.train(way, rate, seed, work)

    def train(self, way: str, rate: float, seed: int, work: Path) -> None:
        """One training, and its line; nothing if the line is there, or another process is at it."""
        recipe, folder, began = self.recipe(way, rate, seed), work / f"{way}-{rate:g}-{seed}", processor()
        asked = self.print_of(recipe)
        for line in self.lines():
            if (line["way"], line["rate"], line["seed"]) == (way, rate, seed):
                if line.get("recipe", asked) != asked:
                    raise SystemExit(f"{self.results}: {way} at {rate:g} with seed {seed} was trained by another "
                                     "recipe: take the line away, or give the new way a name of its own")  # fmt: skip
                return
        try:
            run(recipe, folder)
        except BusyError as error:
            print(f"left out: {error}", flush=True)
            return
        row = self.row(way, rate, seed, folder, processor() - began) | {"recipe": asked}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{way} {rate:g} seed {seed}: {row['steps']} steps, validation {row['validation']:.4g}, test "
              f"{row['test'][row['metric']]:.4g}, {row['seconds']} s", flush=True)  # fmt: skip
        shutil.rmtree(folder)

    def row(self, way: str, rate: float, seed: int, folder: Path, seconds: float) -> Row:
        told = json.loads((folder / "metrics.json").read_text())
        costs = json.loads((folder / "costs.json").read_text()) if (folder / "costs.json").exists() else {}
        metric = told["primary"]
        curve = [[s["step"], round(s[metric], 4)] for s in told["validation"]["scores"]]
        kept = told["validation"].get("kept_step", curve[-1][0])
        return {
            "way": way, "rate": rate, "seed": seed, "steps": told["steps"], "seconds": round(seconds),
            "plateau": told["validation"].get("plateau"), "metric": metric, "validation": dict(curve)[kept],
            "loss": round(told["history"][-1]["loss"], 4), "curve": curve,
            "test": {k: round(v, 4) for k, v in told["test"].items() if "rank" not in k},
            **({"costs": {c.key: costs[c.key] for c in SHOWN if c.key in costs}} if costs else {}),
            **({"skipped": skipped} if (skipped := skipped_in(folder)) else {}),
            "table": self.table(folder), "each": self.each(folder),
        }  # fmt: skip

    def untried(self, way: str) -> set[float]:
        """Learning rates at which seed 0 is not trained."""
        return set(self.rates[way]) - {r["rate"] for r in self.lines() if (r["way"], r["seed"]) == (way, 0)}

    def chosen(self, way: str) -> float:
        """The rate with the best validation score of seed 0; of equal ones the highest."""
        tried = {r["rate"]: r["validation"] for r in self.lines() if r["way"] == way and r["seed"] == 0}
        return max(tried, key=lambda rate: (tried[rate], rate))

    def told_rate(self, way: str) -> str:
        """The chosen rate, which of how many it is by size: `0.001 (2 of 3)` lies between others."""
        tried = sorted({r["rate"] for r in self.lines() if (r["way"], r["seed"]) == (way, 0)})
        rate = self.chosen(way)
        return f"{rate:g} ({tried.index(rate) + 1} of {len(tried)})"

    def measured(self, whole: bool = True) -> dict[str, dict[int, Row]]:
        """Each way that is trained at all its rates (or, not `whole`, at one): its runs at the chosen one by seed."""
        rows = self.lines()
        tried = {r["way"] for r in rows if r["seed"] == 0}
        done = [way for way in self.rates if way in tried and not (whole and self.untried(way))]
        best = {way: self.chosen(way) for way in done}
        lines = Counter((r["way"], r["rate"], r["seed"]) for r in rows)
        if twice := [line for line, count in lines.items() if count > 1]:
            raise SystemExit(f"{self.results}: two lines of {twice[0]}: take one away")
        return {way: {r["seed"]: r for r in rows if (r["way"], r["rate"]) == (way, best[way])} for way in done}

    def at(self, name: str) -> dict[int, Row]:
        """The runs of `WAY@RATE` by seed; SystemExit if there is none."""
        way, _, rate = name.partition("@")
        try:
            found = {r["seed"]: r for r in self.lines() if (r["way"], r["rate"]) == (way, float(rate))}
        except ValueError as error:
            raise SystemExit(f"{name}: expected WAY@RATE, such as unipt-text@5e-4") from error
        if not found:
            tried = sorted({r["rate"] for r in self.lines() if r["way"] == way})
            raise SystemExit(f"{self.results}: no training of {name}, but at {', '.join(map(str, tried)) or 'no rate'}")
        return found

    @property
    def alone(self) -> Path:
        """What `alone.py` measured of a training step, {way: {peak_memory_bytes, step_seconds}}."""
        return self.results.with_name(f"{self.results.stem}_alone.json")

    def steps_alone(self) -> dict[str, Row]:
        """What stands there, by way."""
        return json.loads(self.alone.read_text()) if self.alone.exists() else {}

    def effort(self, ways: list[str] | None = None) -> str:
        """How many trainings there are, of some ways or of all, and what they took of one processor."""
        rows = [r for r in self.lines() if ways is None or r["way"] in ways]
        return f"{len(rows)} trainings, {sum(r['seconds'] for r in rows) / 3600:.1f} hours of one processor"


ALONE = ["peak memory, alone", "a step, alone"]


def alone_cells(step: Row | None) -> list[str]:
    """The columns `ALONE` of a way: what was measured of its step, if it was."""
    return [amount(step["peak_memory_bytes"], BYTES), f"{step['step_seconds']:.3g} s"] if step else ["-", "-"]


def summary(scores: dict[str, list[float]], title: str, costs: Callable[[str, str], float], shown: list[Cost],
            alone: dict[str, Row]) -> Iterator[str]:  # fmt: skip
    """One table for who reads no other: the score of each way, and its costs."""
    yield f"| | {title} | " + " | ".join([*(c.title for c in shown), *ALONE]) + " |"
    yield "|---|" + "---:|" * (len(shown) + 3)
    for way, mine in scores.items():
        cells = [cell(mine), *(amount(costs(way, c.key), c.units) for c in shown), *alone_cells(alone.get(way))]
        yield f"| {way} | {' | '.join(cells)} |"


def apart(mine: dict[int, Row], other: dict[int, Row]) -> str:
    """The difference of the means over all seeds, on the same test rows, with a 95 % interval over rows and seeds drawn
    again; a star where one of the two has a single seed, so that what another would give is not in it."""
    if not mine or not other or mine == other:
        return "-"
    one = next(iter(other.values()))
    if not all(same_rows(row, one) for row in (*mine.values(), *other.values())):
        return "other test rows"
    gap, low, high = over_seeds([r["each"] for r in mine.values()], [r["each"] for r in other.values()])
    if gap == low == high == 0:
        return "-"
    return f"{gap:+.1f} ({low:+.1f} to {high:+.1f}){'*' if 1 in (len(mine), len(other)) else ''}"


def same_rows(one: Row, other: Row) -> bool:
    """Whether two trainings were scored on the same test rows, as far as their lines tell."""
    tables = one.get("table"), other.get("table")
    return None in tables or tables[0] == tables[1]


def compared(found: dict[str, dict[int, Row]], one: str, other: str) -> str:
    """How far one way is from another, as `apart`, and seed by seed."""
    mine, theirs = found.get(one, {}), found.get(other, {})
    gaps = [np.subtract(mine[s]["each"], theirs[s]["each"]).mean() for s in sorted(mine.keys() & theirs.keys())
            if same_rows(mine[s], theirs[s])]  # fmt: skip
    seeds = f"; by seed {', '.join(f'{gap:+.1f}' for gap in gaps)}" if gaps else ""
    return f"{one} beside {other}: {apart(mine, theirs)}{seeds}"


def picture(scores: dict[str, list[float]], costs: Callable[[str, str], float], shown: list[Cost], title: str) -> bytes:
    """A PNG: the scores of ways against each of some costs."""
    panels = [
        Panel(cost.title, [Point(way, costs(way, cost.key), fmean(scores[way]), 0.0, spread(scores[way]))
                           for way in scores], partial(amount, units=cost.units), cost.log)
        for cost in shown
    ]  # fmt: skip
    return pareto_figure(panels, title, assign_styles(scores))


# --- recipes ----------------------------------------------------------------------------------------------------------


def credits(folder: Path) -> list[float]:
    """What each test row gives to the primary metric, in percent."""
    found = json.loads((folder / "rows.json").read_text())["credits"]
    if not found:
        raise SystemExit(f"{folder}: its task does not tell what each test row gives to the score: there is nothing to "
                         "pair; its own metrics are there")  # fmt: skip
    return [round(100 * c, 2) for c in found if c is not None]


def of_recipe(name: str) -> Trials:
    recipes = read(name, ["seeds=[0]"])
    if fixed := [r.variant for r in recipes if r.training.schedule != "plateau"]:
        raise ValueError(f"{name}: expected `schedule: plateau` in training, variant {fixed[0]!r} has another one: a "
                         "study trains until the validation score stops rising")  # fmt: skip
    variants = {r.variant: r.training.learning_rate for r in recipes}

    def recipe(way: str, rate: float, seed: int) -> Any:
        return read(name, [f"variants=[{way}]", f"seeds=[{seed}]", f"training.learning_rate={rate}"])[0]

    rates = {way: tuple(rate * t for t in TRIALS) for way, rate in variants.items()}
    return Trials(HERE / f"{name.replace('/', '-')}.jsonl", rates, recipe, credits, table=table_of)


def metric_of(found: dict[str, dict[int, Row]]) -> str:
    return f"{next(iter(next(iter(found.values())).values()))['metric']} (%)"


def scores_of(rows: dict[int, Row]) -> list[float]:
    return [fmean(r["each"]) for r in rows.values()]


def costs_of(rows: dict[int, Row], key: str) -> float:
    return fmean(r["costs"][key] for r in rows.values())


def cost_in(found: dict[str, dict[int, Row]], way: str, key: str) -> float:
    return costs_of(found[way], key)


def tables(trials: Trials, references: list[str]) -> Iterator[str]:
    """Two: the score of each way in percent, with paired differences; and what it costs, counted, and measured on a
    machine that does nothing else (`alone.py`)."""
    found = trials.measured()
    beside = " | ".join(f"beside {r} (95 %)" for r in references)
    yield f"| | seeds | rate (of those tried) | {metric_of(found)} | steps | {beside} |"
    yield "|---|" + "---:|" * (4 + len(references))
    for way, mine in found.items():
        gaps = [apart(mine, found.get(r, {})) if way != r else "-" for r in references]
        yield (f"| {way} | {len(mine)} | {trials.told_rate(way)} | {cell(scores_of(mine))} | "
               f"{fmean(r['steps'] for r in mine.values()):.0f} | {' | '.join(gaps)} |")  # fmt: skip
    yield ""
    yield "| | " + " | ".join([*(c.title for c in SHOWN), *ALONE]) + " |"
    yield "|---|" + "---:|" * (len(SHOWN) + 2)
    alone = trials.steps_alone()
    for way, mine in found.items():
        cells = [amount(costs_of(mine, c.key), c.units) for c in SHOWN]
        yield f"| {way} | {' | '.join([*cells, *alone_cells(alone.get(way))])} |"
    yield ""
    yield trials.effort()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", help="as of trimtab run, with variants and `schedule: plateau`")
    parser.add_argument("--ways", nargs="+", help="these variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="rates at which seed 0 is trained too")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="for what trainings leave")
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    parser.add_argument("--summary", action="store_true", help="print scores and costs in one table")
    parser.add_argument("--against", nargs="+", default=["full"], help="variants that others stand beside")
    parser.add_argument("--plot", type=Path, help="draw what was measured into this PNG file")
    parser.add_argument("--compare", nargs=2, help="how far the first is from the second")
    options = parser.parse_args()
    try:
        trials = of_recipe(options.recipe)
    except ValueError as error:
        parser.error(str(error))
    named = {*(options.ways or ()), *(options.compare or ()), *(options.against if options.tables else ())}
    if unknown := named - trials.rates.keys():
        parser.error(f"{options.recipe} has no variant {min(unknown)!r}: it has {', '.join(trials.rates)}")
    found = trials.measured()
    if not found and (options.compare or options.tables or options.summary or options.plot):
        parser.error(f"{trials.results}: no variant is trained at all its learning rates yet")
    if options.compare:
        print(compared(trials.measured(whole=False), *options.compare))
        if few := [way for way in options.compare if trials.untried(way)]:
            print(f"not trained at all its learning rates: {', '.join(few)}")
    elif options.tables or options.summary or options.plot:
        if options.tables:
            print("\n".join(tables(trials, options.against)))
        scores, costs = {way: scores_of(mine) for way, mine in found.items()}, partial(cost_in, found)
        if options.summary:
            print("\n".join(summary(scores, metric_of(found), costs, SHOWN, trials.steps_alone())))
        if options.plot:
            options.plot.write_bytes(picture(scores, costs, SHOWN, metric_of(found)))
    else:
        work = options.work / options.recipe.replace("/", "-")
        trials.fill(options.ways or list(trials.rates), options.seeds, work, tuple(options.rates))


if __name__ == "__main__":
    main()
