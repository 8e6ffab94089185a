"""Modules that a forward pass goes around: torch's fused layer, its packed encoder, attention's output projection."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trimtab
from trimtab import Anatomy, Block, Sublayer, Tap, Tower
from trimtab.methods import METHODS

WIDTH = 32


class Encoder(nn.Module):
    """Three of torch's encoder layers, in a list or in torch's own container, on tokens with padding."""

    def __init__(self, contained: bool):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        layers = [copy.deepcopy(layer) for _ in range(3)]
        self.encoder = nn.TransformerEncoder(layer, 3) if contained else nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 5)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x, mask):
        if isinstance(self.encoder, nn.TransformerEncoder):
            return self.head(self.encoder(x, src_key_padding_mask=mask == 0))
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.head(x)

    def anatomy(self, written: str = "dropout1") -> Anatomy:
        scope = "encoder.layers" if isinstance(self.encoder, nn.TransformerEncoder) else "encoder"
        blocks = []
        for i in range(3):
            path = f"{scope}.{i}"
            parts = (Sublayer("attention", Tap(path, "input"), Tap(f"{path}.{written}")),
                     Sublayer("mlp", Tap(f"{path}.norm1"), Tap(f"{path}.linear2")))  # fmt: skip
            blocks.append(Block(path, WIDTH, parts, stream="src"))
        tower = Tower("text", "text", tuple(blocks), ("encoder",), Tap(f"{scope}.2"), mask=Tap("", "input", "mask"))
        return Anatomy((tower,), heads=("head",))


X, MASK = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6, dtype=torch.long)
MASK[1, 4:] = 0
SETTINGS = {"lora": {"targets": ("linear1", "linear2")}, "lst": {"initialise": "random"}}
TUNED = [n for n, m in METHODS.items() if m.lever == "tune"]


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("contained", [False, True])
def test_what_is_tuned_computes_the_same_in_training_and_in_evaluation(contained, name):
    model = Encoder(contained)
    fit = trimtab.tune(model, name, anatomy=model.anatomy(), **SETTINGS.get(name, {}))
    if name == "linear-probe":
        model.head.requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in fit.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    assert before.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    seen = MASK.bool()
    trained = model.train()(X, MASK)[seen]
    trained.square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(model(X, MASK)[seen], trained.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shallow-prompt", "deep-prompt"])
@pytest.mark.parametrize("contained", [False, True])
def test_prompts_are_seen_by_tokens_and_padding_is_not(contained, name):
    model = Encoder(contained)
    trimtab.tune(model, name, anatomy=model.anatomy())
    model.eval()
    with torch.no_grad():
        before = model(X, MASK)
        other = X.clone()
        other[1, 4:] = 9.0
        torch.testing.assert_close(model(other, MASK)[MASK.bool()], before[MASK.bool()], rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        assert ((model(X, MASK) - before).abs().amax(-1)[MASK.bool()] > 1e-3).all()


def test_prompts_refuse_what_torchs_layers_take_in_another_way():
    class Turned(nn.Module):
        def __init__(self, batch_first: bool, causal: bool):
            super().__init__()
            make = lambda: nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, batch_first=batch_first)  # noqa: E731
            self.blocks = nn.ModuleList(make() for _ in range(2))
            self.causal = causal

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
            for block in self.blocks:
                x = block(x, src_mask=mask, is_causal=self.causal)
            return x

    for batch_first, causal, match in ((False, False, "batch_first=True"), (True, True, "is given `src_mask`")):
        model = Turned(batch_first, causal)
        (tower,) = trimtab.Anatomy.of(Turned(True, False), {"x": X}).towers
        trimtab.tune(model, "shallow-prompt", anatomy=trimtab.Anatomy((tower,)))
        with pytest.raises(ValueError, match=match):
            model(X)


@pytest.mark.parametrize("name", ["adapter", "parallel-adapter"])
def test_a_tap_on_what_attention_never_calls_is_refused(name):
    model = Encoder(False)
    with pytest.raises(ValueError, match=r"'encoder.0.self_attn.out_proj' sees nothing.*Tap\('encoder.0.self_attn', k"):
        trimtab.tune(model, name, anatomy=model.anatomy("self_attn.out_proj"))


@pytest.mark.parametrize("name", ["multiflow", "sparsegpt", "wanda"])
def test_both_are_pruned_alike(name):
    found = []
    for contained in (False, True):
        model = Encoder(contained).eval()
        values = Encoder(True).encoder.state_dict()
        model.encoder.load_state_dict(
            values if contained else {k.removeprefix("layers."): v for k, v in values.items()}
        )
        masks = trimtab.prune(model, name, 0.5, [{"x": X, "mask": MASK}], model.anatomy()).masks
        found.append({path.replace("layers.", ""): mask for path, mask in masks.items()})
    assert len(found[0]) == 3 * 4 and found[0].keys() == found[1].keys()
    assert all(torch.equal(mask, found[1][path]) for path, mask in found[0].items())


CASTS = {
    "half before": (torch.float16, None),
    "bfloat16 before": (torch.bfloat16, None),
    "half after": (None, torch.float16),
    "bfloat16 after": (None, torch.bfloat16),
    "half before, single after": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", TUNED)
def test_every_method_computes_and_trains_in_every_precision(name, cast):
    before, after = CASTS[cast]
    model = Encoder(False)
    whole = copy.deepcopy(model)
    outputs = []
    for twin, types in ((whole, ()), (model, (before, after))):
        first, last = types or (None, None)
        twin = twin if first is None else twin.to(first)
        torch.manual_seed(1)
        fit = trimtab.tune(twin, name, anatomy=twin.anatomy(), **SETTINGS.get(name, {}))
        twin = twin if last is None else twin.to(last)
        dtype = last or first or torch.float32
        out = twin.train()(X.to(dtype), MASK)
        assert out.dtype == dtype
        outputs.append(out.detach().float()[MASK.bool()])
        if any(True for _ in fit.parameters()):
            out.float().square().sum().backward()
            assert any(p.grad is not None and torch.isfinite(p.grad).all() for p in fit.parameters())
    assert (outputs[0] - outputs[1]).abs().max() < 0.1 * outputs[0].abs().max()
