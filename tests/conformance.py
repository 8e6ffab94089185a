"""Our methods against reference tensors in a folder: `python tests/conformance.py DIR`.

A case is a safetensors file of inputs, parameters and results with a JSON file beside it. What it is a case of is read
from the JSON (`pruner`, or `case`), never from the file's name. Prints one JSON line a case: the quantity that came
closest to its tolerance (or passed it), its error and tolerance, whether all passed, and what was left out, with the
reason. A comparison that ends in an error is a failed case with that error in its line, and the others go on. Settings
are taken from the JSON; a field that the comparison neither takes nor knows as a description is named under `unknown`,
and so is one whose value it does not know. The exit status is 1 if a case fails or there is none.

A sub-folder with `meta.json` is a backbone, named by the folder: checkpoint files in its authors' format, and
`io*.safetensors` with `<stage>.in.<name>` and `<stage>.out.<name>`. Each stage is a case of its own.

A folder or sub-folder with `expected.json` is a data set, and one with `index.json` holds broken files: see
`comparisons/data.py`.

A JSON file alone is a case of a metric if it has that metric's fields.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One comparison: an error and what it may be at most. For masks the error is the number of bits that differ."""

    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Skipped:
    """Something in a case that is not compared, and why."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A comparison that ended in an error: what, and where."""

    error: str


class Info(dict[str, Any]):
    """The JSON of a case, which notes the fields that are asked for."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__(fields)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


@dataclass
class Case:
    """A reference file and what stands beside it.

    Attributes:
        name: of the file, for people only.
        tensors: inputs, parameters and results.
        info: its JSON.
        folder: where it lies; a case may need another file of it, which it names.
        stage: of a backbone (its pretraining, a task); what it computes is under `<stage>.out.` in the tensors.
        broken: why its files cannot be read, if they cannot.
    """

    name: str
    info: dict[str, Any]
    folder: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    stage: str | None = None
    broken: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.info, Info):
            self.info = Info(self.info)

    @property
    def kind(self) -> str:
        """What it is a case of: `pruner NAME`, `backbone FOLDER`, or the JSON's `case`."""
        if self.stage is not None:
            return f"backbone {self.folder.name}"
        if known := [kind for kind, fields in METRICS.items() if all(_holds(self.info, f) for f in fields)]:
            return max(known, key=lambda kind: len(METRICS[kind]))
        return f"pruner {self.info['pruner'].lower()}" if "pruner" in self.info else str(self.info.get("case"))


Result = Check | Skipped | Failed
Compare = Callable[[Case], Iterator[Check | Skipped]]

# Fields of any case that tell what it is and where it is from, and set nothing.
TOLD = ("case", "pruner", "source", "seed", "torch", "tensors", "note", "stats")


@dataclass(frozen=True)
class Comparison:
    """How a kind of case is compared.

    Attributes:
        function: makes the checks.
        told: fields that describe what the case's tensors hold.
        assumes: fields that it takes no setting from, with a pattern of the values that it computes.
    """

    function: Compare
    told: tuple[str, ...]
    assumes: Mapping[str, str]

    def unknown(self, info: Info) -> dict[str, Any]:
        """The fields of a case, once compared, that nothing took and that are no description that is known."""
        rest = info.keys() - info.asked - {*TOLD, *self.told}
        known = {name for name in rest & self.assumes.keys() if re.fullmatch(self.assumes[name], str(info.get(name)))}
        return {name: info.get(name) for name in sorted(rest - known)}


COMPARISONS: dict[str, Comparison] = {}

# Further kinds of folders: each gives the finished lines of what it knows in a folder, none where it knows nothing.
FOLDERS: list[Callable[[Path], Iterator[dict[str, Any]]]] = []

# Kinds of cases that need no tensors, with the fields by which they are known: the kind with most of them is taken.
METRICS: dict[str, tuple[str, ...]] = {}


def _holds(info: Any, field: str) -> bool:
    """Whether a JSON value has a field, or `outer.inner`; of a list the first entry must."""
    if isinstance(info, list):
        return bool(info) and _holds(info[0], field)
    name, _, rest = field.partition(".")
    return isinstance(info, dict) and name in info and (not rest or _holds(dict.get(info, name), rest))


def metric(kind: str, *fields: str, told: Iterable[str] = ()) -> Callable[[Compare], Compare]:
    """Register the comparison of a metric, known by the fields of its cases; `told` as of `Comparison`."""
    METRICS[kind] = fields
    return compares(kind, told=told)


def number(quantity: str, found: float, wanted: float) -> Check:
    """Within 1e-6: of the number itself below one, else of its size."""
    return Check(quantity, abs(found - wanted) / max(1.0, abs(wanted)), 1e-6)


def compares(*kinds: str, told: Iterable[str] = (), assumes: Mapping[str, str] | None = None
             ) -> Callable[[Compare], Compare]:  # fmt: skip
    """Register the comparison for these kinds of cases; `told` and `assumes` as of `Comparison`."""

    def add(function: Compare) -> Compare:
        COMPARISONS.update(dict.fromkeys(kinds, Comparison(function, tuple(told), assumes or {})))
        return function

    return add


def close(quantity: str, found: Tensor, wanted: Tensor, relative: float = 1e-5, absolute: float = 1e-5) -> Check:
    """Element by element |found - wanted| <= absolute + relative |wanted|, as a relative error of at most
    `relative`."""
    if found.shape != wanted.shape:
        return Check(f"{quantity}: shape {tuple(found.shape)} for {tuple(wanted.shape)}", float("inf"), relative)
    found, wanted = found.detach().double(), wanted.double()
    errors = (found - wanted).abs() / (wanted.abs() + absolute / relative)
    return Check(quantity, float(errors.max()), relative)


def find(folder: Path) -> list[Case]:
    """Every case of a folder, tensors not yet read."""
    if (folder / "meta.json").is_file():
        return _stages(folder)
    if (folder / "expected.json").is_file() or (folder / "index.json").is_file():
        return []  # a data set, or broken files: `comparisons/data.py` gives their lines
    cases = []
    for file in sorted(folder.glob("*.json")):
        try:
            info = json.loads(file.read_text())
        except ValueError as error:
            cases.append(Case(file.stem, {}, folder, broken=f"{file.name}: {error}"))
        else:
            cases += [Case(file.stem, info, folder)] if isinstance(info, dict) else []
    return cases + [case for p in sorted(folder.glob("*/meta.json")) for case in _stages(p.parent)]


def _stages(folder: Path) -> list[Case]:
    """A case for each stage of a backbone."""
    try:
        info = json.loads((folder / "meta.json").read_text())
        stages = dict.fromkeys(key.split(".out.")[0] for key in sorted(_arrays(folder)) if ".out." in key)
    except (ValueError, SafetensorError) as error:
        return [Case(folder.name, {}, folder, broken=f"{folder.name}: {error}")]
    return [Case(f"{folder.name} {stage}", info, folder, stage=stage) for stage in stages]


def _arrays(folder: Path) -> dict[str, Tensor]:
    """What a backbone's `io*.safetensors` hold; from `io_NAME` under the prefix `NAME.`."""
    found = {}
    for file in sorted(folder.glob("io*.safetensors")):
        prefix = f"{file.stem.removeprefix('io_')}." if file.stem != "io" else ""
        found |= {prefix + key: tensor for key, tensor in load_file(file).items()}
    return found


def compare(case: Case) -> list[Result]:
    """Compare one case, or say why it is not compared; an error on the way is the last result."""
    if case.broken:
        return [Failed(case.broken)]
    file = case.folder / f"{case.name}.safetensors"
    if case.stage is None and not file.exists() and case.kind not in METRICS:
        return [Skipped("no tensors beside the JSON: figures and descriptions, nothing to compute")]
    if case.kind not in COMPARISONS:
        return [Skipped(f"no comparison for {case.kind!r}: the library does not have this part")]
    results: list[Result] = []
    try:
        if case.kind not in METRICS:
            case.tensors = load_file(file) if case.stage is None else _arrays(case.folder)
        for result in COMPARISONS[case.kind].function(case):
            results.append(result)
    except Exception as error:  # whatever it is: this case has failed, and the next is compared
        at = traceback.extract_tb(error.__traceback__)[-1]
        results.append(Failed(f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"))
    return results


def stage(case: Case, found: dict[str, Tensor], left_out: dict[str, str] | None = None) -> Iterator[Check | Skipped]:
    """What a stage of a backbone computed against all that its file has of it, within 1e-4.

    Args:
        found: name of an output -> our value.
        left_out: name of an output -> why it is not compared.
    """
    prefix = f"{case.stage}.out."
    for key, wanted in case.tensors.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name in found:
            yield close(name, found[name], wanted, relative=1e-4, absolute=1e-4)
        else:
            yield Skipped(f"{name}: {(left_out or {}).get(name, 'not computed')}")


def line(case: Case, results: list[Result]) -> dict[str, Any]:
    """What is printed about a case, once it is compared."""
    checks = [r for r in results if isinstance(r, Check)]
    out: dict[str, Any] = {"case": case.name, "kind": case.kind}
    if checks:
        worst = max(checks, key=lambda c: (not c.passed, c.error / c.tolerance if c.tolerance else c.error))
        out |= {
            "checks": len(checks),
            "quantity": worst.quantity,
            "max_error": worst.error,
            "tolerance": worst.tolerance,
        }
    errors = [r.error for r in results if isinstance(r, Failed)]
    out["pass"] = all(c.passed for c in checks) and not errors if checks or errors else None
    if errors:
        out["error"] = errors[0]
    elif checks and (unknown := COMPARISONS[case.kind].unknown(case.info)):
        out["unknown"] = unknown
    if reasons := [r.reason for r in results if isinstance(r, Skipped)]:
        out["skipped"] = reasons
    return out


def main(folder: Path) -> int:
    """Compare every case of a folder; returns the exit status."""
    import tests.comparisons  # noqa: F401  (fills COMPARISONS and FOLDERS)

    torch.set_num_threads(1)
    cases = (line(case, compare(case)) for case in find(folder))
    failed, count = False, 0
    for report in itertools.chain(cases, *(more(folder) for more in FOLDERS)):
        failed |= report["pass"] is False
        count += 1
        print(json.dumps(report), flush=True)
    if not count:
        print(f"{folder}: expected reference files (NAME.json beside NAME.safetensors), found none", file=sys.stderr)
    return int(failed or not count)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/conformance.py DIR")
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    from tests import conformance  # under its importable name, so that comparisons register where they are looked up

    sys.exit(conformance.main(Path(sys.argv[1])))
