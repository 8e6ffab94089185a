"""The figures of a section: scores against costs, and training losses, as PNG bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trimtab.report.canvas import DPI, FAINT, INK, Style, new_figure, png, short, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# Where a label may stand, seen from its point: beside, above or below, and then at the corners.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True)
class Point:
    """One method's mean cost (x) and score (y), with their spreads over seeds."""

    label: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Panel:
    """One cost to draw scores against; ``log`` asks for a logarithmic axis whatever the values."""

    title: str
    points: list[Point]
    tick_text: Callable[[float], str]
    log: bool = False


def pareto_figure(panels: Sequence[Panel], score_title: str, styles: dict[str, Style]) -> bytes:
    """Draw the score against each cost, two panels a row, with the Pareto front of each.

    Args:
        panels: What to draw, each with at least one point.
        score_title: Label of the vertical axes; a higher score is better.
        styles: Look of each method.

    Returns:
        A PNG file's content.
    """
    figure = new_figure(height=3.4 * ((len(panels) + 1) // 2))
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, score_title, styles)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    # Labels are placed by the pixel, so the layout has to be final before the first of them.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _place_labels(axes, panel.points, styles)
    return png(figure)


def curve_figure(curves: dict[str, list[dict[float, float]]], styles: dict[str, Style],
                 title: str = "training loss", log: bool = True) -> bytes:  # fmt: skip
    """Draw a curve of each method, averaged over its seeds and, if it has many points, smoothed.

    Args:
        curves: For each method and seed, the loss or the score at each step where it is known.
        styles: Look of each method.
        title: What is drawn.
        log: Take a logarithmic axis if the highest is 30 times the lowest.

    Returns:
        A PNG file's content.
    """
    figure = new_figure(height=3.6)
    axes = figure.subplots()
    lines, highest, lowest = {}, 0.0, float("inf")
    for variant, per_seed in curves.items():
        steps = sorted(set().union(*per_seed))
        if not steps:
            continue
        losses = [fmean(curve[step] for curve in per_seed if step in curve) for step in steps]
        smooth = _smooth(losses, half=min(50, len(losses) // 30))
        colour = styles[variant].colour
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        (lines[variant],) = axes.plot(steps, smooth, color=colour, linewidth=1.8)
        highest, lowest = max(highest, *smooth), min(lowest, *smooth)
    if log and 0 < 30 * lowest < highest:
        axes.set_yscale("log")
    tidy(axes, "training step", title)
    axes.legend(
        lines.values(),
        [short(variant) for variant in lines],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    return png(figure)


def _draw_panel(axes: Axes, panel: Panel, score_title: str, styles: dict[str, Style]) -> None:
    tidy(axes, panel.title, score_title)
    for point in panel.points:
        style = styles[point.label]
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.x_error or None,
            yerr=point.y_error or None,
            fmt=style.marker,
            color=style.colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.1,
            zorder=3,
        )
    _set_cost_axis(axes, panel)
    axes.margins(y=0.18)
    axes.plot(*_front_line(axes, panel.points), color=FAINT, linewidth=1.4, zorder=1, scalex=False)


def _set_cost_axis(axes: Axes, panel: Panel) -> None:
    """Scale the horizontal axis to its values and write its ticks in human units."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    low = min(point.x - point.x_error for point in panel.points)
    high = max(point.x + point.x_error for point in panel.points)
    least = min((point.x for point in panel.points if point.x > 0), default=0)
    decades = LogLocator(subs=(1,) if high > 100 * least else (1, 2, 5))
    if not least:
        axes.set_xticks([0])
    elif not panel.log and high <= 20 * low:
        pad = 0.1 * (high - low) or 0.1 * high
        axes.set_xlim(low - pad, high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    elif low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.8, high * 1.8)
        axes.xaxis.set_major_locator(decades)
    else:  # a method that costs nothing still has its place, left of the logarithmic part
        axes.set_xscale("symlog", linthresh=least / 2, linscale=0.4)
        axes.set_xlim(-least / 8, high * 1.8)
        ticks = [tick for tick in decades.tick_values(least, high) if least / 2 < tick < 1.8 * high]
        axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: panel.tick_text(value))


def _front_line(axes: Axes, points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return the corners of the Pareto front's steps, with the last level drawn out to the right edge."""
    front = pareto_front(points)
    xs, ys = [front[0].x], [front[0].y]
    for point in front[1:]:
        xs += [point.x, point.x]
        ys += [ys[-1], point.y]
    return [*xs, axes.get_xlim()[1]], [*ys, ys[-1]]


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point beats on both axes, from the cheapest to the dearest."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _place_labels(axes: Axes, points: Sequence[Point], styles: dict[str, Style]) -> None:
    """Write each label where, near its point, it covers least of what is drawn already."""
    from matplotlib.patheffects import withStroke

    canvas: Any = axes.figure.canvas  # of Agg, which measures texts
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [box for point in points for box in _drawn_boxes(axes, point)]
    corners = axes.transData.transform(list(zip(*_front_line(axes, points), strict=True)))
    taken += [_around(start, end, _points(1)) for start, end in pairwise(corners)]
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        colour = _darker(styles[point.label].colour)
        text = axes.text(0, 0, short(point.label), fontsize=8.5, color=colour, ha="center", va="center")
        text.set(path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5)
        size = text.get_window_extent(renderer)
        anchor: Any = axes.transData.transform((point.x, point.y))
        box, distance = _best_spot(anchor, (size.width, size.height), frame, taken)
        taken.append(box)
        text.set(transform=None, position=((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        if distance > _points(14):  # far enough away to need a leader
            edge = (min(max(anchor[0], box.x0), box.x1), min(max(anchor[1], box.y0), box.y1))
            xs, ys = zip(anchor, edge, strict=True)
            axes.plot(xs, ys, color=colour, linewidth=0.6, alpha=0.7, transform=None, zorder=2)


def _points(length: float) -> float:
    """Convert typographic points to pixels."""
    return length * DPI / 72


def _around(start: Sequence[float], end: Sequence[float], margin: float) -> Bbox:
    """Return the box around two corners, in any order."""
    from matplotlib.transforms import Bbox

    (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(start, end, strict=True))
    return Bbox([(x0 - margin, y0 - margin), (x1 + margin, y1 + margin)])


def _drawn_boxes(axes: Axes, point: Point) -> list[Bbox]:
    """Return the pixel boxes of a point's marker and error bars."""
    ends = [
        (point.x, point.y),
        (point.x - point.x_error, point.y),
        (point.x + point.x_error, point.y),
        (point.x, point.y - point.y_error),
        (point.x, point.y + point.y_error),
    ]
    centre, left, right, bottom, top = axes.transData.transform(ends)
    thin = _points(1)
    return [_around(centre, centre, _points(5)), _around(left, right, thin), _around(bottom, top, thin)]


def _darker(colour: str) -> tuple[float, ...]:
    """Darken a colour until small text in it reads well on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.7 * channel for channel in to_rgb(colour))


def _best_spot(
    anchor: Sequence[float], size: tuple[float, float], frame: Bbox, taken: Sequence[Bbox]
) -> tuple[Bbox, float]:
    """Try spots around a point and return the freest, nearer ones first, with its distance."""
    from matplotlib.transforms import Bbox

    def shared(box: Bbox, other: Bbox) -> float:
        common = Bbox.intersection(box, other)
        return common.width * common.height if common else 0.0

    width, height = size
    spots = []
    for distance in map(_points, (7, 11, 16, 24, 34, 46)):
        for dx, dy in DIRECTIONS:
            x, y = anchor[0] + dx * (distance + width / 2), anchor[1] + dy * (distance + height / 2)
            box = Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
            outside = width * height - shared(box, frame)
            spots.append((sum(shared(box, other) for other in taken) + 3 * outside, box, distance))
    # The first of equals wins, and a sliver of overlap is no reason to go further away.
    _, box, distance = min(spots, key=lambda spot: round(spot[0] / (0.05 * width * height)))
    return box, distance


def _smooth(values: Sequence[float], half: int) -> list[float]:
    """Average each value with up to ``half`` neighbours on each side, fewer towards the ends."""
    last = len(values) - 1
    reach = [min(half, index, last - index) for index in range(len(values))]
    return [fmean(values[index - width : index + width + 1]) for index, width in enumerate(reach)]
