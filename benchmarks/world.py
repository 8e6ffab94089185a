"""Scenes a second of the built-in world, with rows and PNG encoding, on one core and on all.

python benchmarks/world.py [ROWS]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

from trimtab.data.pictograms import load
from trimtab.data.pictograms.concepts import concepts


def main(rows: int = 6000) -> None:
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRIMTAB_CACHE"] = cache
        concepts_made = len(concepts())
        for kind in ("retrieval", "vqa", "grounding"):
            load(kind, rows=10, seed=9)  # draws the art
            start = time.perf_counter()
            load(kind, rows=rows, progress=False)
            seconds = time.perf_counter() - start
            results.append({"kind": kind, "scenes_per_second": round(rows / seconds), "cores": os.cpu_count()})
    print(json.dumps({"rows": rows, "concepts": concepts_made, "results": results}, indent=1))


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
