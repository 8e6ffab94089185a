"""What the study's runs show about each lever: ratios with their spread over seeds, as Markdown.

trimtab run study/retrieval && trimtab run study/vqa && trimtab run study/grounding
python studies/claims.py runs/study
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from trimtab.report.page import RunRecord, load_runs

Scores = dict[str, dict[int, RunRecord]]  # variant -> seed -> run


def score(run: RunRecord) -> float:
    return run.metrics["test"][run.metrics["primary"]]


def across(values: list[float], percent: bool = True) -> str:
    """Mean and sample standard deviation over seeds."""
    scale, unit = (100, " %") if percent else (1, "")
    spread = f" ± {scale * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):.1f}{spread}{unit}"


def compare(runs: Scores, a: str, b: str) -> tuple[list[float], list[float]]:
    """Scores of two variants on the seeds that both have."""
    seeds = sorted(runs[a].keys() & runs[b].keys())
    return [score(runs[a][s]) for s in seeds], [score(runs[b][s]) for s in seeds]


def main(root: Path) -> None:
    tasks: dict[str, Scores] = defaultdict(lambda: defaultdict(dict))
    for run in load_runs([root]):
        tasks[run.info["name"].split("/")[-1]][run.info["variant"]][run.info["seed"]] = run
    print("| task | claim | holds | measured |\n|---|---|---|---|")
    for task, runs in tasks.items():

        def line(claim: str, holds: bool, measured: str, task: str = task) -> None:
            print(f"| {task} | {claim} | {'yes' if holds else '**no**'} | {measured} |")

        full, scratch = compare(runs, "full", "from-scratch")
        line("pretrained beats scratch", min(full) > max(scratch), f"{across(full)} against {across(scratch)}")
        unipt, probe = compare(runs, "unipt", "linear-probe")
        between = fmean(probe) <= fmean(unipt) <= fmean(full)
        line("UniPT lies between linear probe and full fine-tuning", between,
             f"{across(probe)} / {across(unipt)} / {across(full)}")  # fmt: skip
        if "lora" in runs:
            saved = [next(iter(runs[v].values())).costs["saved_activation_bytes"] for v in ("unipt", "lora")]
            line("UniPT saves at most a third of LoRA's activation bytes", saved[0] <= saved[1] / 3,
                 f"{100 * saved[0] / saved[1]:.1f} % of them")  # fmt: skip
        if "das-2" in runs:
            das, chance = compare(runs, "das-2", "random-skip-2")
            spread = max(stdev(das), stdev(chance)) if len(das) > 1 else 0.0
            ahead = fmean(das) - fmean(chance) > spread
            line("DAS's plan beats random plans of its size by more than the spread", ahead,
                 f"{across(das)} against {across(chance)}")  # fmt: skip
        for sparsity in (63, 75, 90):
            if f"multiflow-{sparsity}" in runs:
                pruned, dense = compare(runs, f"multiflow-{sparsity}", "full")
                kept = [p / d for p, d in zip(pruned, dense, strict=True)]
                claim = f"MULTIFLOW at {sparsity} % keeps at least 95 % of the fine-tuned dense score"
                line(claim, fmean(kept) >= 0.95, across(kept))
        if "random-pruning-90" in runs:
            flow, chance = compare(runs, "multiflow-90", "random-pruning-90")
            line("MULTIFLOW at 90 % beats random pruning", min(flow) > max(chance),
                 f"{across(flow)} against {across(chance)}")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study"))
