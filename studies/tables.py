"""Tables of the studies in docs, from the files that `trimtab report` keeps.

    python studies/tables.py docs/prune/study.jsonl [--seconds] [--number 0.63 0.75]
    python studies/tables.py docs/tune/study.jsonl
    python studies/tables.py docs/skip/study.jsonl
    python studies/tables.py runs/prune/find_tiny-blip/multiflow-0.75-seed0    # what it left of which matrix

One table a recipe: the primary metric, mean ± standard deviation over seeds. Where labels end in a number (`omp-0.63`,
`das-2`), the rows are what stands before it and the columns are the numbers. Other labels follow, with their costs.
`--against LABELS`: instead, how far every label is from these on the test rows and seeds that both have, with 95 %
intervals over test rows.
`--seconds`: how long each pruner took to find its masks, mean over sparsities and backbones' recipes apart.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from safetensors.torch import load_file

from trimtab.report.runs import Section, find_runs, group_runs


def cell(scores: list[float], decimals: int = 1) -> str:
    if not scores:
        return "-"
    spread = f" ± {stdev(scores):.{decimals}f}" if len(scores) > 1 else ""
    return f"{fmean(scores):.{decimals}f}{spread}"


def split(label: str) -> tuple[str, str] | None:
    found = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)", label)
    return (found[1], found[2]) if found else None


def swept(section: Section) -> str:
    """Rows: labels without their number; columns: the numbers."""
    parts = {label: split(label) for label in section.methods}
    numbers = sorted({p[1] for p in parts.values() if p}, key=float)
    names = list(dict.fromkeys(p[0] for p in parts.values() if p))
    lines = [f"| {section.metric_title} | {' | '.join(numbers)} |", "|---|" + "---:|" * len(numbers)]
    for name in names:
        cells = [f"{name}-{n}" for n in numbers]
        lines.append(f"| {name} | {' | '.join(cell(section.scores(c)) if c in parts else '-' for c in cells)} |")
    return "\n".join(lines)


def side_by_side(sections: list[Section], number: str) -> str:
    """Rows: labels with this number, without it, and those without any; columns: the recipes."""
    titles = [f"{s.name.rpartition('/')[2]}: {s.metric_title}" for s in sections]
    rows: dict[str, dict[str, str]] = {}
    for title, section in zip(titles, sections, strict=True):
        for label in section.methods:
            name, own = split(label) or (label, number)
            if own == number:
                rows.setdefault(name, {})[title] = cell(section.scores(label))
    lines = [f"| {number} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    return "\n".join([*lines, *(f"| {n} | {' | '.join(r.get(t, '-') for t in titles)} |" for n, r in rows.items())])


def amount(values: list[float], unit: float) -> str:
    return f"{fmean(values) / unit:.3g}" if values else "-"


def listed(section: Section, labels: list[str]) -> str:
    """One row a label, with what it costs."""
    lines = [
        f"| | {section.metric_title} | trained, K | kept for backward, MB | MACs, M |",
        "|---|---:|---:|---:|---:|",
    ]
    for label in labels:
        costs = [
            amount(section.costs(label, key), unit)
            for key, unit in (("trainable_params", 1e3), ("saved_activation_bytes", 1e6), ("macs", 1e6))
        ]
        lines.append(f"| {label} | {cell(section.scores(label))} | {' | '.join(costs)} |")
    return "\n".join(lines)


def against(section: Section, references: list[str]) -> str:
    """Rows: labels; columns: score, steps to the plateau, and paired differences to each of the references."""
    beside = " | ".join(f"beside {r}" for r in references)
    lines = [f"| | seeds | {section.metric_title} | steps | {beside} | MACs, M |"]
    lines += ["|---|---:|---:|---:|" + "---:|" * (len(references) + 1)]
    for label, runs in section.methods.items():
        steps = round(fmean(run.metrics["steps"] for run in runs))
        cells = [f"{len(runs)}", cell(section.scores(label)), f"{steps}"]
        for reference in references:
            gap, low, high = section.beside(label, reference) or (0.0, 0.0, 0.0)
            cells.append(f"{gap:+.1f} ({low:+.1f} to {high:+.1f})" if low or high else "-")
        lines.append(f"| {label} | {' | '.join(cells)} | {amount(section.costs(label, 'macs'), 1e6)} |")
    return "\n".join(lines)


def seconds(sections: list[Section]) -> str:
    """How long pruners took, a column a recipe that found masks."""
    found = [s for s in sections if "/find_" in s.name]
    names = list(dict.fromkeys(p[0] for s in found for label in s.methods if (p := split(label))))
    lines = [f"| seconds | {' | '.join(s.name for s in found)} |", "|---|" + "---:|" * len(found)]
    for name in names:
        cells = []
        for section in found:
            runs = [r for label, rs in section.methods.items() if (p := split(label)) and p[0] == name for r in rs]
            took = [float(r.pruning["seconds"]) for r in runs if "seconds" in r.pruning]
            cells.append(f"{fmean(took):.1f}" if took else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(run: Path, count: int = 4) -> str:
    """Which matrices a pruning run left least and most of, in percent."""
    methods = json.loads((run / "fit.json").read_text())["methods"]
    number, state = next((i, m["state"]) for i, m in enumerate(methods) if m["lever"] == "prune")
    prefix = f"method.{number}."
    stored = load_file(run / "weights.safetensors")
    masks = {k: v for k, v in stored.items() if k.startswith(prefix) and v.dtype == torch.uint8}
    kept = {k: 100 * int(np.unpackbits(v.numpy()).sum()) / (8 * len(v)) for k, v in masks.items()}
    order = sorted(kept, key=kept.__getitem__)
    rows = [f"{kept[k]:5.1f} % {k.removeprefix(prefix)}" for k in (*order[:count], *order[-count:])]
    return f"{run}: {100 * (1 - state['sparsity']):.1f} % of all\n" + "\n".join(rows)


def main(files: list[Path], with_seconds: bool, numbers: list[str], references: list[str]) -> None:
    for run in (f for f in files if (f / "fit.json").exists()):
        print(shares(run))
        return
    found = find_runs(files)[0]
    sections = group_runs(found)
    print(f"{len(found)} runs, {sum(run.info['seconds'] for run in found) / 60:.0f} minutes one after the other\n")
    if unknown := set(references) - {label for section in sections for label in section.methods}:
        raise SystemExit(f"--against: no run has the label {min(unknown)!r}")
    for number in numbers:
        print(side_by_side(sections, number) + "\n")
    if numbers:
        return
    for section in sections:
        counts = {label: len(runs) for label, runs in section.methods.items()}
        several = sorted(set(counts.values()))
        print(f"### {section.name} ({' or '.join(map(str, several))} seeds)\n")
        if references:
            print(against(section, references) + "\n")
            continue
        plain = [label for label in section.methods if not split(label)]
        if any(split(label) for label in section.methods):
            print(swept(section) + "\n")
        costs = [label for label in section.methods if section.costs(label, "macs")]
        if rest := (list(section.methods) if costs else plain):
            print(listed(section, rest) + "\n")
    if with_seconds:
        print(seconds(sections))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tables of a study, from the file that `trimtab report` keeps.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seconds", action="store_true")
    parser.add_argument(
        "--number", nargs="*", default=[], metavar="N", help="recipes side by side, for labels ending so"
    )
    parser.add_argument("--against", nargs="*", default=[], metavar="LABEL", help="paired differences to these")
    options = parser.parse_args()
    main(options.files, options.seconds, options.number, options.against)
