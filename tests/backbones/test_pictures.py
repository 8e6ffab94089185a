"""How pictures are prepared: equal to transformers' processors and to the authors' rules, whatever the picture."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViltConfig, ViltForImageAndTextRetrieval
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

import trimtab
from tests.models.official import clip_vil, meter
from trimtab.backbones import FAMILIES, Pictures, pictures
from trimtab.backbones.pictures import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Bounded,
    Cropped,
    Stretched,
    pixel_mask,
)
from trimtab.backbones.processed import Processed, read_pictures
from trimtab.backbones.vilt.features import ViltBackbone
from trimtab.tasks.grounding import Grounding, frames, grid

SIZES = [(37, 23), (23, 38), (40, 40), (61, 20), (5, 4)]
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}),
    "crop beyond the picture": CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 21, "width": 25}),
    "blip": BlipImageProcessorPil(size={"height": 20, "width": 20}),
    "siglip": SiglipImageProcessorPil(size={"height": 20, "width": 20}, resample=2),
    "padded to a size": CLIPImageProcessorPil(size={"max_height": 18, "max_width": 22}, do_center_crop=False,
                                              do_pad=True, pad_size={"height": 24, "width": 24}),
    "vilt": ViltImageProcessorPil(size={"shortest_edge": 24}, size_divisor=4),
}  # fmt: skip


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def unusual() -> dict[str, Image.Image]:
    """One picture in every form in which a file may hold it."""
    base = photo(37, 23)
    clear = base.copy()
    clear.putalpha(base.convert("L"))
    palette = base.quantize(16)
    palette.info["transparency"] = 3
    file, exif = io.BytesIO(), base.getexif()
    exif[0x0112] = 6  # turned by a quarter
    base.save(file, "JPEG", exif=exif)
    deep = np.random.default_rng(0).integers(0, 65536, (23, 37), dtype=np.uint16)
    return {
        "grey": base.convert("L"), "bits": base.convert("1"), "palette": base.quantize(16),
        "palette with a clear colour": palette, "alpha": clear, "grey with alpha": clear.convert("LA"),
        "CMYK": base.convert("CMYK"), "16 bit": Image.fromarray(deep), "turned by EXIF": Image.open(file),
    }  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_folders_are_followed_pixel_for_pixel(name, tmp_path):
    """Odd sizes, and every kind of picture; a processor that does not convert to RGB is given RGB."""
    processor = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    found = read_pictures(tmp_path, 20)
    converts = processor.do_convert_rgb
    for picture in [photo(*size) for size in SIZES] + list(unusual().values()):
        wanted = processor([picture if converts else picture.convert("RGB")], return_tensors="pt")["pixel_values"]
        assert torch.equal(found([picture]), wanted), (picture.mode, picture.size)
    batch = [photo(*size) for size in SIZES]
    assert torch.equal(found(batch), processor(batch, return_tensors="pt")["pixel_values"])


def test_the_processor_within_a_joint_config_comes_first(tmp_path):
    own, joint = (CLIPImageProcessorPil(size={"height": s, "width": s}, do_center_crop=False) for s in (16, 24))
    own.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": joint.to_dict()}, default=int))
    assert read_pictures(tmp_path, 16).shape == (24, 24)


@pytest.mark.parametrize("kind", unusual())
def test_what_becomes_of_unusual_pictures(kind):
    """Squashed pictures are those of BLIP's processor, which lays on white what is clear; here alpha is dropped."""
    picture = unusual()[kind]
    squash = Pictures(20, CLIP_MEAN, CLIP_STD)
    opaque = picture.convert("RGB")
    opaque.info.pop("transparency", None)
    wanted = PROCESSORS["blip"]([opaque], return_tensors="pt")["pixel_values"]
    assert torch.equal(squash([picture]), wanted)
    same = torch.equal(wanted, PROCESSORS["blip"]([picture], return_tensors="pt")["pixel_values"])
    assert same == ("alpha" not in kind and "clear" not in kind)
    assert squash.place(picture.size) == ((20, 20), (0, 0), (20, 20)) and picture.size == (37, 23)  # EXIF: not turned


def test_more_than_eight_bits_are_said_to_be_cut(caplog):
    pictures._warned.clear()
    with caplog.at_level(logging.WARNING):
        white = Pictures(4)([Image.fromarray(np.full((4, 4), 300, dtype=np.uint16))] * 2)
    assert torch.equal(white, torch.ones(2, 3, 4, 4))
    assert caplog.text.count("pictures of mode 'I;16' have more than 8 bits a channel") == 1


def torchvision_crop(picture: Image.Image, side: int) -> Image.Image:
    """torchvision's `Resize(side, BICUBIC)` and `CenterCrop(side)`, as written there."""
    w, h = picture.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = side, int(side * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    picture = picture.resize((new_w, new_h), Image.Resampling.BICUBIC)
    top, left = round((new_h - side) / 2.0), round((new_w - side) / 2.0)
    return picture.crop((left, top, left + side, top + side))


def test_the_middle_is_cut_out_as_torchvision_does():
    """METER and CLIP4Clip; transformers' CLIP rounds half a pixel down instead, so that some sizes differ."""
    rule, differ = Cropped(20), 0
    for width in range(20, 64, 3):
        for height in (20, 27, 41):
            picture = photo(width, height)
            assert torch.equal(rule([picture]), Pictures(20)([torchvision_crop(picture, 20)]))
            processor = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20},
                                              image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
            differ += not torch.equal(rule([picture]), processor([picture], return_tensors="pt")["pixel_values"])
    assert 0 < differ < 23


def test_meter_resizes_with_the_alpha_channel():
    clear = unusual()["alpha"]
    with_alpha, without = (Cropped(20, alpha=alpha)([clear]) for alpha in (True, False))
    assert torch.equal(with_alpha, Pictures(20)([torchvision_crop(clear, 20)])) and not torch.equal(with_alpha, without)
    assert torch.equal(Cropped(20, alpha=True)([photo(37, 23)]), Cropped(20)([photo(37, 23)]))


def bounded_size(w: int, h: int, size: int, longest: int) -> tuple[int, int]:
    """(width, height) by `get_size` of CLIP-ViL's and MDETR's code."""
    low, high = float(min((w, h))), float(max((w, h)))
    if high / low * size > longest:
        size = round(longest * low / high)
    if (w <= h and w == size) or (h <= w and h == size):
        return w, h
    return (size, int(size * h / w)) if w < h else (int(size * w / h), size)


def test_bounded_pictures():
    rule = Bounded(40, IMAGENET_MEAN, IMAGENET_STD, longest=66)
    detr = DetrImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 66}, do_pad=False)
    for size in [*SIZES, (40, 50), (90, 31), (31, 90)]:
        picture, wanted = photo(*size), bounded_size(*size, 40, 66)
        assert rule.place(size).resized == wanted and rule([picture]).shape[2:] == wanted[::-1]
        if max(wanted) < 60:  # where the longer side is bound, transformers rounds the other way
            assert torch.equal(rule([picture]), detr([picture], return_tensors="pt")["pixel_values"])


def test_clip_vil_pastes_pictures_into_a_frame():
    """`PadToGivenSize`: half a pixel more at the left and the top, black, and a square goes into an upright frame."""
    rule = Bounded(32, (0.0,) * 3, (1.0,) * 3, longest=64, canvas=True)
    for size in SIZES:
        w, h = bounded_size(*size, 32, 64)
        wide, high = (32, 64) if w <= h else (64, 32)
        frame = Image.new("RGB", (wide, high))
        frame.paste(photo(*size).resize((w, h), Image.Resampling.BILINEAR), (-(-(wide - w) // 2), -(-(high - h) // 2)))
        assert torch.equal(rule([photo(*size)])[0].permute(1, 2, 0) * 255, torch.tensor(np.asarray(frame)).float())


def test_vse_stretches_without_smoothing():
    """OpenCV's `INTER_LINEAR` on floats, written out."""
    picture = photo(37, 23)
    pixels = np.asarray(picture).astype(np.float64)
    for axis in (0, 1):
        length = pixels.shape[axis]
        at = ((np.arange(16) + 0.5) * length / 16 - 0.5).clip(0, length - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
    wanted = torch.tensor((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1)
    assert torch.allclose(Stretched(16, IMAGENET_MEAN, IMAGENET_STD)([picture])[0], wanted.float(), atol=1e-5)
    plain, flipped = (Stretched(16, flip=flip)([picture]) for flip in (False, True))
    assert torch.equal(plain.flip(1), flipped)


RULES = {
    "squash": Pictures(20), "crop": Cropped(20), "bounded": Bounded(20, longest=33),
    "frame": Bounded(20, longest=40, canvas=True), "stretched": Stretched(20),
    **{name: Processed.of(processor) for name, processor in PROCESSORS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_windows_say_where_a_box_goes(name):
    """A bright square in a black picture is found again where its window says, in a batch of unlike shapes."""
    rule = RULES[name]
    box, sizes = torch.tensor([80.0, 60, 120, 100]), [(200, 160), (160, 200), (180, 180)]
    batch = []
    for size in sizes:
        picture = Image.new("RGB", size)
        picture.paste((255, 255, 255), tuple(int(x) for x in box))
        batch.append(picture)
    pixels = rule(batch)
    origin, span = frames(rule.windows(sizes))
    shape = torch.tensor([rule.place(size).frame for size in sizes]).repeat(1, 2)
    bright = (pixels * torch.tensor(rule.std).view(3, 1, 1) + torch.tensor(rule.mean).view(3, 1, 1)).mean(dim=1) > 0.7
    assert torch.equal(rule.windows(sizes[:1]), rule.windows(sizes)[:1])  # whatever the others of a batch are
    for where, mask in zip((box - origin) / span * shape, bright, strict=True):
        rows, columns = (mask.any(dim=d).nonzero().flatten() for d in (1, 0))
        found = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (found - where).abs().max() <= 1.0, (found, where)


def test_a_processor_with_steps_of_its_own_cannot_say_where_boxes_go():
    with pytest.raises(ValueError, match=r"DetrImageProcessorPil: where a picture stands .* use `pictures: squash`"):
        Processed.of(DetrImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 12})).windows([(20, 20)])


def test_boxes_follow_the_crop():
    """Shares of what is seen: a box beyond the crop lies beyond 0..1, and costs nothing in training."""
    task = Grounding()
    backbone = SimpleNamespace(pictures=Cropped(8), images=lambda p: {}, texts=lambda t: {})
    rows = [{"image": Image.new("RGB", (40, 20)), "phrase": "", "box": box} for box in ([10, 0, 20, 10], [0, 0, 8, 20])]
    batch = task.collate(backbone, rows, train=True)
    assert batch["windows"].tolist() == [[10, 0, 30, 20]] * 2
    assert batch["boxes"].tolist() == [[0, 0, 0.5, 0.5], [-0.5, 0, pytest.approx(-0.1), 1]]
    guess = torch.tensor([[0.0, 0, 0.5, 0.5], [0.3, 0.3, 0.4, 0.4]], requires_grad=True)
    shares = torch.full((2, 4), 0.25).log()
    task._boxes = lambda *_: (guess, shares, grid(4, guess.device))
    loss = task.loss(None, None, batch)
    # The first box is right, but a quarter of the vote lies in it; the second asks for nothing.
    assert loss.item() == pytest.approx(-np.log(0.25) / 2, abs=1e-6)
    assert torch.equal(torch.autograd.grad(loss, guess)[0][1], torch.zeros(4))
    assert task.predict(None, None, batch)[0]["box"] == [10, 0, 20, 10]  # in pixels of the picture


def tiny_vilt() -> ViltBackbone:
    torch.manual_seed(0)
    config = ViltConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50,
                        image_size=24, patch_size=8, max_position_embeddings=20, max_image_length=-1)  # fmt: skip
    model = ViltForImageAndTextRetrieval(config).eval()
    torch.nn.init.normal_(model.vilt.embeddings.position_embeddings)
    return ViltBackbone("tiny", model, None)


@torch.no_grad()
def test_vilt_sees_a_padded_batch_as_transformers_does():
    backbone = tiny_vilt()
    batch = [photo(*size) for size in [(60, 40), (40, 60), (50, 50), (140, 40)]]
    pixels = backbone.images(batch)["pixel_values"]
    theirs = backbone.pictures.processor(batch, return_tensors="pt")
    assert torch.equal(pixel_mask(pixels), theirs["pixel_mask"]) and pixels.shape == (4, 3, 32, 32)
    words = {"input_ids": torch.randint(5, 50, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    found = backbone.pair(pixels, **words)
    assert torch.allclose(found.pooled, backbone.model.vilt(**words, **theirs).pooler_output, atol=1e-6)
    assert found.mask[:, found.image_tokens].sum(dim=1).tolist() == [12, 12, 9, 4]
    wide = backbone.pair(pixels[:1, :, :24], **{k: v[:1] for k, v in words.items()})
    assert wide.grid == (3, 4) and torch.allclose(wide.pooled, found.pooled[:1], atol=1e-6)
    with pytest.raises(ValueError, match="zero in all channels stand for padding at the right"):
        backbone.look(torch.cat([torch.zeros(1, 3, 8, 24), torch.ones(1, 3, 16, 24)], dim=2))


@torch.no_grad()
def test_clip_vil_sees_pictures_of_both_ways_in_one_batch(tmp_path):
    model, _ = clip_vil(tmp_path, "pretrain")
    rule = Bounded(32, CLIP_MEAN, CLIP_STD, longest=64, canvas=True)
    backbone = FAMILIES["clip_vil"].features("clip-vil", model.eval(), None, rule)
    batch = [photo(50, 30), photo(30, 50), photo(60, 30)]
    words = {"input_ids": torch.randint(4, 40, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    found = backbone.pair(**backbone.images(batch), **words)
    for i, picture in enumerate(batch):
        alone = backbone.pair(**backbone.images([picture]), **{k: v[i : i + 1] for k, v in words.items()})
        assert torch.allclose(found.pooled[i], alone.pooled[0], atol=1e-5)
        assert alone.grid == ((2, 1) if i == 1 else (1, 2)) and found.mask[i].sum() == alone.mask.sum() == 7


@pytest.mark.parametrize("name", ["tiny-vilt", "tiny-clip", "tiny-blip"])
def test_built_in_models_see_squares_as_before(name):
    batch = [photo(side, side) for side in (64, 48, 100)]
    assert torch.equal(trimtab.load(name).images(batch)["pixel_values"], Pictures(64)(batch))


@pytest.mark.parametrize("rule", [Pictures(20, CLIP_MEAN, CLIP_STD), Cropped(20, alpha=True), Stretched(20, flip=True),
                                  Bounded(20, longest=33), *map(Processed.of, PROCESSORS.values())],
                         ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_what_is_exported_gives_the_same_pixels(rule, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule.config()))
    again = read_pictures(tmp_path, 7)
    assert again == rule and str(again) == str(rule)
    for picture in (photo(37, 23), unusual()["alpha"]):
        assert torch.equal(again([picture]), rule([picture]))


def test_transformers_reads_what_is_exported(tmp_path):
    """Without our key the same pixels, but for alpha and half pixels."""
    from transformers import AutoImageProcessor

    for rule in (Pictures(20, CLIP_MEAN, CLIP_STD), Cropped(20)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule.config()))
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        picture = photo(30, 20)
        assert torch.equal(rule([picture]), processor([picture], return_tensors="pt")["pixel_values"])


def test_preparations_are_told_apart():
    """By their text, which is part of the key of cached activations."""
    other = Processed.of(BlipImageProcessorPil(size={"height": 20, "width": 20}, resample=2))
    kinds = {str(rule) for rule in (*RULES.values(), Cropped(20, alpha=True), Stretched(20, flip=True), other)}
    assert len(kinds) == len(RULES) + 3


def saved(folder: Path, name: str, **changes) -> Path:
    """A built-in model's folder with another image processor."""
    trimtab.load(name).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_processor_must_fit_the_model(tmp_path):
    folder = saved(tmp_path / "a", "tiny-clip", size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match=r"its image processor gives 48 x 48 pixels, the model was built for 64 x 64"):
        trimtab.load(folder)
    squashed = trimtab.load(folder, pictures="squash").pictures
    assert squashed == Pictures(64)
    folder = saved(tmp_path / "b", "tiny-clip", size={"shortest_edge": 64})
    with pytest.raises(ValueError, match=r"gives pictures of different shapes, the model was built for 64 x 64"):
        trimtab.load(folder)


def test_padding_must_be_told_from_picture(tmp_path):
    folder = saved(tmp_path / "a", "tiny-vilt", do_normalize=False)
    with pytest.raises(ValueError, match=r"pixels of the colour \(0, 0, 0\) become zero, which stands for padding"):
        trimtab.load(folder)
    assert trimtab.load(folder, pictures="squash").pictures == Pictures(64)
    with pytest.raises(ValueError, match=r"pixels of the colour \(127, 128, 0\) become zero"):
        Pictures(8, (127 / 255, 128 / 255, 0.0)).check_padding("model")


def test_processors_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: expected an image processor that transformers has"):
        read_pictures(saved(tmp_path / "a", "tiny-clip", image_processor_type="NoSuchProcessor"), 64)
    Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Idefics3ImageProcessorPil gives no \(3, H, W\) for a picture"):
        read_pictures(tmp_path, 16)
    assert read_pictures(tmp_path, 16, tiles=True) == Pictures(16)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: no JSON"):
        read_pictures(tmp_path, 16)
    (tmp_path / "preprocessor_config.json").write_text('{"trimtab_pictures": {"rule": "Cropped", "sise": 3}}')
    with pytest.raises(ValueError, match=r"trimtab_pictures: expected `rule`, one of Pictures, Cropped, .* found"):
        read_pictures(tmp_path, 16)
    with pytest.raises(ValueError, match=r"ViltImageProcessorPil: cannot prepare pictures such as 400 x 4 .* squash"):
        Processed.of(PROCESSORS["vilt"])([photo(400, 4)])


def test_authors_rules_are_those_of_official_models():
    model, _ = meter()
    side = model.config.vision_config.image_size
    backbone = FAMILIES["meter"].backbone("meter.ckpt", model)
    assert backbone.pictures == Cropped(side, CLIP_MEAN, CLIP_STD, alpha=True) and backbone.side == side
    backbone.prepare("squash")
    assert backbone.pictures == Pictures(side, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (1000, 200), (384, 384)])
def test_vilt_resizes_as_its_authors(size):
    """`MinMaxResize(384, 639)`: steps of 32, so that the longer side has 608 pixels at most."""
    w, h = size
    scale = 384 / min(w, h)
    newh, neww = (384, scale * w) if h < w else (scale * h, 384)
    if max(newh, neww) > 639:
        scale = 639 / max(newh, neww)
        newh, neww = newh * scale, neww * scale
    newh, neww = int(newh + 0.5) // 32 * 32, int(neww + 0.5) // 32 * 32
    rule = Processed.of(ViltImageProcessorPil(size={"shortest_edge": 384}, size_divisor=32))
    assert rule.place(size).resized == (neww, newh)
