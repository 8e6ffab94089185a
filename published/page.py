"""The papers' figures beside ours: parameters, multiply-adds, trained parameters and memory, without any weights.

    python -m published.page [--out docs/published_figures.md] [--only sizes/meter] [--redo]

Every figure is a piece of its own that is kept in `published/results.json` as soon as it is known, so that
the command goes on where it was stopped; `--redo` counts pieces anew (with `--only` those whose name begins so).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from published import levers
from published.sizes import PUBLISHED, measure
from trimtab.files import replace_file

RESULTS = Path(__file__).with_name("results.json")
COMMAND = "python -m published.page"
TITLES = {"meter": "METER", "vilt": "ViLT", "xvlm": "X-VLM", "blip": "BLIP", "mdetr": "MDETR", "vse": "VSE-infinity",
          "clip4clip": "CLIP4Clip", "clip_vil": "CLIP-ViL"}  # fmt: skip
WAYS = ("full", "lst", "unipt")
# MP-ISMoE (AAAI 2026), tables 1 and 2, which keeps UniPT's settings: G of training memory in full, with LST and UniPT.
MEMORY = {"VSE-infinity": (176.8, 24.4, 24.4), "CLIP4Clip": (48.8, 32.0, 13.6), "CLIP-ViL": (82.0, 25.6, 11.6),
          "MDETR": (39.6, 12.6, 6.8)}  # fmt: skip
GPUS = {"VSE-infinity": 1, "CLIP4Clip": 4, "CLIP-ViL": 4, "MDETR": 2}  # of the authors' scripts
TRAINED = {"VSE-infinity": "12.4", "CLIP4Clip": "9.6", "CLIP-ViL, as published": "10.3",
           "CLIP-ViL, as released": "10.73", "MDETR": "0.7"}  # fmt: skip


def pieces() -> dict[str, Callable[[], Any]]:
    """Name -> what counts it."""
    out: dict[str, Callable[[], Any]] = {}
    for row in PUBLISHED:
        out[f"sizes/{row['architecture']}/{row['setting']}"] = lambda row=row: measure(row)
    for k in (None, 0, 2, 4, 6):
        out[f"das/meter/{k}"] = lambda k=k: levers.das_meter(k)
    for k in (None, 0, 1, 2):
        out[f"das/vilt/{k}"] = lambda k=k: levers.das_vilt(k)
    out["unipt"] = levers.unipt_parameters
    for name in MEMORY:
        for way in WAYS:
            out[f"memory/{name}/{way}"] = lambda name=name, way=way: levers.memory(name, way)
    return out


def count(only: str, redo: bool, file: Path = RESULTS) -> dict[str, Any]:
    """Every piece, those that are kept already from the file."""

    def kept() -> dict[str, Any]:
        return json.loads(file.read_text()) if file.exists() else {}

    for name, function in pieces().items():
        if not name.startswith(only) or (name in kept() and not redo):
            continue
        print(name, flush=True)
        value = function()
        new = kept() | {name: value}  # read again: another process may have counted other pieces
        with replace_file(file) as partial:
            partial.write_text(json.dumps({key: new[key] for key in pieces() if key in new}, indent=1) + "\n")
    return kept()


# --- the page ---------------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list[Any]], left: int = 1) -> str:
    """Markdown; the first `left` columns are words, the others numbers."""
    shown = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *shown))


def sizes(found: dict[str, Any]) -> str:
    """The tables of parameters and of multiply-adds."""
    parameters, macs = [], []
    for row in PUBLISHED:
        title = f"{TITLES[row['architecture']]}, {row['setting']}"
        ours = found[f"sizes/{row['architecture']}/{row['setting']}"]
        short, unused = ours["params"] - row["params"], row.get("unused", 0)
        why = (row.get("unused_parts", "") if short else "") if short == -unused else "unexplained"
        parameters.append([title, row["params"], ours["params"], short, why])
        for part, theirs in row["macs"].items():
            difference = ours["macs"][part] - theirs
            macs.append([f"{title}: {part}", theirs, ours["macs"][part], difference, reason(row, part, difference)])
    columns = ["authors' classes", "ours", "difference", "what they have more"]
    return "\n\n".join((
        table(["parameters", *columns], parameters),
        table(["multiply-adds", *columns[:3], "why"], macs),
    ))  # fmt: skip


def reason(row: dict[str, Any], part: str, difference: int) -> str:
    """Why multiply-adds differ."""
    if not difference:
        return ""
    if row["architecture"] == "clip4clip" and part.startswith(("text", "video")):
        return "they project every token into the common space, and keep one"
    if row["architecture"] == "vse":
        return "the pooling's GRU reads padded texts in two rows, once from either end"
    return "unexplained"


def das(found: dict[str, Any]) -> str:
    def macs(backbone: str, k: int | None) -> int:
        return found[f"das/{backbone}/{k}"]["macs"]

    def giga(number: float) -> str:
        return f"{number / 1e9:+.2f} G"

    dense, four = macs("meter", None), macs("meter", 4)
    change = 100 * (four - dense) / dense
    whole, one = macs("vilt", None), macs("vilt", 1)
    rows = [
        ["METER, 384 px, 40 tokens: multiply-adds", "93.12 G (derived)", f"{dense / 1e9:.2f} G",
         f"{(dense - 93.12e9) / 1e9:+.3f} G"],
        ["without 2 text and 2 image fusion layers", "-11.97 % (abstract)", f"{change:.2f} %",
         f"{change + 11.97:+.2f} points"],
        ["the same in multiply-adds", "-11.18 G (derived)", giga(four - dense), giga(four - dense + 11.18e9)],
        ["METER, adapters in all layers", "+1.64 G", giga(macs("meter", 0) - dense),
         giga(macs("meter", 0) - dense - 1.64e9)],
        ["ViLT, 241 tokens, adapters in all blocks", "+0.86 G", giga(macs("vilt", 0) - whole),
         giga(macs("vilt", 0) - whole - 0.86e9)],
        ["one block skipped", "-0.94 G (derived)", giga(one - whole), giga(one - whole + 0.94e9)],
        ["each further one", "-1.795 G (derived)", f"{(macs('vilt', 2) - one) / 1e9:+.3f} G",
         f"{(macs('vilt', 2) - one + 1.795e9) / 1e9:+.3f} G"],
    ]  # fmt: skip
    counts = []
    for backbone, published in (("meter", 5.34), ("vilt", 3.56)):
        for name, value in found.items():
            if name.startswith(f"das/{backbone}/") and not name.endswith("None"):
                millions, norms = value["without"] / 1e6, value["with norms"] / 1e6
                counts.append([
                    f"{TITLES[backbone]}, {name.split('/')[-1]} skipped", f"{published} M", f"{millions:.3f} M",
                    f"{millions - published:+.3f} M", f"{norms:.3f} M",
                ])  # fmt: skip
    return "\n\n".join((
        table(["", "published", "ours", "difference"], rows),
        table(["parameters of DAS's adapters", "published", "ours", "difference", "with LayerNorms"], counts),
    ))  # fmt: skip


def unipt(found: dict[str, Any]) -> str:
    rows = []
    for name, parts in found["unipt"].items():
        total = sum(parts.values()) / 1e6
        shown = ", ".join(f"{part} {number:,}" for part, number in parts.items())
        rows.append([name, shown, f"{TRAINED[name]} M", f"{total:.3f} M", f"{total - float(TRAINED[name]):+.3f} M"])
    return table(["UniPT on", "parts", "published", "ours", "difference"], rows, left=2)


def memory(found: dict[str, Any]) -> str:
    rows = []
    for name, published in MEMORY.items():
        ours = {way: found.get(f"memory/{name}/{way}") for way in WAYS}
        for way, theirs in zip(WAYS, published, strict=True):
            if ours[way] is None:
                rows.append([f"{name}, {way}", "-", f"{theirs} G", "not counted", f"{theirs / published[0]:.3f}",
                             "-", "-", "-"])  # fmt: skip
                continue
            peak, saved = (ours[way][key] / ours["full"][key] for key in ("peak", "saved"))
            gigabytes = GPUS[name] * ours[way]["peak"] / 2**30
            rows.append([
                f"{name}, {way}", f"{ours[way]['trained'] / 1e6:.1f} M", f"{theirs} G", f"{gigabytes:.1f} GiB",
                f"{theirs / published[0]:.3f}", f"{peak:.3f}", f"{peak - theirs / published[0]:+.3f}", f"{saved:.3f}",
            ])  # fmt: skip
    columns = ["published", "peak", "published : full", "peak : full", "difference", "kept : full"]
    return table(["", "trained", *columns], rows)


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    text = Path(__file__).with_name("page.md").read_text()
    for name, made in (("sizes", sizes), ("das", das), ("unipt", unipt), ("memory", memory)):
        text = text.replace(f"{{{name}}}", made(found))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/published_figures.md"), help="the page")
    parser.add_argument("--only", default="", help="count pieces whose name begins so, such as sizes/meter")
    parser.add_argument("--redo", action="store_true", help="count again what is kept")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = count(options.only, options.redo)
    if missing := [name for name in pieces() if name not in found]:
        print(f"no page yet: {len(missing)} pieces are missing, the first is {missing[0]}")
        return
    with replace_file(options.out) as partial:
        partial.write_text(page(found))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
