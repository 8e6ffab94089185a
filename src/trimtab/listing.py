"""What is there: everything registered under a name, as tables with settings, defaults and meaning."""

from __future__ import annotations

import inspect
from typing import Any

from trimtab.registry import unknown

KINDS = ("methods", "backbones", "architectures", "tasks", "data", "recipes", "training")


def check(kind: str | None) -> None:
    """Raise a ValueError with the nearest kinds unless there is such a kind; None stands for all of them."""
    if kind and kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))


def entries(kind: str) -> dict[str, Any]:
    """Name -> what is registered under it (for recipes: their title)."""
    from trimtab.experiments import recipe, schema

    if kind == "recipes":
        return {name: recipe.title(name) for name in recipe.names()}
    if kind == "training":
        return {"training": schema.TrainingSpec, "backbone": schema.BackboneSpec}
    from trimtab import backbones, methods, tasks
    from trimtab.data.sources import SOURCES

    registries: dict[str, Any] = {
        "methods": methods.METHODS, "backbones": backbones.BACKBONES, "architectures": backbones.ARCHITECTURES,
        "tasks": tasks.TASKS, "data": SOURCES,
    }  # fmt: skip
    return dict(registries[kind].items())


def show(kind: str | None = None, name: str | None = None) -> None:
    """Print the names of a kind, or of all kinds; or the settings of one name.

    Raises:
        ValueError: if there is no such kind or name, with the nearest.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    check(kind)
    console = Console()
    for each in (kind,) if kind else KINDS:
        found = entries(each)
        if name:
            if name not in found:
                raise ValueError(unknown(each.removesuffix("s"), name, found))
            console.print(_settings(name, found[name]))
        elif each == "training":
            console.print(_settings("training", found["training"]))
        else:
            table = Table(title=each, title_justify="left", show_header=False)
            for entry, item in found.items():
                table.add_row(entry, escape(_first_line(item)))
            console.print(table)


def _first_line(item: Any) -> str:
    text = item if isinstance(item, str) else (item.__doc__ or "")
    lever = f"{item.lever}: " if hasattr(item, "lever") else ""
    return lever + text.strip().split("\n\n")[0].replace("\n    ", " ")


def _settings(name: str, item: Any) -> Any:
    """A table of settings with defaults and meaning, from the class that defines them."""
    from docstring_parser import parse_from_object
    from rich.table import Table

    if isinstance(item, str):
        return f"{name}: {item}"
    source = getattr(item, "Settings", item)
    meaning = {p.arg_name: p.description for kind in reversed(source.__mro__[:-1] if isinstance(source, type) else ())
               for p in parse_from_object(kind).params}  # fmt: skip
    table = Table(title=f"{name}: {_first_line(item)}", title_justify="left")
    for column in ("setting", "default", "meaning"):
        table.add_column(column)
    for key, parameter in inspect.signature(source).parameters.items():
        default = "required" if parameter.default is parameter.empty else str(parameter.default)
        table.add_row(key, default, meaning.get(key) or "")
    return table
