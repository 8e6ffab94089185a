"""RandAugment (Cubuk et al., 2020) in the two dialects with which vision-language models are trained, in PIL.

    "vilt"    two of fourteen operations at 9 of 30, always applied         ViLT, METER, and DAS on both
    "xvlm"    two of ten operations at 7 of 10, each with chance one half   X-VLM, MULTIFLOW on X-VLM and BLIP
    "blip"    the same ten at 5 of 10                                       BLIP

`vilt` is its authors' own code in PIL, operation by operation. The other two are written with OpenCV by their authors:
here the same operations with the same strengths are PIL's, which differ by rounding and by half a pixel of a rotation.
The authors apply them to the cropped and resized picture, here they come before resizing, so that a shift by 7 pixels
is one of 7 pixels of the picture itself. Mirroring, which both train with, is not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch

Dialect = Literal["vilt", "xvlm", "blip"]
Change = Callable[[Any, float, float], Any]
GREY = (128, 128, 128)


class Operation(NamedTuple):
    """One change of a picture.

    Attributes:
        change: (picture, strength, sign) -> picture; the sign is 1 or -1, drawn anew each time.
        low, high: the strength at nothing and at the most.
        moves: whether places in the picture move, so that a box would have to follow.
    """

    change: Change
    low: float
    high: float
    moves: bool = False


def operations(dialect: str, still: bool = False) -> list[Operation]:
    """What a dialect draws from.

    Args:
        dialect: see above.
        still: only those that leave everything in its place: what X-VLM's authors take where boxes are learned.

    Raises:
        ValueError: if there is no such dialect.
    """
    if dialect not in get_args(Dialect):
        raise ValueError(f"randaugment must be one of {', '.join(get_args(Dialect))}, found {dialect!r}")
    found = _vilt() if dialect == "vilt" else _xvlm()
    return [o for o in found if not (still and o.moves)]


def randaugment(picture: Any, dialect: str, generator: torch.Generator, still: bool = False) -> Any:
    """A PIL image (RGB) after two operations drawn at random, each one a dialect's strength.

    Raises:
        ValueError: if there is no such dialect.
    """
    every = operations(dialect, still)
    share = {"vilt": 9 / 30, "xvlm": 7 / 10, "blip": 5 / 10}[dialect]
    for _ in range(2):
        change, low, high, _moves = every[int(torch.randint(len(every), (), generator=generator))]
        applies, sign = torch.rand(2, generator=generator).tolist()
        if dialect == "vilt" or applies <= 0.5:
            picture = change(picture, low + share * (high - low), 1 if sign > 0.5 else -1)
    return picture


def _affine(picture: Any, data: tuple[float, ...], smooth: bool) -> Any:
    from PIL import Image

    if smooth:
        return picture.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=GREY)
    return picture.transform(picture.size, Image.Transform.AFFINE, data)


def _moving(smooth: bool) -> dict[str, Change]:
    """Shears, shifts and rotation: with `smooth` bilinear on grey, else of the nearest pixel on black."""
    from PIL import Image

    def rotate(picture: Any, v: float, sign: float) -> Any:
        return (
            picture.rotate(sign * v, Image.Resampling.BILINEAR, fillcolor=GREY) if smooth else picture.rotate(sign * v)
        )

    return {
        "rotate": rotate,
        "shear x": lambda p, v, sign: _affine(p, (1, sign * v, 0, 0, 1, 0), smooth),
        "shear y": lambda p, v, sign: _affine(p, (1, 0, 0, sign * v, 1, 0), smooth),
        "shift x": lambda p, v, sign: _affine(p, (1, 0, sign * v, 0, 1, 0), smooth),
        "shift y": lambda p, v, sign: _affine(p, (1, 0, 0, 0, 1, sign * v), smooth),
    }


def _colours() -> dict[str, Change]:
    from PIL import ImageEnhance, ImageOps

    return {
        "as it is": lambda p, v, sign: p,
        "autocontrast": lambda p, v, sign: ImageOps.autocontrast(p),
        "equalize": lambda p, v, sign: ImageOps.equalize(p),
        "posterize": lambda p, v, sign: ImageOps.posterize(p, max(1, int(v))),
        "solarize": lambda p, v, sign: ImageOps.solarize(p, v),  # type: ignore[arg-type]  # it compares, no more
        "solarize add": lambda p, v, sign: ImageOps.solarize(p.point([min(int(i + v), 255) for i in range(256)] * 3)),
        "colour": lambda p, v, sign: ImageEnhance.Color(p).enhance(v),
        "contrast": lambda p, v, sign: ImageEnhance.Contrast(p).enhance(v),
        "brightness": lambda p, v, sign: ImageEnhance.Brightness(p).enhance(v),
        "sharpness": lambda p, v, sign: ImageEnhance.Sharpness(p).enhance(v),
    }


def _vilt() -> list[Operation]:
    """`vilt/transforms/randaug.py`, in its order."""
    c, m = _colours(), _moving(smooth=False)
    return [
        Operation(c["autocontrast"], 0, 1), Operation(c["equalize"], 0, 1), Operation(m["rotate"], 0, 30, True),
        Operation(c["posterize"], 0, 4), Operation(c["solarize"], 0, 256), Operation(c["solarize add"], 0, 110),
        Operation(c["colour"], 0.1, 1.9), Operation(c["contrast"], 0.1, 1.9), Operation(c["brightness"], 0.1, 1.9),
        Operation(c["sharpness"], 0.1, 1.9), Operation(m["shear x"], 0, 0.3, True),
        Operation(m["shear y"], 0, 0.3, True), Operation(m["shift x"], 0, 100, True),
        Operation(m["shift y"], 0, 100, True),
    ]  # fmt: skip


def _xvlm() -> list[Operation]:
    """`dataset/randaugment.py` of X-VLM with the operations that its transforms name."""
    c, m = _colours(), _moving(smooth=True)
    return [
        Operation(c["as it is"], 0, 1), Operation(c["autocontrast"], 0, 1), Operation(c["equalize"], 0, 1),
        Operation(c["brightness"], 0.1, 1.9), Operation(c["sharpness"], 0.1, 1.9),
        Operation(m["shear x"], 0, 0.3, True), Operation(m["shear y"], 0, 0.3, True),
        Operation(m["shift x"], 0, 10, True), Operation(m["shift y"], 0, 10, True), Operation(m["rotate"], 0, 30, True),
    ]  # fmt: skip
