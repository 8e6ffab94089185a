"""How good what `trimtab fit` finds is, and what it pays: against a grid, random search, single levers, and LoRA.

    python studies/fit.py tiny-clip tiny-vilt [--seeds 0 1 2]            train what is missing
    python studies/fit.py lite0-minilm --root flickr8k
    python studies/fit.py --compare                                      compare what is there, and print the tables
    python studies/fit.py tiny-clip --check                              one search trained for itself: is it the same?

Each candidate that any budget of a setting allows is trained once a seed, to its end, and its validation score at the
rungs of the search kept (`studies/results/fit/SETTING.jsonl`, one line a training; what is there is not trained again).
All ways then look their trainings up: a trial that would stop at a rung is one of which no more is read. So every way
sees the very same trainings, and what it would have paid is counted in their steps.

    grid        every candidate that fits, trained to its end; the best on validation rows
    fit         successive halving, as the command does it; half as many trials as candidates fit
    random      candidates drawn evenly, trained to their ends, as long as the steps of `fit` last; mean of 200 orders
    prune       one lever alone at the same budget: pruned and tuned in full; the best on validation rows
    skip        shortened, with adapters or in full
    tune        neither pruned nor shortened
    lora        LoRA of rank 8 on the whole model, whether it fits or not

Scores in the tables are those on test rows, on which nothing is chosen.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from photographs import files

from trimtab.budgets.asking import recipe_of, searched
from trimtab.budgets.halving import Search
from trimtab.budgets.limits import Budget, parse
from trimtab.budgets.prices import Prices
from trimtab.budgets.shared import Shared
from trimtab.budgets.space import ADAPTERS, TUNES, Candidate, Space, Tune
from trimtab.budgets.trial import Trial
from trimtab.experiments.schema import Recipe

RESULTS = Path(__file__).parent / "results" / "fit"
ORDERS = 200
LORA = "lora-8"
TRIED = ("linear-probe", LORA, "unipt-2", ADAPTERS, "full")


@dataclass(frozen=True)
class Setting:
    """A model, a task and rows, and what is tried on them."""

    model: str
    task: Any
    data: dict[str, Any]
    training: tuple[str, ...]
    space: Space
    budgets: tuple[str, ...]

    def recipe(self, seed: int, data: dict[str, Any]) -> Recipe:
        return recipe_of(self.model, self.task, data, None, None, [*self.training, f"seed={seed}"])


def _space(*tunes: str, **more: Any) -> Space:
    return Space(**{"sparsities": (0.5,), "skips": (2, 4), "multiples": (1.0,),
                    "tunes": {name: TUNES[name] for name in tunes}} | more)  # fmt: skip


TEXT = {"form": "token", "towers": ["text"]}
SETTINGS = {
    "tiny-clip": Setting(
        "tiny-clip", {"name": "retrieval", "captions": "first"},
        {"name": "pictograms", "style": "openmoji", "train": 4000, "test": 1000, "validation": 320, "per_scene": 1},
        ("training.steps=200", "training.batch_size=32", "training.cache=fp16"),
        _space(*TRIED),
        ("train memory <= -25%",
         "macs <= -5%, nonzeros <= -40%",
         "macs <= -5%, train memory <= -30%, disk <= 1 MB",),
    ),
    "tiny-vilt": Setting(
        "tiny-vilt", "vqa",
        {"name": "pictograms", "style": "openmoji", "train": 4800, "test": 1000, "validation": 480,
         "questions": ["is there", "how many", "where", "colour"]},
        ("training.steps=400", "training.batch_size=16", "training.cache=fp16"),
        _space(*TRIED),
        ("train memory <= -40%",
         "macs <= -20%, nonzeros <= -40%",
         "macs <= -20%, train memory <= -40%, disk <= 1 MB",),
    ),
    "lite0-minilm": Setting(
        "lite0-minilm", {"name": "retrieval", "pooling": "gpo", "objective": "triplet", "all_negatives": 40},
        {},
        ("training.steps=200", "training.batch_size=64", "training.evaluation_batch=64", "training.cache=fp16"),
        _space(sparsities=(0.5,), skips=(2,), tunes={
            "linear-probe": Tune({"name": "linear-probe"}, 1e-3, cached=True),
            LORA: Tune({"name": "lora", "towers": ["text"]}, 2e-3, 0.5),
            "unipt": Tune({"name": "unipt", **TEXT}, 1e-3, cached=True),
            "full": Tune({"name": "full"}, 2e-4, 5.0),
        }),
        ("train memory <= -70%",
         "macs <= -15%, nonzeros <= -20%",
         "macs <= -15%, train memory <= -70%, disk <= 6 MB",),
    ),
}  # fmt: skip


# --- the trainings ----------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """What came of each candidate of one setting and seed, trained to its end.

    Args:
        name: of the setting.
        work: folder for what trainings leave while they run, and for counts, masks and plans.
    """

    name: str
    seed: int
    work: Path
    root: str | None = None
    known: dict[Candidate, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.setting = SETTINGS[self.name]
        work = self.work / self.name
        work.mkdir(parents=True, exist_ok=True)
        self.data = self.setting.data or files(Path(self.root or "flickr8k"), work)
        self.file = RESULTS / f"{self.name}.jsonl"
        for row in lines(self.file):
            if row.pop("seed") == self.seed:
                trial = trial_of(row)
                self.known[trial.candidate] = trial

    def search(self, budget: str | None, folder: Path, make: Callable[..., Search] = Search) -> Search:
        """A search under a budget; None allows everything."""
        recipe, space = self.setting.recipe(self.seed, self.data), self.setting.space
        work = self.work / self.name
        prices = Prices(recipe, space, work / "prices.json", exports=False)
        prices.count_all()
        goal = Budget.of(parse(budget), prices.bases) if budget else Budget((), {})
        shared = Shared(recipe, space, work / f"seed{self.seed}" / "shared", searched(space, recipe))
        shared.find(set(space.sparsities), set(space.skips))
        folder.mkdir(parents=True, exist_ok=True)
        search = make(recipe, space, goal, prices, shared, folder, tell=lambda line: None)
        search.trials = -(-len(search.fitting) // 2)
        return search

    def wanted(self) -> list[Candidate]:
        """What any budget allows, and what stands beside: full tuning, LoRA."""
        fitting: set[Candidate] = {Candidate(0.0, 0, "full"), Candidate(0.0, 0, LORA)}
        for budget in self.setting.budgets:
            fitting |= set(self.search(budget, self.work / "none").fitting)
        return [c for c in self.setting.space if c in fitting]

    def fill(self) -> None:
        """Train what is missing."""
        wanted = self.wanted()
        missing = [c for c in wanted if c not in self.known]
        search = self.search(None, self.work / self.name / f"seed{self.seed}")
        for candidate in missing:
            trial = Trial(wanted.index(candidate), candidate, search.prices(candidate) or {})
            began = time.process_time()
            search.carry_out(trial, lambda step, score: False)
            trial.seconds = round(time.process_time() - began, 1)
            shutil.rmtree(search.folder_of(trial), ignore_errors=True)
            self.known[candidate] = trial
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seed": self.seed, **asdict(trial)}) + "\n")
            print(f"{self.name} seed {self.seed} [{len(self.known)}/{len(wanted)}] {candidate}: {trial.status} "
                  f"{trial.reason}{trial.scores} test {trial.test}, {trial.seconds} s", flush=True)  # fmt: skip


def trial_of(row: dict[str, Any]) -> Trial:
    return Trial(**{**row, "candidate": Candidate(**row["candidate"]),
                    "scores": {int(k): v for k, v in row["scores"].items()}})  # fmt: skip


def lines(file: Path) -> Iterable[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines()) if file.exists() else ()


# --- the ways ---------------------------------------------------------------------------------------------------------


@dataclass
class Looked(Search):
    """A search whose trials are looked up, and read no further than they would have been trained."""

    known: dict[Candidate, Trial] = field(default_factory=dict)

    def carry_out(self, trial: Trial, judge: Callable[[int, float], bool]) -> None:
        whole = self.known[trial.candidate]
        trial.costs, trial.status, trial.reason = whole.costs, whole.status, whole.reason
        if trial.status != "whole":
            trial.steps = whole.steps
            return
        if over := self.budget.over(trial.costs):
            trial.status, trial.reason = "over", str(over)
            return
        for rung in self.rungs:
            trial.steps, trial.scores[rung] = rung, whole.scores[rung]
            if judge(rung, trial.score) and rung < self.rungs[-1]:
                trial.status = "stopped"
                return
        trial.test = whole.test


def best(trials: Iterable[Trial]) -> Trial | None:
    """The best on validation rows of those that were trained to the end."""
    return max((t for t in trials if t.status == "whole"), key=lambda t: t.score, default=None)


def ways(table: Table, budget: str) -> dict[str, dict[str, Any]]:
    """What each way finds under a budget, and pays."""
    with tempfile.TemporaryDirectory() as folder:
        search = table.search(budget, Path(folder), lambda *a, **k: Looked(*a, **k, known=table.known))
        search.go()
    assert isinstance(search, Looked)
    exact = [table.known[c] for c in search.fitting if not search.budget.over(table.known[c].costs)]
    end = search.rungs[-1]

    def told(trials: list[Trial]) -> dict[str, Any]:
        found = best(trials)
        steps = sum(t.steps for t in trials)
        return {"found": found and str(found.candidate), "test": found and found.test, "steps": steps}

    alone = {
        "prune": [t for t in exact if not t.candidate.skip and t.candidate.tune == "full"],
        "skip": [t for t in exact if t.candidate.skip and not t.candidate.sparsity
                 and t.candidate.tune in (ADAPTERS, "full")],
        "tune": [t for t in exact if not t.candidate.skip and not t.candidate.sparsity],
    }  # fmt: skip
    lora = table.known[Candidate(0.0, 0, LORA)]
    draws = [best(random.Random(order).sample(exact, min(len(exact), max(1, search.paid // end))))
             for order in range(ORDERS)]  # fmt: skip
    return {
        "grid": told(exact),
        "fit": {"found": str(search.best.candidate), "test": search.best.test, "steps": search.paid},
        "random": {"found": None, "test": fmean(t.test for t in draws if t and t.test is not None),
                   "steps": search.paid // end * end},
        **{name: told(trials) for name, trials in alone.items()},
        "lora": {"found": LORA, "test": lora.test, "steps": lora.steps, "fits": not search.budget.over(lora.costs)},
        "full": {"found": "full", "test": table.known[Candidate(0.0, 0, "full")].test, "steps": end},
    }  # fmt: skip


def compare(work: Path, root: str | None) -> dict[str, Any]:
    """All ways on every setting, budget and seed whose trainings are whole."""
    out: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        tables = [
            Table(name, seed, work, root) for seed in sorted({r["seed"] for r in lines(RESULTS / f"{name}.jsonl")})
        ]
        if name == "lite0-minilm" and root is None:
            continue
        whole = [t for t in tables if set(t.wanted()) <= set(t.known)]
        if whole:
            out[name] = {b: {str(t.seed): ways(t, b) for t in whole} for b in setting.budgets}
    return out


WAYS = ("fit", "grid", "random", "prune", "skip", "tune", "lora", "full")


def markdown(compared: dict[str, Any]) -> str:
    """A table a setting: test score of each way, mean and standard deviation over seeds."""
    out = []
    for name, budgets in compared.items():
        out += [f"**{name}**", "", f"| budget | {' | '.join(WAYS)} | steps of fit / grid |",
                "|---|" + "---:|" * (len(WAYS) + 1)]  # fmt: skip
        for budget, seeds in budgets.items():
            share = fmean(s["fit"]["steps"] / s["grid"]["steps"] for s in seeds.values())
            cells = [_cell([s[way] for s in seeds.values()]) for way in WAYS]
            out.append(f"| {budget} | {' | '.join(cells)} | {share:.2f} |")
        out.append("")
    return "\n".join(out)


def _cell(found: list[dict[str, Any]]) -> str:
    scores = [100 * f["test"] for f in found if f["test"] is not None]
    if not scores:
        return "nothing fits"
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    over = "" if all(f.get("fits", True) for f in found) else " (over)"
    return f"{fmean(scores):.1f}{spread}{over}"


def check(table: Table) -> None:
    """Train one search for itself, and tell whether its trials are those that were looked up."""
    budget = table.setting.budgets[-1]
    with tempfile.TemporaryDirectory() as folder:
        looked = table.search(budget, Path(folder) / "a", lambda *a, **k: Looked(*a, **k, known=table.known))
        trained = table.search(budget, Path(folder) / "b")
        for search in (looked, trained):
            search.go()
        rows = [[(str(t.candidate), t.status, t.steps, t.scores, t.test) for t in s.done] for s in (looked, trained)]
    different = [pair for pair in zip(*rows, strict=True) if pair[0] != pair[1]]
    print(f"{table.name} seed {table.seed}, {budget}: {len(rows[0])} trials, {len(different)} different {different}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("settings", nargs="*", choices=[*SETTINGS, []], help="to train; none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder of Flickr8K in its official layout")
    parser.add_argument("--work", type=Path, default=Path("runs/fit-study"), help="for what trainings leave")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.settings:
            table = Table(name, seed, options.work, options.root)
            if options.check:
                check(table)
            else:
                table.fill()
    if options.compare:
        compared = compare(options.work, options.root)
        (RESULTS / "compared.json").write_text(json.dumps(compared, indent=1) + "\n")
        print(markdown(compared))


if __name__ == "__main__":
    main()
