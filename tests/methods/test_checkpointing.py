"""Gradient checkpointing keeps less, never more: beside every tuner, in every way in which it is switched on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from tests.methods.test_tune_copies import PIXELS, WORDS, bart, llama, t5, vit
from tests.models.four import DECODER
from trimtab.counting import saved_bytes
from trimtab.experiments.assembly import assemble
from trimtab.experiments.recipe import expand

pytestmark = pytest.mark.filterwarnings("ignore")


def written(model: nn.Module) -> torch.Tensor:
    return model(WORDS, attention_mask=torch.ones_like(WORDS), use_cache=False).logits.square().mean()


def answered(model: nn.Module) -> torch.Tensor:
    mask = torch.ones_like(WORDS)
    words = {"decoder_input_ids": WORDS[:, :5], "decoder_attention_mask": mask[:, :5]}
    return model(WORDS, attention_mask=mask, use_cache=False, **words).logits.square().mean()


MODELS: dict[str, Any] = {
    "vit": (vit, lambda model: model(PIXELS).last_hidden_state.square().mean()),
    "llama": (llama, written),
    "bart": (bart, answered),
    "t5": (t5, answered),
}


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable()


def older(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})


def asked(model: Any) -> None:
    model.enable_input_require_grads()


def by_peft(model: Any) -> None:
    """What PEFT does to a model in 8 bits."""
    from peft import prepare_model_for_kbit_training

    model.is_loaded_in_8bit = True
    prepare_model_for_kbit_training(model)


def adapted(kind: str, name: str, before: Any = None, after: Any = None) -> nn.Module:
    """A model with a tuner that has learned something, in training mode."""
    model = MODELS[kind][0]()
    if before:
        before(model)
    torch.manual_seed(1)
    trimtab.tune(model, name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    if after:
        after(model)
    return model.train()


def outcome(kind: str, model: nn.Module) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Bytes kept, the loss, and the gradients."""
    run = MODELS[kind][1]
    kept = saved_bytes(lambda: run(model), model)
    loss = run(model)
    if loss.requires_grad:
        loss.backward()
    return kept, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_same(found: Any, plain: Any) -> None:
    assert torch.allclose(found[1], plain[1], atol=1e-6)
    assert found[2].keys() == plain[2].keys()
    for name, gradient in plain[2].items():
        assert torch.allclose(found[2][name], gradient, rtol=1e-4, atol=1e-6), name


BESIDE = ("unipt", "lst", "side-tuning", "linear-probe")
# `sherl` sends a gradient through the last block alone: what it keeps of that is what checkpointing can save.
THROUGH = ("sherl", "partial", "norm-tuning", "lora", "adapter", "deep-prompt")


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "t5") for n in (*BESIDE, *THROUGH)), *((n, "vit") for n in ("unipt", "partial", "lora"))]
)
def test_checkpointing_keeps_no_more_and_changes_nothing(name, kind):
    """Beside a frozen tower there is nothing to save, and nothing is added: not a byte, not the inputs of blocks.
    Where the gradient goes through the blocks, less than half of it is kept."""
    plain = outcome(kind, adapted(kind, name))
    for way in (checkpointed, older):
        found = outcome(kind, adapted(kind, name, after=way))
        check_same(found, plain)
        assert found[0] <= (1.0 if name in BESIDE else 0.75 if name == "sherl" else 0.35) * plain[0], way.__name__


@pytest.mark.parametrize("way", [asked, by_peft])
@pytest.mark.parametrize(("kind", "name"), [("bart", "lst"), ("bart", "unipt"), ("llama", "sherl"), ("llama", "lora"),
                                            ("llama", "partial"), ("llama", "side-tuning"), ("t5", "linear-probe"),
                                            ("bart", "deep-prompt")])  # fmt: skip
def test_inputs_that_require_gradients_keep_no_more(kind, name, way):
    """The norm behind embeddings may keep its input, before prompts that are trained: 3 %. PEFT prepares a model before
    it is tuned, and freezes all of it."""
    plain = outcome(kind, adapted(kind, name))
    found = outcome(kind, adapted(kind, name, before=way) if way is by_peft else adapted(kind, name, after=way))
    check_same(found, plain)
    assert found[0] <= (1.03 if name == "deep-prompt" else 1.0) * plain[0]


def test_a_gradient_of_inputs_that_leads_to_something_trained_stays():
    """Embeddings are trained here beside the blocks, and what is made from them is no vain gradient."""
    model = adapted("llama", "lora", after=asked)
    words = model.get_input_embeddings().weight.requires_grad_()
    written(model).backward()
    assert words.grad.abs().sum() > 0


def test_what_stands_before_a_frozen_model_is_trained_through_it():
    """A part of one's own that makes the model's input keeps its gradient, also where inputs must require one."""
    model, own = adapted("llama", "partial", after=asked), nn.Linear(32, 32)
    embedded = own(model.get_input_embeddings()(WORDS).detach())
    model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
    assert own.weight.grad.abs().sum() > 0


def test_blocks_without_a_graph_are_not_checkpointed_and_those_with_one_are():
    model = adapted("llama", "sherl", after=checkpointed)
    assert [layer.training for layer in model.model.layers] == [False, False, True]
    assert all(layer.training for layer in adapted("llama", "lora", after=checkpointed).model.layers)


def test_an_exported_model_begins_where_its_class_does():
    fit = trimtab.adapt(vit())
    fit.tune("norm-tuning")
    hooks = lambda model: sum(len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    assert hooks(fit.model) > 0 == hooks(fit.folded())


@pytest.mark.parametrize("way", [checkpointed, older])
@pytest.mark.parametrize("towers", [("vision",), ("text",), None])
def test_a_tower_that_is_trained_behind_a_frozen_one_gets_the_same_gradient(towers, way):
    """Where the vision tower alone is trained, its gradient comes through the frozen blocks that read it."""
    plain = None
    for done in (None, way):
        model = DECODER.make()
        trimtab.tune(model, "norm-tuning", towers=towers)
        if done:
            done(model)
        model.train()
        loss = model(**DECODER.batch, use_cache=False).loss
        loss.backward()
        found = (0, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(found[2]) == sum(p.requires_grad for p in model.parameters()) > 4
        plain = plain or found
    check_same(found, plain)


def test_frozen_blocks_of_a_tasks_model_are_checkpointed_too(tiny_raw):
    """Of deep prompts nothing is trained inside the blocks, which transformers checkpoints in training mode alone."""
    kept = []
    for switch in (False, True):
        parts = assemble(expand(tiny_raw("tiny-clip", "retrieval", ["deep-prompt"], batch_size=4), "test")[0])
        parts.attach()
        if switch:
            parts.plain.gradient_checkpointing_enable()
        model, batch = parts.model.train(), parts.model.example(4)
        kept.append(saved_bytes(lambda model=model, batch=batch: model(**batch)["loss"], model))
    assert kept[1] < 0.3 * kept[0]
