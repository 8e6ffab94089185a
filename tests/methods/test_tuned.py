"""Tuning in one call: what is trained, saved, attached again, switched and refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import trimtab
from tests.methods.test_rivals import bert, words
from trimtab.methods import METHODS

TUNERS = sorted(n for n, m in METHODS.items() if m.lever == "tune" and n != "linear-probe")


def output(model: nn.Module) -> torch.Tensor:
    return model.eval()(**words()).last_hidden_state.detach()


def train(tuned: trimtab.Adapted, steps: int = 2, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    target = torch.randn(2, 7, 32)
    tuned.model.train()
    for _ in range(steps):
        (tuned.model(**words()).last_hidden_state - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", TUNERS)
def test_what_was_trained_comes_back_on_a_fresh_model(method, tmp_path):
    tuned = trimtab.tune(bert(), method)
    train(tuned)
    wanted = output(tuned.model)
    tuned.save(tmp_path / "side")
    assert {p.name for p in (tmp_path / "side").iterdir()} == {"fit.json", "weights.safetensors"}
    if method != "full":
        size = (tmp_path / "side" / "weights.safetensors").stat().st_size
        assert size < 4 * sum(p.numel() for p in bert().parameters())
    again = trimtab.adapt(bert(), tmp_path / "side")
    assert torch.equal(output(again.model), wanted)


def test_frozen_parts_stay_in_evaluation_mode_and_as_they_are():
    tuned = trimtab.tune(bert(), "unipt", reduction=4)
    before = {n: p.clone() for n, p in tuned.model.named_parameters() if not p.requires_grad}
    train(tuned)
    assert tuned.model.train().unipt.training and not tuned.model.encoder.layer[0].training
    assert all(torch.equal(p, before[n]) for n, p in tuned.model.named_parameters() if n in before)
    assert not tuned.model.eval().unipt.training


def test_heads_are_trained_when_they_are_named():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    frozen, trained = (trimtab.tune(BertForSequenceClassification(config), heads=h) for h in (False, True))
    assert {n.split(".")[2] for n in frozen.tensors()} == {"text"}, "the side networks alone"
    assert {"learned.classifier.weight", "learned.classifier.bias"} <= set(trained.tensors())
    some = trimtab.tune(BertForSequenceClassification(config), heads=("classifier.bias",))
    assert "learned.classifier.bias" in some.tensors() and "learned.classifier.weight" not in some.tensors()
    with pytest.raises(ValueError, match="unknown head 'clasifier': did you mean 'classifier'"):
        trimtab.tune(BertForSequenceClassification(config), heads=("clasifier",))


@pytest.mark.parametrize("method", ["unipt", "lora", "bitfit"])
def test_several_are_held_and_switched(method, tmp_path):
    tuned = trimtab.tune(bert(), method, name="questions")
    train(tuned, seed=0)
    questions = output(tuned.model)
    tuned.add("captions")
    assert torch.equal(output(tuned.model), questions)
    train(tuned, seed=1)
    captions = output(tuned.model)
    assert not torch.equal(captions, questions)
    tuned.save(tmp_path / "questions", "questions")
    tuned.switch("questions")
    assert torch.equal(output(tuned.model), questions) and tuned.names == ["captions", "questions"]
    tuned.switch("captions")
    assert torch.equal(output(tuned.model), captions)
    tuned.load(tmp_path / "questions", "again")
    tuned.switch("again")
    assert torch.equal(output(tuned.model), questions)
    with pytest.raises(ValueError, match="did you mean 'captions'"):
        tuned.switch("caption")


def test_another_backbone_is_refused_with_the_difference(tmp_path):
    tuned = trimtab.tune(bert(), "unipt")
    tuned.save(tmp_path / "side")
    with pytest.raises(
        ValueError, match=r"blocks of tower 'text' \['encoder.layer.0', .*\], here \['encoder.layer.0', 'enc"
    ):
        trimtab.adapt(bert(2), tmp_path / "side")
    other = bert()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ValueError, match="same architecture and precision with other weights"):
        trimtab.adapt(other, tmp_path / "side")
    with pytest.raises(ValueError, match="a BertModel, this is a Linear"):
        tower = trimtab.Tower("t", "text", (trimtab.Block("", 4),), ("",), output=trimtab.Tap(""))
        trimtab.adapt(nn.Linear(4, 4), tmp_path / "side", anatomy=trimtab.Anatomy((tower,)))
    (tmp_path / "side" / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"weights.safetensors"):
        trimtab.adapt(bert(), tmp_path / "side")


def test_other_settings_are_refused_beside_each_other(tmp_path):
    trimtab.tune(bert(), "unipt", reduction=4).save(tmp_path / "narrow")
    tuned = trimtab.tune(bert(), "unipt")
    with pytest.raises(ValueError, match="unipt with reduction 4, here 2"):
        tuned.load(tmp_path / "narrow", "narrow")
    config = json.loads((tmp_path / "narrow" / "fit.json").read_text())
    (tmp_path / "narrow" / "fit.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="format 9, this version of trimtab reads 1"):
        tuned.load(tmp_path / "narrow", "narrow")
    with pytest.raises(FileNotFoundError, match=r"expected fit.json"):
        tuned.load(tmp_path / "nowhere", "narrow")
    with pytest.raises(FileExistsError):
        tuned.save(tmp_path / "narrow")


def test_wrong_names_get_the_nearest():
    with pytest.raises(ValueError, match="unknown tuning method 'unitp': did you mean 'unipt'"):
        trimtab.tune(bert(), "unitp")
    with pytest.raises(ValueError, match="unipt: unknown setting 'reductoin': did you mean 'reduction'"):
        trimtab.tune(bert(), reductoin=4)
    tuned = trimtab.tune(bert())
    with pytest.raises(ValueError, match="tuned already with unipt"):
        trimtab.tune(tuned.model)
