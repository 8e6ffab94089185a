"""Augmentation: pictures change, what is asked about them does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from trimtab.data.augment import Augmentation


def row(**more) -> dict:
    """A black picture of 60 x 40 pixels with a red rectangle on it, whose box is given."""
    picture = Image.new("RGB", (60, 40))
    picture.paste((255, 0, 0), (30, 10, 50, 30))
    return {"image": picture, "box": [30, 10, 50, 30], "phrase": "the red one", **more}


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("seed", range(8))
def test_a_box_goes_with_its_picture(seed):
    given = row()
    (out,) = Augmentation(crop=0.3)([given], seeded(seed))
    assert out["image"].size == (60, 40) and given["box"] == [30, 10, 50, 30]
    left, top, right, bottom = out["box"]
    assert 0 <= left < right <= 60 + 1e-6 and 0 <= top < bottom <= 40 + 1e-6
    rows, columns = np.nonzero(np.asarray(out["image"])[..., 0] > 127)
    assert abs(columns.min() - left) < 1.5 and abs(columns.max() + 1 - right) < 1.5
    assert abs(rows.min() - top) < 1.5 and abs(rows.max() + 1 - bottom) < 1.5


def test_crops_leave_the_share_that_was_asked_for():
    # A picture whose value is the pixel's column: how much of it is left shows in the range of values.
    ramp = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None], 200, axis=0)).convert("RGB")
    spans = []
    for seed in range(40):
        (out,) = Augmentation(crop=0.5)([{"image": ramp}], seeded(seed))
        values = np.asarray(out["image"])[..., 0]
        spans.append((int(values.max()) - int(values.min()) + 1) / 200)
    least = (0.5 * 3 / 4) ** 0.5  # the smallest area at the narrowest ratio
    assert min(spans) > least - 0.02 and max(spans) > 0.9 and np.std(spans) > 0.05


def test_light_changes_brightness_and_nothing_else():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    values = [
        np.asarray(Augmentation(light=0.4)([{"image": grey}], seeded(i))[0]["image"])[0, 0].tolist() for i in range(20)
    ]
    assert all(len(set(v)) == 1 for v in values), "no hue"
    assert all(59 <= v[0] <= 141 for v in values) and len({v[0] for v in values}) > 10


def test_the_same_seed_draws_the_same_and_nothing_asked_for_changes_nothing():
    first, again = (Augmentation(crop=0.5, light=0.2)([row()], seeded(3))[0] for _ in range(2))
    assert first["box"] == again["box"] and first["image"].tobytes() == again["image"].tobytes()
    rows = [row()]
    assert Augmentation()(rows) is rows and not Augmentation()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0.0}, r"crop must lie in \(0, 1\]"),
        ({"crop": 1.5}, "found 1.5"),
        ({"light": 1.0}, r"light must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@pytest.mark.parametrize("dialect", ["vilt", "xvlm", "blip"])
def test_randaugment_is_drawn_and_repeatable(dialect):
    change = Augmentation(randaugment=dialect)
    row = {"image": Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))}
    found = [change([row], torch.Generator().manual_seed(seed))[0]["image"] for seed in (0, 0, 1, 2, 3, 4)]
    assert all(p.size == (30, 20) and p.mode == "RGB" for p in found)
    assert found[0].tobytes() == found[1].tobytes() and len({p.tobytes() for p in found}) > 2
    assert change and row["image"].tobytes() != b"" and not Augmentation()


def test_randaugment_of_vilt_does_what_its_authors_do():
    """Every operation at 9 of 30 by hand, from the table in their code; moving ones in both directions."""
    from PIL import ImageEnhance, ImageOps

    from trimtab.data.randaugment import operations

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    added = Image.fromarray(np.clip(np.asarray(picture).astype(int) + 33, 0, 255).astype(np.uint8))
    move = lambda *data: picture.transform(picture.size, Image.Transform.AFFINE, data)  # noqa: E731
    wanted = [
        ImageOps.autocontrast(picture), ImageOps.equalize(picture), picture.rotate(9), ImageOps.posterize(picture, 1),
        ImageOps.solarize(picture, 77), ImageOps.solarize(added, 128), ImageEnhance.Color(picture).enhance(0.64),
        ImageEnhance.Contrast(picture).enhance(0.64), ImageEnhance.Brightness(picture).enhance(0.64),
        ImageEnhance.Sharpness(picture).enhance(0.64), move(1, 0.09, 0, 0, 1, 0), move(1, 0, 0, 0.09, 1, 0),
        move(1, 0, 30, 0, 1, 0), move(1, 0, 0, 0, 1, 30),
    ]  # fmt: skip
    for own, theirs in zip(operations("vilt"), wanted, strict=True):
        found = own.change(picture, own.low + 0.3 * (own.high - own.low), 1)
        assert found.tobytes() == theirs.tobytes()
        other = own.change(picture, own.low + 0.3 * (own.high - own.low), -1)
        assert (other.tobytes() != found.tobytes()) == own.moves


def test_randaugment_leaves_boxes_where_they_are():
    """Of a row with a box only colours change: a black column in white never moves, though it may become grey."""
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste((0, 0, 0), (10, 0, 20, 40))
    for dialect in ("vilt", "xvlm"):
        change, moved = Augmentation(randaugment=dialect), 0
        for seed in range(30):
            row = {"image": picture, "box": [10, 0, 20, 40]}
            kept = change([row], torch.Generator().manual_seed(seed))[0]
            pixels = np.asarray(kept["image"].convert("L"))[2:-2]  # sharpening leaves the edge as it is
            assert kept["box"] == row["box"] and (pixels == pixels[:1]).all()
            free = np.asarray(change([{"image": picture}], torch.Generator().manual_seed(seed))[0]["image"])[2:-2]
            moved += not (free == free[:1]).all()
        assert moved > 3


def test_randaugment_that_is_not_there():
    with pytest.raises(ValueError, match="randaugment must be one of vilt, xvlm, blip, found 'timm'"):
        Augmentation(randaugment="timm")
