"""What the built-in world's kinds of rows hold, counted on 1,000 rows of the training split, as Markdown.

python studies/world_counts.py
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from trimtab.data import pictograms

TEXTS, LABELS = ("captions", "question", "phrase", "statement"), ("answer", "label")


def texts(table: Any) -> list[str]:
    """Every text of a table's rows."""
    name = next((n for n in TEXTS if n in table.column_names), None)
    if name is None:
        return []
    return [t for value in table[name] for t in (value if isinstance(value, list) else [value])]


def main(rows: int = 1000) -> None:
    print("| kind | texts a row | different texts | words a text | labels | the commonest |\n|---|---|---|---|---|---|")
    for kind in pictograms.KINDS:
        table = pictograms.load(kind, "twemoji", "train", rows, progress=False)
        said = texts(table)
        label = next((n for n in LABELS if n in table.column_names), None)
        counts = Counter(table[label]) if label else Counter()
        words = sum(len(t.split()) for t in said) / len(said) if said else 0
        common = f"{counts.most_common(1)[0][0]}, {100 * counts.most_common(1)[0][1] / rows:.0f} %" if counts else "-"
        print(f"| {kind} | {len(said) / rows:.0f} | {len(set(said))} | {words:.1f} | {len(counts) or '-'} | {common} |")


if __name__ == "__main__":
    main()
