"""What can be told from a model's module tree alone: its lists of repeated blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def repeated(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Outermost lists of two or more modules of one class that hold weights: (path, paths of the children)."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f + ".") for f in found):
            continue
        children = [(f"{path}.{n}".lstrip("."), c) for n, c in module.named_children()]
        kinds = {type(c) for _, c in children}
        weighty = any(_matrices(m) for _, c in children for m in list(c.modules())[1:])
        if len(children) >= 2 and len(kinds) == 1 and weighty:
            found.append(path)
            yield path, [p for p, _ in children]


def _matrices(module: nn.Module) -> bool:
    """Whether a module multiplies by weights: linear, convolution, or transformers' transposed linear (`Conv1D`)."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted path is one of `prefixes`, or stands below one."""
    return any(path == p or path.startswith(p + ".") for p in prefixes)
