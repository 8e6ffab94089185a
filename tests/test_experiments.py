"""The page of the papers' experiments is made of the kept figures and of the recipes that are there."""

from __future__ import annotations

import json

from published import experiments
from trimtab.experiments import recipe

KEPT = json.loads(experiments.FIGURES.read_text())


def test_the_page_is_what_the_command_writes():
    assert experiments.PAGE.read_text() == experiments.page(), "run `python -m published.experiments`"


def test_every_recipe_is_on_the_page_and_every_figure_has_a_known_source():
    named = {name for table in KEPT["tables"] for row in table["rows"] for name in row["figures"] if name}
    there = {n.removeprefix("published/") for n in recipe.names() if n.startswith("published/")}
    assert {n for n in there if not n.endswith("_find")} == named
    for table in KEPT["tables"]:
        known = any(v != "NF" for row in table["rows"] for f in row["figures"].values() for v in f.values())
        assert (table["source"] in KEPT["sources"]) == known
        for row in table["rows"]:
            for name in row["figures"]:
                assert "why" in row or row["variant"] in experiments.variants(name) or "multiflow" in name


def test_a_measured_number_stands_where_the_data_were_there():
    table = next(t for t in KEPT["tables"] if t["table"].startswith("ViLT"))
    lines = list(experiments.rows(table, {"das_vilt_nlvr2/full": "76.0"}))
    assert [line for line in lines if line.endswith("| NLVR2 test-P 76.13 [R:APT] | 76.0 |")]
    assert sum("needs the data" in line for line in lines) == len(lines) - 1
