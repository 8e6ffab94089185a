"""The page of a search: the sentence, the frontier, what each lever contributed, and the course of the trials."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import report
from trimtab.budgets.halving import Search, Trial
from trimtab.budgets.limits import Axis, shown
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.report.canvas import FAINT, INK, MARKERS, PALETTE, new_figure, png, tidy
from trimtab.report.pictures import data_uri

if TYPE_CHECKING:
    from trimtab.budgets.fit import Found


def write_page(search: Search, found: Found) -> Path:
    """Write `report/index.html` and its pictures into the folder of the search.

    Raises:
        ImportError: if matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the page of a search needs matplotlib and jinja2: pip install -e '.[report]' in trimtab's folder"
        ) from error
    out = search.folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    figures = [
        ("frontier.png", frontier(search), "Validation score against each cost that the budget names. Filled: trained "
         "to the end, the largest is what was found; hollow: stopped at a rung, at its last score. Ticks at the foot: "
         "candidates that were only counted. Grey: over the limit. The grey line joins what nothing beats."),
        ("course.png", course(search), "Validation score of each trial at its rungs. A line that ends early was not "
         "among the best third of its rung."),
    ]  # fmt: skip
    for name, picture, _ in figures:
        with replace_file(out / name) as partial:
            partial.write_bytes(picture)
    folders = [Path(__file__).parent, Path(report.__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html.j2").render(
        title=title(search.recipe),
        sentence=str(found),
        limits=[(x.name, x.about, shown(found.budget.most[x.name], x.kind)) for x in found.budget.axes],
        figures=[(data_uri(picture), caption) for _, picture, caption in figures],
        axes=[x.name for x in found.budget.axes],
        levers=_levers(found),
        untrained=[(str(t.candidate), t.reason) for t in search.done if t.status in ("over", "failed")],
        trials=[_row(search, t) for t in sorted(search.done, key=lambda t: (t.status != "whole", -t.score))],
        refused=sorted(set(search.prices.refused.values())),
        fitting=len(search.fitting), combinations=len(list(search.space)), paid=found.paid, grid=found.grid,
        command="trimtab run found.yaml",
    )  # fmt: skip
    index = out / "index.html"
    with replace_file(index) as partial:
        partial.write_text(page, encoding="utf-8")
    return index


def title(recipe: Recipe) -> str:
    """What was searched for."""
    return f"{recipe.task['name']} with {Path(recipe.backbone.name).name} under a budget"


def _score(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def _costs(axes: tuple[Axis, ...], costs: dict[str, Any]) -> list[str]:
    return ["—" if costs.get(x.key) is None else shown(float(costs[x.key]), x.kind) for x in axes]


def _row(search: Search, trial: Trial) -> dict[str, Any]:
    return {
        "name": str(trial.candidate), "status": trial.status, "steps": trial.steps, "reason": trial.reason,
        "score": _score(trial.score if trial.scores else None), "test": _score(trial.test),
        "costs": _costs(search.budget.axes, trial.costs), "best": trial is search.best,
    }  # fmt: skip


def _levers(found: Found) -> list[dict[str, Any]]:
    """What was found, beside it without each lever, and full tuning: on the test rows."""
    words = {"prune": "not pruned", "skip": "no block skipped", "tune": "head alone tuned"}
    rows = [("found", found.best), *((words[k], t) for k, t in found.without.items())]
    rows += [("full tuning", found.full)] if found.full is not None else []
    best = found.best.test
    fits = {True: "yes", False: "no", None: "—"}
    return [
        {
            "what": what, "name": str(t.candidate), "test": _score(t.test),
            "difference": "" if t is found.best or t.test is None or best is None else f"{100 * (t.test - best):+.1f}",
            "costs": _costs(found.budget.axes, t.costs), "fits": fits[found.budget.kept(t.costs)],
        }
        for what, t in rows
    ]  # fmt: skip


def frontier(search: Search) -> bytes:
    """Scores of the trials against each budgeted cost; candidates that were only counted as ticks."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes = search.budget.axes
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure = new_figure(height=3.4 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    tried = [t for t in search.done if t.scores]
    low = min((100 * t.score for t in tried), default=0.0)
    looks = _looks(search)
    for i, (plot, axis) in enumerate(zip(grid.flat, axes, strict=False)):
        tidy(plot, axis.name, "validation score (%)" if i % columns == 0 else "")
        points = [(float(t.costs[axis.key]), 100 * t.score, t) for t in tried if t.costs.get(axis.key) is not None]
        for x, y, t in points:
            (colour, marker), whole, best = looks[t.candidate.tune], t.status == "whole", t is search.best
            plot.plot(x, y, marker, color=colour, markersize=11 if best else 7, zorder=4 if best else 3,
                      markerfacecolor=colour if whole else "none", markeredgewidth=1.0)  # fmt: skip
        counted = [float(p[axis.key]) for c in search.fitting
                   if (p := search.prices(c)) is not None and p.get(axis.key) is not None]  # fmt: skip
        if counted:
            plot.plot(counted, [low - 2] * len(counted), "|", color=FAINT, markersize=8)
        front = _front([(x, y) for x, y, t in points if t.status == "whole"])
        if front:
            plot.step([x for x, _ in front], [y for _, y in front], where="post", color=FAINT, linewidth=1.4, zorder=1)
        most = search.budget.most[axis.name]
        plot.axvline(most, color=INK, linewidth=1, linestyle="--")
        plot.margins(x=0.12, y=0.12)
        plot.autoscale_view()
        plot.set_xlim(right=max(plot.get_xlim()[1], 1.05 * most))
        plot.axvspan(most, plot.get_xlim()[1], color=FAINT, alpha=0.2, linewidth=0)
        plot.xaxis.set_major_locator(MaxNLocator(4))
        plot.xaxis.set_major_formatter(lambda value, _, kind=axis.kind: shown(value, kind) if value > 0 else "0")
    for plot in grid.flat[len(axes) :]:
        plot.remove()
    used = dict.fromkeys(t.candidate.tune for t in tried)
    marks = [Line2D([], [], linestyle="", color=looks[tune][0], marker=looks[tune][1], label=tune) for tune in used]
    figure.legend(handles=marks, loc="outside lower center", ncols=max(1, len(marks)), frameon=False, labelcolor=INK,
                  fontsize=9)  # fmt: skip
    return png(figure)


def _looks(search: Search) -> dict[str, tuple[str, str]]:
    """Colour and marker of each way to tune, those that were tried first."""
    tunes = dict.fromkeys([*(t.candidate.tune for t in search.done), *search.space.tunes])
    return {tune: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, tune in enumerate(tunes)}


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def course(search: Search) -> bytes:
    """Validation score of each trial over its rungs; in the colours of the frontier."""
    figure = new_figure(height=3.8)
    plot = figure.subplots()
    tidy(plot, "training step", "validation score (%)")
    looks, drawn = _looks(search), Counter[str]()
    for t in (t for t in sorted(search.done, key=lambda t: (t.status != "whole", -t.score)) if t.scores):
        steps, whole = sorted(t.scores), t.status == "whole"
        colour, marker = looks[t.candidate.tune]
        plot.plot(steps, [100 * t.scores[s] for s in steps], marker, label=str(t.candidate) if whole else None,
                  linestyle=("-", "--", ":", "-.")[drawn[t.candidate.tune] % 4], markersize=5 if whole else 4,
                  zorder=3 if whole else 1, color=colour if whole else FAINT,
                  linewidth=2.4 if t is search.best else 1.3)  # fmt: skip
        drawn[t.candidate.tune] += whole
    plot.set_xticks(search.rungs)
    plot.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, labelcolor=INK, fontsize=8.5)
    return png(figure)
