"""How long it takes to know what every candidate of a search costs.

    python benchmarks/prices.py [tiny-clip] [retrieval]

Counts the usual space of `trimtab fit` on a built-in model, what is exported included, with nothing counted before, in
one process. Prints candidates, those that the model allows, and seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from trimtab.budgets.asking import recipe_of, usual_space
from trimtab.budgets.prices import Prices


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="tiny-clip")
    parser.add_argument("task", nargs="?", default="retrieval")
    options = parser.parse_args()
    data = {"name": "pictograms", "style": "openmoji", "train": 400, "test": 100, "validation": 64}
    recipe = recipe_of(options.model, options.task, data, None, None, ["training.batch_size=32", "training.cache=fp16"])
    with tempfile.TemporaryDirectory() as folder:
        began, processor = time.perf_counter(), time.process_time()
        space = usual_space(recipe)
        prices = Prices(recipe, space, Path(folder) / "prices.json", exports=True)
        prices.count_all()
        allowed = sum(prices(candidate) is not None for candidate in space)
        seconds, used = time.perf_counter() - began, time.process_time() - processor
    rates = len(space.multiples)
    found = {"candidates": rates * sum(1 for _ in space), "allowed": rates * allowed}
    spent = {"seconds": round(seconds, 1), "of the processor": round(used, 1)}
    print(json.dumps({"model": options.model, "task": options.task, **found, **spent}))


if __name__ == "__main__":
    main()
