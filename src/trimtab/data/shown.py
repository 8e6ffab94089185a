"""Rows shown to a person: as text in a terminal, and as a page with pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.images import ImageError, decode

if TYPE_CHECKING:
    from trimtab.data.check import Found

SHADES = " .:-=+*#%@"
LARGEST = 480  # longest side of a picture in the page


def tell(found: Sequence[Found], console: Any) -> None:
    """Print what was found: the source and its settings, a line a split, what is missing, and the samples."""
    from rich.markup import escape

    for each in found:
        settings = "".join(f", {name}: {value}" for name, value in each.settings.items())
        console.print(f"[bold]{escape(each.source)}[/bold]{escape(settings)}: {escape(each.about)}".rstrip(": "))
        console.print(f"  tasks: {', '.join(each.tasks) or 'none'}; columns: {', '.join(each.columns) or 'none'}")
        if not each.tasks and each.columns:
            for columns in dict.fromkeys(each.lacking.values()):
                tasks = ", ".join(task for task, lacking in each.lacking.items() if lacking == columns)
                console.print(f"  without {', '.join(columns)}: not for {tasks}", highlight=False)
            console.print("  settings give columns these names, such as columns.captions=text", highlight=False)
        absent = [split for split in each.splits if split.absent]
        if len(absent) == len(each.splits):
            absent = absent[1:]  # then the first says what is looked for
        if absent:
            console.print(f"  not there: {', '.join(split.name for split in absent)}", highlight=False)
        for split in (split for split in each.splits if split not in absent):
            out = f", {len(split.left_out)} rows cannot be used" if split.left_out else ""
            more = ", or more: reading stopped at the setting rows" if split.more else ""
            console.print(f"  {split.name}: {split.rows:,} rows{more}{out}", highlight=False)
            for fault in [split.missing, *split.left_out[:3]]:
                if fault:
                    console.print(f"    missing: {fault}", markup=False, highlight=False, soft_wrap=True)
            if len(split.left_out) > 3:
                console.print(f"    and {len(split.left_out) - 3} more")
        for i, row in enumerate(each.samples, 1):
            _sample(i, row, console)


def _sample(number: int, row: dict[str, Any], console: Any) -> None:
    console.print(f"  sample {number}", style="bold")
    found, fault = pictures(row)
    for picture in found:
        console.print(drawn(picture))
    if fault:
        console.print(f"    cannot be shown: {fault}", markup=False, soft_wrap=True)
    for name, value in words(row):
        console.print(f"    {name}: {value}", markup=False, highlight=False, soft_wrap=True)


def pictures(row: dict[str, Any]) -> tuple[list[Any], str]:
    """The pictures of a row, boxes drawn in, and why one cannot be shown (empty if all can)."""
    if row.get("video"):
        try:
            return [middle(row["video"])], ""
        except (ValueError, OSError, ImportError) as error:
            return [], str(error)
    cells = [row["image"]] if row.get("image") is not None else row.get("images") or []
    try:
        found = [decode(cell).convert("RGB") for cell in cells]
    except (ImageError, OSError) as error:
        return [], str(error)
    if found and row.get("box"):
        found[0] = boxed(found[0], row["box"])
    return found, ""


def middle(path: str | Path) -> Any:
    """The frame in the middle of a video."""
    from trimtab.data.video import read

    return read(path, lambda length: [length.frames // 2])[0]


def boxed(picture: Any, box: Sequence[float]) -> Any:
    """A copy of a picture with a box drawn in."""
    from PIL import ImageDraw

    out = picture.copy()
    left, top, right, bottom = box
    ImageDraw.Draw(out).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=(255, 0, 255),
                                  width=max(1, max(out.size) // 100))  # fmt: skip
    return out


def drawn(picture: Any, width: int = 36) -> Any:
    """A picture as text for rich: a sign a cell by its lightness, in its colour."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    height = max(1, min(18, round(width * picture.height / picture.width / 2)))  # a cell is twice as high as wide
    small, text = picture.convert("RGB").resize((width, height)), Text()
    for y in range(height):
        for x in range(width):
            red, green, blue = small.getpixel((x, y))
            light = (299 * red + 587 * green + 114 * blue) // 1000
            text.append(SHADES[light * len(SHADES) // 256], Style(color=Color.from_rgb(red, green, blue)))
        text.append("\n")
    return text


def words(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The other columns of a row, each as one line: name and value."""
    for name, value in row.items():
        if name in ("image", "images"):
            cells = [value] if name == "image" else value or []
            yield name, ", ".join(_named(cell) for cell in cells if cell is not None) or "none"
        elif value not in (None, "", []):
            yield name, _short(value)


def _named(cell: Any) -> str:
    if isinstance(cell, dict):
        return cell.get("path") or f"{len(cell.get('bytes') or b'')} bytes in the file"
    return f"a picture {getattr(cell, 'size', '')}"


def _short(value: Any, most: int = 300) -> str:
    strings = isinstance(value, list) and all(isinstance(v, str) for v in value)
    text = (" | ".join(value) if strings else str(value)).replace("\n", "\\n")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def page(samples: Sequence[tuple[str, dict[str, Any]]], title: str) -> str:
    """A page of HTML, complete in itself, with the rows and their pictures.

    Args:
        samples: what each is from, and its row.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for about, row in samples:
        found, fault = pictures(row)
        shown = "".join(f'<img src="data:image/png;base64,{_png(p)}" alt="{html.escape(about)}">' for p in found)
        told = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in words(row))
        missing = f'<p class="fault">{html.escape(fault)}</p>' if fault else ""
        body.append(f"<section><h2>{html.escape(about)}</h2>{shown}{missing}<table>{told}</table></section>")
    style = ("body{font:16px sans-serif;max-width:60em;margin:2em auto}img{max-width:100%;margin:0 .5em .5em 0}"
             "th{text-align:left;vertical-align:top;padding-right:1em}.fault{color:#a00}")  # fmt: skip
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{style}</style><body>{''.join(body)}</body></html>\n")  # fmt: skip


def _png(picture: Any) -> str:
    picture = picture.copy()
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
