"""What the commands of the command line do. Everything slow (torch, transformers) is imported inside of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from trimtab import listing

DEMO = ("demo/retrieval", "demo/grounding", "demo/vqa")  # the last shows the levers composed


def run(options: Namespace) -> int:
    from trimtab.experiments import recipe

    _, failed = _carry_out(recipe.below(options.recipe), options.overrides, options.out, options.redo)
    return int(failed)


def fit(options: Namespace) -> None:
    _quiet()
    from trimtab.budgets.fit import fit as find

    only, without = ([x.strip() for x in text.split(",") if x.strip()] for text in (options.only, options.without))
    found = find(options.model, options.task, options.data, budget=options.budget, test=options.test,
                 validation=options.validation, time=options.time, out=options.out, only=only, without=without,
                 trials=options.trials, overrides=options.overrides, reference=not options.no_reference,
                 warm=options.warm)  # fmt: skip
    print(found)
    print(f"model: {found.model}; again: trimtab run {found.folder / 'found.yaml'}; page: {found.folder}/report")


def demo(options: Namespace) -> int:
    folders, failed = _carry_out(list(DEMO), options.overrides, options.out, options.redo)
    from trimtab.experiments import many
    from trimtab.report.page import write_report

    found = options.out / "demo" / "fit"
    if many.started() == 1:  # the trials of a search run in one process
        from trimtab.budgets import demo
        from trimtab.budgets.limits import BudgetError

        try:
            print(f"demo/fit: {demo.search(found, options.overrides, options.redo)}")
        except BudgetError as error:  # on a slow machine, say: what was shown so far stands
            print(f"demo/fit: nothing found: {error}", file=sys.stderr)
        except (ValueError, ImportError) as error:
            failed = True
            print(f"demo/fit: failed: {error}", file=sys.stderr)
    there = [found] if found.is_dir() else []
    if folders and many.is_first():
        print(f"report: {write_report([*folders, *there], options.out / 'report', 'trimtab demo')}")
    return int(failed)


def _carry_out(recipes: list[str], overrides: list[str], out: Path, redo: bool) -> tuple[list[Path], bool]:
    """Run everything that recipes stand for; prints a line a run and the table of each recipe.

    One of several runs that fails does not keep the others from running, in one process or in many; those that failed
    are listed at the end. A run that another process is working on is left out, and looked at once more at the end: the
    same command, started twice, divides them. A run by itself raises what it fails with, and so does one with divided
    weights in several processes, which then end.

    Returns:
        The folders of the finished runs, and whether one failed or is not finished.
    """
    from rich.console import Console

    from trimtab.experiments import recipe as recipe_module

    console = Console()
    todo = [r for name in recipes for r in recipe_module.read(name, overrides)]  # all are checked before the first runs
    with console.status("loading torch and transformers"):
        _quiet()
        from trimtab.experiments import assembly, many
        from trimtab.experiments import folder as runs
        from trimtab.experiments.run import run as carry_out
        from trimtab.report.page import load_runs, summary_table

        many.join()
        for r in todo:
            assembly.check(r)
    done: dict[Path, str] = {}
    failed: dict[str, str] = {}
    busy: dict[int, str] = {}
    queue = list(enumerate(todo, 1))
    while queue:
        number, r = queue.pop(0)
        folder = out / r.name / f"{r.variant}-seed{r.seed}"
        label = f"[{number}/{len(todo)}] {r.name} {r.variant} seed {r.seed}"
        fresh = many.first_says((redo and number not in busy) or not runs.is_finished(folder, r))
        why, alone = None, False
        try:
            if fresh:
                carry_out(r, folder)
        except runs.BusyError as error:
            if len(todo) == 1:
                raise
            print(f"{label}: left out: {error}", file=sys.stderr, flush=True)
            if number not in busy:  # looked at once more when all others are done
                queue.append((number, r))
            busy[number] = label
            continue
        except Exception as error:
            # What divides a model keeps the connections open on which others would wait: all end together.
            whole = not r.training.shard or many.started() == 1
            if len(todo) == 1 or not whole or os.environ.get("TRIMTAB_DEBUG"):
                raise
            alone = many.left_alone(error)
            why = "another process has ended the run" if alone else _reason(error)
        busy.pop(number, None)
        if len(todo) > 1 and (why := many.agreed(number, why, alone)):
            failed[label] = why
            if many.is_first():
                print(f"{label}: failed: {why}", file=sys.stderr, flush=True)
            continue
        done[folder] = r.name
        console.print(f"{label}: {_outcome(folder, None if fresh else runs.newer(folder, r), fresh)}", highlight=False)
    for name in dict.fromkeys(done.values()):
        console.print(summary_table(load_runs(p for p, other in done.items() if other == name)))
    if failed and many.is_first():
        _list(f"{len(failed)} of {len(todo)} runs failed:", [f"{label}: {why}" for label, why in failed.items()])
    if busy:
        _list(f"{len(busy)} of {len(todo)} runs are another process's work, and not finished:", busy.values())
    return list(done), bool(failed or busy)


def _outcome(folder: Path, newer: Path | None, fresh: bool) -> str:
    """A finished run in a line: its score, its seconds, and whether what it was made from has changed since."""
    result, info = (json.loads((folder / f).read_text()) for f in ("metrics.json", "run.json"))
    value = result["test"][result["primary"]]
    score = f"{result['primary']} {100 * value:.1f} %" if 0 <= value <= 1 else f"{result['primary']} {value:.3g}"
    told = f", {info['seconds']:.0f} s" if fresh else ", kept"
    return score + told + (f" (it is older than {newer}: --redo runs it again)" if newer is not None else "")


def _list(title: str, lines: Iterable[str]) -> None:
    print(title, *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)


def _reason(error: Exception) -> str:
    """Why a run failed, in a line; what nobody has foreseen is printed with the place where it came from."""
    if not isinstance(error, (ValueError, ImportError, OSError)):
        traceback.print_exception(error)
        return f"{type(error).__name__}: {error}"
    return str(error)


def report(options: Namespace) -> None:
    from trimtab.report.page import load_runs, markdown_table, write_report

    if options.watch:
        from trimtab.report.watch import watch

        with contextlib.suppress(KeyboardInterrupt):
            watch(options.runs, lambda: print(f"report: {write_report(options.runs, options.out)}", flush=True))
        return
    page = write_report(options.runs, options.out)
    if options.markdown:
        print(markdown_table(load_runs(options.runs)))
    print(f"report: {page}")


def export(options: Namespace) -> None:
    _quiet()
    from trimtab.experiments.folder import export

    print(f"wrote {export(options.run, options.folder, options.dtype, options.sparse)}")


def convert(options: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
    from trimtab.backbones import convert_official
    from trimtab.storage.checkpoints import convert

    if options.folder.is_file():
        settings = {} if options.image_size is None else {"image_size": options.image_size}
        to = options.to or "dense"
        done, report = convert_official(options.folder, options.out, to == "sparse", options.max_shard_size, **settings)
        print(report)
    elif not options.folder.exists():
        raise ValueError(f"{options.folder}: there is no such file or folder")
    elif options.to is None:
        raise ValueError(f"{options.folder}: name the layout to write, --to sparse or --to dense")
    else:
        to = options.to
        done = convert(options.folder, options.out, to, options.max_shard_size)
    sizes, before = done.sizes, done.bytes_before
    row = {
        "tensors": sizes.tensors, "stored sparse": sizes.packed, "weights": sizes.weights, "non-zeros": sizes.nonzeros,
        "bytes before": before, "bytes after": sizes.file_bytes, "ratio": sizes.file_bytes / max(before, 1),
    }  # fmt: skip
    table = Table(title=f"{options.out}: {to}")
    for column in row:
        table.add_column(column, justify="right")
    table.add_row(*(f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in row.values()))
    Console().print(table)


def data(options: Namespace) -> None:
    from rich.console import Console

    from trimtab.data import shown
    from trimtab.data.check import check
    from trimtab.settings import from_texts

    found = check(options.path, options.source, from_texts(options.settings), decode=options.decode)
    shown.tell(found, Console())
    if options.picture:
        rows = [(f"{f.source} {i + 1}", row) for f in found for i, row in enumerate(f.samples)]
        options.picture.write_text(shown.page(rows, f"{options.path}"), encoding="utf-8")
        print(f"samples: {options.picture}")


def speed(options: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
    import torch

    from trimtab import speed as semistructured
    from trimtab.backbones import from_pretrained
    from trimtab.experiments import folder as runs

    is_run = (options.model / "run.json").is_file()
    model = runs.load(options.model).backbone.model if is_run else from_pretrained(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = semistructured.speed_up(model.to(device, getattr(torch, options.dtype)), options.tokens)
    if options.json:
        print(json.dumps({"device": report.device, "tokens": report.tokens, "layers": report.rows()}, indent=1))
        return
    table = Table(title=f"{options.model}: {options.tokens} tokens in {options.dtype} on {report.device}")
    for column in ("layer", "weight", "zeros", "dense ms", "2:4 ms", "ratio", "faster kernel"):
        table.add_column(column, justify="left" if column in ("layer", "faster kernel") else "right")
    for x in report.layers:
        timed = [f"{v:.3f}" if v is not None else "-" for v in (x.dense_ms, x.sparse_ms, x.ratio)]
        shape = "x".join(map(str, x.shape))
        table.add_row(x.path, shape, f"{100 * x.zeros:.1f} %", *timed, "yes" if x.converted else x.why)
    Console().print(table)
    print(f"{len(report.converted)} of {len(report.layers)} linear layers run faster; nothing was written")


def plan(options: Namespace) -> None:
    from rich.console import Console

    _quiet()
    from trimtab.methods.skip.plan import Plan, read_raw

    raw, where = read_raw(options.plan)
    Console().print(Plan.from_dict(raw, where).table())
    if options.plot:
        from trimtab.report.gates import gates_figure

        picture = gates_figure(raw)
        if picture is None:
            raise ValueError(f"{where}: holds no course of a search to draw (its method did not search in steps)")
        options.plot.write_bytes(picture)
        print(f"gates: {options.plot}")


def cost(options: Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from trimtab.experiments import recipe

    recipes = {r.variant: r for r in reversed(recipe.read(options.recipe, options.overrides))}  # seeds cost the same
    _quiet()
    from trimtab.experiments import estimate as cost

    found = [{"variant": r.variant, **cost.estimate(r)} for r in reversed(recipes.values())]
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
        return
    from trimtab.report.runs import BYTES, COUNTS
    from trimtab.report.tables import amount

    columns = {
        "params": ("params", COUNTS), "nonzero_params": ("not zero", COUNTS), "trainable_params": ("trained", COUNTS),
        "macs": ("MACs", COUNTS), "saved_activation_bytes": ("saved", BYTES),
        "training_peak_bytes": ("peak", BYTES), "checkpoint_bytes": ("on disk", BYTES),
    }  # fmt: skip
    first = found[0]
    dense = f"dense: {amount(first['dense_params'], COUNTS)} numbers, {amount(first['dense_macs'], COUNTS)} MACs"
    table = Table(
        title=f"{options.recipe}: before any data or weights; {dense}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", overflow="fold")  # where a line is too short for all, numbers stay whole
    for title, _ in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in found:
        table.add_row(row["variant"], *(amount(row[key], units) for key, (_, units) in columns.items()))
    Console().print(table)
    print(f"MACs: one sample, one multiply-add = 1; saved and peak: bytes of a training batch of {first['batch_size']}")
    for note in dict.fromkeys(note for row in found for note in row["assumes"]):
        print(f"assumes {note}")


def anatomy(options: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
    from trimtab.anatomy.weights import left_whole
    from trimtab.backbones import load_model

    model, anatomy = load_model(options.model)
    table = Table(title=f"{options.model}: {type(model).__name__}, {anatomy.source}")
    columns = ("tower", "modality", "layout", "blocks", "widths", "params", "share", "prunable")
    for column in columns:
        right = column in ("blocks", "params", "share", "prunable")
        table.add_column(column.replace("_", " "), justify="right" if right else "left", no_wrap=True)
    for row in anatomy.rows(model):
        shown = {**row, "share": f"{100 * row['share']:.1f} %"}
        table.add_row(*(f"{shown[c]:,}" if isinstance(shown[c], int) else str(shown[c]) for c in columns))
    Console().print(table)
    for kind in left_whole(anatomy, model):
        print(f"never pruned: {kind}")
    for tower in anatomy.towers:
        how = "seen" if anatomy.seen else "described"
        print(f"{tower.name}: {tower.blocks[0].path} ... {tower.blocks[-1].path}; {how}: {tower.told()}")
    if anatomy.severed:
        print(f"no gradient reaches: {', '.join(anatomy.severed)}")
    for sentence in anatomy.unknown():
        print(f"unknown: {sentence}")


def list_(options: Namespace) -> None:
    if not options.matrix:
        if given := [f"--{n}" for n in ("backbone", "method", "markdown") if getattr(options, n)]:
            raise ValueError(f"{given[0]} is for the matrix: trimtab list --matrix {given[0]} ...")
        listing.check(options.kind)
    _quiet()
    if options.matrix:
        from trimtab import matrix

        matrix.show(matrix.find(options.backbone, options.method), options.markdown)
        if not (options.backbone or options.method):
            matrix.show_together(options.markdown)
    else:
        listing.show(options.kind, options.name)


def _quiet() -> None:
    """Keep libraries from talking over our own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    import datasets

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="torch")
    logging.getLogger("transformers").setLevel(logging.ERROR)
