"""How pictures become tensors: as the authors of a model prepare them, or as the image processor in its folder does.

    Pictures    squashed to a square                                BLIP, X-VLM; any model with `pictures: squash`
    Cropped     shorter side resized, then the middle               METER, CLIP4Clip
    Bounded     shape kept, both sides bounded, padded or not       CLIP-ViL, MDETR
    Stretched   squashed by torch, each pixel from four neighbours  VSE-infinity
    Processed   transformers' own processor                         CLIP, SigLIP, LLaVA, ViLT, ... (`processed.py`)

    picture --resized--> (w, h) --pasted at an offset into--> frame (W, H) --/255, mean, std--> (3, H, W)

Frames of unlike sizes are padded at the right and at the bottom with zeros after the normalisation, so that a batch
tells by itself what is padding (`pixel_mask`): with published means no pixel of a picture is zero in all channels.

What happens to a picture that is not plain RGB is what PIL's `convert("RGB")` does, which is what authors call: grey
gets three equal channels, a palette its colours, CMYK PIL's plain formula; an alpha channel is dropped (`Processed`
lays the picture on white, as transformers does); values of 16 bits above 255 become white, with a warning.
The rotation in EXIF data is not applied, neither by authors nor by processors: they are given what the file holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

log = logging.getLogger(__name__)

# What CLIP's pictures, and those of models built on it, are normalised with; and what ImageNet's are.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEEP = ("I;16", "I;16L", "I;16B", "I", "F")
"""Modes of PIL with more than 8 bits a channel, which `convert` cuts at 255."""


class Placement(NamedTuple):
    """Where a picture stands in its frame, in pixels, (width, height) each.

    Attributes:
        resized: size of the resized picture.
        offset: its left upper corner in the frame; negative where it is cut off.
        frame: size of the frame.
    """

    resized: tuple[int, int]
    offset: tuple[int, int]
    frame: tuple[int, int]


@dataclass(frozen=True)
class Pictures:
    """Squashed to a square of `size` pixels (bicubic), scaled to 0..1, then normalised."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    bilinear: ClassVar[bool] = False

    @property
    def fixed(self) -> bool:
        """Whether every picture gives a tensor of one shape."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of a usual picture's tensor, with which costs are counted."""
        return self.size, self.size

    def place(self, size: tuple[int, int]) -> Placement:
        """Where a picture of (width, height) pixels comes to stand."""
        side = (self.size, self.size)
        return Placement(side, (0, 0), side)

    def framed(self, picture: Any) -> np.ndarray:
        """A PIL image in its frame, (H, W, 3) bytes; what is not picture is black."""
        return _framed(plain(picture), self.place(picture.size), self.bilinear)

    def __call__(self, pictures: Sequence[Any]) -> Tensor:
        """From PIL images (any mode, any size) to (B, 3, H, W) float32."""
        frames = [self.framed(picture) for picture in pictures]
        if len({frame.shape for frame in frames}) == 1:
            return self._normalised(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float())
        return together([self._normalised(torch.from_numpy(f).permute(2, 0, 1).float()[None])[0] for f in frames])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W), 0..255."""
        return (pixels / 255 - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def windows(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """What of each picture the model sees, (B, 4): left, top, right, bottom in pixels of the picture.

        A window is smaller than a picture that is cropped and larger than one that is padded by itself. What is padded
        to the largest picture of a batch lies outside: a picture's window is the same in any batch. A box in pixels is,
        as shares of what the model sees, `(box - window[[0, 1, 0, 1]]) / span` with `span = window[[2, 3, 2, 3]] -
        window[[0, 1, 0, 1]]`; what was cropped off lies below 0 or above 1.

        Args:
            sizes: (width, height) of the pictures.
        """
        rows = []
        for width, height in sizes:
            resized, (x, y), (wide, high) = self.place((width, height))
            across, down = width / resized[0], height / resized[1]
            rows.append((-x * across, -y * down, (wide - x) * across, (high - y) * down))
        return torch.tensor(rows, dtype=torch.float32)

    def check_side(self, side: int, where: str) -> None:
        """Raise a ValueError unless these are pictures for a model that takes squares of `side` pixels alone."""
        if self.fixed and self.shape == (side, side):
            return
        found = f"{self.shape[0]} x {self.shape[1]} pixels" if self.fixed else "pictures of different shapes"
        raise ValueError(
            f"{where}: its image processor gives {found}, the model was built for {side} x {side}: mend `size` and "
            "`crop_size` in preprocessor_config.json, or squash pictures (`pictures: squash`)"
        )

    def check_padding(self, where: str) -> None:
        """Raise a ValueError if a colour becomes zero in all channels: what is picture and what padding is not told."""
        from PIL import Image

        likely = (round(self.mean[0] * 255), round(self.mean[1] * 255), round(self.mean[2] * 255))
        for colour in (likely, (0, 0, 0)):
            some = self([Image.new("RGB", (16, 16), colour)])[0, :, 0, 0].any()
            if not isinstance(some, FakeTensor) and not some:  # where models have no values, nothing is looked at
                raise ValueError(
                    f"{where}: pixels of the colour {colour} become zero, which stands for padding to this model: "
                    "normalise pictures with the mean of its authors (`image_mean` in preprocessor_config.json)"
                )

    def squashed(self, side: int | None = None) -> Pictures:
        """The same normalisation of whole pictures that are squashed to a square."""
        return Pictures(side or self.size, self.mean, self.std)

    def config(self) -> dict[str, Any]:
        """What preprocessor_config.json says: transformers' processor that comes closest, and the rule itself.

        `read_pictures` reads the rule back. transformers' processors differ from it in what they do to an alpha
        channel, and in half pixels of a crop.
        """
        found = {
            "do_resize": True, "size": {"height": self.size, "width": self.size}, "do_center_crop": False,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.mean), "image_std": list(self.std), "image_processor_type": "CLIPImageProcessor",
        }  # fmt: skip
        return found | {RULE: {"rule": type(self).__name__, **asdict(self)}}


RULE = "trimtab_pictures"
"""Key in preprocessor_config.json of a rule that no processor of transformers has."""


@dataclass(frozen=True)
class Cropped(Pictures):
    """The shorter side resized to `size` (bicubic), the middle of the longer one cut out: torchvision's `Resize` and
    `CenterCrop`, whose half pixels are rounded to the even side.

    Attributes:
        alpha: resize with the alpha channel, as METER does, and drop it after that.
    """

    alpha: bool = False

    def place(self, size: tuple[int, int]) -> Placement:
        width, height = size
        short = min(size)
        resized = (int(self.size * width / short), int(self.size * height / short))
        left, top = (round((extent - self.size) / 2) for extent in resized)
        return Placement(resized, (-left, -top), (self.size, self.size))

    def framed(self, picture: Any) -> np.ndarray:
        if not self.alpha or not picture.has_transparency_data:
            return super().framed(picture)
        return _framed(picture.convert("RGBA"), self.place(picture.size), self.bilinear)

    def config(self) -> dict[str, Any]:
        crop = {"do_center_crop": True, "crop_size": {"height": self.size, "width": self.size}}
        return super().config() | {"size": {"shortest_edge": self.size}, **crop}


@dataclass(frozen=True)
class Bounded(Pictures):
    """The shape kept: the shorter side `size`, the longer one at most `longest`, bilinear, as DETR resizes.

    Attributes:
        longest: bound of the longer side; a picture that would pass it gets a shorter side below `size`.
        canvas: paste the picture into the middle of a black frame of `longest` by `size` (CLIP-ViL), which lies on its
            side if the picture is wider than high. Black is picture to the model; padding to a batch is not.
    """

    longest: int = 0
    canvas: bool = False

    bilinear: ClassVar[bool] = True

    @property
    def fixed(self) -> bool:
        return self.canvas and self.longest == self.size

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.longest) if self.canvas else (self.size, self.size)

    def place(self, size: tuple[int, int]) -> Placement:
        width, height = size
        short, side = min(size), self.size
        if max(size) / short * side > self.longest:
            side = max(1, round(self.longest * short / max(size)))
        resized = (int(side * width / short), int(side * height / short))
        if not self.canvas:
            return Placement(resized, (0, 0), resized)
        frame = (self.size, self.longest) if resized[0] <= resized[1] else (self.longest, self.size)
        offset = [(f - r + 1) // 2 for f, r in zip(frame, resized, strict=True)]
        return Placement(resized, (offset[0], offset[1]), frame)

    def config(self) -> dict[str, Any]:
        size = {"shortest_edge": self.size, "longest_edge": self.longest}
        return super().config() | {"size": size, "do_pad": True, "image_processor_type": "DetrImageProcessor"}


@dataclass(frozen=True)
class Stretched(Pictures):
    """Squashed to a square as OpenCV's `INTER_LINEAR` does on floats: each pixel is between its four nearest ones, so
    that a picture made smaller is not smoothed.

    Attributes:
        flip: blue first, as detectors take pictures that were trained in Caffe.
    """

    flip: bool = False

    def framed(self, picture: Any) -> np.ndarray:
        return np.array(plain(picture))

    def squashed(self, side: int | None = None) -> Stretched:
        return replace(self, size=side or self.size)

    def __call__(self, pictures: Sequence[Any]) -> Tensor:
        found = []
        for picture in pictures:
            pixels = torch.from_numpy(self.framed(picture)).permute(2, 0, 1).float()[None]  # (1, 3, H, W)
            found.append(
                torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear", align_corners=False)
            )
        pixels = self._normalised(torch.cat(found))
        return pixels.flip(1) if self.flip else pixels

    def config(self) -> dict[str, Any]:
        return super().config() | {"resample": 2}


def plain(picture: Any) -> Any:
    """A PIL image in RGB; says so once if values above 255 are cut."""
    if picture.mode in DEEP:
        _warn_deep(picture.mode)
    return picture.convert("RGB")


_warned: set[str] = set()


def _warn_deep(mode: str) -> None:
    if mode not in _warned:
        _warned.add(mode)
        log.warning("pictures of mode %r have more than 8 bits a channel: values above 255 become white", mode)


def _framed(picture: Any, place: Placement, bilinear: bool) -> np.ndarray:
    from PIL import Image

    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    if picture.size != place.resized:
        picture = picture.resize(place.resized, resample)
    (x, y), (wide, high) = place.offset, place.frame
    if (x, y) != (0, 0) or picture.size != place.frame:
        picture = picture.crop((-x, -y, wide - x, high - y))  # PIL fills what lies outside with black
    return np.asarray(picture.convert("RGB"))


def together(pixels: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) of unlike sizes as one batch (B, 3, H, W), padded with zeros at the right and the bottom."""
    high, wide = (max(p.shape[axis] for p in pixels) for axis in (1, 2))
    out = pixels[0].new_zeros(len(pixels), pixels[0].shape[0], high, wide)
    for row, picture in zip(out, pixels, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return out


def pixel_mask(pixel_values: Tensor) -> Tensor:
    """Which pixels are picture and which are padding, (B, 3, H, W) -> (B, H, W) of 1 and 0.

    Padding is zero in all channels. A picture of nothing but zeros is taken as whole.
    """
    mask = (pixel_values != 0).any(dim=1)
    return (mask | ~mask.flatten(1).any(dim=1)[:, None, None]).long()


def extents(pixel_values: Tensor, step: int) -> list[tuple[int, int]] | None:
    """Rows and columns of patches of `step` pixels that each picture of a batch has; None if none has padding.

    A patch counts if its first pixel is picture, as ViLT's authors take it.

    Raises:
        ValueError: if what is not zero is no rectangle at the left upper corner.
    """
    first = pixel_values[:, :, ::step, ::step]
    whole = (first != 0).any(dim=1).all()
    if isinstance(whole, FakeTensor) or whole.is_meta or torch.compiler.is_compiling() or bool(whole):
        return None  # what has no values is counted as whole
    mask = pixel_mask(first)  # (B, h, w)
    rows, columns = mask[:, :, 0].sum(dim=1), mask[:, 0, :].sum(dim=1)
    if not torch.equal(rows * columns, mask.sum(dim=(1, 2))):
        raise ValueError("pixel_values: pixels that are zero in all channels stand for padding at the right and the "
                         "bottom, found such pixels elsewhere")  # fmt: skip
    if bool((mask == 1).all()):
        return None
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
