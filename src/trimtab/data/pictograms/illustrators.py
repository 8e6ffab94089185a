"""Drawings of further illustrators, for pretraining alone: Google's Noto, and Microsoft's Fluent in colour and black.

They come as npm packages of Iconify (a tar file that holds SVG in JSON), which npm fetches and nothing installs:

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji-high-contrast

Noto is under Apache-2.0, Fluent under MIT. Whoever only uses the models needs none of them.
"""

from __future__ import annotations

import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.files import cache_dir

ILLUSTRATORS = ("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast")


def package(illustrator: str) -> Path:
    """The newest tar file of an illustrator in the folder `art` of the cache folder.

    Raises:
        FileNotFoundError: if there is none; it says how to fetch it.
    """
    folder = cache_dir() / "art"
    found = sorted(folder.glob(f"iconify-json-{illustrator}-[0-9]*.tgz"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"{folder}: no drawings of {illustrator!r} are there; fetch them with "
            f"`mkdir -p {folder} && npm pack @iconify-json/{illustrator} --pack-destination {folder}`"
        )
    return found[-1]


def svg(illustrator: str, code: str) -> str | None:
    """An illustrator's drawing of a thing as an SVG document; None if there is none.

    Args:
        illustrator: name in `ILLUSTRATORS`.
        code: Unicode code points as in `Concept.code`.

    Raises:
        FileNotFoundError: if the package is not there, see `package`.
        ValueError: if it is not one of Iconify's.
    """
    names, icons = _read(package(illustrator))
    name = names.get(code.replace("-FE0F", "").lower())
    if name is None:
        return None
    drawn, aliases = icons["icons"], icons.get("aliases", {})
    icon = drawn.get(name) or drawn.get(aliases.get(name, {}).get("parent"))
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


@cache
def _read(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The names of drawings by code points, and the drawings."""
    try:
        with tarfile.open(file) as packed:
            names, icons = (json.load(_member(packed, f"package/{n}.json")) for n in ("chars", "icons"))
    except (tarfile.TarError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a package of Iconify with chars.json and icons.json ({error}); "
                         "delete it and fetch it again") from error  # fmt: skip
    return names, icons


def _member(packed: tarfile.TarFile, name: str) -> Any:
    member = packed.extractfile(name)
    if member is None:
        raise KeyError(name)
    return member
