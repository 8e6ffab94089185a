"""Tables in the docs are what the studies' commands print from the files of results that lie beside them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!-- python (studies/\S+ .*(?:--tables|\.jsonl.*)) -->")


def tables(lines: list[str]) -> list[list[str]]:
    """The tables in a text, each as its lines."""
    runs = groupby(lines, lambda line: line.startswith("|"))
    return [list(run) for is_table, run in runs if is_table]


def marked() -> dict[str, list[tuple[str, list[str]]]]:
    """By command: each page and the lines of the table that follows the mark."""
    found = defaultdict(list)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if mark := MARK.fullmatch(line):
                found[mark[1]].append((page.name, tables(lines[number:])[0]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(marked()))
def test_a_table_in_the_docs_is_what_its_command_prints(command: str) -> None:
    told = subprocess.run([sys.executable, "-W", "ignore", *shlex.split(command)], cwd=ROOT, check=True, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout  # fmt: skip
    printed = [set(lines) for lines in tables(told.splitlines())]
    for page, table in marked()[command]:  # which may leave rows out
        assert any(set(table) <= lines for lines in printed), (
            f"docs: {page}: python {command} prints no such table: {table}"
        )


def test_the_pages_of_studies_are_marked() -> None:
    assert {page for tables in marked().values() for page, _ in tables} >= {"flickr8k.md", "prune.md"}
