"""What works on which family: every lever on a tiny model of each, with a verdict and its reason.

    python -m tests.models.census --out docs/families.json --page docs/families.md
    python -m tests.models.census --family clip --family llava        # prints what it finds

works      every check of the lever holds
refused    trimtab said no, in words of its own
traceback  any other exception
wrong      no exception, and a check does not hold
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import linecache
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import nn

import trimtab
from tests.models import checks
from tests.models.checks import Facts, equal, finite, run, same, step, without_gradient
from tests.models.families import FAMILIES
from tests.models.inputs import inputs, tensors
from tests.models.shrink import build, tiny_config
from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import plain_parameters, under

SECONDS = 240  # for a family
Batch = dict[str, Any]


class Wrong(Exception):
    """A check does not hold; the text says which."""


@dataclass
class Verdict:
    """How a lever did on a model: `works`, `refused`, `traceback` or `wrong`, and why."""

    kind: str
    reason: str = ""


@dataclass
class Case:
    """A tiny model with inputs; every lever gets a fresh copy."""

    family: str
    model: Any
    batch: Batch
    facts: Facts
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @classmethod
    def of(cls, family: str, model: Any, batch: Batch) -> Case:
        return cls(family, model, batch, Facts.of(model, batch))

    def fresh(self) -> Any:
        model = copy.deepcopy(self.model)
        model.census_names = {n for n, _ in model.named_parameters()}
        return model

    def adapt(self, model: nn.Module, folder: Path | None = None) -> Any:
        return trimtab.adapt(model, folder, **given(trimtab.adapt, example=self.batch))


def given(function: Callable, **values: Any) -> dict[str, Any]:
    """Those of the values that a function takes."""
    takes = inspect.signature(function).parameters
    return {k: v for k, v in values.items() if k in takes}


# --- the levers -------------------------------------------------------------------------------------------------------


def prune(case: Case, method: str = "multiflow") -> None:
    """Half of the prunable weights go: exactly that many, and the outputs stay numbers."""
    model = case.fresh()
    fit = case.adapt(model)
    batches = [case.batch] if method == "multiflow" else None
    fit.prune(method, sparsity=0.5, batches=batches)
    total, kept = fit.masks.prunable, sum(int(m.sum()) for m in fit.masks.values())
    parameters = plain_parameters(model)
    zero = sum(int((parameters[path] == 0).sum()) for path in fit.masks)
    if abs(total - kept - total / 2) > 1 or zero != total - kept:
        raise Wrong(f"asked for {total // 2} zeros of {total}: {total - kept} in the masks, {zero} in the weights")
    after = run(model, case.batch)
    if not finite(after):
        raise Wrong("outputs are not numbers")
    if equal(after, case.facts.plain):
        raise Wrong("half of the weights are zero, and the outputs are as before")


def magnitude(case: Case) -> None:
    """The same by the size of the weights alone."""
    prune(case, "omp" if "omp" in trimtab.METHODS else "magnitude")


def middle(model: Any, anatomy: Anatomy, among: set[str] | None = None) -> str:
    """Path of a middle block of the largest tower."""

    def size(tower: Any) -> int:
        return sum(p.numel() for b in tower.blocks for p in model.get_submodule(b.path).parameters())

    for tower in sorted(anatomy.towers, key=lambda t: (len(t.blocks) > 1, size(t)), reverse=True):
        if paths := [b.path for b in tower.blocks if among is None or b.path in among]:
            return paths[len(paths) // 2]
    raise ValueError("no tower has blocks")


def shorten(case: Case) -> None:
    """A block is taken out: the model computes as if it passed its stream on, and is the same when saved and loaded."""
    model = case.fresh()
    anatomy = anatomy_of(case, model)
    path = middle(model, anatomy)
    expected = bypassed(case, path, anatomy)
    trimtab.shorten(model, [path], **given(trimtab.shorten, example=case.batch))
    after = run(model, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        if not equal(run(again, case.batch), after):
            raise Wrong(f"without '{path}', saved and loaded: other outputs")
    if equal(after, case.facts.plain):
        raise Wrong(f"without '{path}' the outputs are as before")
    if expected is not None and not same(after, expected):
        raise Wrong(f"without '{path}': other outputs than when it hands its stream on")


def bypassed(case: Case, path: str, anatomy: Anatomy) -> list | None:
    """The outputs when a block hands on its stream unchanged; None if it cannot be made to."""
    model = case.fresh()
    block = next(b for b in anatomy.blocks() if b.path == path)
    module = model.get_submodule(path)
    own = module.forward

    @functools.wraps(own)
    def hand_on(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        stream = block.stream_of(module, args, kwargs)
        return stream if isinstance(out, torch.Tensor) else (stream, *out[1:])

    module.forward = hand_on  # no hook: those that collect hidden states may run before it
    try:
        return run(model, case.batch)
    except Exception:
        return None


def anatomy_of(case: Case, model: Any) -> Anatomy:
    return Anatomy.of(model, **given(Anatomy.of, example=case.batch))


def skip(case: Case) -> None:
    """A block is skipped and the rest get adapters: all that is trained gets a gradient and changes the outputs."""
    model = case.fresh()
    fit = case.adapt(model)
    candidates = {b.path for b in trimtab.METHODS.make("das", skip=1).candidates(fit.anatomy)}
    fit.skip(plan=[middle(model, fit.anatomy, candidates)])
    learns(case, model)
    holds(case, model, fit)


def tune(case: Case, method: str, near: float | None = None) -> None:
    """A tuning method: near the plain model at first, all that is trained gets a gradient and counts, saved and loaded.

    Args:
        case: the model.
        method: its name.
        near: how far the outputs may be from the plain model's before training, relative to them; None: anywhere.
    """
    model = case.fresh()
    fit = case.adapt(model)
    fit.tune(method)
    before = run(model, case.batch)
    if near is not None and not close(before, case.facts.plain, near):
        raise Wrong("before training the outputs are not those of the plain model")
    if near is not None:
        reaches(fit, model)
    learns(case, model)
    holds(case, model, fit)


def reaches(fit: Any, model: nn.Module) -> None:
    """No tower is left out without a word."""
    paths = [n for n, _ in checks.trained(model)]
    for tower in fit.anatomy.towers:
        if not any(under(p, tower.scope) for p in paths):
            raise Wrong(f"nothing is trained in tower {tower.name!r}")


def close(a: list, b: list, far: float) -> bool:
    """Whether outputs differ by no more than a share of their size."""
    if far == 0:
        return same(a, b, 1e-5)
    moved = sum(float((x - y).nan_to_num(0, 0, 0).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.nan_to_num(0, 0, 0).square().sum()) for y in b)
    return moved**0.5 <= far * size**0.5


def learns(case: Case, model: Any) -> None:
    """One step: every trained tensor gets a gradient, and the outputs move."""
    if not any(True for _ in checks.trained(model)):
        raise Wrong("nothing is trained")
    before = run(model, case.batch)
    step(model, case.batch)  # what starts at zero hides others from the gradient
    if idle := without_gradient(model, case.batch, case.facts):
        raise Wrong(f"{len(idle)} trained tensors get no gradient, first '{idle[0]}'")
    after = run(model, case.batch)
    if not finite(after):
        raise Wrong("outputs are not numbers")
    if equal(before, after):
        raise Wrong("what is trained does not change the outputs")


def holds(case: Case, model: Any, fit: Any) -> None:
    """Rows, padding and causality are as in the plain model; saved and loaded, the outputs are the same."""
    if why := case.facts.broken(model, case.batch):
        raise Wrong(why)
    after = run(model, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        fit.save(Path(folder) / "fit")
        again = case.fresh()
        case.adapt(again, Path(folder) / "fit")
        if not equal(run(again, case.batch), after):
            raise Wrong("saved and loaded: other outputs")


def save(case: Case) -> None:
    """Pruned and tuned with LoRA, or biases where LoRA has no place: saved and loaded, the outputs are the same."""
    model = case.fresh()
    fit = case.adapt(model)
    fit.prune("omp" if "omp" in trimtab.METHODS else "magnitude", sparsity=0.5)
    try:
        fit.tune("lora")
    except ValueError:
        fit.tune("bitfit")
    keep = fit.masks
    step(model, case.batch)
    keep.enforce(model)
    after = run(model, case.batch)
    with tempfile.TemporaryDirectory() as folder:
        fit.save(Path(folder) / "fit")
        again = case.fresh()
        case.adapt(again, Path(folder) / "fit")
        if not equal(run(again, case.batch), after):
            raise Wrong("saved and loaded: other outputs")


LEVERS: dict[str, Callable[[Case], None]] = {
    "prune": prune,
    "magnitude": magnitude,
    "shorten": shorten,
    "skip": skip,
    "unipt": lambda case: tune(case, "unipt"),
    "lst": lambda case: tune(case, "lst"),
    "adapter": lambda case: tune(case, "adapter", 0.3),
    "lora": lambda case: tune(case, "lora", 0.0),
    "bitfit": lambda case: tune(case, "bitfit", 0.0),
    "save": save,
}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdict(lever: Callable[[Case], None], case: Case) -> Verdict:
    """Pull a lever and say how it went."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lever(case)
    except Wrong as wrong:
        return Verdict("wrong", str(wrong))
    except TimeoutError:
        raise
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
    """Raise a TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def made(family: str, name: str | None = None) -> Case:
    """The tiny model of a family with its inputs, checked to compute numbers, and the same twice."""
    model = build(name or FAMILIES[family], tiny_config(family))
    batch = inputs(model)
    first = run(model, batch)
    if not first or not finite(first):
        raise ValueError("its outputs are not numbers")
    if not equal(first, run(model, batch)):
        raise ValueError("it computes differently twice")
    unread = [k for k, v in batch.items() if torch.is_tensor(v) and v.is_floating_point() and equal(run(model, {**batch, k: v + 1}), first)]
    if unread:
        raise ValueError(f"its outputs do not depend on {unread[0]}")
    return Case.of(family, model, batch)


def census(family: str, make: Callable[[], Case], levers: list[str]) -> dict[str, Any]:
    """The verdicts of a family; `built` says why there is no model of it."""
    started = time.time()
    out: dict[str, Any] = {"class": FAMILIES.get(family, ""), "built": "", "levers": {}}
    torch.manual_seed(0)
    try:
        with limit(SECONDS):
            try:
                case = make()
                out["class"] = type(case.model).__name__
            except TimeoutError:
                raise
            except Exception as error:
                out["built"] = told(error)
                return out
            for name in levers:
                out["levers"][name] = asdict(verdict(LEVERS[name], case))
    except TimeoutError as error:
        for name in levers:
            out["levers"].setdefault(name, asdict(Verdict("traceback", str(error))))
    out["seconds"] = round(time.time() - started, 1)
    return out


# --- all families -----------------------------------------------------------------------------------------------------


def counts(found: dict[str, Any]) -> dict[str, Counter]:
    """How many families get each verdict, by lever."""
    out: dict[str, Counter] = {}
    for entry in found.values():
        for lever, verdict in entry["levers"].items():
            out.setdefault(lever, Counter())[verdict["kind"]] += 1
    return out


def summary(found: dict[str, Any]) -> str:
    """The counts as lines of text."""
    missing = {f: e["built"] for f, e in found.items() if e["built"]}
    lines = [f"{len(found) - len(missing)} families, {len(missing)} could not be built"]
    for lever, count in counts(found).items():
        kinds = ", ".join(f"{count[k]} {k}" for k in ("refused", "traceback", "wrong"))
        lines.append(f"{lever:10} works on {count['works']} of {sum(count.values())} ({kinds})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only these; all if left out")
    parser.add_argument("--lever", action="append", choices=list(LEVERS), help="only these; all if left out")
    parser.add_argument("--out", type=Path, help="JSON; families that are in it already are left out")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    levers = args.lever or list(LEVERS)
    for family in args.family or FAMILIES:
        if family in found and not args.family:
            continue
        found[family] = entry = census(family, lambda family=family: made(family), levers)
        if args.family:
            print(family, entry["class"], entry["built"])
            for lever, v in entry["levers"].items():
                print(f"  {lever:10} {v['kind']:10} {v['reason']}")
        else:
            kinds = " ".join(f"{k}:{v['kind']}" for k, v in entry["levers"].items())
            print(family, entry["built"] or kinds, entry.get("seconds", ""), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
    print(summary(found))


if __name__ == "__main__":
    main()
