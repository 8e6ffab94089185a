"""While an adapted model trains, nothing is dropped in what is frozen, whichever method trains what."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from trimtab.methods import METHODS
from trimtab.methods.fitting import evaluating

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
DROPS = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


def bert():
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=60, **DROPS)), {"input_ids": torch.randint(60, (2, 7))}


def vit():
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=8, **DROPS))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def llama():
    """Attention drops by a share that it is given (`attention_dropout`), not by a module."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=60, attention_dropout=0.5, pad_token_id=0)
    return hf.LlamaModel(config), {"input_ids": torch.randint(3, 60, (2, 7)), "use_cache": False}


def bart():
    """Layers, and the encoder itself, drop by shares of their own."""
    torch.manual_seed(0)
    model = hf.BartModel(hf.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.5, attention_dropout=0.5,
        activation_dropout=0.5, pad_token_id=1))  # fmt: skip
    ids = torch.randint(3, 60, (2, 7))
    return model, {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False,
                   "attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(ids)}  # fmt: skip


MODELS = {"bert": bert, "vit": vit, "llama": llama, "bart": bart}
FROZEN = [n for n, m in METHODS.items() if m.lever == "tune" and n not in ("full", "partial")]


def test_modes_are_kept_with_the_shares_of_dropout_that_are_off():
    """What a frozen layer drops by a share of its own stays off after a look in evaluation mode."""
    model, batch = bart()
    fit = trimtab.tune(model, "bitfit")
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        with evaluating(model):
            model(**batch)
        assert torch.equal(model(**batch).last_hidden_state, before)
        fit.cost(batch)
        assert torch.equal(model(**batch).last_hidden_state, before) and model.training


def attached(name, model, batch):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        try:
            fit = trimtab.tune(model, name)
        except ValueError as error:
            pytest.skip(str(error)[:80])  # the matrix says why
    for parameter in fit.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if any(t.mask for t in fit.anatomy.towers) and "attention_mask" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return fit


def outputs(model, batch, count=3):
    """The model's last hidden state, several times, in training mode, each with another seed."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(model.train()(**batch).last_hidden_state.detach())
    return found


def dropping(model) -> list[str]:
    """Modules that would drop something: torch's own, and those with a share of their own."""
    found = []
    for path, module in model.named_modules():
        shares = {n: v for n, v in vars(module).items() if "drop" in n and isinstance(v, float)}
        share = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else max(shares.values(), default=0)
        if module.training and share:
            found.append(path)
    return found


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_dropped_in_frozen_parts(kind, name):
    model, batch = MODELS[kind]()
    assert not torch.equal(*outputs(copy.deepcopy(model), batch, 2)), "the example drops something"
    attached(name, model, batch)
    first, *others = outputs(model, batch)
    assert not dropping(model)
    assert all(torch.equal(first, other) for other in others)
    assert model.training


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_dropped_beside_adapters_of_skipped_blocks(kind):
    model, batch = MODELS[kind]()
    if "pixel_values" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    path = next(iter(trimtab.Anatomy.of(model).blocks())).path
    try:
        trimtab.skip(model, "das", plan=[path])
    except ValueError as error:
        pytest.skip(str(error)[:80])
    assert any(p.requires_grad for p in model.parameters())
    first, *others = outputs(model, batch)
    assert not dropping(model) and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", MODELS)
def test_full_drops_as_the_plain_model_does(kind):
    model, batch = MODELS[kind]()
    plain = copy.deepcopy(model)
    attached("full", model, batch)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), outputs(plain, batch), strict=True))


def test_full_drops_as_before_where_what_no_loss_reaches_is_frozen():
    model, batch = bert()
    plain = copy.deepcopy(model)
    fit = trimtab.tune(model, "full")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    idle = fit.settle(batch, loss=lambda out: out.last_hidden_state.sum())
    assert set(idle) == {"pooler.dense.weight", "pooler.dense.bias"}
    for copied in (model, copy.deepcopy(model)):
        assert all(torch.equal(a, b) for a, b in zip(outputs(copied, batch), outputs(plain, batch), strict=True))


def test_partial_drops_in_the_blocks_that_are_trained():
    model, _ = bert()
    trimtab.tune(model, "partial", blocks=1)
    model.train()
    assert dropping(model) and all(path.startswith("encoder.layer.2.") for path in dropping(model))


def test_what_is_added_may_drop():
    model, batch = bert()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    trimtab.tune(model, "lora", dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.train()
    assert dropping(model) and all("lora_dropout" in path for path in dropping(model))
    assert not torch.equal(*outputs(model, batch, 2))


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_with_gradient_checkpointing_layers_are_checkpointed_and_drop_nothing(kind):
    model, batch = MODELS[kind]()
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    trimtab.tune(model, "lora")
    shares = {p: dict(vars(m)) for p, m in model.named_modules()}
    model.gradient_checkpointing_enable()
    first, second = outputs(model, batch, 2)
    assert torch.equal(first, second)
    layers = [m for m in model.modules() if isinstance(m, hf.modeling_layers.GradientCheckpointingLayer)]
    assert layers and all(layer.training and layer.gradient_checkpointing for layer in layers)
    model.eval()
    now = {p: vars(m) for p, m in model.named_modules()}
    assert all(now[p][n] == v for p, own in shares.items() for n, v in own.items() if "drop" in n)


def test_running_statistics_of_frozen_norms_stay():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            layer = lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8))  # noqa: E731
            self.blocks = nn.ModuleList(layer() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Grid()
    trimtab.tune(model, "bitfit")
    model.train()(torch.randn(4, 8) + 3)
    assert not model.blocks[0][1].running_mean.any()
