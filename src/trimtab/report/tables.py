"""The table of a report: its rows, and its forms for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from trimtab.report.runs import COSTS, REFERENCE, STEPS, Cost, RunRecord, Section, group_runs, known

if TYPE_CHECKING:
    from rich.table import Table

DASH = "—"


@dataclass(frozen=True)
class Row:
    """One method's line in the table: its name and the text of the cells after it."""

    variant: str
    cells: tuple[str, ...]
    best: bool


def summary_table(runs: Sequence[RunRecord]) -> Table:
    """Lay the runs out as a table for the terminal.

    Args:
        runs: Finished runs; several names become blocks of one table, each under a line with its name.

    Returns:
        A table with the same rows as the HTML page.
    """
    from rich.table import Table
    from rich.text import Text

    sections = group_runs(runs)
    single = len(sections) == 1
    table = Table(title=Text(sections[0].name) if single else None)
    shown = measured(sections)
    for index, title in enumerate(column_titles(sections, shown)):
        table.add_column(Text(title), justify="left" if index == 0 else "right")
    for section in sections:
        if not single:
            table.add_section()
            table.add_row(Text(section.name, style="bold italic"), Text(section.metric_title, style="italic"))
        for row in table_rows(section, shown, compared(sections)):
            score, *costs = row.cells
            table.add_row(Text(row.variant), Text(score, style="bold" if row.best else ""), *map(Text, costs))
    return table


def markdown_table(runs: Sequence[RunRecord]) -> str:
    """Lay the runs out as Markdown tables.

    Args:
        runs: Finished runs; if they have several names, each name becomes a heading with its own table.

    Returns:
        Markdown with the same rows as the HTML page, ending in a newline.
    """
    sections = group_runs(runs)
    blocks = []
    for section in sections:
        shown = measured([section])
        titles = column_titles([section], shown)
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
        for row in table_rows(section, shown, compared([section])):
            score, *costs = row.cells
            lines.append([row.variant, f"**{score}**" if row.best else score, *costs])
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        if len(sections) > 1:
            blocks.append(f"### {section.name}")
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def measured(sections: Sequence[Section]) -> tuple[Cost, ...]:
    """Return the columns of costs: those that some run of the sections measured; none of them in many a sweep. Steps
    are left out where all that was trained took as many."""
    runs = [run for section in sections for run in section.runs]
    told = {cost: known(run.cost(cost.key) for run in runs) for cost in COSTS}
    same = all(len({run.cost(STEPS) for run in section.runs} - {None, 0}) <= 1 for section in sections)
    return tuple(cost for cost, values in told.items() if values and not (same and cost.key == STEPS))


def compared(sections: Sequence[Section]) -> bool:
    """Whether some method is compared with full tuning on the same test rows."""
    return any(section.are_paired(variant) for section in sections for variant in section.methods)


def column_titles(sections: Sequence[Section], shown: Sequence[Cost]) -> list[str]:
    """Return the table's header, which names the primary metric if the table is one section's."""
    score = sections[0].metric_title if len(sections) == 1 else "primary metric"
    beside = [f"beside {REFERENCE}"] if compared(sections) else []
    return ["method", score, *beside, *(cost.title for cost in shown)]


def table_rows(section: Section, shown: Sequence[Cost], beside: bool = False) -> list[Row]:
    """Return the rows that every form of the table shows; the highest mean score is marked.

    Args:
        section: the runs.
        shown: columns of costs.
        beside: show how far each score is from full tuning's, on the same test rows.
    """
    rows = []
    for variant, runs in section.methods.items():
        scores = section.scores(variant)
        cells = [_score_cell(scores, section.is_fraction, section.interval(variant))]
        if beside:
            cells.append(_beside_cell(section, variant))
        for cost in shown:
            values = section.costs(variant, cost.key)
            text = amount(fmean(values), cost.units, spread(values)) if values else DASH
            cells.append(text + _relative(runs, cost.key))
        rows.append(Row(variant, tuple(cells), best=bool(scores) and fmean(scores) == section.best))
    return rows


def amount(mean: float, units: Sequence[str], deviation: float = 0.0) -> str:
    """Write an amount to three digits in the unit that suits it, with its deviation over seeds if any.

    Args:
        mean: The amount.
        units: The unit and its multiples by a thousand, in order; none for whole numbers that are written out.
        deviation: The standard deviation, written as finely as the mean.

    Returns:
        Text such as ``131 K`` or ``3.14 ± 0.04 ms``.
    """
    if not units:
        return f"{mean:,.0f}" + (f" ± {deviation:,.0f}" if deviation else "")
    value, unit, factor = in_unit(mean, units)
    whole = factor == 1 and value == int(value) and not deviation
    decimals = 0 if whole else _decimals(value, 3)
    text = f"{value:,.{decimals}f}" + (f" ± {deviation / factor:,.{decimals}f}" if deviation else "")
    return f"{text} {unit}".rstrip()


def in_unit(value: float, units: Sequence[str]) -> tuple[float, str, int]:
    """Express a value in the unit that suits it: rounded to three digits, with the unit and its factor."""
    value = float(f"{value:.3g}")  # rounded first, so that 999,900 becomes 1 M and not 1000 K
    power = min(int(math.log10(abs(value)) // 3), len(units) - 1) if abs(value) >= 1 else 0
    return value / 1000**power, units[power], 1000**power


def digits(value: float, significant: int = 3) -> str:
    """Write a number to a few significant digits, without an exponent."""
    return f"{value:,.{_decimals(value, significant)}f}"


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation, which is 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def _decimals(value: float, significant: int) -> int:
    return max(0, significant - 1 - math.floor(math.log10(abs(value)))) if value else 0


def _beside_cell(section: Section, variant: str) -> str:
    if variant == REFERENCE:
        return ""
    found = section.beside(variant)
    if found is None:
        return DASH
    decimals = 1 if section.is_fraction else _decimals(max(map(abs, found)), 3)
    gap, low, high = (f"{value:+,.{decimals}f}" for value in found)
    return f"{gap} ({low} to {high})"


def _score_cell(scores: Sequence[float], is_fraction: bool, interval: tuple[float, float] | None) -> str:
    if not scores:
        return DASH
    mean = fmean(scores)
    # A tenth of a percent is as fine as a test set of a thousand samples can resolve.
    decimals = 1 if is_fraction else _decimals(mean, 3)
    text = f"{mean:,.{decimals}f}"
    if len(scores) > 1:
        return f"{text} ± {spread(scores):,.{decimals}f} ({len(scores)} seeds)"
    return f"{text} ({interval[0]:,.{decimals}f} to {interval[1]:,.{decimals}f})" if interval else text


def _relative(runs: Sequence[RunRecord], key: str) -> str:
    """Say how a cost compares with the whole: trained with all parameters, MACs and weights with the dense model's."""
    whole_key = {"trainable_params": "params", "macs": "dense_macs", "nonzero_params": "dense_params"}.get(key)
    pairs = [(run.cost(key), run.cost(whole_key)) for run in runs] if whole_key else []
    ratios = [part / whole for part, whole in pairs if part is not None and whole]
    if not ratios:
        return ""
    ratio = fmean(ratios)
    if key == "trainable_params":
        return f" ({digits(100 * ratio, 2)} %)" if ratio else ""
    return f" ({ratio:.2f}× dense)" if abs(ratio - 1) >= 0.005 else ""
