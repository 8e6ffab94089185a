"""Which method works on which backbone, found by attaching each method to a tiny example of each family.

    example's model --assume, attach--> it works on all towers, on some of them, or on none
                             |
                             +-> ValueError: its text is the reason in the table, and what a user would read

There is no list of what is supported: a cell is what attaching does. `tests/test_every_pair.py` trains, saves and loads
what the table promises.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.backbones.examples import EXAMPLES
from trimtab.methods import METHODS, Method
from trimtab.methods.stack import refusal
from trimtab.registry import unknown

# Settings for examples of two or three blocks and channels by the dozen; a method takes those that it has.
SMALL = {"skip": 1, "blocks": 1, "prompts": 2}
LEVERS = ("prune", "skip", "tune")


@dataclass(frozen=True)
class Cell:
    """What a method does on a backbone.

    Attributes:
        towers: those on which it works, together.
        reasons: tower -> why it does not work on that one; the tower "" stands for the whole model.
    """

    towers: tuple[str, ...]
    reasons: dict[str, str]


def small_settings(name: str) -> dict[str, Any]:
    """A method's settings for an example."""
    fields = METHODS[name].Settings.__dataclass_fields__
    return {k: v for k, v in SMALL.items() if k in fields}


def only(anatomy: Anatomy, towers: Sequence[str]) -> Anatomy:
    """The anatomy without its other towers, as a method's setting `towers` does it for those that have one."""
    return replace(anatomy, towers=tuple(t for t in anatomy.towers if t.name in towers))


def apply(name: str, model: nn.Module, anatomy: Anatomy) -> Method:
    """Attach a method, frozen model first, as it would be before data were seen.

    Raises:
        ValueError: if the method does not apply to these towers.
    """
    method = METHODS[name](**small_settings(name))
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    return method


def cell(model: nn.Module, anatomy: Anatomy, name: str) -> Cell:
    """Attach a method to each tower in turn, each time on a copy of the model."""
    reasons: dict[str, str] = {}
    for tower in anatomy.towers:
        # A pruner's masks keep everything as long as no data were seen: it changes nothing, and needs no copy.
        copied = model if METHODS[name].lever == "prune" else copy.deepcopy(model).requires_grad_(False)
        try:
            apply(name, copied, only(anatomy, [tower.name]))
        except ValueError as error:
            reasons[tower.name] = str(error)
    return Cell(tuple(t.name for t in anatomy.towers if t.name not in reasons), reasons)


def matching(kind: str, pattern: str | None, names: Sequence[str]) -> list[str]:
    """Names that a pattern such as `xvlm*` fits, all without one; ValueError if there is none."""
    found = [n for n in names if pattern is None or fnmatchcase(n, pattern)]
    if not found:
        raise ValueError(unknown(kind, str(pattern), names))
    return found


def find(backbone: str | None = None, method: str | None = None) -> dict[tuple[str, str], Cell]:
    """The cells of all backbones and methods that two patterns fit, by their names, with a progress bar.

    Raises:
        ValueError: if a pattern fits no name.
    """
    from rich.console import Console
    from rich.progress import track

    backbones = matching("backbone", backbone, list(EXAMPLES))
    methods = matching("method", method, list(METHODS))
    console = Console(stderr=True)  # the table may go into a file
    cells = compute(backbones, methods)
    total = len(backbones) * len(methods)
    bar = track(cells, "attaching", total, console=console, transient=True, disable=not console.is_terminal)
    return {(b, m): found for b, m, found in bar}


def compute(backbones: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, Cell]]:
    """One cell after another: backbone, method, what was found."""
    for backbone in backbones:
        try:
            model = EXAMPLES[backbone].model()
        except ImportError as error:
            yield from ((backbone, name, Cell((), {"": str(error)})) for name in methods)
            continue
        anatomy = Anatomy.of(model)
        for name in methods:
            yield backbone, name, cell(model, anatomy, name)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One lever's part of the matrix.

    Attributes:
        lever: its name.
        columns: methods that have the same cells, each group once.
        rows: backbone -> a cell's text for each group, with the numbers of its notes.
    """

    lever: str
    columns: list[list[str]]
    rows: dict[str, list[str]]


def tables(cells: dict[tuple[str, str], Cell]) -> tuple[list[Table], list[str]]:
    """The tables of all levers and the notes that they refer to, from cells by (backbone, method)."""
    notes: dict[str, int] = {}
    backbones = list(dict.fromkeys(b for b, _ in cells))
    found = []
    for lever in LEVERS:
        texts: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(m for _, m in cells if METHODS[m].lever == lever):
            texts[name] = tuple(_text(cells[b, name], name, notes) for b in backbones)
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, column in texts.items():
            groups.setdefault(column, []).append(name)
        if groups:
            rows = {b: [column[i] for column in groups] for i, b in enumerate(backbones)}
            found.append(Table(lever, list(groups.values()), rows))
    return found, list(notes)


def _text(cell: Cell, name: str, notes: dict[str, int]) -> str:
    """`yes`, `no [1]`, or `not vision [1]`; a note leaves out method and tower, for cells to share it."""
    marks: dict[str, list[str]] = {}
    for tower, reason in cell.reasons.items():
        reason = reason.removeprefix(f"{name}: ").removeprefix(f"{name} ")
        reason = reason.replace(f"tower {tower!r}", "the tower").replace(f"in ({tower!r},)", "in the tower")
        number = notes.setdefault(reason, len(notes) + 1)
        marks.setdefault(f"[{number}]", []).append(tower)
    if not marks:
        return "yes"
    if not cell.towers:
        return "no " + " ".join(marks)
    return "not " + ", ".join(f"{', '.join(towers)} {mark}" for mark, towers in marks.items())


def markdown(cells: dict[tuple[str, str], Cell]) -> str:
    """The matrix as Markdown: a table a lever, and the notes."""
    parts, notes = tables(cells)
    out = []
    for part in parts:
        heads = ["<br>".join(names) for names in part.columns]
        out += [f"## {part.lever}", "", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        out += [f"| {_label(b)} | " + " | ".join(texts) + " |" for b, texts in part.rows.items()]
        out.append("")
    if notes:
        out += ["## Why not", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join(out)


def _label(backbone: str) -> str:
    return f"{backbone} ({EXAMPLES[backbone].title})"


def show(cells: dict[tuple[str, str], Cell], as_markdown: bool = False) -> None:
    """Print the matrix, for the terminal or as Markdown."""
    if as_markdown:
        print(markdown(cells), end="")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    parts, notes = tables(cells)
    for part in parts:
        table = RichTable(title=part.lever, title_justify="left")
        table.add_column("", no_wrap=True)
        for names in part.columns:
            table.add_column("\n".join(names))
        for backbone, texts in part.rows.items():
            table.add_row(backbone, *(Text(t) for t in texts))
        console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(Text(f"[{i}] {note}"))


# --- levers together --------------------------------------------------------------------------------------------------


def together() -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Which methods of two levers go together, in either order, and why others do not.

    Columns are groups of methods of the later lever, rows of the earlier one; methods with the same cells share a row
    or a column. Pruners differ in nothing here, nor do searches with the same facts.

    Returns:
        Heads of the columns, rows by their label, notes.
    """
    anatomy = Anatomy.of(EXAMPLES["vilt"].model())
    made: dict[str, Method] = {}
    for name, cls in METHODS.items():
        if cls.lever == "skip":
            made[f"{name} (adapters)"] = METHODS.make(name)
            made[f"{name} (adapters: none)"] = METHODS.make(name, adapters="none")
        else:
            made[name] = METHODS.make(name)
    notes: dict[str, int] = {}
    cells: dict[str, tuple[str, ...]] = {}
    for label, first in made.items():
        cells[label] = tuple(_together(first, second, anatomy, notes) for second in made.values())
    rows = _grouped(cells)
    columns = _grouped(
        {label: tuple(column) for label, column in zip(made, zip(*cells.values(), strict=True), strict=True)}
    )
    picked = [list(made).index(labels[0]) for labels in columns]
    heads = ["<br>".join(labels) for labels in columns]
    return heads, {", ".join(labels): [cells[labels[0]][i] for i in picked] for labels in rows}, list(notes)


def _together(first: Method, second: Method, anatomy: Anatomy, notes: dict[str, int]) -> str:
    why = refusal([first], second, anatomy)
    if not why:
        return "yes"
    why = why.removeprefix(f"{second.name}: ").replace(first.name, "the first")
    return f"no [{notes.setdefault(why, len(notes) + 1)}]"


def _grouped(cells: dict[str, tuple[str, ...]]) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, row in cells.items():
        groups.setdefault(row, []).append(label)
    return list(groups.values())


def show_together(as_markdown: bool = False) -> None:
    """Print which methods go together, for the terminal or as Markdown."""
    if as_markdown:
        print("\n" + combinations(), end="")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    heads, rows, notes = together()
    table = RichTable("", title="levers together: the row's method first, then the column's", title_justify="left")
    for head in heads:
        table.add_column(head.replace("<br>", "\n"))
    for label, row in rows.items():
        table.add_row(label.replace(", ", "\n"), *(Text(cell) for cell in row), end_section=True)
    console.print(table)
    for i, note in enumerate(notes, 1):
        console.print(Text(f"[{i}] {note}"))


def combinations() -> str:
    """The page of combinations as Markdown."""
    heads, rows, notes = together()
    out = ["## Levers together", "", "The row's method first, then the column's.", ""]
    out += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    out += [f"| {label} | " + " | ".join(row) + " |" for label, row in rows.items()]
    out += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join(out)
