"""The command line. Everything slow (torch, transformers) is imported inside the commands, so that help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

DESCRIPTION = (
    "Fit a pretrained vision-language model to a task under a budget: prune weights, skip blocks, tune beside."
)
OVERRIDES = "changes to the recipe, such as training.steps=100 methods.0.sparsity=0.9 seeds=[0,1,2] variants=[full]"
DEMO = ("demo/retrieval", "demo/vqa", "demo/grounding", "demo/easy-vqa")
KINDS = ("methods", "backbones", "architectures", "tasks", "data", "recipes", "training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 after a message about bad input."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return 0
    options = parser.parse_args(_options_first(sys.argv[1:] if arguments is None else arguments))
    command = options.subcommand
    try:
        return globals()[f"_{command}"](options[command]) or 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("TRIMTAB_DEBUG"):
            raise
        print(f"trimtab {command}: {error}", file=sys.stderr)
        return 2


def _options_first(arguments: Sequence[str]) -> list[str]:
    """The command, then its options, then the rest: argparse takes no more of a list after an option."""
    command, options, rest = list(arguments[:1]), [], []
    words = iter(arguments[1:])
    for word in words:
        if word in (
            "--out",
            "--dtype",
            "--to",
            "--max-shard-size",
            "--tokens",
            "--image-size",
            "--plot",
            "--backbone",
            "--method",
        ):
            options += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (options if word.startswith("-") else rest).append(word)
    return command + options + rest


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="trimtab", description=DESCRIPTION)
    commands = parser.add_subcommands(metavar="COMMAND", title="commands")

    def command(name: str, help: str) -> ArgumentParser:
        sub = ArgumentParser(description=help)
        commands.add_subcommand(name, sub, help=help.splitlines()[0])
        return sub

    run = command("run", "Carry out a recipe, one run for each of its variants and seeds; finished runs are kept.")
    which = "a YAML file, the name of a shipped recipe (`trimtab list recipes`), or a folder of them"
    run.add_argument("recipe", type=str, help=which)
    run.add_argument("overrides", nargs="*", type=str, help=OVERRIDES)
    run.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders")
    run.add_argument("--redo", action="store_true", help="run again what is finished")

    demo = command("demo", "Adapt the built-in models to new tasks with every lever, and write a report.")
    demo.add_argument("overrides", nargs="*", type=str, help=OVERRIDES)
    demo.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders and of the report")
    demo.add_argument("--redo", action="store_true", help="run again what is finished")

    report = command("report", "Write one HTML page and pictures about run folders.")
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="run folders, folders that hold them, or a results.jsonl of an earlier report",
    )
    report.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the page")
    report.add_argument("--markdown", action="store_true", help="print the tables as Markdown too")

    export = command("export", "Write the backbone of a run as a transformers folder; LoRA is merged, zeros stay.")
    export.add_argument("run", type=Path, help="a run folder")
    export.add_argument("folder", type=Path, help="where to write; must not be there yet")
    export.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the weights")
    export.add_argument("--sparse", action="store_true", help="in the sparse layout: only non-zeros are stored")

    convert = command(
        "convert", "Write a checkpoint folder in another layout, or from a file as its authors published."
    )
    source = "a transformers folder (safetensors, pytorch_model.bin, or sparse), or an official checkpoint file"
    convert.add_argument("folder", type=Path, help=source)
    convert.add_argument("out", type=Path, help="where to write; must not be there yet")
    layouts = "sparse: bitmasks and packed values, see docs/sparse.md; dense: safetensors as transformers reads them"
    convert.add_argument("--to", choices=["sparse", "dense"], help=f"{layouts} (default for an official file)")
    size = "for an official file: resize its table of positions for square images of so many pixels"
    convert.add_argument("--image-size", type=int | None, default=None, help=size)
    convert.add_argument("--max-shard-size", type=str, default="2GB", help="of a weight file, such as 500MB")

    speed = command("speed", "Which layers of a 2:4-pruned model run faster here with torch's semi-structured kernels.")
    speed.add_argument("model", type=Path, help="a run folder or a transformers folder, sparse or dense")
    speed.add_argument("--tokens", type=int, default=4096, help="rows of the inputs: batch times length")
    speed.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16", help="to compute in")
    speed.add_argument("--json", action="store_true", help="print JSON: an object with a list of layers")

    plan = command("plan", "Print which blocks a search skips: tower, MACs, gate of each.")
    plan.add_argument("plan", type=Path, help="a run folder, or a plan's JSON file")
    plan.add_argument("--plot", type=Path, help="write a picture of the gates over the search (PNG)")

    cost = command("cost", "What a recipe will cost, without data or weights: parameters, MACs, bytes.")
    cost.add_argument("recipe", type=str, help="a YAML file or the name of a shipped recipe")
    cost.add_argument("overrides", nargs="*", type=str, help=OVERRIDES)
    cost.add_argument("--json", action="store_true", help="print JSON: an object, or a list if there are several runs")

    anatomy = command("anatomy", "The towers of a model as methods see them: modality, blocks, widths, parameters.")
    anatomy.add_argument("model", type=str, help="a registered backbone or a transformers folder")

    names = command(
        "list", "What is there: methods, backbones, architectures, tasks, data, recipes, training settings."
    )
    names.add_argument("kind", nargs="?", type=str, help=f"one of {', '.join(KINDS)}; all of them if left out")
    names.add_argument("name", nargs="?", type=str, help="one of these: its settings, their defaults and meaning")
    names.add_argument("--matrix", action="store_true", help="which method works on which backbone, and why not")
    names.add_argument("--backbone", type=str | None, default=None, help="of the matrix: only these, such as 'xvlm*'")
    names.add_argument("--method", type=str | None, default=None, help="of the matrix: only these, such as 'unipt'")
    names.add_argument("--markdown", action="store_true", help="print the matrix as Markdown")
    return parser


def _run(options: Any) -> None:
    from trimtab.experiments import recipe

    _carry_out(recipe.below(options.recipe), options.overrides, options.out, options.redo)


def _demo(options: Any) -> None:
    folders = _carry_out(list(DEMO), options.overrides, options.out, options.redo)
    from trimtab.report.page import write_report

    print(f"report: {write_report(folders, options.out / 'report', 'trimtab demo')}")


def _carry_out(recipes: list[str], overrides: list[str], out: Path, redo: bool) -> list[Path]:
    """Run everything that recipes stand for; prints a line a run and the table of each recipe."""
    from rich.console import Console

    from trimtab.experiments import recipe as recipe_module

    console = Console()
    todo = [r for name in recipes for r in recipe_module.read(name, overrides)]  # all are checked before the first runs
    with console.status("loading torch and transformers"):
        _quiet()
        from trimtab.experiments import run as run_module
        from trimtab.report.page import load_runs, summary_table

        for r in todo:
            run_module.check(r)
    done: list[Path] = []
    for number, r in enumerate(todo, 1):
        folder = out / r.name / f"{r.variant}-seed{r.seed}"
        label = f"[{number}/{len(todo)}] {r.name} {r.variant} seed {r.seed}"
        fresh = redo or not run_module.is_finished(folder, r)
        if fresh:
            run_module.run(r, folder)
        done.append(folder)
        result, info = (json.loads((folder / f).read_text()) for f in ("metrics.json", "run.json"))
        score = f"{result['primary']} {100 * result['test'][result['primary']]:.1f} %"
        console.print(f"{label}: {score}" + (f", {info['seconds']:.0f} s" if fresh else ", kept"), highlight=False)
    for name in dict.fromkeys(r.name for r in todo):
        console.print(summary_table(load_runs(p for p, r in zip(done, todo, strict=True) if r.name == name)))
    return done


def _report(options: Any) -> None:
    from trimtab.report.page import load_runs, markdown_table, write_report

    page = write_report(options.runs, options.out)
    if options.markdown:
        print(markdown_table(load_runs(options.runs)))
    print(f"report: {page}")


def _export(options: Any) -> None:
    _quiet()
    from trimtab.experiments.run import export

    print(f"wrote {export(options.run, options.folder, options.dtype, options.sparse)}")


def _convert(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
    from trimtab.storage.checkpoints import convert, convert_official

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


def _speed(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
    import torch

    from trimtab import speed as semistructured
    from trimtab.experiments import run
    from trimtab.storage.checkpoints import from_pretrained

    is_run = (options.model / "run.json").is_file()
    model = run.load(options.model).backbone.model if is_run else from_pretrained(options.model)
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


def _plan(options: Any) -> None:
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


def _cost(options: Any) -> None:
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
    table = Table(title=f"{options.recipe}: before any data or weights")
    for column in found[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "variant" else "right")
    for row in found:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console().print(table)
    print("MACs: one sample, one multiply-add = 1; saved activation bytes: one training batch of `batch size` rows")


def _anatomy(options: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    _quiet()
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
    for tower in anatomy.towers:
        first, last = tower.blocks[0].path, tower.blocks[-1].path
        print(f"{tower.name}: {first} ... {last}, handed on at {tower.output.path}")


def _list(options: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from trimtab.registry import unknown

    console = Console()
    if options.matrix:
        _quiet()
        from trimtab import matrix

        return matrix.show(matrix.find(options.backbone, options.method), options.markdown)
    if given := [f"--{n}" for n in ("backbone", "method", "markdown") if getattr(options, n)]:
        raise ValueError(f"{given[0]} is for the matrix: trimtab list --matrix {given[0]} ...")
    if options.kind and options.kind not in KINDS:
        raise ValueError(unknown("kind", options.kind, KINDS))
    _quiet()
    for kind in (options.kind,) if options.kind else KINDS:
        entries = _entries(kind)
        if options.name:
            if options.name not in entries:
                raise ValueError(unknown(kind.removesuffix("s"), options.name, entries))
            console.print(_settings(options.name, entries[options.name]))
            continue
        if kind == "training":
            console.print(_settings("training", entries["training"]))
            continue
        table = Table(title=kind, title_justify="left", show_header=False)
        for name, item in entries.items():
            table.add_row(name, escape(_first_line(item)))
        console.print(table)


def _entries(kind: str) -> dict[str, Any]:
    """Name -> what is registered under it (for recipes: the first line of the file's text)."""
    from trimtab.experiments import recipe

    if kind == "recipes":
        return {name: recipe.title(name) for name in recipe.names()}
    if kind == "training":
        return {"training": recipe.TrainingSpec, "backbone": recipe.BackboneSpec}
    from trimtab import backbones, methods, tasks
    from trimtab.data.sources import SOURCES

    registries: dict[str, Any] = {
        "methods": methods.METHODS, "backbones": backbones.BACKBONES, "architectures": backbones.ARCHITECTURES,
        "tasks": tasks.TASKS, "data": SOURCES,
    }  # fmt: skip
    return dict(registries[kind].items())


def _first_line(item: Any) -> str:
    text = item if isinstance(item, str) else (item.__doc__ or "")
    lever = f"{item.lever}: " if hasattr(item, "lever") else ""
    return lever + text.strip().split("\n\n")[0].replace("\n    ", " ")


def _settings(name: str, item: Any) -> Any:
    """A table of settings with defaults and meaning, from the dataclass that defines them."""
    from docstring_parser import parse_from_object
    from rich.table import Table

    from trimtab.experiments.recipe import defaults

    if isinstance(item, str):
        return f"{name}: {item}"
    source = getattr(item, "Settings", item)
    meaning = {p.arg_name: p.description for kind in reversed(source.__mro__[:-1] if isinstance(source, type) else ())
               for p in parse_from_object(kind).params}  # fmt: skip
    table = Table(title=f"{name}: {_first_line(item)}", title_justify="left")
    for column in ("setting", "default", "meaning"):
        table.add_column(column)
    for key, value in defaults(source).items():
        table.add_row(key, "required" if value is None and key in ("name",) else str(value), meaning.get(key) or "")
    return table


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


if __name__ == "__main__":
    sys.exit(main())
