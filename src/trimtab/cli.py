"""The command line. The commands are functions of `commands.py`; help is quick, since nothing slow is imported here."""

from __future__ import annotations

import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab import commands, listing
from trimtab.registry import unknown

DESCRIPTION = (
    "Fit a pretrained vision-language model to a task under a budget: prune weights, skip blocks, tune beside."
)
MANY = ("run", "demo")  # what several processes can do together
OVERRIDES = "changes to the recipe, such as training.steps=100 methods.0.sparsity=0.9 seeds=[0,1,2] variants=[full]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if one of several runs failed, 2 after a message about bad input."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        _parser().print_help()
        return 0
    options = parse(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _one_of_many(options)
    try:
        return options.call(options) or 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("TRIMTAB_DEBUG"):
            raise
        print(f"trimtab {options.command}: {error}", file=sys.stderr)
        return 2


def _one_of_many(options: Namespace) -> int:
    """A command as one of several processes: the first prints, and any of them tells of its own end."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from trimtab.experiments import many

    if options.command not in MANY:
        print(f"trimtab {options.command}: is the work of one process, found WORLD_SIZE={os.environ['WORLD_SIZE']} in "
              f"the environment: several can {' and '.join(MANY)}", file=sys.stderr)  # fmt: skip
        return 2
    many.quiet()
    try:
        return options.call(options) or 0
    except Exception as error:
        many.died(options.command, error)
        if many.left_alone(error):
            return 1
        if os.environ.get("TRIMTAB_DEBUG") or not isinstance(error, (ValueError, ImportError, OSError)):
            raise
        return 2
    finally:
        many.leave()


def parse(words: Sequence[str]) -> Namespace:
    """The options of a command line, in any order; `command` is its name and `call` its function.

    Raises:
        SystemExit: after a message on standard error, or the help.
    """
    known: dict[str, ArgumentParser] = {}
    parser = _parser(known)
    name, *rest = words
    if name.startswith("-"):
        return parser.parse_args(words)
    if name not in known:
        parser.error(unknown("command", name, known))
    # Intermixed: positional arguments may stand between options, so that `RECIPE --json key=value` is understood.
    return known[name].parse_intermixed_args(rest)


class _Help(ArgumentDefaultsHelpFormatter):
    """Help with the defaults of those options that have one."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _parser(known: dict[str, ArgumentParser] | None = None) -> ArgumentParser:
    """The parser of the whole line; the parsers of the commands are put into `known`."""
    parser = ArgumentParser(prog="trimtab", description=DESCRIPTION)
    group = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name: str, call: Callable[[Namespace], int | None], help: str) -> ArgumentParser:
        sub = group.add_parser(name, description=help, help=help, formatter_class=_Help, allow_abbrev=False)
        sub.set_defaults(command=name, call=call)
        if known is not None:
            known[name] = sub
        return sub

    _add_recipe_commands(command)
    _add_model_commands(command)
    _add_data(command)
    _add_list(command)
    return parser


def _add_recipe_commands(command: Callable[..., ArgumentParser]) -> None:
    run = command(
        "run", commands.run, "Carry out a recipe, one run for each of its variants and seeds; finished runs are kept."
    )
    which = "a YAML file, the name of a shipped recipe (`trimtab list recipes`), or a folder of them"
    run.add_argument("recipe", help=which)
    run.add_argument("overrides", nargs="*", help=OVERRIDES)
    run.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders")
    run.add_argument("--redo", action="store_true", help="run again what is finished")

    fit = command(
        "fit", commands.fit, "A budget in, a model out: search prune x skip x tune for the best score that it allows."
    )
    fit.add_argument("model", help="a transformers folder, an official checkpoint file, or a registered backbone")
    fit.add_argument("overrides", nargs="*", help="changes to the recipe of all trials, such as training.steps=300")
    fit.add_argument("--task", required=True, help="name of a task (`trimtab list tasks`)")
    fit.add_argument("--data", required=True, help="rows to train on: a file, a folder, or a source's name")
    fit.add_argument("--test", type=Path, help="rows to report on, beside a file of training rows")
    fit.add_argument("--validation", type=Path, help="rows to choose by; otherwise a tenth of the file is held out")
    fit.add_argument("--budget", required=True, help="limits: 'macs <= -30%%, train memory <= 2 GB, disk <= 5 MB'")
    fit.add_argument("--time", help="for everything, such as 20m")
    fit.add_argument("--trials", type=int, default=24, help="most candidates to try")
    fit.add_argument("--only", default="", help="levers and methods to use, such as skip,lora,unipt")
    fit.add_argument("--without", default="", help="levers and methods to leave out, such as prune,full")
    fit.add_argument("--no-reference", action="store_true", help="do not train full tuning to compare with")
    fit.add_argument("--warm", action="store_true", help="start candidates from the tuned weights of like ones")
    fit.add_argument("--out", type=Path, default=Path("found"), help="folder; an interrupted search goes on there")

    demo = command(
        "demo", commands.demo, "Adapt the built-in models to new tasks with every lever, and write a report."
    )
    demo.add_argument("overrides", nargs="*", help=OVERRIDES)
    demo.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders and of the report")
    demo.add_argument("--redo", action="store_true", help="run again what is finished")

    report = command("report", commands.report, "Write one HTML page and pictures about run folders.")
    where = "run folders, folders that hold them, or a results.jsonl of an earlier report"
    report.add_argument("runs", nargs="+", type=Path, help=where)
    report.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the page")
    report.add_argument("--markdown", action="store_true", help="print the tables as Markdown too")
    watch = "print what runs log while they run, and write the page again as they finish; Ctrl-C ends it"
    report.add_argument("--watch", action="store_true", help=watch)

    plan = command("plan", commands.plan, "Print which blocks a search skips: tower, MACs, gate of each.")
    plan.add_argument("plan", type=Path, help="a run folder, or a plan's JSON file")
    plan.add_argument("--plot", type=Path, help="write a picture of the gates over the search (PNG)")

    cost = command("cost", commands.cost, "What a recipe will cost, without data or weights: parameters, MACs, bytes.")
    cost.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    cost.add_argument("overrides", nargs="*", help=OVERRIDES)
    cost.add_argument("--json", action="store_true", help="print JSON: an object, or a list if there are several runs")


def _add_model_commands(command: Callable[..., ArgumentParser]) -> None:
    export = command(
        "export", commands.export, "Write the backbone of a run as a transformers folder; LoRA is merged, zeros stay."
    )
    export.add_argument("run", type=Path, help="a run folder")
    export.add_argument("folder", type=Path, help="where to write; must not be there yet")
    export.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the weights")
    export.add_argument("--sparse", action="store_true", help="in the sparse layout: only non-zeros are stored")

    convert = command(
        "convert",
        commands.convert,
        "Write a checkpoint folder in another layout, or from a file as its authors published.",
    )
    source = "a transformers folder (safetensors, pytorch_model.bin, or sparse), or an official checkpoint file"
    convert.add_argument("folder", type=Path, help=source)
    convert.add_argument("out", type=Path, help="where to write; must not be there yet")
    layouts = "sparse: bitmasks and packed values, see docs/sparse.md; dense: safetensors as transformers reads them"
    convert.add_argument("--to", choices=["sparse", "dense"], help=f"{layouts} (default for an official file)")
    size = "for an official file: resize its table of positions for square images of so many pixels"
    convert.add_argument("--image-size", type=int, help=size)
    convert.add_argument("--max-shard-size", default="2GB", help="of a weight file, such as 500MB")

    speed = command(
        "speed",
        commands.speed,
        "Which layers of a 2:4-pruned model run faster here with torch's semi-structured kernels.",
    )
    speed.add_argument("model", type=Path, help="a run folder or a transformers folder, sparse or dense")
    speed.add_argument("--tokens", type=int, default=4096, help="rows of the inputs: batch times length")
    speed.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16", help="to compute in")
    speed.add_argument("--json", action="store_true", help="print JSON: an object with a list of layers")

    anatomy = command(
        "anatomy", commands.anatomy, "The towers of a model as methods see them: modality, blocks, widths, parameters."
    )
    anatomy.add_argument("model", help="a registered backbone or a transformers folder")


def _add_data(command: Callable[..., ArgumentParser]) -> None:
    data = command(
        "data", commands.data, "Look at a folder or file of data: what it is, its splits and rows, what is missing."
    )
    data.add_argument("action", choices=["check"], help="what to do with it")
    data.add_argument("path", type=Path, help="a published data set's folder, or own files (see `trimtab list data`)")
    data.add_argument("settings", nargs="*", help="settings of the source, such as form=mdetr columns.captions=text")
    data.add_argument("--source", help="read it as this (`trimtab list data`); otherwise its files tell")
    data.add_argument("--decode", action="store_true", help="decode every picture of a published set (slow)")
    data.add_argument("--picture", type=Path, help="write a page (HTML) with the three samples as pictures")


def _add_list(command: Callable[..., ArgumentParser]) -> None:
    names = command("list", commands.list_, f"What is there: {', '.join(listing.KINDS)} settings.")
    names.add_argument("kind", nargs="?", help=f"one of {', '.join(listing.KINDS)}; all of them if left out")
    names.add_argument("name", nargs="?", help="one of these: its settings, their defaults and meaning")
    names.add_argument("--matrix", action="store_true", help="which method works on which backbone, and why not")
    names.add_argument("--backbone", help="of the matrix: only these, such as 'xvlm*'")
    names.add_argument("--method", help="of the matrix: only these, such as 'unipt'")
    names.add_argument("--markdown", action="store_true", help="print the matrix as Markdown")


if __name__ == "__main__":
    sys.exit(main())
