"""Draw the pages again: every table and picture that a page marks with the command that makes it.

    python studies/pages.py [docs/compose.md ...] [--check]

A page names the command above the table, or above the picture that the command draws, as a comment:

    <!-- python studies/vse.py --tables -->
    <!-- python studies/protocol.py compose/vqa --plot docs/images/compose-vqa.png -->

A table keeps its rows and columns and their order: a page may leave some out, and a line `| unipt |` with nothing but
the name takes that row in. `| heads alone <!-- linear-probe --> |` shows a row under another name. Rows that are
printed and not shown are named. `--check` writes nothing and fails where a page is not
what its commands print; pictures are left out of it. Only commands that read files of results are carried out: those
that measure (`one_side.py`) are not.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALIAS = re.compile(r".*<!-- (.+) -->")
MARK = re.compile(r"<!-- python (studies/\S+ .*(?:--tables|--summary|--plot|\.jsonl).*) -->")


class PageError(ValueError):
    """A page and its command do not fit: says the page, the command and the row or table."""


@cache
def printed(command: str) -> str:
    """What a command prints.

    Raises:
        PageError: if it fails.
    """
    told = subprocess.run([sys.executable, "-W", "ignore", *shlex.split(command)], cwd=ROOT, check=False, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if told.returncode:
        raise PageError(f"python {command} failed: {told.stderr.strip()}")
    return told.stdout


def tables(lines: list[str]) -> list[list[str]]:
    """The tables in a text, each as its lines."""
    return [list(run) for is_table, run in groupby(lines, lambda line: line.startswith("|")) if is_table]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def name(row: str) -> str:
    first = row.split("|")[1].strip()
    alias = ALIAS.fullmatch(first)
    return alias[1] if alias else first


def filled(shown: list[str], command: str, page: str) -> tuple[list[str], list[str]]:
    """A page's table with the rows that its command prints, and the names of printed rows that it does not show.

    Of the tables that are printed it is one with all columns of the page's, with no others if there is such a one, and
    the one that shares most lines with the page's.
    """
    head = cells(shown[0])
    found = [t for t in tables(printed(command).splitlines()) if set(head) <= set(cells(t[0]))]
    if not found:
        raise PageError(f"{page}: python {command} prints no table with the head {shown[0]}")
    table = max(found, key=lambda t: (cells(t[0]) == head, len(set(t) & set(shown))))
    taken = [cells(table[0]).index(title) for title in head]
    rows = {name(row): [cells(row)[i] for i in taken[1:]] for row in table[2:]}
    if missing := [name(row) for row in shown[2:] if name(row) not in rows]:
        raise PageError(f"{page}: python {command} prints no row {missing[0]!r}: it has {', '.join(rows)}")
    lines = [[row.split("|")[1].strip(), *rows[name(row)]] for row in shown[2:]]
    rule = [cells(table[1])[i] for i in taken]
    out = [
        shown[0],
        f"|{'|'.join(rule)}|",
        *("|" + "|".join(f" {c} " if c else " " for c in line) + "|" for line in lines),
    ]
    return out, [row for row in rows if row not in {name(line) for line in shown[2:]}]


def drawn(page: Path, pictures: bool) -> str:
    """The page's text with its tables as they are printed today."""
    lines, out, number = page.read_text(encoding="utf-8").splitlines(), [], 0
    while number < len(lines):
        out.append(lines[number])
        mark, number = MARK.fullmatch(lines[number]), number + 1
        if mark and "--plot" in mark[1]:
            if pictures:
                printed(mark[1])
        elif mark:
            while number < len(lines) and not lines[number].startswith("|"):
                out.append(lines[number])
                number += 1
            if number == len(lines):
                raise PageError(f"{page.name}: no table follows the mark of python {mark[1]}: write its head and a row")
            shown = tables(lines[number:])[0]
            table, left = filled(shown, mark[1], page.name)
            out += table
            number += len(shown)
            if left and pictures:
                print(f"{page.name}: python {mark[1]}: not shown: {', '.join(left)}")
    return "\n".join(out) + "\n"


def pages() -> list[Path]:
    """Those with a mark."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [p for p in every if any(MARK.fullmatch(line) for line in p.read_text(encoding="utf-8").splitlines())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", type=Path, nargs="*", help="all with a mark, if left out")
    parser.add_argument("--check", action="store_true", help="fail where a table is not what its command prints")
    options = parser.parse_args()
    stale = []
    for page in options.pages or pages():
        try:
            text = drawn(page, not options.check)
        except (PageError, OSError) as error:
            parser.error(str(error))
        if text == page.read_text(encoding="utf-8"):
            continue
        stale.append(page.name)
        if not options.check:
            page.write_text(text, encoding="utf-8")
    print(f"{'not as printed' if options.check else 'drawn again'}: {', '.join(stale) or 'none'}")
    sys.exit(bool(options.check and stale))


if __name__ == "__main__":
    main()
