"""Tables in the docs are what the studies' commands print from the files of results that lie beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

import pages

TOLD = "| | a |\n|---|---:|\n| x | 1 |\n| y | 2 |\n\n| | b |\n|---|---:|\n| x | 3 |\n"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.stem)
def test_tables_of_a_page_are_what_its_commands_print(page: Path) -> None:
    assert pages.drawn(page, pictures=False) == page.read_text(encoding="utf-8"), "python studies/pages.py mends it"


def test_the_pages_of_studies_are_marked() -> None:
    assert {page.stem for page in pages.pages()} >= {"flickr8k", "prune", "pretraining"}


def test_a_table_keeps_its_rows_and_takes_named_ones_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "printed", lambda command: TOLD)
    page = tmp_path / "page.md"
    page.write_text("<!-- python studies/x.py --tables -->\n| | b |\n|---|---:|\n| x | 9 |\n\ntext\n"
                    "<!-- python studies/x.py --tables -->\n\n| | a |\n|---|---:|\n| y |\n")  # fmt: skip
    assert pages.drawn(page, pictures=False) == (
        "<!-- python studies/x.py --tables -->\n| | b |\n|---|---:|\n| x | 3 |\n\ntext\n"
        "<!-- python studies/x.py --tables -->\n\n| | a |\n|---|---:|\n| y | 2 |\n"
    )


def test_a_table_keeps_its_columns_and_its_own_names_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "| | a | b | c |\n|---|---:|---:|---|\n| x | 1 | 2 | 3 |\n| y | 4 | 5 | 6 |\n"
    monkeypatch.setattr(pages, "printed", lambda command: told)
    page = tmp_path / "page.md"
    page.write_text("<!-- python studies/x.py --summary -->\n| | c | a |\n|---|\n| **Y** <!-- y --> | old |\n| x |\n")
    text = pages.drawn(page, pictures=False)
    assert text.splitlines()[1:] == ["| | c | a |", "|---|---|---:|", "| **Y** <!-- y --> | 6 | 4 |", "| x | 3 | 1 |"]
    page.write_text(text)
    assert pages.drawn(page, pictures=False) == text


@pytest.mark.parametrize(("table", "told"), [("| | c |\n|---|---:|\n| x |", "no table with the head"),
                                             ("| | a |\n|---|---:|\n| z |", "no row 'z': it has x, y")])  # fmt: skip
def test_a_table_that_is_not_printed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, told: str
) -> None:
    monkeypatch.setattr(pages, "printed", lambda command: TOLD)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- python studies/x.py --tables -->\n{table}\n")
    with pytest.raises(pages.PageError, match=told):
        pages.drawn(page, pictures=False)
