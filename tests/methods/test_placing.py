"""Frozen models that are quantised, offloaded or spread over devices: levers work on them, or say the way out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from trimtab.methods.placing import check_in_one_place


class Int8Linear(nn.Linear):
    """Weights in int8 with a scale a row, as quantised layers of bitsandbytes hold them."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features, device="meta")
        scale = whole.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((whole.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def vit(quantised: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
                                     image_size=16, patch_size=4), add_pooling_layer=False).eval()  # fmt: skip
    for module in list(model.modules()) if quantised else ():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model


PICTURES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def loss(out) -> Tensor:
    states = out.last_hidden_state
    return (states * torch.arange(states.numel()).view(states.shape).sin()).mean()


@pytest.mark.parametrize("name", ["unipt", "lst", "lora", "adapter", "block-influence"])
def test_a_quantised_model_is_tuned_stored_and_comes_back(name, tmp_path):
    model = vit()
    fit = trimtab.adapt(model)
    if name == "block-influence":
        fit.skip(name, skip=1, train=[PICTURES], validation=[PICTURES], loss=loss)
    else:
        fit.tune(name)
    trained = list(fit.parameters())
    assert trained and all(p.is_floating_point() for p in trained)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    before = loss(model(**PICTURES))
    before.backward()
    optimizer.step()
    after = model.eval()(**PICTURES).last_hidden_state
    assert abs(float(loss(model(**PICTURES)) - before)) > 1e-6
    fit.save(tmp_path / "fit")
    again = vit()
    trimtab.adapt(again, tmp_path / "fit")
    assert torch.equal(again.eval()(**PICTURES).last_hidden_state, after)


@pytest.mark.parametrize(("lever", "name"), [("prune", "omp"), ("tune", "full")])
def test_quantised_weights_themselves_are_left_alone(lever, name):
    fit = trimtab.adapt(vit())
    with pytest.raises(ValueError, match=r"q_proj.weight' is stored as int8 \(quantised\)"):
        getattr(fit, lever)(name, *([0.5] if lever == "prune" else []))


def test_an_offloaded_model_is_refused_with_the_way_out():
    model = cpu_offload(vit(quantised=False), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is on the meta device .* without offloading: `device_map=.* quantised"):
        trimtab.adapt(model)


def test_a_model_on_several_devices_is_refused_with_the_way_out():
    class Spread:  # there are no two devices where tests run
        def named_parameters(self):
            for name, device in (("first", "cuda:0"), ("second", "cuda:0"), ("third", "cuda:1")):
                yield name, SimpleNamespace(is_meta=False, device=torch.device(device))

    with pytest.raises(ValueError, match="spread over devices: 'first' is on cuda:0, 'third' on cuda:1 .*auto.*one"):
        check_in_one_place(Spread())
