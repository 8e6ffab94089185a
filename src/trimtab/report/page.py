"""Compare finished runs: a self-contained HTML page, a terminal table and a Markdown table.

A run folder is any folder that holds ``run.json``, with ``metrics.json`` beside it and optionally ``costs.json``,
``fit.json`` and ``samples/samples.json``. Runs of one name make up one section; inside it, runs
that differ only in their seed are averaged into one row.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from trimtab.files import replace_file
from trimtab.report import pictures, plots, sparsity
from trimtab.report.canvas import Style, assign_styles
from trimtab.report.gates import gates_figure
from trimtab.report.runs import (
    COSTS,
    Cost,
    OmittedRun,
    RunRecord,
    Section,
    find_runs,
    group_runs,
    known,
    load_runs,
    mapping,
    number,
    searches,
    write_results,
)
from trimtab.report.tables import (
    DASH,
    column_titles,
    compared,
    digits,
    in_unit,
    markdown_table,
    measured,
    spread,
    summary_table,
    table_rows,
)

__all__ = [
    "OmittedRun",
    "RunRecord",
    "find_runs",
    "load_runs",
    "markdown_table",
    "summary_table",
    "write_report",
]

GALLERY_METHODS = 4
GALLERY_SAMPLES = 6


def write_report(paths: Iterable[Path], out: Path, title: str | None = None) -> Path:
    """Write a page that compares all finished runs at or below some folders.

    The page embeds its figures; the same figures are written beside it as PNG files, and the numbers as
    ``results.jsonl``, one line a run, from which a report can be written again.

    Args:
        paths: Run folders, folders that hold them at any depth, or files named ``results.jsonl``. Of folders of
            `trimtab fit` the page shows what was found, and links to their own pages.
        out: Folder for the page, made if need be.
        title: Heading of the page.

    Returns:
        The path of the page, ``index.html`` in ``out``.

    Raises:
        ImportError: If matplotlib or jinja2 is not installed.
        ValueError: If no finished run was found; the message says why each run was left out.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "trimtab report needs matplotlib and jinja2: pip install -e '.[report]' in trimtab's folder"
        raise ImportError(message) from error

    paths = [Path(path) for path in paths]
    runs, omitted = find_runs(paths)
    if not runs:
        reasons = "; ".join(f"{run.path}: {run.reason}" for run in omitted)
        raise ValueError(f"no finished run in {', '.join(map(str, paths))} ({reasons})")

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sections = group_runs(runs)
    styles = assign_styles(dict.fromkeys(label for section in sections for label in section.methods))
    slugs: set[str] = set()
    views = [_section_view(section, styles, _slug(section.name, slugs)) for section in sections]
    for figure in (figure for view in views for figure in view["figures"]):
        with replace_file(out / figure["file"]) as partial_file:
            partial_file.write_bytes(figure["png"])

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("template.html.j2").render(
        title=title or "trimtab report",
        sections=views,
        styles=styles,
        omitted=omitted,
        searches=list(_searches([folder for path in paths for folder in searches(path)], out)),
        run_count=len(runs),
        origin=_origin(runs),
        command=shlex.join(["trimtab", "report", *map(str, paths)]),
    )
    index = out / "index.html"
    with replace_file(index) as partial_file:
        partial_file.write_text(page, encoding="utf-8")
    write_results(runs, out / "results.jsonl")
    return index


def _searches(folders: Iterable[Path], out: Path) -> Iterator[dict[str, str]]:
    """What the page shows of searches under a budget that came to their end: the sentence, the frontier, a link."""
    for folder in dict.fromkeys(folders):
        told, page = folder / "fit.json", folder / "report" / "index.html"
        if told.is_file() and page.is_file():
            raw = json.loads(told.read_text(encoding="utf-8"))
            link = os.path.relpath(page, out)
            picture = pictures.data_uri((page.parent / "frontier.png").read_bytes())
            yield {"title": raw["title"], "sentence": raw["sentence"], "link": link, "uri": picture}


def _slug(name: str, taken: set[str]) -> str:
    """Turn a name into one fit for files and links, different from those taken."""
    base = slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "section"
    count = 1
    while slug in taken:
        count += 1
        slug = f"{base}-{count}"
    taken.add(slug)
    return slug


def _section_view(section: Section, styles: dict[str, Style], slug: str) -> dict[str, Any]:
    """Gather what the template shows of one section."""
    shown = measured([section])
    beside = compared([section])
    rows = table_rows(section, shown, beside)
    best = [row.variant for row in rows if row.best]
    return {
        "name": section.name,
        "slug": slug,
        "heading": _distinct(section, "recipe_title"),
        "setting": [(key, _distinct(section, key)) for key in ("task", "data", "backbone")],
        "titles": column_titles([section], shown),
        "rows": rows,
        "best": ", ".join(best),
        "caption": _caption(section),
        "footnote": _footnote(section, shown) + (f" {DASH} not measured." if _has_gaps(rows) else ""),
        "figures": _figures(section, styles, slug),
        "gallery": _gallery(section, best[0]),
        "plans": _plans(section),
    }


def _has_gaps(rows: Iterable[Any]) -> bool:
    return any(DASH in row.cells for row in rows)


def _distinct(section: Section, key: str) -> str:
    return ", ".join(dict.fromkeys(str(run.info[key]) for run in section.runs if run.info.get(key)))


def _caption(section: Section) -> str:
    """Say how the scores came about: seeds, averaging, chance."""
    counts = sorted({len(section.scores(variant)) for variant in section.methods} - {0})
    seeds = "1 seed"
    if counts != [1]:
        span = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        seeds = f"mean ± standard deviation over {span} seeds"
    levels = sorted(set(known(number(run.metrics.get("chance")) for run in section.runs)))
    texts = [f"{float(f'{100 * level:.2g}'):g} %" if section.is_fraction else digits(level) for level in levels]
    chance = ", ".join(texts)
    told = ""
    if compared([section]) or any(section.interval(variant) for variant in section.methods):
        told = "in brackets 95 % intervals over test rows, and seeds (of one seed: another may differ more); "
    level = f"chance level {chance}; " if chance else ""
    return f"Test {section.primary}, {seeds}; {told}{level}the best is bold."


def _footnote(section: Section, shown: Sequence[Cost]) -> str:
    """Say what the cost columns count."""
    sizes = {variant: section.costs(variant, "batch_size") for variant in section.methods}
    batches = {variant: f"{values[0]:g}" for variant, values in sizes.items() if values}
    batch = ""
    if len(set(batches.values())) == 1 and len(batches) == len(section.methods):
        batch = f" of {next(iter(batches.values()))} samples"
    elif batches:
        batch = f" (samples: {', '.join(f'{variant} {size}' for variant, size in batches.items())})"
    per = ", ".join(dict.fromkeys(str(run.costs.get("macs_per") or "one sample") for run in section.runs))
    meanings = {
        "saved_activation_bytes": f"Saved activations: what the backward pass of one training batch{batch} keeps in "
        "memory.",
        "macs": f"MACs: for {per}.",
        "nonzero_params": "Weights kept: numbers that no mask makes zero.",
        "latency_ms": f"Latency: the median for {per}.",
        "checkpoint_bytes": "On disk: the saved checkpoint.",
    }
    return " ".join(meanings[cost.key] for cost in shown if cost.key in meanings)


def _figures(section: Section, styles: dict[str, Style], slug: str) -> list[dict[str, Any]]:
    if swept := sparsity.figures(section, slug):  # dozens of variants that cost the same but for their zeros
        return [{**figure, "uri": pictures.data_uri(figure["png"])} for figure in swept]
    figures: list[dict[str, Any]] = []
    if panels := _panels(section):
        figures.append(
            {
                "file": f"{slug}-pareto.png",
                "png": plots.pareto_figure(panels, section.metric_title, styles),
                "alt": f"{section.metric_title} of each method against its costs",
                "caption": "Up and to the left is better. The line joins the methods that no other method beats "
                "on both axes; bars are standard deviations over seeds.",
            }
        )
    curves = {variant: [_losses(run) for run in runs] for variant, runs in section.methods.items()}
    if any(losses for per_seed in curves.values() for losses in per_seed):
        figures.append(
            {
                "file": f"{slug}-loss.png",
                "png": plots.curve_figure(curves, styles),
                "alt": "Training loss of each method",
                "caption": "Training loss, mean over seeds: smoothed (strong) and as logged (faint).",
            }
        )
    scores = {variant: [_validation(run, section) for run in runs] for variant, runs in section.methods.items()}
    if any(curve for per_seed in scores.values() for curve in per_seed):
        figures.append(
            {
                "file": f"{slug}-validation.png",
                "png": plots.curve_figure(scores, styles, f"validation {section.metric_title}", log=False),
                "alt": f"Validation {section.primary} of each method while it trains",
                "caption": "Score on the validation rows, mean over the seeds that were still training.",
            }
        )
    return [{**figure, "uri": pictures.data_uri(figure["png"])} for figure in figures]


def _panels(section: Section) -> list[plots.Panel]:
    """Pair each method's score with each plotted cost that was measured."""
    panels = []
    for cost in (cost for cost in COSTS if cost.plotted):
        points = []
        for variant in section.methods:
            costs, scores = section.costs(variant, cost.key), section.scores(variant)
            if costs and scores:
                point = plots.Point(variant, fmean(costs), fmean(scores), spread(costs), spread(scores))
                points.append(point)
        if points:
            panels.append(plots.Panel(cost.title, points, partial(_tick_text, units=cost.units), cost.log))
    return panels


def _tick_text(value: float, units: tuple[str, ...]) -> str:
    _, unit, factor = in_unit(value, units)
    return f"{value / factor:.6g} {unit}".rstrip()  # not rounded further: ticks may lie close together


def _losses(run: RunRecord) -> dict[float, float]:
    history = run.metrics.get("history")
    entries = [mapping(entry) for entry in history] if isinstance(history, list) else []
    pairs = [(number(entry.get("step")), number(entry.get("loss"))) for entry in entries]
    return {step: loss for step, loss in pairs if step is not None and loss is not None}


def _validation(run: RunRecord, section: Section) -> dict[float, float]:
    """The scores of a run while it trained, in the units of the table."""
    entries = mapping(run.metrics.get("validation")).get("scores")
    found = [mapping(entry) for entry in entries] if isinstance(entries, list) else []
    pairs = [(number(entry.get("step")), number(entry.get(section.primary))) for entry in found]
    scale = 100 if section.is_fraction else 1
    return {step: scale * score for step, score in pairs if step is not None and score is not None}


def _gallery(section: Section, best: str) -> dict[str, Any] | None:
    """Line up the first samples of a few methods: the first, the best and others in order."""
    shown = {}
    for variant, runs in section.methods.items():
        # One seed may see samples in another order than the next: all methods show their lowest.
        if with_samples := [run for run in runs if run.samples]:
            shown[variant] = min(with_samples, key=lambda run: run.info["seed"])
    if not shown:
        return None
    wanted = dict.fromkeys([next(iter(shown)), best, *shown])
    chosen = [variant for variant in wanted if variant in shown][:GALLERY_METHODS]
    chosen.sort(key=list(shown).index)
    runs = [shown[label] for label in chosen]
    queries = [_query(sample) for sample in runs[0].samples[:GALLERY_SAMPLES]]
    samples = [sample for run in runs for sample in run.samples[:GALLERY_SAMPLES]]
    return {
        "queries": queries,
        "rows": [
            {"variant": label, "seed": run.info["seed"], "cells": _gallery_cells(run, queries)}
            for label, run in zip(chosen, runs, strict=True)
        ],
        "boxes": any(sample.get("box_target") or sample.get("box_predicted") for sample in samples),
    }


def _gallery_cells(run: RunRecord, queries: list[str]) -> list[dict[str, Any]]:
    """Describe a method's samples; one whose query is not its column's states its own."""
    folder = run.path / "samples"
    cells = []
    for index, sample in enumerate(run.samples[:GALLERY_SAMPLES]):
        query, ranked = _query(sample), sample.get("images")
        cells.append(
            {
                "query": None if [query] == queries[index : index + 1] else query,
                "prediction": sample.get("prediction"),
                "target": sample.get("target"),
                "correct": sample.get("correct"),
                "picture": pictures.sample_picture(folder, sample),
                "ranked": pictures.thumbnails(folder, ranked if isinstance(ranked, list) else []),
            }
        )
    return cells


def _query(sample: dict[str, Any]) -> str:
    return str(sample.get("query") or "")


def _plans(section: Section) -> list[dict[str, Any]]:
    """List the plans found, seeds that agree on one together."""
    seeds: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
    figures: dict[tuple[str, tuple[str, ...], int], bytes | None] = {}
    for label, run in ((label, run) for label, runs in section.methods.items() for run in runs):
        if run.plan is not None:
            skip, candidates = (_texts(run.plan.get(key)) for key in ("skip", "candidates"))
            key = (label, skip, len(candidates))
            seeds.setdefault(key, []).append(run.info["seed"])
            if key not in figures:  # of the first seed with this plan
                figures[key] = gates_figure(run.plan)
    return [
        {
            "method": key[0],
            "seeds": ", ".join(map(str, agreeing)),
            "skipped": key[1],
            "candidates": key[2],
            "gates": (png := figures[key]) and pictures.data_uri(png),
        }
        for key, agreeing in seeds.items()
    ]


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(str, values)) if isinstance(values, (list, dict)) else ()


def _origin(runs: list[RunRecord]) -> dict[str, str]:
    """Sum up what the runs came from: library versions, code and seeds."""
    versions: dict[str, dict[str, None]] = {}
    commits: dict[str, None] = {}
    for run in runs:
        for package, version in mapping(run.info.get("versions")).items():
            versions.setdefault(package, {})[str(version)] = None
        git = mapping(run.info.get("git"))
        if git.get("commit"):
            commits[f"{str(git['commit'])[:12]}{' (dirty)' if git.get('dirty') else ''}"] = None
    packages = [f"{package} {' / '.join(found)}" for package, found in versions.items()]
    return {
        "versions": ", ".join(packages) or DASH,
        "git commit": ", ".join(commits) or DASH,
        "seeds": ", ".join(map(str, sorted({run.info["seed"] for run in runs}))),
    }
