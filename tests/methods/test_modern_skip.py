"""The skip lever on today's vision-language families: generation, shorter models, and blocks that cannot go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from tests.models.modern import DEEPER, MEMBERS, deeper, outputs, written
from trimtab.anatomy import Anatomy
from trimtab.backbones.described.examples import florence, grounding_dino, qwen3
from trimtab.methods.skip.adapters import Adapter
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.shorten import shorten
from trimtab.methods.skip.skipped import Skipped


def attach(model: nn.Module, *plan: str, **settings: Any) -> None:
    """Skip blocks, and give adapters weights that matter."""
    method = DAS(plan=plan, skip=len(plan), **settings)
    anatomy = Anatomy.of(model)
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, Adapter):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    model.eval()


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("name", DEEPER)
def test_generation_with_a_cache_is_generation_without(name, form, skipped):
    model, member, blocks = deeper(name)
    if name == "florence2" and form == "sequential":
        with pytest.raises(ValueError, match="no norm; use parallel adapters"):
            attach(model, blocks[skipped], adapters=form, towers=("decoder",))
        return
    before = written(model, member, cache=True)
    attach(model, blocks[skipped], adapters=form)
    slow = written(model, member, cache=False)
    torch.testing.assert_close(written(model, member, cache=True), slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[0], slow[0], atol=1e-3)


def test_a_part_of_a_skipped_block_is_missed_by_name():
    model, _, blocks = deeper("qwen3-vl")
    part = next(name for name, _ in model.get_submodule(blocks[0]).named_children())
    attach(model, blocks[0])
    skipped = model.get_submodule(blocks[0])
    with pytest.raises(ValueError, match=rf"skipped block '{blocks[0]}': the model asks for its part '{part}'"):
        getattr(skipped, part)
    assert not hasattr(skipped, part) and getattr(skipped, "nothing", None) is None


@pytest.mark.parametrize("name", DEEPER)
def test_a_shortened_decoder_is_an_ordinary_model(name, tmp_path):
    """It computes what the model with an identity in the block's place does, writes, and comes back from its folder."""
    model, member, blocks = deeper(name)
    gone = blocks[2] if name == "qwen3-vl" else blocks[0]
    attach(model, gone, adapters="none")
    skipped = written(model, member, cache=True)
    shorten(model)
    assert not any(isinstance(m, Skipped) for m in model.modules())
    torch.testing.assert_close(written(model, member, cache=True), skipped)
    model.save_pretrained(tmp_path / "short")
    again = trimtab.from_pretrained(tmp_path / "short")
    assert type(again) is type(model)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(written(again, member, cache=False), skipped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "block", "setting", "numbers"),
    [("qwen2.5-vl", 0, "fullatt_block_indexes", [0]), ("qwen2.5-vl", 1, "fullatt_block_indexes", []),
     ("qwen3-vl", 1, "deepstack_visual_indexes", [0, 1]), ("qwen3-vl", 2, "deepstack_visual_indexes", [0, 1]),
     ("smolvlm", 1, None, None), ("paligemma", 2, None, None), ("siglip", 0, None, None), ("siglip2", 2, None, None),
     ("florence2", 1, "depths", [1, 1])],
)  # fmt: skip
def test_a_shortened_vision_tower_is_an_ordinary_one(name, block, setting, numbers, tmp_path):
    member = MEMBERS[name]
    model = member.model()
    path = list(Anatomy.of(model).blocks("vision"))[block].path
    attach(model, path, adapters="none")
    skipped = outputs(model, member)
    shorten(model)
    torch.testing.assert_close(outputs(model, member), skipped)
    if setting:
        assert getattr(model.config.vision_config, setting) == numbers
    model.save_pretrained(tmp_path / "short")
    torch.testing.assert_close(outputs(trimtab.from_pretrained(tmp_path / "short"), member), skipped)


@pytest.mark.parametrize(
    ("build", "tower", "block", "message"),
    [(qwen3, "text", 0, "adds features of the picture after each of its first 2 text blocks"),
     (qwen3, "vision", 0, "reads the blocks .0, 2. of .* has no block of its own for each"),
     (grounding_dino, "decoder", 1, "boxes are refined once after each decoder layer"),
     (grounding_dino, "fusion-text", 0, "one half of an encoder layer"),
     (grounding_dino, "vision", 0, "windows are shifted in every second block"),
     (florence, "vision", 0, "only block of its stage")],
)  # fmt: skip
def test_blocks_that_cannot_go_for_good_say_why(build, tower, block, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        shorten(model, [list(Anatomy.of(model).blocks(tower))[block].path])


@pytest.mark.parametrize("name", MEMBERS)
def test_each_tower_is_computed_without_one_of_its_blocks(name):
    """Adapters in the kept blocks and in place of the skipped one get gradients."""
    member = MEMBERS[name]
    for tower in Anatomy.of(member.model()).towers:
        blocks = [b for b in tower.blocks if b.sublayers]
        if not blocks:
            assert tower.layout == "grid"
            continue
        model = member.model().requires_grad_(False)
        attach(model, blocks[-1].path, towers=(tower.name,))
        torch.manual_seed(1)
        sum(v[v.isfinite()].sum() for v in model(**member.batch).to_tuple()
            if isinstance(v, torch.Tensor) and v.requires_grad).backward()  # fmt: skip
        adapters = [m for m in model.modules() if isinstance(m, Adapter)]
        assert len(adapters) == sum(len(b.sublayers) for b in blocks[:-1]) + 1
        assert all(m.up.bias.grad is not None and m.up.bias.grad.abs().sum() > 0 for m in adapters)
