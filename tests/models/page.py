"""The page of what works on which family, from the census."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

HEAD = """# Families

What works on which family of transformers: each lever on a tiny model of the family with random weights, made from its
configuration class, on a batch of two rows of which the second is padded. Written by

```bash
python -m tests.models.census --out docs/families.json --page docs/families.md
```

A lever *works* if all of its checks hold (`tests/models/levers.py`): pruned, half of the weights are zero;
shortened, the model computes as if the block handed its stream on, and is the same when saved and loaded; skipped or
tuned, every trained tensor gets a gradient, rows do not depend on each other, padding changes nothing, a causal model
stays causal, text is written the same with a key-value cache, and what is saved and loaded computes the same. Otherwise
the number of the reason stands there; **error** is an exception that no one meant, **wrong** a check that does not
hold, and where nothing stands before the number trimtab refuses in words of its own.
"""
# Of a group that stands beside: what the words mean is told once.
ASIDE = """# Families that {what}

As [Families](families.md), for the classes of transformers that {what}. Written by

```bash
python -m tests.models.census --group {group} --out docs/families_{group}.json --page docs/families_{group}.md
```
"""
HEADS = {
    "multimodal": HEAD,
    "vision": ASIDE.format(group="vision", what="see alone"),
    "text": ASIDE.format(group="text", what="read alone"),
}
_SIGN = {"refused": "", "traceback": "**error** ", "wrong": "**wrong** "}


def counts(found: dict[str, Any]) -> dict[str, Counter]:
    """How many families get each verdict, by lever."""
    out: dict[str, Counter] = {}
    for entry in found.values():
        for lever, verdict in entry["levers"].items():
            out.setdefault(lever, Counter())[verdict["kind"]] += 1
    return out


def general(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    text = re.sub(r"'[^']*'(, '[^']*')*", "'...'", reason)
    return re.sub(r"\d[\d,.]*", "N", text)


def page(found: dict[str, Any], group: str = "multimodal") -> str:
    """The page of a group of families: counts, a row a family, and the reasons with one example of each."""
    found = dict(sorted(found.items()))  # the page does not depend on the order in which families were measured
    built = {f: e for f, e in found.items() if not e["built"]}
    totals = counts(built)
    levers = list(totals)
    lines = [HEADS[group], "| | works | refused | error | wrong |", "| --- | ---: | ---: | ---: | ---: |"]
    for lever in levers:
        c = totals[lever]
        lines.append(f"| {lever} | {c['works']} of {c.total()} | {c['refused']} | {c['traceback']} | {c['wrong']} |")
    notes: dict[tuple[str, str], int] = {}
    examples: list[str] = []
    rows = []
    for family, entry in built.items():
        cells = []
        for lever in levers:
            verdict = entry["levers"][lever]
            if verdict["kind"] == "works":
                cells.append("works")
                continue
            key = (verdict["kind"], general(verdict["reason"]))
            if key not in notes:
                notes[key] = len(notes) + 1
                examples.append(f"{notes[key]}. {_SIGN[key[0]] or 'refused '}({family}) {_plain(verdict['reason'])}")
            cells.append(f"{_SIGN[key[0]]}[{notes[key]}]")
        rows.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", f"| family | {' | '.join(levers)} |", "| --- " * (len(levers) + 1) + "|", *rows]
    lines += ["", "## Reasons", "", "Each with the first family that has it.", "", *examples]
    if missing := {f: e["built"] for f, e in found.items() if e["built"]}:
        lines += ["", "## Not tried", ""]
        lines += [f"- {family}: {_plain(why)}" for family, why in missing.items()]
    return "\n".join(lines) + "\n"


def _plain(text: str, most: int = 260) -> str:
    """A reason on one line, not too long, as plain Markdown."""
    text = text if len(text) <= most else text[: most - 3].rstrip() + "..."
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
