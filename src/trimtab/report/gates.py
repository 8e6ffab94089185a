"""The course of a search: one line a block, its gate (or score) after each update."""

from __future__ import annotations

from typing import Any

from trimtab.report.canvas import FAINT, PALETTE, new_figure, png, short, tidy


def gates_figure(plan: dict[str, Any]) -> bytes | None:
    """A PNG of the gates over a search's updates, skipped blocks in colour; None if it has no such course.

    Args:
        plan: a plan as a search keeps it: `candidates`, `skip`, and `updates` with the `gates` after each.
    """
    updates, paths = plan.get("updates"), plan.get("candidates")
    if not isinstance(updates, list) or not isinstance(paths, list) or not updates:
        return None
    rows: list[Any] = [u.get("gates") for u in updates if isinstance(u, dict)]
    if not all(isinstance(r, list) and len(r) == len(paths) for r in rows) or len(rows) != len(updates):
        return None
    steps = [u.get("step", i + 1) for i, u in enumerate(updates)]
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    skipped = [p for p in paths if p in plan.get("skip", ())]
    for i, path in enumerate(paths):
        values = [r[i] for r in rows]
        if path in skipped:
            colour = PALETTE[skipped.index(path) % len(PALETTE)]
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=".", label=short(path), zorder=3)
        else:
            axes.plot(steps, values, color=FAINT, linewidth=1)
    if skipped:
        axes.legend(title="skipped", fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes, "step of the search", "gate")
    return png(figure)
