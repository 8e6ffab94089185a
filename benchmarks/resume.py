"""Runs that are killed at random moments and started again: do they end as if nothing had happened?

python benchmarks/resume.py [ROUNDS] [SEED] [SECONDS] [FIRST]

Each round takes one of the trainings below, runs it to its end once, and then again with a kill (SIGKILL, to all its
processes) at random moments until it ends. Metrics, curve and every stored tensor must be equal to the bit. Half of the
kills wait until a checkpoint is being written. SECONDS bounds the time from a start to a kill; FIRST is where in the
list of trainings to begin.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

BASE = {
    "backbone": {"name": "tiny-clip", "pretrained": False}, "task": "retrieval",
    "data": {"name": "pictograms", "train": 128, "test": 24, "validation": 32}, "costs": False,
    "training": {"steps": 60, "batch_size": 8, "save_every": 3, "log_every": 1, "crop": 0.7, "light": 0.2},
}  # fmt: skip
METHODS = {
    "full": ["full"], "lora": [{"name": "lora", "dropout": 0.1}], "unipt": ["unipt"],
    "multiflow-full": [{"name": "multiflow", "sparsity": 0.5, "batches": 4}, "full"], "plateau": ["full"],
}  # fmt: skip
TRAINING = {"plateau": {"schedule": "plateau", "evaluate_every": 4, "patience": 3, "learning_rate": 1e-3}}


STARTED: list[subprocess.Popen[bytes]] = []


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "trimtab", "run", str(recipe), "--out", str(out)]
    with (out.parent / "log.txt").open("ab") as log:
        STARTED.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    return STARTED[-1]


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def half_written(run: Path) -> bool:
    return any(not (p / "whole.json").exists() for p in run.glob("checkpoints/checkpoint-*"))


def interrupted(recipe: Path, out: Path, run: Path, draw: random.Random, longest: float) -> dict[str, int]:
    """Start and kill until a run is finished; how often it was killed, and how often in a checkpoint."""
    kills = {"kills": 0, "in a checkpoint": 0}
    while True:
        process = start(recipe, out)
        writing, moment = draw.random() < 0.5, time.monotonic() + draw.uniform(0.3, 1) * longest
        while process.poll() is None and time.monotonic() < moment:
            if writing and (run / "checkpoints").is_dir() and half_written(run) and draw.random() < 0.2:
                break
            time.sleep(0.002 if writing else 0.05)
        if process.poll() is not None:
            if process.returncode:
                raise AssertionError(
                    f"exit status {process.returncode}: {(out.parent / 'log.txt').read_text()[-2000:]}"
                )
            return kills
        kill(process)
        kills["kills"] += 1
        kills["in a checkpoint"] += half_written(run)


def same(one: Path, two: Path) -> bool:
    told = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    tensors = [load_file(run / "weights.safetensors") for run in (one, two)]
    return told[0] == told[1] and tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()
    )  # fmt: skip


def main(rounds: int = 8, seed: int = 0, longest: float = 60.0, first: float = 0) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started ends too
    draw, results = random.Random(seed), []
    for number in range(int(first), int(first) + rounds):
        name = list(METHODS)[number % len(METHODS)]
        workers = draw.choice([0, 1, 2])
        with tempfile.TemporaryDirectory() as scratch:
            recipe = Path(scratch) / "resume.yaml"
            training = {**BASE["training"], **TRAINING.get(name, {}), "workers": workers}  # type: ignore[dict-item]
            recipe.write_text(yaml.safe_dump({**BASE, "methods": METHODS[name], "training": training}))
            runs = []
            for kind in ("straight", "killed"):
                out = Path(scratch) / kind / "runs"
                out.mkdir(parents=True)
                runs.append(out / "resume" / "default-seed0")
                if kind == "killed":
                    kills = interrupted(recipe, out, runs[-1], draw, longest)
                elif start(recipe, out).wait():
                    raise AssertionError((out.parent / "log.txt").read_text()[-2000:])
            results.append({"methods": name, "workers": workers, **kills, "same": same(*runs)})
            print(json.dumps(results[-1]), flush=True)
    if not all(result["same"] for result in results):
        sys.exit("some runs differ")


if __name__ == "__main__":
    try:
        main(*(int(a) for a in sys.argv[1:3]), *(float(a) for a in sys.argv[3:]))
    finally:
        for one in STARTED:
            if one.poll() is None:
                kill(one)
