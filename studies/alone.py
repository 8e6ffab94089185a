"""Peak memory and time of a training step of the ways of `vse.py`, through the frozen towers, without a cache.

    python studies/alone.py --root flickr8k [--ways linear-probe unipt-text]       on a machine that does nothing else

Every way has a process of its own, which trains twelve steps of 128 photographs on one core: the median time of the
last ten, and by how much the resident set grew in a forward and backward pass. Results are in
`studies/results/vse_alone.json`, which `vse.py --tables` shows.
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

import vse
from photographs import files

from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run

STEPS = 12
CHANGES = [f"training.steps={STEPS}", "training.log_every=1", "training.schedule=linear", "training.cache=null",
           "training.cache_views=1", "training.evaluate_every=null", "training.patience=null",
           "costs=true"]  # fmt: skip


def few(data: dict[str, Any], work: Path) -> dict[str, Any]:
    """The study's data, cut: some rows to train on, and hardly any to score."""
    cut: dict[str, Any] = {"name": "files"}
    for split, rows in (("train", 512), ("validation", 128), ("test", 32)):
        file = work / f"few-{split}.jsonl"
        file.write_text("".join(Path(data[split]).read_text().splitlines(keepends=True)[:rows]), encoding="utf-8")
        cut[split] = str(file.absolute())
    return cut


def measure(way: str, data: dict[str, Any], work: Path) -> dict[str, float]:
    raw = vse.raw_of(way, vse.WAYS[way].rates[0], 0, few(data, work))
    folder = run(expand(raw, "alone", CHANGES)[0], work / f"alone-{way}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = [datetime.fromisoformat(e["time"]).timestamp() for e in log if e["event"] == "train"][-STEPS:]
    costs = json.loads((folder / "costs.json").read_text())
    return {
        "step_seconds": round(median(b - a for a, b in pairwise(times[1:])), 3),
        "peak_memory_bytes": costs["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("flickr8k"), help="Flickr8K in its official layout")
    parser.add_argument("--ways", nargs="+", choices=list(vse.WAYS), help="all that are trained, if left out")
    parser.add_argument("--work", type=Path, default=Path("runs/vse-study"), help="for what trainings leave")
    parser.add_argument("--one", choices=list(vse.WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = files(options.root, options.work)
    if options.one:
        print(json.dumps(measure(options.one, data, options.work)))
        return
    trained = {r["way"] for r in vse.trials().lines()}
    for way in options.ways or [w for w in vse.WAYS if w in trained]:
        command = [sys.executable, "-W", "ignore", __file__, "--root", str(options.root), "--work", str(options.work)]
        told = subprocess.run([*command, "--one", way], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
                              stdout=subprocess.PIPE, text=True).stdout  # fmt: skip
        found = json.loads(vse.ALONE.read_text()) if vse.ALONE.exists() else {}
        found[way] = json.loads(told.splitlines()[-1])
        vse.ALONE.write_text(json.dumps(found, indent=1) + "\n")
        print(way, found[way], flush=True)


if __name__ == "__main__":
    main()
