"""What every figure of the report shares: colours, an empty figure, quiet axes, the PNG file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow (too pale on white), then three of Paul Tol's.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#999933",
    "#332288",
)
MARKERS = "os^DvPX"
INK, FAINT = "#333333", "#B8B8B8"
DPI = 160


@dataclass(frozen=True)
class Style:
    """How one method looks in every figure."""

    colour: str
    marker: str


def assign_styles(variants: Iterable[str]) -> dict[str, Style]:
    """Give each method its colour and marker; the pair repeats only after 70 methods."""
    return {
        variant: Style(PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)])
        for index, variant in enumerate(variants)
    }


def new_figure(height: float) -> Figure:
    """An empty figure 10 inches wide, its height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def tidy(axes: Axes, x_title: str, y_title: str) -> None:
    """Give axes their titles, and take away what draws the eye from the data."""
    axes.set_xlabel(short(x_title), color=INK)
    axes.set_ylabel(short(y_title), color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)


def short(text: str) -> str:
    """Shorten a label and keep matplotlib from reading it as mathematics."""
    return (text if len(text) <= 32 else f"{text[:31]}…").replace("$", r"\$")
