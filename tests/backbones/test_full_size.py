"""Backbones at their published sizes with random weights: one forward pass and one training step of a lever."""

from __future__ import annotations

import pytest
import torch

from tests.models import layouts
from trimtab.anatomy import Anatomy
from trimtab.backbones.family import FAMILIES
from trimtab.backbones.official import FORMATS, Tensors
from trimtab.methods import METHODS


def build(name: str, shapes: layouts.Shapes, **settings) -> torch.nn.Module:
    state = layouts.fill(shapes, device="meta")
    kind, config = FORMATS[name].plan(Tensors(state, name, FAMILIES[name].title), {}, **settings)
    torch.manual_seed(0)
    return kind(config).train().requires_grad_(False)


def step(model: torch.nn.Module, loss: torch.Tensor) -> set[str]:
    """One step of AdamW; returns the names of what changed."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    loss.backward()
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    assert torch.isfinite(loss)
    return {n for n, p in trained.items() if not torch.equal(p, before[n])}


def inputs(side: int, length: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, side, side), "input_ids": torch.randint(5, 1000, (1, length)),
            "attention_mask": torch.ones(1, length, dtype=torch.long)}  # fmt: skip


@pytest.mark.slow
def test_meter_with_das():
    """288 px and 50 tokens, two text and two image fusion layers skipped."""
    model = build("meter", layouts.meter(("vqa",)))
    anatomy = Anatomy.of(model)
    plan = tuple(f"cross_modal_{s}_layers.{i}" for s in ("text", "image") for i in (2, 4))
    method = METHODS["das"](skip=4, towers=("fusion_text", "fusion_image"), plan=plan)
    method.assume(model, anatomy)
    assert len(list(method.attach(model, anatomy).blocks())) == 11 + 12 + 12 - 4
    changed = step(model, model.vqa_classifier(model(**inputs(288, 50)).pooled).logsumexp(-1).mean())
    assert any(".das_2." in n for n in changed) and any(".adapter." in n for n in changed)
    assert not any(n.startswith(("vision.", "text_transformer.")) for n in changed)


@pytest.mark.slow
def test_blip_with_unipt():
    """224 px and 30 tokens, side networks beside the vision tower and the encoder of text."""
    model = build("blip", layouts.blip())
    METHODS["unipt"](towers=("vision", "text"), form="token").attach(model, Anatomy.of(model))
    changed = step(model, model(**inputs(224, 30)).logsumexp(-1).mean())
    assert changed and all("unipt" in n for n in changed)
