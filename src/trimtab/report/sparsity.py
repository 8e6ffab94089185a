"""Figures of a sweep over sparsities: what each pruner scores, what it leaves of each tower, how long it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from trimtab.report.canvas import FAINT, INK, MARKERS, PALETTE, new_figure, png, short, tidy
from trimtab.report.runs import RunRecord, Section, known
from trimtab.report.tables import spread

Sweep = dict[str, dict[float, list[RunRecord]]]  # series -> sparsity reached -> the runs of one variant
NUMBERED = re.compile(r"(.+?)-\d+(\.\d+)?")


def sweep(section: Section) -> Sweep:
    """The pruned runs of a section by series and sparsity; empty unless a series has two sparsities or more.

    A series are the variants that are called alike but for a number at the end, `omp-0.63` and `omp-0.75`; whatever
    else is pruned stands alone. No two variants share a point.
    """
    found: Sweep = {}
    for label, runs in section.methods.items():
        if not all(run.pruning for run in runs):
            continue
        level = fmean(float(run.pruning["sparsity"]) for run in runs)
        numbered = NUMBERED.fullmatch(label)
        series = found.setdefault(numbered[1] if numbered else label, {})
        if level in series:
            series = found.setdefault(label, {})
        series[level] = runs
    return found if any(len(levels) > 1 for levels in found.values()) else {}


def figures(section: Section, slug: str) -> list[dict[str, Any]]:
    """The figures of a sweep, or none if the section holds none."""
    found = sweep(section)
    if not found:
        return []
    out = [{
        "file": f"{slug}-sparsity.png", "png": _scores(section, found),
        "alt": f"{section.metric_title} of each pruner against sparsity",
        "caption": "Score against the share of prunable weights that are zero; bars are standard deviations over "
                   "seeds where there are several, the dashed lines are runs without pruning.",
    }]  # fmt: skip
    towers = list(dict.fromkeys(t for levels in found.values() for runs in levels.values()
                                for t in runs[0].pruning["towers"]))  # fmt: skip
    if len(towers) > 1:
        out.append({
            "file": f"{slug}-towers.png", "png": _shares(found, towers),
            "alt": "Share of the weights that each pruner keeps in each tower",
            "caption": "What stays of each tower. On the grey line a tower gives as much as the whole model; far below "
                       "it one modality is collapsing.",
        })  # fmt: skip
    if any(runs[0].pruning.get("seconds") is not None for levels in found.values() for runs in levels.values()):
        out.append({
            "file": f"{slug}-seconds.png", "png": _seconds(found),
            "alt": "Run time of each pruner",
            "caption": "Time to find the masks of one sparsity, calibration included, mean over the sparsities.",
        })  # fmt: skip
    return out


def _styles(found: Sweep) -> dict[str, dict[str, Any]]:
    return {name: {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            for i, name in enumerate(found)}  # fmt: skip


def _scores(section: Section, found: Sweep) -> bytes:
    figure = new_figure(height=4.6)
    axes = figure.subplots()
    scale = 100 if section.is_fraction else 1
    for number, (name, style) in enumerate(_styles(found).items()):
        scored = {s: [scale * v for v in known(run.score(section.primary) for run in found[name][s])]
                  for s in sorted(found[name])}  # fmt: skip
        points = {s: values for s, values in scored.items() if values}
        shift = (number - len(found) / 2) * 0.12  # side by side, so that no bar hides another
        axes.errorbar([100 * s + shift for s in points], [fmean(v) for v in points.values()],
                      yerr=[spread(v) for v in points.values()] if any(len(v) > 1 for v in points.values()) else None,
                      label=short(name), linewidth=1.5, markersize=6, markeredgecolor="white", elinewidth=1,
                      **style)  # fmt: skip
    for variant, runs in section.methods.items():
        if (scores := section.scores(variant)) and not any(run.pruning for run in runs):
            mean = fmean(scores)
            axes.axhline(mean, color=INK, linestyle="--", linewidth=0.9)
            axes.annotate(short(variant), (1, mean), xycoords=("axes fraction", "data"), xytext=(4, 0), color=INK,
                          textcoords="offset points", fontsize=8.5, va="center")  # fmt: skip
    tidy(axes, "weights removed (%)", section.metric_title)
    _ticks(axes, found)
    _legend(axes)
    return png(figure)


def _ticks(axes: Any, found: Sweep) -> None:
    every = sorted({f"{100 * s:.3g}" for levels in found.values() for s in levels}, key=float)
    axes.set_xticks([float(text) for text in every], every)


def _shares(found: Sweep, towers: Sequence[str]) -> bytes:
    figure = new_figure(height=3.8)
    grid = figure.subplots(1, len(towers), sharey=True, squeeze=False)[0]
    for axes, tower in zip(grid, towers, strict=True):
        every = sorted({s for levels in found.values() for s in levels})
        axes.plot([100 * s for s in every], [100 * (1 - s) for s in every], color=FAINT, linewidth=5, zorder=0)
        for name, style in _styles(found).items():
            levels = sorted(found[name])
            kept = [found[name][s][0].pruning["towers"].get(tower, {"kept": 0, "prunable": 1}) for s in levels]
            axes.plot([100 * s for s in levels], [100 * k["kept"] / k["prunable"] for k in kept], label=short(name),
                      linewidth=1.3, markersize=5, markeredgecolor="white", **style)  # fmt: skip
        tidy(axes, "weights removed (%)", f"kept of {tower} (%)")
        _ticks(axes, found)
        axes.set_ylim(bottom=0)
    _legend(grid[-1])
    return png(figure)


def _seconds(found: Sweep) -> bytes:
    times = {
        name: fmean(seconds)
        for name, levels in found.items()
        if (seconds := [r[0].pruning["seconds"] for r in levels.values() if r[0].pruning.get("seconds") is not None])
    }
    names = sorted(times, key=times.__getitem__, reverse=True)
    figure = new_figure(height=1.0 + 0.26 * len(names))
    axes = figure.subplots()
    axes.barh(names, [times[n] for n in names], color=PALETTE[0], height=0.65)
    for i, name in enumerate(names):
        axes.annotate(f"{times[name]:.3g} s", (times[name], i), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8.5, color=INK)  # fmt: skip
    tidy(axes, "seconds", "")
    if max(times.values()) > 30 * max(min(times.values()), 1e-3):
        axes.set_xscale("log")
    axes.margins(x=0.12)
    return png(figure)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.09, 1.02), frameon=False, labelcolor=INK, fontsize=9)
