"""Run folders as a run would leave them, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

VARIANTS = ("zero-shot", "full", "lora", "unipt")
SCORES = {"zero-shot": 0.10, "full": 0.60, "lora": 0.50, "unipt": 0.55}
TRAINED = {"zero-shot": 0, "full": 12_000_000, "lora": 120_000, "unipt": 240_000}


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_run(root: Path, name: str, variant: str, seed: int, changes: dict[str, Any] | None = None) -> Path:
    """Write a run folder; ``changes`` go into run.json."""
    folder = root / name / variant / f"seed-{seed}"
    info = {
        "format": 1,
        "name": name,
        "variant": variant,
        "seed": seed,
        "status": "finished",
        "recipe_title": f"Recipe of {name}",
        "task": name.split("/")[-1],
        "data": "pictograms:openmoji",
        "backbone": "tiny-clip",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "versions": {"torch": "2.13.0", "trimtab": "0.1.0"},
        "started": f"2026-11-22T14:{VARIANTS.index(variant):02}:{seed:02}+00:00",
        "seconds": 12.3,
    }
    primary = "recall@1" if name.endswith("retrieval") else "accuracy"
    score = SCORES[variant] + 0.02 * seed
    history = [{"step": step, "loss": 3 / (1 + step / 20) + 0.1 * seed} for step in range(0, 200, 10)]
    trained = TRAINED[variant]
    costs = {
        "params": 12_000_000,
        "trainable_params": trained,
        "macs": 900_000_000 if variant == "unipt" else 1_200_000_000,
        "dense_macs": 1_200_000_000,
        "saved_activation_bytes": 1_500_000 + trained,
        "checkpoint_bytes": 4 * trained,
        "peak_memory_bytes": None,
        "latency_ms": None if variant == "full" else {"median": 4.0 + seed, "p10": 3.5, "p90": 6.0},
        "batch_size": 32,
    }
    write_json(folder / "run.json", {**info, **(changes or {})})
    write_json(
        folder / "metrics.json",
        {"primary": primary, "chance": 0.004, "test": {primary: score, "loss": 1.5}, "history": history},
    )
    write_json(folder / "costs.json", costs)
    write_samples(folder / "samples", score)
    return folder


def write_fit(folder: Path, *methods: tuple[str, str, dict[str, Any]]) -> None:
    entries = [{"name": name, "lever": lever, "settings": {}, "state": state} for name, lever, state in methods]
    write_json(folder / "fit.json", {"format": 1, "methods": entries})


def write_samples(folder: Path, score: float) -> None:
    samples = []
    for index in range(8):
        correct = index / 8 < score
        samples.append(
            {
                "image": f"{index}.png",
                "query": f"a <b>bold</b> picture {index}",
                "prediction": "cat" if correct else "dog",
                "target": "cat",
                "correct": correct,
                "box_predicted": [14, 6, 4, 16],
                "box_target": [5, 5, 15, 15] if index % 2 else None,
                "images": [f"{(index + 1) % 8}.png", "lost.png"],
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (20, 16), (30 * index, 80, 160, 200)).save(folder / f"{index}.png")
    write_json(folder / "samples.json", samples)
