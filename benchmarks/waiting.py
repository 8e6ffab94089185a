"""Share of training that waits for data, in the recipes of the demo, with and without workers.

python benchmarks/waiting.py [STEPS] [RECIPE=VARIANT ...]

Each pair of runs has the same losses, which is checked. `collate_ms` is the processor time of one batch: what is read,
decoded, resized and tokenised. Figures of a machine with other work on its cores are larger.
"""

from __future__ import annotations

import json
import os
import sys
import time

from short import short
from transformers import set_seed

from trimtab.data.draws import Place
from trimtab.experiments import assembly, feeding, training

DEFAULT = ("demo/retrieval=lora", "demo/retrieval=unipt", "demo/grounding=unipt", "demo/vqa=unipt", "demo/vqa=full")
BATCHES = 20  # of the time of collating


def measured(name: str, variant: str, steps: int) -> dict[str, object]:
    out: dict[str, object] = {"recipe": name, "variant": variant, "steps": steps}
    losses = []
    for workers in (0, None):
        r = short(name, variant, steps, *([] if workers is None else [f"training.workers={workers}"]))
        parts = assembly.assemble(r)
        train, validation, _ = assembly.tables(r, parts)
        parts.pull(training.TrainingSession(parts.model, train, validation, r.training, r.seed, name))
        set_seed(r.seed)
        start = time.perf_counter()
        history = training.fit(parts.model, train, r.training, r.seed, parts.fit.callbacks(), f"{name} {variant}")
        seconds = time.perf_counter() - start
        losses.append([entry["loss"] for entry in history])
        shares = [entry["waiting"] for entry in history]
        key = "default" if workers is None else f"{workers} workers"
        out[key] = {"waiting": round(sum(shares) / len(shares), 4), "ms_a_step": round(1000 * seconds / steps)}
        if workers == 0:
            out["collate_ms"] = collate_ms(feeding.Feed(parts.model, train, r.training), r.training.batch_size)
    if losses[0] != losses[1]:
        raise AssertionError(f"{name} {variant}: the losses differ with the number of workers")
    return out


def collate_ms(feed: feeding.Feed, size: int) -> float:
    places = [Place(0, 0, i % feed.rows) for i in range(size * (BATCHES + 1))]
    feed(places[:size])
    start = time.process_time()
    for i in range(1, BATCHES + 1):
        feed(places[i * size : (i + 1) * size])
    return round(1000 * (time.process_time() - start) / BATCHES, 1)


def main(steps: int = 30, *chosen: str) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [measured(*which.split("=", 1), steps) for which in chosen or DEFAULT]
    print(json.dumps({"cores": cores, "load": round(os.getloadavg()[0], 1), "results": found}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, *sys.argv[2:])
