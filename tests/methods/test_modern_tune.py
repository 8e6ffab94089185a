"""The tune lever on today's vision-language families: gradients, round trips, and what does not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from tests.methods.test_tune_copies import learned
from tests.models.modern import DEEPER, MEMBERS, deeper, outputs, written
from tests.models.zoo import Member
from trimtab import methods
from trimtab.anatomy import Anatomy
from trimtab.backbones.reader.examples import idefics

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
    silent = [n for n in trained if n not in reached and "lora_A" not in n]  # A has no gradient while B is zero
    assert trained and not silent
    torch.manual_seed(2)
    with torch.no_grad():
        for p in trained.values():
            p += 0.1 * torch.randn_like(p)
    after = outputs(model, member)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    tuned.save(tmp_path / "tuned")
    again = member.model()
    trimtab.adapt(again, tmp_path / "tuned")
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
    assert all(p.grad is not None for p in trained.values())
    assert sum(float(p.grad.abs().sum()) for p in trained.values() if p.grad is not None) > 0


@pytest.mark.parametrize(
    ("name", "method", "settings", "message"),
    [
        ("qwen3-vl", "unipt", {"towers": ("vision",)}, "does not begin with the samples"),
        ("qwen3-vl", "deep-prompt", {"towers": ("text",)}, "features of the picture are added to the image tokens"),
        ("smolvlm", "unipt", {"towers": ("vision", "text")}, "'text' reads tower 'vision', and nothing is back-prop"),
        ("florence2", "lst", {"towers": ("vision", "decoder")}, "'decoder' reads tower 'vision'"),
        ("florence2", "adapter", {}, "tower 'vision' is a grid tower; adapters need tokens"),
        ("grounding-dino", "lst", {"towers": ("vision",)}, "widths .*; it needs tokens of one width.* or take unipt"),
        ("grounding-dino", "shallow-prompt", {"towers": ("decoder",)}, "around which deformable attention samples"),
        ("paligemma", "bitfit", {}, "blocks of tower 'text' have no bias"),
        ("qwen2.5-vl", "lst", {"towers": ("vision",)}, "does not begin with the samples"),
    ],
)
def test_a_method_that_does_not_apply_says_why(name, method, settings, message):
    with pytest.raises(ValueError, match=message):
        trimtab.tune(MEMBERS[name].model(), method, **settings)


def test_lst_cannot_start_from_heads_that_share_keys():
    model = idefics("SmolVLM", num_key_value_heads=1)
    with pytest.raises(ValueError, match="shares them between queries .grouped heads.: set initialise: random"):
        trimtab.tune(model, "lst", initialise="pruned")
    with pytest.warns(UserWarning, match="gets a random start and no pruned one.*grouped heads"):
        trimtab.tune(model, "lst")


def test_prompts_refuse_a_cache_that_would_hold_them_twice():
    model, member, _ = deeper("smolvlm")
    trimtab.tune(model, "deep-prompt")
    with pytest.raises(ValueError, match="generate with use_cache=False"):
        written(model, member, cache=True)
    assert written(model, member, cache=False).shape[0] == 5


@pytest.mark.parametrize("name", ["paligemma", "florence2"])
def test_ladders_write_without_a_cache_and_refuse_one(name):
    """Florence-2's decoder is given no mask when it writes: the cache itself tells."""
    model, member, _ = deeper(name)
    towers = {"towers": ("decoder",)} if name == "florence2" else {}
    trimtab.tune(model, "lst", initialise="random", **towers)
    assert written(model, member, cache=False).shape[0] == 5
    with pytest.raises(ValueError, match="use no key-value cache in generation"):
        written(model, member, cache=True)


@pytest.mark.parametrize("name", DEEPER)
def test_unipt_writes_the_same_with_a_cache(name):
    model, member, _ = deeper(name)
    plain = written(model, member, cache=True)
    trimtab.tune(model, "unipt")
    learned(model)
    found = written(model, member)  # with a cache, as the model is set
    assert model.generation_config.use_cache and torch.equal(found, written(model, member, cache=True))
    finite = found.isfinite()
    assert torch.allclose(found[finite], written(model, member, cache=False)[finite], atol=1e-4)
    assert (found - plain)[finite].abs().max() > 0.1  # the side network says something


@pytest.mark.parametrize("method", ["lst", "sherl", "side-tuning", "shallow-prompt", "deep-prompt"])
def test_generation_goes_without_a_cache_where_nothing_is_said(method):
    model, member, _ = deeper("paligemma")
    trimtab.tune(model, method, **({"initialise": "random"} if method == "lst" else {}))
    assert torch.equal(written(model, member), written(model, member, cache=False))


def test_a_tower_without_a_cache_leaves_the_other_its_own():
    model, member, _ = deeper("paligemma")
    trimtab.tune(model, "unipt", towers=("vision",))
    assert model.generation_config.use_cache
    assert torch.allclose(written(model, member, cache=True), written(model, member, cache=False), atol=1e-5)


def test_detached_a_model_generates_with_a_cache_again():
    model, _, _ = deeper("paligemma")
    method = methods.METHODS["sherl"]()
    method.attach(model, Anatomy.of(model))
    assert not model.generation_config.use_cache
    method.detach(model)
    assert model.generation_config.use_cache
