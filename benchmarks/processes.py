"""What a second process brings: training steps of one process and of two, which share each batch.

    python benchmarks/processes.py [--steps 12] [--rounds 3] [--out FILE] [RECIPE=VARIANT ...]

Each process computes on one thread; they meet over gloo on this machine. One and two processes run by turns, and a
ratio is the median over rounds. `speed` is samples a second of two over one, by the clock: 2 at best, and below what it
would be where other programs use the cores. `work` is what a step takes of the processor in both processes together,
over what it takes in one: 1 at best, and little changed by other programs, so that 2 / work is the speed that two free
cores could reach. The losses of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT = ("demo/vqa=full", "demo/vqa=lora", "demo/retrieval=unipt")
FIRST = 3  # steps that are not counted


def here(name: str, variant: str, steps: int, out: Path) -> None:
    """Train in this process, alone or as one of several; write what its steps took."""
    import torch
    from short import short
    from transformers import TrainerCallback, set_seed

    from trimtab.experiments import assembly, many, training

    torch.set_num_threads(1)
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    many.join()
    r = short(name, variant, steps, "training.workers=0")
    with many.one_by_one():
        parts = assembly.assemble(r)
        train, validation, _ = assembly.tables(r, parts)
    parts.pull(training.TrainingSession(parts.model, train, validation, r.training, r.seed, name))
    set_seed(r.seed)
    history = training.fit(parts.model, train, r.training, r.seed, [*parts.fit.callbacks(), Clock()])
    taken = [[b[i] - a[i] for a, b in zip(marks[FIRST:], marks[FIRST + 1 :], strict=False)] for i in (0, 1)]
    clock, processor = map(statistics.median, taken)
    found = {"clock": clock, "processor": processor, "rows": r.training.batch_size,
             "losses": [entry["loss"] for entry in history]}  # fmt: skip
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    many.leave()


def together(count: int, name: str, variant: str, steps: int) -> dict[str, Any]:
    """The same in so many processes: the slowest clock, the sum of processor seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(count):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": port,
                     "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                     "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
            command = [sys.executable, "-W", "ignore", __file__, "--here", folder, "--steps", str(steps)]
            environment = {k: v for k, v in os.environ.items() if k not in world} | (world if count > 1 else {})
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            running.append(subprocess.Popen([*command, f"{name}={variant}"], env=environment, stdout=sys.stderr))
        try:
            if any(process.wait() for process in running):
                raise RuntimeError(f"{name} {variant}: a process of {count} failed, see above")
        finally:
            for process in running:
                process.kill()
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return {**found[0], "clock": max(f["clock"] for f in found), "processor": sum(f["processor"] for f in found)}


def compared(name: str, variant: str, steps: int, rounds: int) -> dict[str, Any]:
    pairs = [(together(1, name, variant, steps), together(2, name, variant, steps)) for _ in range(rounds)]
    apart = max(abs(a - b) / abs(a) for one, two in pairs for a, b in zip(one["losses"], two["losses"], strict=True))
    ratios = {"speed": [one["clock"] / two["clock"] for one, two in pairs],
              "work": [two["processor"] / one["processor"] for one, two in pairs]}  # fmt: skip
    return {
        "recipe": name, "variant": variant, "batch": pairs[0][0]["rows"], "rounds": rounds,
        **{k: {"median": round(statistics.median(v), 3), "lowest": round(min(v), 3), "highest": round(max(v), 3)}
           for k, v in ratios.items()},
        "ms_a_step_of_one": round(1000 * statistics.median(one["processor"] for one, _ in pairs)),
        "losses_apart": float(f"{apart:.1e}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=list(DEFAULT))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    named = [which.split("=", 1) for which in options.recipes]
    if options.here:
        here(*named[0], options.steps, options.here)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = []
    for name, variant in named:
        found.append(compared(name, variant, options.steps, options.rounds))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    result = {"cores": cores, "load": round(os.getloadavg()[0], 1), "results": found}
    print(text := json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
