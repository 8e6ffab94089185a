"""Flickr8K in its official layout, as studies read it."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

PIXELS, MEAN, STD = 96, 127.0, 128.0  # of EfficientNet-Lite0


class Photographs:
    """The pictures of a split and their five captions."""

    def __init__(self, root: Path):
        self.root = root
        self.captions: dict[str, list[str]] = defaultdict(list)
        for line in (root / "Flickr8k_text" / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
            name, caption = line.split("\t", 1)
            self.captions[name.partition("#")[0]].append(caption)

    def names(self, split: str) -> list[str]:
        listed = (self.root / "Flickr8k_text" / f"Flickr_8k.{split}Images.txt").read_text().split()
        return [n for n in listed if self.file(n).exists()]

    def file(self, name: str) -> Path:
        return self.root / "Flicker8k_Dataset" / name

    def pixels(self, name: str, draw: random.Random | None = None) -> Tensor:
        """(3, 96, 96), whole, or a crop of at least half of its area, drawn."""
        with Image.open(self.file(name)) as opened:
            picture = opened.convert("RGB")
        if draw is not None:
            side = draw.uniform(0.71, 1.0)
            w, h = (round(side * x) for x in picture.size)
            x, y = draw.randint(0, picture.width - w), draw.randint(0, picture.height - h)
            picture = picture.crop((x, y, x + w, y + h))
        picture = picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        array = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(PIXELS, PIXELS, 3)
        return (array.movedim(-1, 0).float() - MEAN) / STD


def files(root: Path, work: Path) -> dict[str, Any]:
    """Flickr8K's own split as files, with 320 of its 1,000 photographs for validation."""
    photographs = Photographs(root)
    data: dict[str, Any] = {"name": "files"}
    work.mkdir(parents=True, exist_ok=True)
    for split, listed, most in (("train", "train", None), ("validation", "dev", 320), ("test", "test", None)):
        names = photographs.names(listed)[:most]
        rows = [{"image": str(photographs.file(n).absolute()), "captions": photographs.captions[n]} for n in names]
        file = work / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data[split] = str(file.absolute())
    return data
