"""MULTIFLOW on its paper's backbones, from official files: calibrated on pairs with the pretraining objective, at three
sparsities, with the exclusions of the authors, a step of fine-tuning on the pattern, sparse files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.models.official import TEXTS, file
from trimtab.anatomy import Anatomy
from trimtab.backbones import PretrainingLoss
from trimtab.backbones.examples.inputs import pixels

SPARSITIES = [0.63, 0.75, 0.9]


@dataclass
class Subject:
    """A pretrained model, its calibration batches, and what these go through (None: the model itself)."""

    model: Any
    batches: list[dict[str, Tensor]]
    with_task: nn.Module | None
    run: Callable[[Any], Tensor]
    excluded: tuple[str, ...]
    modalities: set[str]


def pairs(backbone: Any) -> list[dict[str, Tensor]]:
    size = backbone.pictures.size
    return [{"pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(i)),
             **backbone.texts(TEXTS[i : i + 3])} for i in range(2)]  # fmt: skip


def blip(folder) -> Subject:
    path, settings, words = file(folder, "blip")
    backbone = trimtab.load(path, tokenizer=words, **settings)
    batches = pairs(backbone)
    # `text_encoder.cls` and momentum copies are not there; the decoder's word head is `text_decoder.cls`.
    return Subject(backbone.model, batches, PretrainingLoss(backbone), lambda m: m(**batches[0]),
                   ("vision_proj", "text_proj", "itm_head", "text_decoder.cls"), {"vision", "text"})  # fmt: skip


def xvlm(folder) -> Subject:
    path, settings, words = file(folder, "xvlm")
    backbone = trimtab.load(path, tokenizer=words, **settings)
    batches = pairs(backbone)
    return Subject(backbone.model, batches, PretrainingLoss(backbone), lambda m: m(**batches[0])["match"],
                   ("vision_proj", "text_proj", "itm_head", "bbox_head", "text_encoder.cls"),
                   {"vision", "text", "fusion"})  # fmt: skip


def dino(folder) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
                       patch_size=8, num_labels=5)  # fmt: skip
    batches = [{"pixel_values": pixels(2, 3, 16, 16) + i, "labels": torch.tensor([0, 3])} for i in range(2)]
    model = ViTForImageClassification(config).eval()
    return Subject(model, batches, None, lambda m: m(pixel_values=batches[0]["pixel_values"]).logits,
                   ("classifier",), {"vision"})  # fmt: skip


SUBJECTS = {"blip": blip, "xvlm": xvlm, "dino": dino}


@pytest.fixture(params=SUBJECTS)
def subject(request, tmp_path) -> Subject:
    torch.manual_seed(0)
    return SUBJECTS[request.param](tmp_path)


def test_what_is_prunable_is_what_the_authors_prune(subject):
    """Every linear weight but those excluded by name; never embeddings, convolutions, norms or biases."""
    weights = Anatomy.of(subject.model).weights(subject.model)
    tied, expected = set(), set()
    for path, module in subject.model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith(subject.excluded) and id(module.weight) not in tied:
            tied.add(id(module.weight))
            expected.add(path)
    assert {w.module for w in weights} == expected
    assert {w.modality for w in weights} == subject.modalities


@pytest.mark.parametrize("method", ["multiflow", "snip"])
def test_pruned_at_the_three_sparsities_from_one_calibration(subject, method):
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    found = trimtab.prune(subject.model, method, SPARSITIES, subject.batches, with_task=subject.with_task)
    assert all(torch.equal(p, before[n]) for n, p in subject.model.named_parameters())
    for masks, sparsity in zip(found, SPARSITIES, strict=True):
        total = sum(m.numel() for m in masks.values())
        kept = sum(int(m.sum()) for m in masks.values())
        assert kept / total == pytest.approx(1 - sparsity, abs=0.01)
    if method == "multiflow":  # each modality gives the same share, so that none collapses
        weights = Anatomy.of(subject.model).weights(subject.model)
        for modality in subject.modalities:
            masks = [found[1][w.path] for w in weights if w.modality == modality]
            assert sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) == pytest.approx(0.25, abs=0.01)


def test_fine_tuned_on_the_pattern_saved_sparse_and_loaded(subject, tmp_path):
    model = subject.model
    fit = trimtab.prune(model, "multiflow", 0.75, subject.batches, with_task=subject.with_task)
    weights = {w.path: model.get_parameter(w.path) for w in Anatomy.of(model).weights(model)}
    pattern = {n: p != 0 for n, p in weights.items()}
    before = {n: p.clone() for n, p in weights.items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    fit.keep(optimiser)
    called = subject.with_task or model
    for batch in subject.batches:
        out = called(**batch)
        (out["loss"] if subject.with_task else out.loss).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(torch.equal(p != 0, pattern[n]) for n, p in weights.items())
    assert all(not torch.equal(p, before[n]) for n, p in weights.items())
    model.eval()
    fit.export(tmp_path / "sparse", sparse=True)
    again = trimtab.from_pretrained(tmp_path / "sparse")
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in weights.items())
    with torch.no_grad():
        torch.testing.assert_close(subject.run(again), subject.run(model), rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_pair_has_no_wrong_text(tmp_path):
    made = blip(tmp_path)
    batch = {k: v[:1] for k, v in made.batches[0].items()}
    with pytest.raises(ValueError, match="give two pairs or more"):
        made.with_task(**batch)


def test_fine_tuned_models_have_no_pretraining_objective(tmp_path):
    path, settings, words = file(tmp_path, "blip")
    backbone = trimtab.load(path, tokenizer=words, task="retrieval", **settings)
    with pytest.raises(NotImplementedError, match="no pretraining objective: a pretrained BLIP or X-VLM has one"):
        PretrainingLoss(backbone)(**pairs(backbone)[0])


def test_xvlm_finds_masked_words_and_leaves_the_ends_of_a_text(tmp_path):
    made = xvlm(tmp_path)
    seen = []
    made.model.text_encoder.bert.register_forward_pre_hook(lambda m, args: seen.extend(args[:1]))
    made.with_task(**made.batches[0])
    ids = made.batches[0]["input_ids"]
    masked = next(r for r in seen if not torch.equal(r, ids)) == 4
    length = made.batches[0]["attention_mask"].sum(dim=1)
    assert masked.any(dim=1).all() and not masked[:, 0].any()
    assert not masked[torch.arange(3), length - 1].any() and torch.equal(seen[0], ids)
