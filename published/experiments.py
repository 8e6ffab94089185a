"""The papers' experiments: paper table -> recipe -> command -> published figure with its source -> ours.

    python -m published.experiments [--out docs/experiments.md]

The page is made of `published/experiments.json` (figures as they were read, with their sources), of the recipes in
`recipes/published` (variants, and the command in the head of each) and of `published/results.json` (what was counted).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.experiments import recipe

HERE = Path(__file__).parent
FIGURES, COUNTED = HERE / "experiments.json", HERE / "results.json"
PAGE = HERE.parent / "docs" / "experiments.md"
HEAD = """# The papers' experiments

Every experiment of the three papers whose figures or settings are known, as a recipe. This page is written by

```
python -m published.experiments
```

from `published/experiments.json`, where a number measured on the data is noted under `measured`, and from the recipes
of `recipes/published`. "Here" says "needs the data" where nothing was measured: the sets and the authors' checkpoints
are not part of trimtab. A recipe's head says what deviates from the published setting, and how its costs are printed.
Where a recipe scores another split than the published one (VQA v2: the server keeps the answers of test-dev), its head
says so, too.

Sources of the figures: {sources}. The papers themselves were not at hand.
"""


@cache
def command(name: str) -> str:
    """The command in the head of a recipe, without its choice of variants.

    Raises:
        ValueError: if the head has none.
    """
    lines = recipe.find(f"published/{name}").read_text().splitlines()
    if not lines[0].startswith(f"# trimtab run published/{name} "):
        raise ValueError(f"recipes/published/{name}.yaml: expected its command in the first line, found {lines[0]!r}")
    words = lines[0].removeprefix("# ")
    for line in lines[1:]:
        if not words.endswith("\\"):
            break
        words = words.removesuffix("\\").rstrip() + " " + line.removeprefix("#").strip()
    return re.sub(r"\s*'variants=.*?'|\s+#.*$", "", words)


@cache
def variants(name: str) -> frozenset[str]:
    return frozenset(r.variant for r in recipe.read(f"published/{name}"))


def rows(table: dict[str, Any], measured: dict[str, str]) -> Iterator[str]:
    """A line for every row of a paper's table and every recipe that stands for it."""
    for row in table["rows"]:
        for name, figures in row["figures"].items():
            told = ", ".join(f"{what} {value}".strip() for what, value in figures.items() if value != "NF") or "NF"
            if told != "NF":
                told += f" [{table['source']}]"
            there = name and row["variant"] in variants(name)
            run = f"`{command(name)} 'variants=[{row['variant']}]'`" if there else "-"
            here = measured.get(f"{name}/{row['variant']}", "needs the data") if there else "no recipe"
            if "why" in row:
                here += f": {row['why']}"
            elif not there:
                here += ": the head of the file says why"
            cells = (table["table"], row["row"], row["parameters"], f"`{name}`" if name else "-", run, told, here)
            yield f"| {' | '.join(cells)} |"


def counted(entry: dict[str, Any], found: dict[str, Any]) -> str:
    """A figure that was counted without data: a change of multiply-adds, or millions of parameters."""
    if "change" in entry:
        before, after = (found[key]["macs"] for key in entry["change"])
        return f"{100 * (before - after) / before:.2f} % less"
    key, part = entry["millions"]
    value = found[key][part]
    return f"{(sum(value.values()) if isinstance(value, dict) else value) / 1e6:.2f}M"


def page() -> str:
    """The page as Markdown."""
    kept, found = json.loads(FIGURES.read_text()), json.loads(COUNTED.read_text())
    sources = "; ".join(f"[{tag}] {text}" if tag != "NF" else f"NF {text}" for tag, text in kept["sources"].items())
    out = [HEAD.format(sources=sources)]
    for paper in dict.fromkeys(table["paper"] for table in kept["tables"]):
        out += [f"## {paper}", ""]
        out += [f"{kept['notes'][paper]}\n"] if paper in kept["notes"] else []
        if own := [entry for entry in kept["counted"] if entry["paper"] == paper]:
            out += ["| counted without data or weights | published | here |", "| --- | ---: | ---: |"]
            out += [f"| {e['what']} | {e['published']} [{e['source']}] | {counted(e, found)} |" for e in own]
            out += [""]
        out += ["| table | row | parameters | recipe | command | published | here |", "| --- " * 7 + "|"]
        for table in kept["tables"]:
            if table["paper"] == paper:
                out += rows(table, kept["measured"])
        out += [""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    options = parser.parse_args()
    options.out.write_text(page())


if __name__ == "__main__":
    main()
