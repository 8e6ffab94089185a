"""Every published layout: it loads, trains, is saved and comes back the same, and a wrong file is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import trimtab
from tests.models.published import PUBLISHED, build, tensors
from trimtab.anatomy import Anatomy, Tap, read
from trimtab.backbones import convert_official
from trimtab.backbones.official import CheckpointError, build_official, load_official
from trimtab.methods import METHODS

every = pytest.mark.parametrize("name", PUBLISHED)
# Without those whose difference lies in the CNN, the patches or a head of no blocks.
distinct = pytest.mark.parametrize(
    "name",
    [n for n in PUBLISHED if n not in ("vse_caffe", "clip4clip_meanP", "clip4clip_seqLSTM", "clip4clip_meanP_3d")],
)
one_each = pytest.mark.parametrize("name", {p.format: name for name, p in PUBLISHED.items()}.values())


@pytest.fixture
def saved(tmp_path):
    def save(name: str):
        torch.save(PUBLISHED[name].file(tensors(name)), tmp_path / "any.name")
        return tmp_path / "any.name"

    return save


@every
def test_every_tensor_is_used_or_known_to_be_left_over(name):
    model, report = build(name)
    assert report.format == PUBLISHED[name].format
    assert not report.unused and not report.fresh
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())


@every
def test_gradients_reach_every_parameter(name):
    model, _ = build(name)
    outputs = PUBLISHED[name].run(model)
    assert all(torch.isfinite(v).all() for v in outputs.values())
    # A plain sum would be constant for what is normalised; fixed random weights make every part count.
    generator = torch.Generator().manual_seed(3)
    sum((v * torch.randn(v.shape, generator=generator)).sum() for v in outputs.values()).backward()
    idle = PUBLISHED[name].idle
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    unexplained = {n for n in silent if not n.startswith(idle)} if idle else silent
    # A key's bias moves all scores of a query alike, which softmax does not see.
    assert not {n for n in unexplained if not n.endswith(("k_proj.bias", "key.bias"))}, sorted(unexplained)


@every
@torch.no_grad()
def test_what_is_saved_comes_back_bit_for_bit(name, saved, tmp_path):
    settings = PUBLISHED[name].settings
    first, _ = load_official(saved(name), **settings)
    convert_official(saved(name), tmp_path / "out", **settings)
    again = trimtab.from_pretrained(tmp_path / "out")
    assert type(again) is type(first)
    wanted = first.state_dict()
    assert wanted.keys() == again.state_dict().keys()
    assert all(torch.equal(wanted[k], v) for k, v in again.state_dict().items())
    # Copies, because mapped files start tensors at odd addresses, where some matrix kernels sum in another order.
    here, there = PUBLISHED[name].run(copy.deepcopy(first)), PUBLISHED[name].run(copy.deepcopy(again))
    assert all(torch.equal(here[k], there[k]) for k in here)


@every
def test_anatomy_has_the_towers_of_the_papers(name):
    model, _ = build(name)
    anatomy = Anatomy.of(model)
    weights = anatomy.weights(model)
    found = {
        t.name: (t.modality, len(t.blocks), sum(anatomy.owner(w.module) is t for w in weights)) for t in anatomy.towers
    }
    assert found == PUBLISHED[name].towers
    assert anatomy.source.startswith("registered for")


@distinct
def test_taps_and_masks_see_what_flows(name):
    """Every tap of the anatomy is passed in a forward pass; those of blocks carry tensors of the block's width."""
    model, _ = build(name)
    seen: dict[Tap, torch.Size] = {}

    def note(tap: Tap) -> None:
        def remember(value) -> None:
            seen[tap] = value.shape

        read(model, tap, remember)

    towers = Anatomy.of(model).towers
    parts = [(tap, b) for t in towers for b in t.blocks for p in b.sublayers for tap in (p.read, p.write)]
    ends = [tap for t in towers for tap in (t.output, t.mask, t.pooled) if tap is not None]
    for tap in {tap for tap, _ in parts} | set(ends):
        note(tap)
    PUBLISHED[name].run(model)
    assert not [tap for tap in ends if tap not in seen]
    assert all(seen[tap][-1] == block.width for tap, block in parts)


@distinct
@torch.no_grad()
def test_attention_can_be_chosen(name):
    model, _ = build(name)
    fused = PUBLISHED[name].run(model)
    model.set_attn_implementation("eager")
    parts = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    assert {m.config._attn_implementation for m in parts} == {"eager"}
    for key, plain in PUBLISHED[name].run(model).items():
        torch.testing.assert_close(fused[key], plain, rtol=1e-4, atol=1e-5)


@distinct
def test_a_block_of_every_tower_can_be_skipped(name):
    """Of every tower of tokens: a convolutional block has no place for an adapter."""
    model, _ = build(name)
    anatomy = Anatomy.of(model)
    plan = tuple(next(b.path for b in t.blocks if b.sublayers) for t in anatomy.towers if t.layout == "tokens")
    method = METHODS["random-skip"](skip=len(plan), plan=plan, reduction=4)
    method.assume(model, anatomy)
    before = {k: v.detach() for k, v in PUBLISHED[name].run(model).items()}
    left = method.attach(model, anatomy)
    assert len(list(left.blocks())) == len(list(anatomy.blocks())) - len(plan)
    after = PUBLISHED[name].run(model)
    assert all(torch.isfinite(after[k]).all() for k in before)
    assert any(not torch.allclose(before[k], after[k]) for k in before)
    sum(v.sum() for v in after.values()).backward()


@distinct
def test_side_networks_listen_to_every_tower_of_tokens(name):
    """One at a time: above a tower with a side network nothing is back-propagated into those below."""
    anatomy = Anatomy.of(build(name)[0])
    for tower in anatomy.towers:
        if tower.layout != "tokens" or len({b.width for b in tower.blocks}) > 1:
            continue
        model, _ = build(name)
        before = PUBLISHED[name].run(model)
        METHODS["unipt"](towers=(tower.name,), form="token").attach(model.requires_grad_(False), anatomy)
        after = PUBLISHED[name].run(model)
        assert any(not torch.allclose(before[k], after[k]) for k in before), tower.name
        sum((v * torch.randn_like(v)).sum() for v in after.values() if v.requires_grad).backward()
        assert all(p.grad is not None for p in model.unipt[tower.name].project.parameters()), tower.name
        assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("unipt."))


@pytest.mark.parametrize("name", ["vse_grid", "vse_caffe", "clip4clip_meanP", "xvlm_clip"])
@torch.no_grad()
def test_backbones_for_tasks_from_a_file_and_from_the_folder_that_it_becomes(name, saved, tmp_path):
    from PIL import Image

    backbone = trimtab.load(saved(name), **PUBLISHED[name].settings)
    assert backbone.load_report.format == PUBLISHED[name].format
    backbone.save_pretrained(tmp_path / "out")
    again = trimtab.load(tmp_path / "out")
    picture = Image.new("RGB", (40, 30), (250, 100, 20))
    pixel_values = again.images([picture])["pixel_values"]
    assert torch.equal(pixel_values, backbone.images([picture])["pixel_values"])
    batch = again.example(2, text_tokens=7)
    text = {k: v for k, v in batch.items() if k != "pixel_values"}
    for one in (backbone, again):
        if one.kind == "joint":
            assert one.pair(**batch).pooled.shape == (2, one.width) and one.match(one.pair(**batch)).shape == (2,)
        else:
            assert one.image(pixel_values).pooled.shape == (1, one.width)
            assert one.text(**text).pooled.shape == (2, one.width)


def test_detectors_take_bytes_with_blue_first(saved):
    from PIL import Image

    backbone = trimtab.load(saved("vse_caffe"), **PUBLISHED["vse_caffe"].settings)
    pixels = backbone.images([Image.new("RGB", (8, 8), (250, 100, 20))])["pixel_values"]
    wanted = torch.tensor([20 - 102.9801, 100 - 115.9465, 250 - 122.7717])
    torch.testing.assert_close(pixels[0, :, 0, 0], wanted, atol=1e-3, rtol=0)


@one_each
def test_half_the_tensors_missing(name):
    state = tensors(name)
    half = dict(list(state.items())[: len(state) // 2])
    with pytest.raises(CheckpointError, match=rf"{name}.pth: .*'[\w.]+'"):
        build(name, half)
    rest = {k: v for i, (k, v) in enumerate(state.items()) if not k.endswith("bias")}
    with pytest.raises(CheckpointError, match=rf"{name}.pth: looks like .* tensors are missing: '.*', '.*', '.*' and"):
        build(name, rest)


@one_each
def test_a_wrong_shape_is_named(name):
    state = tensors(name)
    key = next(k for k in reversed(state) if k.endswith(("dense.weight", "out_proj.weight")))
    state[key] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=re.escape(f"{key}' has (3, 5) where")):
        build(name, state)


@one_each
def test_another_backbones_checkpoint_is_refused(name):
    others = [n for n in ("vse_region", "clip4clip_meanP") if PUBLISHED[n].format != PUBLISHED[name].format]
    with pytest.raises(CheckpointError, match="this looks like .*, not like"):
        build_official(tensors(others[0]), {}, "x.pth", PUBLISHED[name].format)


@distinct
def test_texts_longer_than_the_table_of_positions(name, monkeypatch):
    from tests.models import published

    monkeypatch.setattr(published, "ids", lambda *_: (torch.ones(2, 30).long(), torch.ones(2, 30).long()))
    model, _ = build(name)
    with pytest.raises(ValueError, match="text of 30 tokens: .* has positions for"):
        PUBLISHED[name].run(model)
