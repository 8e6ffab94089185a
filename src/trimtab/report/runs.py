"""Run folders as records: reading them, and grouping them for a report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from trimtab.files import replace_file
from trimtab.metrics.intervals import DRAWS, difference, over_seeds

logger = logging.getLogger(__name__)

FORMAT = 1
NO_SHARES = ("cider",)  # of metrics that may stay below 1 and are no shares all the same
REFERENCE = "full"  # the variant that others are compared with
COUNTS = ("", "K", "M", "G", "T")
BYTES = ("B", "kB", "MB", "GB", "TB")
MILLISECONDS = ("ms",)
STEPS = "steps"  # told by the training itself; shown where methods took different numbers of them


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as its folder describes it; `rows` has the `credits` of the test rows, what each gives to the
    `metric`, a hash of their `table`, and where rows share pictures the first row with the `pictures` of each."""

    path: Path
    info: dict[str, Any]
    metrics: dict[str, Any]
    costs: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)

    def score(self, metric: str) -> float | None:
        """Return a test metric, or None if the run did not measure it."""
        return number(self.metrics["test"].get(metric))

    def cost(self, key: str) -> float | None:
        """Return a cost, or its median if it was measured repeatedly, or None if it is unknown."""
        value = self.metrics.get("steps") if key == STEPS else self.costs.get(key)
        return number(value.get("median") if isinstance(value, dict) else value)


@dataclass(frozen=True)
class OmittedRun:
    """A run folder that takes no part in the report, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Cost:
    """A column of the table, and a panel of the Pareto figure if it is ``plotted``; without units a plain count."""

    title: str
    key: str
    units: tuple[str, ...]
    log: bool = False
    plotted: bool = True


COSTS = (
    Cost("steps", STEPS, (), plotted=False),
    Cost("trained parameters", "trainable_params", COUNTS, log=True),
    Cost("saved activations", "saved_activation_bytes", BYTES),
    Cost("MACs", "macs", COUNTS),
    Cost("weights kept", "nonzero_params", COUNTS, plotted=False),
    Cost("latency", "latency_ms", MILLISECONDS),
    Cost("on disk", "checkpoint_bytes", BYTES, plotted=False),
)


@dataclass(frozen=True)
class Section:
    """All runs of one name, grouped by variant in order of first appearance."""

    name: str
    methods: dict[str, list[RunRecord]]

    @property
    def runs(self) -> list[RunRecord]:
        return [run for runs in self.methods.values() for run in runs]

    @property
    def primary(self) -> str:
        return self.runs[0].metrics["primary"]

    @property
    def is_fraction(self) -> bool:
        """Whether the primary metric is a share, within 0..1, so that it reads best as a percentage."""
        scores = known(run.score(self.primary) for run in self.runs)
        return self.primary not in NO_SHARES and all(0 <= score <= 1 for score in scores)

    @property
    def metric_title(self) -> str:
        return f"{self.primary} (%)" if self.is_fraction else self.primary

    @property
    def best(self) -> float | None:
        """The highest mean score of any method."""
        means = [fmean(scores) for scores in map(self.scores, self.methods) if scores]
        return max(means, default=None)

    def scores(self, variant: str) -> list[float]:
        """Return the primary metric of a variant's seeds, in the units of ``metric_title``."""
        scale = 100 if self.is_fraction else 1
        return [scale * value for value in known(run.score(self.primary) for run in self.methods[variant])]

    def interval(self, variant: str) -> tuple[float, float] | None:
        """The 95 % interval over test rows of a variant that has one seed, in the units of ``metric_title``."""
        runs = self.methods[variant]
        found = runs[0].metrics.get("interval") if len(runs) == 1 else None
        if not isinstance(found, list) or len(known(map(number, found))) != 2:
            return None
        scale = 100 if self.is_fraction else 1
        return scale * found[0], scale * found[1]

    def are_paired(self, variant: str, reference: str = REFERENCE) -> bool:
        """Whether two variants are known to have been scored on the same test rows, with all seeds."""
        sides = [[run.rows for run in self.methods.get(name, ())] for name in (variant, reference)]
        asked = {(rows.get("metric"), rows.get("table"), tuple(c is not None for c in rows.get("credits", ())))
                 for side in sides for rows in side}  # fmt: skip
        known = len(asked) == 1 and next(iter(asked))[:2] != (None, None)
        return known and all(sides) and variant != reference and any(next(iter(asked))[2])

    def beside(self, variant: str, reference: str = REFERENCE) -> tuple[float, float, float] | None:
        """The mean of a variant less that of another one, over all seeds, and its 95 % interval over test rows and
        seeds, in the units of ``metric_title``; None where they are not known to be of the same rows."""
        if not self.are_paired(variant, reference):
            return None
        scale = 100 if self.is_fraction else 1
        mine, others = ([[scale * credit for credit in run.rows["credits"] if credit is not None]
                         for run in self.methods[name]] for name in (variant, reference))  # fmt: skip
        rows = self.methods[variant][0].rows
        shared = rows.get("pictures")
        groups = shared and [g for g, credit in zip(shared, rows["credits"], strict=True) if credit is not None]
        if len(mine) == len(others) == 1:
            return difference(mine[0], others[0], groups)
        return over_seeds(mine, others, groups, draws=DRAWS)

    def costs(self, variant: str, key: str) -> list[float]:
        """Return one cost of a variant's seeds, leaving out the seeds that lack it."""
        return known(run.cost(key) for run in self.methods[variant])


def searches(root: Path) -> list[Path]:
    """Folders of `trimtab fit` at or below a folder."""
    return sorted(file.parent for file in root.rglob("asked.json")) if root.is_dir() else []


def find_runs(paths: Iterable[Path]) -> tuple[list[RunRecord], list[OmittedRun]]:
    """Read every run folder at or below some folders.

    A run that was repeated (same name, variant and seed) counts once: the one started last. Trials of a search are
    left to its own page, unless they are given by their own folder (`found/trials`).

    Args:
        paths: Run folders, folders that hold them at any depth, or files that `write_results` wrote.

    Returns:
        The finished runs in the order in which they were started, and those that had to be left out.

    Raises:
        ValueError: If one of the folders does not exist, none of them holds a run, or a file is not of results.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise ValueError(f"nothing is at {root}: give run folders, folders that hold them, or a results.jsonl")
    inside = [folder for root in roots for folder in searches(root)]  # their trials have a page of their own
    files = [file for root in roots if root.is_dir() for file in sorted(root.rglob("run.json"))
             if not any(folder in file.parents for folder in inside)]  # fmt: skip
    folders = {file.parent.resolve(): file.parent for file in files}
    found = [run for root in roots if root.is_file() for run in _read_results(root)]
    if not folders and not found:
        raise ValueError(
            f"no run found in {', '.join(map(str, roots)) or 'an empty list of folders'}: a run folder "
            "holds run.json, metrics.json and costs.json, and lies at or below the folder given"
            + (f"; {inside[0]} is of trimtab fit: see its report, or give its folder trials" if inside else "")
        )
    omitted = []
    for folder in folders.values():
        try:
            found.append(_read_run(folder))
        except ValueError as error:
            omitted.append(OmittedRun(folder, str(error)))

    latest: dict[tuple[str, str, int], RunRecord] = {}
    for run in sorted(found, key=lambda run: str(run.info.get("started", ""))):
        key = (run.info["name"], run.info["variant"], run.info["seed"])
        if key in latest:
            omitted.append(OmittedRun(latest[key].path, f"repeated later by {run.path}"))
        latest[key] = run
    return list(latest.values()), omitted


def load_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """Read the finished runs at or below some folders, logging a warning for each run left out.

    Args:
        paths: Run folders, or folders that hold them at any depth.

    Returns:
        The finished runs in the order in which they were started.

    Raises:
        ValueError: If one of the folders does not exist, or none of them holds a run.
    """
    runs, omitted = find_runs(paths)
    for run in omitted:
        logger.warning("left out run %s: %s", run.path, run.reason)
    return runs


def _check(info: dict[str, Any], metrics: dict[str, Any]) -> None:
    """A ValueError says why a run with these records cannot be used."""
    if info.get("format", FORMAT) != FORMAT:
        raise ValueError(f"run.json has format {info['format']!r}, this version reads format {FORMAT}")
    if info.get("status") != "finished":
        raise ValueError(f"its status is {info.get('status', 'unknown')!r}, not 'finished'")
    for key, kind, label in (("name", str, "text"), ("variant", str, "text"), ("seed", int, "an integer")):
        if not isinstance(info.get(key), kind):
            raise ValueError(f"run.json should give {label} as {key!r}")

    primary, test = metrics.get("primary"), mapping(metrics.get("test"))
    if not isinstance(primary, str) or number(test.get(primary)) is None:
        raise ValueError(f"metrics.json has no finite test value for its primary metric {primary!r}")


def _read_run(folder: Path) -> RunRecord:
    """Read one run folder; a ValueError says why the run cannot be used."""
    info = _read_json(folder / "run.json", dict)
    metrics = _read_json(folder / "metrics.json", dict) if info.get("status") == "finished" else {}
    _check(info, metrics)

    samples_file, costs_file = folder / "samples" / "samples.json", folder / "costs.json"  # a sweep may leave them out
    samples = _read_json(samples_file, list) if samples_file.exists() else []
    states = _states(folder / "fit.json")
    return RunRecord(
        path=folder,
        info=info,
        metrics=metrics,
        costs=_read_json(costs_file, dict) if costs_file.exists() else {},
        samples=[sample for sample in samples if isinstance(sample, dict)],
        plan=states.get("skip"),
        pruning=_pruning(states.get("prune", {})),
        rows=_rows(folder / "rows.json"),
    )


def _rows(file: Path) -> dict[str, Any]:
    """What each test row gave to the primary metric; nothing where a run does not tell, as of earlier versions."""
    told = _read_json(file, dict) if file.exists() else {}
    for name in ("credits", "pictures"):
        if not isinstance(told.get(name, []), list):
            raise ValueError(f"{file.name} should give a list as {name!r}")
    if "pictures" in told and len(told["pictures"]) != len(told.get("credits", [])):
        raise ValueError(f"{file.name} should give as many 'pictures' as 'credits', found {len(told['pictures'])} and "
                         f"{len(told.get('credits', []))}")  # fmt: skip
    return {**told, "credits": [number(value) for value in told.get("credits", [])]} if told else {}


def write_results(runs: Iterable[RunRecord], file: Path) -> None:
    """Write what a report needs of runs into one file, a JSON object a line; samples and losses are left out."""
    lines = []
    for run in runs:
        metrics = {key: value for key, value in run.metrics.items() if key != "history"}
        kept = {"path": run.path.as_posix(), "info": run.info, "metrics": metrics, "costs": run.costs,
                "plan": run.plan, "pruning": run.pruning, "rows": run.rows}  # fmt: skip
        lines.append(json.dumps(kept, ensure_ascii=False))
    with replace_file(file) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_results(file: Path) -> list[RunRecord]:
    found = []
    for count, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            kept = json.loads(line)
            run = RunRecord(**{**kept, "path": Path(kept["path"])})
            _check(mapping(run.info), mapping(run.metrics))
            found.append(run)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}, line {count}: expected a run as `trimtab report` writes it to results.jsonl ({error})"
            ) from error
    return found


def _states(file: Path) -> dict[str, dict[str, Any]]:
    """What the methods of a run found, by their lever: the plan of a search, what a pruner left of the model."""
    methods = _read_json(file, dict).get("methods") if file.exists() else []
    if not isinstance(methods, list):
        raise ValueError(f"{file.name} should give a list as 'methods'")
    entries = [mapping(method) for method in methods]
    return {str(entry.get("lever")): state for entry in entries if (state := mapping(entry.get("state")))}


def _pruning(state: dict[str, Any]) -> dict[str, Any]:
    """A pruner's state if it says which pruner left how much of which tower; else an empty one."""
    whole = isinstance(state.get("towers"), dict) and number(state.get("sparsity")) is not None and "pruner" in state
    return state if whole else {}


def _read_json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{file.name} does not hold a JSON {'object' if kind is dict else 'array'}")
    return value


def number(value: Any) -> float | None:
    """Return a finite number as it is and anything else as None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def known(values: Iterable[float | None]) -> list[float]:
    """Drop the missing values."""
    return [value for value in values if value is not None]


def mapping(value: Any) -> dict[str, Any]:
    """Return a dict as it is and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def _alike(one: RunRecord, other: RunRecord) -> bool:
    """Whether two runs differ in their seed alone, as far as they tell."""
    told = (one.info.get("recipe"), other.info.get("recipe"))
    return told[0] == told[1] or None in told


def group_runs(runs: Iterable[RunRecord]) -> list[Section]:
    """Group runs into sections by name, and inside a section by variant, in order of first appearance. Seeds of a
    variant with another recipe stand by themselves: their scores have no mean."""
    names: dict[str, dict[str, list[RunRecord]]] = {}
    for run in runs:
        methods = names.setdefault(run.info["name"], {})
        label, number = run.info["variant"], 1
        while label in methods and not _alike(methods[label][0], run):
            number += 1
            label = f"{run.info['variant']} (recipe {number})"
        methods.setdefault(label, []).append(run)
    return [Section(name, methods) for name, methods in names.items()]
