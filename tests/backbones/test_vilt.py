"""tiny-vilt and tiny-clip as shipped, and how the one starts from the other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trimtab import backbones
from trimtab.backbones import Pictures


@pytest.fixture(scope="module")
def clip():
    return backbones.load("tiny-clip")


def pixels(backbone, n: int = 8) -> torch.Tensor:
    """Pictures of a few flat patches of colour."""
    colours = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(colours, size=backbone.pictures.size, mode="nearest")


@torch.no_grad()
def test_start_from_keeps_the_function_of_the_vision_tower(clip):
    vilt = backbones.load("tiny-vilt", pretrained=False)
    vilt.start_from(clip)
    x, vision = pixels(clip), clip.model.vision_model
    theirs = vision.pre_layrnorm(vision.embeddings(x))
    ours, unfolded = vilt.look(x), vision.embeddings(x)  # the latter: copied as they are, without the norm
    for block, other in zip(vision.encoder.layers, vilt.model.vilt.encoder.layer, strict=True):
        theirs, ours, unfolded = block(theirs, None), other(ours, None)[0], other(unfolded, None)[0]
    near, far = (F.cosine_similarity(found, theirs, dim=-1).mean() for found in (ours, unfolded))
    assert 1 - near < (1 - far) / 2, f"{near:.3f} with the norm folded in, {far:.3f} without"


def test_a_clip_cannot_start_from_a_vilt(clip):
    with pytest.raises(ValueError, match="cannot start from 'tiny-vilt'"):
        clip.start_from(backbones.load("tiny-vilt", pretrained=False))


@torch.no_grad()
def test_what_it_looks_at_is_transformers_own_up_to_the_order_of_patches():
    vilt = backbones.load("tiny-vilt")
    x = pixels(vilt, 2)
    mask = torch.ones(2, vilt.pictures.size, vilt.pictures.size)
    theirs, seen, (order, _) = vilt.model.vilt.embeddings.visual_embed(x, mask, -1)
    side = vilt.model.config.image_size // vilt.model.config.patch_size
    at = order[..., 0] * side + order[..., 1]  # which patch each of their tokens is
    ours = vilt.look(x)
    torch.testing.assert_close(theirs[:, :1], ours[:, :1])
    for a, b, o in zip(theirs[:, 1:], ours[:, 1:], at, strict=True):
        torch.testing.assert_close(a, b[o])
    assert seen.all()


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-vilt"])
def test_exported_folders_load_back_the_same(name, tmp_path):
    backbone = backbones.load(name)
    backbone.save_pretrained(tmp_path / "out")
    again = backbones.load(tmp_path / "out")
    for (key, a), b in zip(backbone.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_truncated_weights_file_is_named(tmp_path):
    backbones.load("tiny-clip").save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors: not a whole safetensors file"):
        backbones.load(tmp_path / "cut")


def test_a_folder_without_config_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        backbones.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clop"}')
    with pytest.raises(ValueError, match="did you mean 'clip'"):
        backbones.load(tmp_path)


def test_shipped_weights_stay_small():
    total = sum(f.stat().st_size for f in backbones.base.WEIGHTS.rglob("*.safetensors"))
    assert 0 < total < 15e6


def test_pictures_of_any_kind_become_normalised_squares():
    from PIL import Image

    out = Pictures(8)([Image.new("RGBA", (30, 20), "white"), Image.new("L", (8, 8), 0)])
    assert out.shape == (2, 3, 8, 8)
    assert torch.allclose(out[0], torch.ones(3, 8, 8)) and torch.allclose(out[1], -torch.ones(3, 8, 8))
