"""The seam stands low: its files import each other in one direction, and of trimtab only what lies below."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import trimtab.anatomy

FOLDER = Path(trimtab.anatomy.__file__).parent
BELOW = {"trimtab.registry", "trimtab.files", "trimtab.randomness"}


def imported(file: Path) -> set[str]:
    """Modules of trimtab that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "trimtab"}


def named(file: Path) -> str:
    return ".".join(("trimtab.anatomy", *file.relative_to(FOLDER).with_suffix("").parts))


def test_imports_point_one_way():
    files = {named(f): imported(f) for f in FOLDER.rglob("*.py") if f.stem != "__init__" or f.parent == FOLDER}
    own = {name: used - BELOW for name, used in files.items()}
    assert {used for name in own for used in own[name]} <= set(files)
    order = list(TopologicalSorter(own).static_order())  # CycleError if there is a circle
    assert order[-1] == "trimtab.anatomy.__init__"
