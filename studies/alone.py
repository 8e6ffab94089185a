"""Peak memory and time of a training step of what a study compares, without a cache.

    python studies/alone.py vse --root flickr8k [--ways linear-probe unipt-text]   on a machine that does nothing else
    python studies/alone.py compose/vqa [--ways full lora]

Every way has a process of its own, which trains twelve steps on one core: the median time of the last ten, and by how
much the resident set grew in a forward and backward pass. Results stand in `studies/results` beside those of the study,
whose `--tables` show them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import protocol
import vse
from photographs import files

from trimtab.experiments.recipe import expand, read
from trimtab.experiments.run import run

STEPS = 12
CHANGES = [f"training.steps={STEPS}", "training.log_every=1", "training.schedule=linear", "training.cache=null",
           "training.cache_views=1", "training.evaluate_every=null", "training.patience=null",
           "training.patience_share=0", "costs=true"]  # fmt: skip
ROWS = {"train": 512, "validation": 128, "test": 32}  # hardly any to score


def few(data: dict[str, Any], work: Path) -> dict[str, Any]:
    """The photographs, cut to some rows."""
    cut: dict[str, Any] = {"name": "files"}
    for split, rows in ROWS.items():
        file = work / f"few-{split}.jsonl"
        file.write_text("".join(Path(data[split]).read_text().splitlines(keepends=True)[:rows]), encoding="utf-8")
        cut[split] = str(file.absolute())
    return cut


def recipe_of(study: str, way: str, root: Path, work: Path) -> Any:
    """A short training of a way; at which of its learning rates is no matter here."""
    if study == "vse":
        raw = vse.raw_of(way, vse.WAYS[way].rates[0], 0, few(files(root, work), work))
        raw["training"].pop("drops", None)  # of 25 epochs
        return expand(raw, "alone", CHANGES)[0]
    rows = [f"data.{split}={count}" for split, count in ROWS.items()]
    return read(study, [f"variants=[{way}]", "seeds=[0]", *CHANGES, *rows])[0]


def measure(recipe: Any, folder: Path) -> dict[str, float]:
    folder = run(recipe, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = [datetime.fromisoformat(e["time"]).timestamp() for e in log if e["event"] == "train"][-STEPS:]
    costs = json.loads((folder / "costs.json").read_text())
    return {
        "step_seconds": round(median(b - a for a, b in pairwise(times[1:])), 3),
        "peak_memory_bytes": costs["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", help="vse, or a recipe of protocol.py")
    parser.add_argument("--root", type=Path, default=Path("flickr8k"), help="Flickr8K in its official layout, for vse")
    parser.add_argument("--ways", nargs="+", help="all that are trained, if left out")
    parser.add_argument("--work", type=Path, default=Path("runs/alone"), help="for what trainings leave")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        recipe = recipe_of(options.study, options.one, options.root, options.work)
        print(json.dumps(measure(recipe, options.work / f"{options.study.replace('/', '-')}-{options.one}")))
        return
    try:
        trials = vse.trials() if options.study == "vse" else protocol.of_recipe(options.study)
    except ValueError as error:
        parser.error(str(error))
    ways = options.ways or [w for w in trials.rates if w in {r["way"] for r in trials.lines()}]
    if options.study == "vse" and not options.ways:
        ways = list(vse.once(ways).values())
    if unknown := set(ways) - trials.rates.keys():
        parser.error(f"{options.study} has no way {min(unknown)!r}: it has {', '.join(trials.rates)}")
    for way in ways:
        command = [sys.executable, "-W", "ignore", __file__, options.study, "--root", str(options.root)]
        told = subprocess.run([*command, "--work", str(options.work), "--one", way], check=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE).stdout  # fmt: skip
        name = vse.plain(way) if options.study == "vse" else way
        found = {**trials.steps_alone(), name: json.loads(told.splitlines()[-1])}
        trials.alone.write_text(json.dumps(found, indent=1) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
