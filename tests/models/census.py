"""What works on which family: every lever on a tiny model of each, with a verdict and its reason.

    python -m tests.models.census --out docs/families.json --page docs/families.md
    python -m tests.models.census --group vision --out docs/families_vision.json --page docs/families_vision.md
    python -m tests.models.census --group text --out docs/families_text.json --page docs/families_text.md
    python -m tests.models.census --family clip --family llava        # prints what it finds

works      every check of the lever holds
refused    trimtab said no, in words of its own
traceback  any other exception
wrong      no exception, and a check does not hold
"""

from __future__ import annotations

import argparse
import json
import linecache
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import trimtab
from tests.models.checks import equal, finite, run
from tests.models.families import CLASSES, GROUPS
from tests.models.inputs import inputs
from tests.models.levers import LEVERS, Case, Wrong
from tests.models.page import counts, page
from tests.models.shrink import build, tiny_config

SECONDS = 240  # for a family


class OverTime(BaseException):
    """A family took too long. No `Exception`, which the code that is tried may catch and tell as its own."""


@dataclass
class Verdict:
    """How a lever did on a model: `works`, `refused`, `traceback` or `wrong`, and why."""

    kind: str
    reason: str = ""


def verdict(lever: Callable[[Case], None], case: Case) -> Verdict:
    """Pull a lever and say how it went."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lever(case)
    except Wrong as wrong:
        return Verdict("wrong", str(wrong))
    except Exception as error:
        return Verdict("refused" if deliberate(error) else "traceback", told(error))
    return Verdict("works")


def deliberate(error: Exception) -> bool:
    """Whether trimtab itself raised it: a ValueError from a `raise` in its own code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    source = Path(trimtab.__file__).parent
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return isinstance(error, ValueError) and source in Path(last.filename).parents and line.startswith("raise")


def told(error: Exception) -> str:
    """An error on one line, with where it was raised if not on purpose."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if deliberate(error):
        return " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "trimtab" in f.filename]
    at = [f"{Path(f.filename).name}:{f.lineno}" for f in (*own[-1:], frames[-1])]
    return f"{text[:300]} ({' < '.join(reversed(dict.fromkeys(at)))})"


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise OverTime after so many seconds."""

    def stop(*_: Any) -> None:
        raise OverTime(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def made(family: str, name: str | None = None) -> Case:
    """The tiny model of a family with its inputs, checked to compute numbers, and the same twice."""
    model = build(name or CLASSES[family], tiny_config(family))
    batch = inputs(model)
    first = run(model, batch)
    if not first or not finite(first):
        raise ValueError("its outputs are not numbers")
    if not equal(first, run(model, batch)):
        raise ValueError("it computes differently twice")
    unread = [
        k
        for k, v in batch.items()
        if torch.is_tensor(v) and v.is_floating_point() and equal(run(model, {**batch, k: v + 1}), first)
    ]
    if unread:
        raise ValueError(f"its outputs do not depend on {unread[0]}")
    return Case.of(family, model, batch)


def census(family: str, make: Callable[[], Case], levers: list[str]) -> dict[str, Any]:
    """The verdicts of a family; `built` says why there is no model of it."""
    out: dict[str, Any] = {"class": CLASSES.get(family, ""), "built": "", "levers": {}}
    torch.manual_seed(0)
    try:
        with limit(SECONDS):
            try:
                case = make()
                out["class"] = type(case.model).__name__
            except Exception as error:
                out["built"] = told(error)
                return out
            for name in levers:
                out["levers"][name] = asdict(verdict(LEVERS[name], case))
    except OverTime as error:
        for name in levers:
            out["levers"].setdefault(name, asdict(Verdict("traceback", str(error))))
    return out


# --- all families -----------------------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> str:
    """The counts as lines of text."""
    missing = {f: e["built"] for f, e in found.items() if e["built"]}
    lines = [f"{len(found) - len(missing)} families, {len(missing)} could not be built"]
    for lever, count in counts(found).items():
        kinds = ", ".join(f"{count[k]} {k}" for k in ("refused", "traceback", "wrong"))
        lines.append(f"{lever:10} works on {count['works']} of {sum(count.values())} ({kinds})")
    return "\n".join(lines)


def written(found: dict[str, Any]) -> str:
    """As JSON, a line a family."""
    return "{\n" + ",\n".join(f"{json.dumps(f)}: {json.dumps(e)}" for f, e in sorted(found.items())) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only these; all if left out")
    parser.add_argument("--group", choices=list(GROUPS), default="multimodal")
    parser.add_argument("--lever", action="append", choices=list(LEVERS), help="only these; all if left out")
    parser.add_argument("--out", type=Path, help="JSON; families that are in it already are left out")
    parser.add_argument("--page", type=Path, help="Markdown, of what --out holds then")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    levers = args.lever or list(LEVERS)
    for family in args.family or GROUPS[args.group]:
        if family in found and not args.family:
            continue
        started = time.time()
        found[family] = entry = census(family, lambda family=family: made(family), levers)
        if args.family:
            print(family, entry["class"], entry["built"])
            for lever, v in entry["levers"].items():
                print(f"  {lever:10} {v['kind']:10} {v['reason']}")
        else:
            kinds = " ".join(f"{k}:{v['kind']}" for k, v in entry["levers"].items())
            print(f"{family} {entry['built'] or kinds} {time.time() - started:.1f} s", flush=True)
        if args.out:
            args.out.write_text(written(found))
    print(summary(found))
    if args.page:
        args.page.write_text(page(found, args.group))


if __name__ == "__main__":
    main()
