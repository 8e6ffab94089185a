"""The skip and tune levers on today's vision-language families: generation, shorter models, round trips, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from tests.modern import MODERN, florence, grounding_dino, idefics, paligemma, qwen3
from tests.zoo import ZOO, Member, _qwen25
from trimtab.anatomy import Anatomy
from trimtab.methods.skip.adapters import Adapter, Skipped
from trimtab.methods.skip.das import DAS
from trimtab.methods.skip.shorten import shorten

MEMBERS = MODERN | {name: ZOO[name] for name in ("siglip", "siglip2", "qwen2.5-vl")}
# Members that write, with three blocks in their decoder.
DEEPER: dict[str, tuple[str, Callable[[], Any], str]] = {
    "smolvlm": ("smolvlm", partial(idefics, "SmolVLM", 3), "text"),
    "idefics3": ("idefics3", partial(idefics, "Idefics3", 3), "text"),
    "qwen2.5-vl": ("qwen2.5-vl", partial(_qwen25, 3), "text"),
    "qwen3-vl": ("qwen3-vl", qwen3, "text"),
    "paligemma": ("paligemma", partial(paligemma, "gemma", 3), "text"),
    "paligemma2": ("paligemma2", partial(paligemma, "gemma2", 3), "text"),
    "florence2": ("florence2", partial(florence, 3), "decoder"),
}


def deeper(name: str) -> tuple[Any, Member, list[str]]:
    """A model with three blocks in its decoder, its member of the zoo, and the decoder's blocks."""
    member, build, tower = DEEPER[name]
    model = Member(build, {}, {}, {}).model()
    return model, MEMBERS[member], [b.path for b in Anatomy.of(model).blocks(tower)]


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


def written(model: Any, member: Member, cache: bool) -> torch.Tensor:
    """The logits of five words in a row, (5, B, V)."""
    prompt = {k: v for k, v in member.batch.items() if not k.startswith(("labels", "decoder"))}
    # A model of 30 words would also write tokens that stand for pictures.
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [26, 27, 28, 29]}
    with torch.no_grad():
        out = model.generate(**prompt, **options, use_cache=cache, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def outputs(model: Any, member: Member) -> list[torch.Tensor]:
    """All finite tensors that the model returns."""
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**member.batch).to_tuple()
    return [v[v.isfinite()] for v in out if isinstance(v, torch.Tensor) and v.is_floating_point()]


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


# --- tuning -----------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "unipt": {}, "lora": {}, "adapter": {}, "lst": {"initialise": "random"}, "bitfit": {}, "deep-prompt": {},
}  # fmt: skip
# Where a method does not apply to every tower: those to which it does.
ONLY = {
    **{(name, "bitfit"): ("vision",) for name in ("smolvlm", "qwen2.5-vl", "qwen3-vl", "paligemma2")},
    ("florence2", "adapter"): ("encoder", "decoder"), ("florence2", "deep-prompt"): ("encoder", "decoder"),
    ("grounding-dino", "deep-prompt"): ("text",), ("qwen2.5-vl", "deep-prompt"): ("text",),
}  # fmt: skip
TUNED = [(n, m) for n in ("smolvlm", "qwen2.5-vl", "qwen3-vl", "paligemma2", "florence2", "grounding-dino", "siglip2")
         for m in METHODS if (n, m) != ("qwen3-vl", "deep-prompt")]  # fmt: skip


def summed(model: Any, member: Member) -> torch.Tensor:
    """A number that depends on all finite outputs."""
    torch.manual_seed(1)
    out = model(**member.batch).to_tuple()
    return sum((v[v.isfinite()].sum() for v in out if isinstance(v, torch.Tensor) and v.requires_grad), torch.zeros(()))


@pytest.mark.parametrize(("name", "method"), TUNED)
def test_tuning_trains_is_saved_and_comes_back(name, method, tmp_path):
    member = MEMBERS[name]
    settings = dict(METHODS[method])
    if (name, method) in ONLY:
        settings["towers"] = ONLY[name, method]
    model = member.model()
    before = outputs(model, member)
    tuned = trimtab.tune(model, method, **settings)
    summed(model, member).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reached = {n for n, p in trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    # LoRA's A has no gradient while B is zero; a softmax does not see the bias that all its layers share.
    silent = [n for n in trained if n not in reached and "lora_A" not in n and not n.endswith("gate.bias")]
    assert trained and not silent
    torch.manual_seed(2)
    with torch.no_grad():
        for p in trained.values():
            p += 0.1 * torch.randn_like(p)
    after = outputs(model, member)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tuned.save_pretrained(tmp_path / "tuned")
    again = member.model()
    trimtab.Tuned.from_pretrained(again, tmp_path / "tuned")
    torch.testing.assert_close(outputs(again, member), after, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "tower"), [(n, t.name) for n in ("smolvlm", "paligemma", "florence2", "siglip")
                                             for t in Anatomy.of(MEMBERS[n].model()).towers])  # fmt: skip
def test_unipt_stands_beside_each_tower_alone(name, tower):
    """The vision tower's side network too, through the frozen language model that reads it."""
    member = MEMBERS[name]
    model = member.model()
    trimtab.tune(model, "unipt", towers=(tower,))
    summed(model, member).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith(f"unipt.{tower}.") for n in trained)
    # DaViT's grids have two sizes here: one earlier layer, whose confidence is always one.
    assert all(p.grad is not None for n, p in trained.items() if ".gate." not in n)
    assert sum(float(p.grad.abs().sum()) for p in trained.values() if p.grad is not None) > 0


@pytest.mark.parametrize(
    ("name", "method", "settings", "message"),
    [
        ("qwen3-vl", "unipt", {"towers": ("vision",)}, "does not begin with the samples"),
        ("qwen3-vl", "deep-prompt", {"towers": ("text",)}, "features of the picture are added to the image tokens"),
        ("smolvlm", "unipt", {"towers": ("vision", "text")}, "'text' reads tower 'vision', and nothing is back-prop"),
        ("florence2", "lst", {"towers": ("vision", "decoder")}, "'decoder' reads tower 'vision'"),
        ("florence2", "adapter", {}, "tower 'vision' is a grid tower; adapters need tokens"),
        ("grounding-dino", "unipt", {"towers": ("vision",)}, "it needs tokens of one width"),
        ("grounding-dino", "shallow-prompt", {"towers": ("decoder",)}, "around which deformable attention samples"),
        ("paligemma", "bitfit", {}, "tower 'text' has no bias"),
        ("qwen2.5-vl", "lst", {"towers": ("vision",)}, "does not begin with the samples"),
    ],
)
def test_a_method_that_does_not_apply_says_why(name, method, settings, message):
    with pytest.raises(ValueError, match=message):
        trimtab.tune(MEMBERS[name].model(), method, **settings)


def test_lst_cannot_start_from_heads_that_share_keys():
    model = idefics("SmolVLM", num_key_value_heads=1)
    with pytest.raises(ValueError, match="shares them between queries .grouped heads.: set initialise: random"):
        trimtab.tune(model, "lst")


def test_prompts_refuse_a_cache_that_would_hold_them_twice():
    model, member, _ = deeper("smolvlm")
    trimtab.tune(model, "deep-prompt")
    with pytest.raises(ValueError, match="generate with use_cache=False"):
        written(model, member, cache=True)
    assert written(model, member, cache=False).shape[0] == 5
