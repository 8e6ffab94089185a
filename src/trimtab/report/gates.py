"""The course of a search: one line a block, its gate (or score) after each update."""

from __future__ import annotations

from typing import Any

from trimtab.report import plots


def gates_figure(plan: dict[str, Any]) -> bytes | None:
    """A PNG of the gates over a search's updates, skipped blocks in colour; None if the plan has no such course.

    Args:
        plan: a run's `plan.json`: `candidates`, `skip`, and `updates` with the `gates` after each.
    """
    updates, paths = plan.get("updates"), plan.get("candidates")
    if not isinstance(updates, list) or not isinstance(paths, list) or not updates:
        return None
    rows = [u.get("gates") for u in updates if isinstance(u, dict)]
    if not all(isinstance(r, list) and len(r) == len(paths) for r in rows) or len(rows) != len(updates):
        return None
    steps = [u.get("step", i + 1) for i, u in enumerate(updates)]
    figure = plots._new_figure(3.2)
    axes = figure.add_subplot()
    skipped = [p for p in paths if p in plan.get("skip", ())]
    for i, path in enumerate(paths):
        values = [r[i] for r in rows]
        if path in skipped:
            colour = plots.PALETTE[skipped.index(path) % len(plots.PALETTE)]
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=".", label=plots._plain(path), zorder=3)
        else:
            axes.plot(steps, values, color=plots.FAINT, linewidth=1)
    if skipped:
        axes.legend(title="skipped", fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plots._tidy(axes, "step of the search", "gate")
    return plots._png(figure)
