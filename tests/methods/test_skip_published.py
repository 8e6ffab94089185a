"""DAS on its papers' backbones: METER's two streams of fusion layers, and LLaVA's decoder in a later form: searched,
retrained from the pretrained weights, generating. ViLT runs in `tests/test_published.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.backbones.test_meter import batch, tiny
from tests.models import zoo
from trimtab.anatomy import Anatomy
from trimtab.methods import METHODS

METER = ("fusion_text", "fusion_image")


class Trained(nn.Module):
    """A model and its loss, as a session holds them."""

    def __init__(self, model: Any, batch: dict[str, Tensor], loss: Any):
        super().__init__()
        self.model, self.batch, self.loss = model, batch, loss

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.model(**batch))}


class Session:
    """One batch for everything: training, and rewards, which LLaVA-DAS takes from the training batch itself."""

    folder = None
    seed = 0

    def __init__(self, model: Any, batch: dict[str, Tensor], loss: Any):
        self.with_task, self.anatomy = Trained(model, batch, loss), Anatomy.of(model)

    @property
    def plain(self) -> nn.Module:
        return self.with_task.model

    def plain_in(self, model: Trained) -> nn.Module:
        return model.model

    def example(self) -> dict[str, Tensor]:
        return self.with_task.batch

    def loss(self, with_task: Trained, batch: dict[str, Tensor]) -> Tensor:
        return with_task(**batch)["loss"]

    def batches(self, split: str, size: int | None = None) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.with_task.batch

    def fit(self, model: Trained, steps: int, callbacks: list[Any]) -> list[dict[str, float]]:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        control = SimpleNamespace(should_save=False)
        model.train()
        for step in range(steps):
            for hook in callbacks:
                hook.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=steps), control)
            model(**model.batch)["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            for hook in callbacks:
                hook.on_step_end(None, SimpleNamespace(global_step=step + 1, max_steps=steps), control)
        return []


def searched(model: Any, batch: dict[str, Tensor], loss: Any, **settings: Any) -> Any:
    """DAS with its plan found; the model is as it was."""
    model.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    das = METHODS["das"](**settings)
    das.prepare(Session(model, batch, loss))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "retraining starts from the pretrained"
    return das


@pytest.mark.parametrize("towers", [METER, None], ids=["fusion", "global"])
def test_meter_is_searched_and_retrained(towers):
    model, _ = tiny()
    loss = lambda out: out.pooled.square().mean()  # noqa: E731
    das = searched(model, batch(), loss, skip=1, towers=towers, search_steps=6, turn=2, reduction=4)
    gates = list(das.state["gates"])
    fusion = [f"cross_modal_{s}_layers.{i}" for s in ("text", "image") for i in range(2)]
    assert gates[-4:] == fusion, "text layers first, as in the published code"
    assert (len(gates) == 4) == (towers == METER)
    (path,) = das.state["skip"]
    assert das.state["gates"][path] == max(das.state["gates"].values())
    pretrained = copy.deepcopy(model.state_dict())
    left = das.attach(model, Anatomy.of(model))
    assert path not in [b.path for b in left.blocks()]
    # Kept fusion layers have three adapters a quarter as wide, the skipped one an adapter as wide as the three.
    kept = next(p for p in fusion if p != path)
    assert model.get_submodule(kept).das_2.down.out_features == 4
    if path in fusion:
        assert model.get_submodule(path).adapter.down.out_features == 12
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, pretrained[n]) for n, p in frozen.items() if n in pretrained)
    assert any(n.startswith("cross_modal_image_transform") for n in frozen)
    model(**batch()).pooled.square().mean().backward()
    assert all(p.grad is None for p in frozen.values())


LLAVA = {"adapters": "sequential", "towers": ("text",), "subsets": 2, "turn": 3, "reduction": 4, "gate_rate": 0.1}


def llava() -> tuple[Any, dict[str, Tensor]]:
    """Four decoder layers instead of two, so that there are plans to choose from."""
    member = zoo.ZOO["llava"]
    model = member.model()
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 4, None
    torch.manual_seed(0)
    model = type(model)(config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model, member.batch


def test_llava_is_searched_retrained_and_generates_the_same_with_a_cache():
    model, inputs = llava()
    das = searched(model, inputs, lambda out: out.loss, skip=2, search_steps=6, **LLAVA)
    assert [len(u["subsets"]) for u in das.state["updates"]] == [2, 2], "every third step after the warm-up of two"
    das.attach(model, Anatomy.of(model))
    layers = model.model.language_model.layers
    # Two adapters of a width in a kept layer; one of their width together, on the normalised input, in a skipped one.
    kept = next(b for b in layers if hasattr(b, "das_0"))
    assert kept.das_0.down.out_features == kept.das_1.down.out_features == 4
    gone = next(b for b in layers if type(b).__name__ == "Skipped")
    assert gone.adapter.down.out_features == 8 and gone.norm is not None
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".das_" in n or ".adapter." in n or "multi_modal_projector" in n for n in trained)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    told = {k: v for k, v in inputs.items() if k != "labels"}
    told |= {"suppress_tokens": [model.config.image_token_id]}  # a picture in its own words would have no features
    texts = [model.generate(**told, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*texts)


def test_llava_has_the_released_widths():
    """LLaVA-1.5-7B: two adapters of 4096 / 64 = 64 in a kept layer, one of 256 in a skipped one."""
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        sizes = {"hidden_size": 4096, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64}
        model = LlamaModel(LlamaConfig(**sizes)).requires_grad_(False)
        das = METHODS["das"](skip=1, adapters="sequential", reduction=64, skip_width=256)
        das.assume(model, Anatomy.of(model))
        das.attach(model, Anatomy.of(model))
    assert model.layers[0].das_0.down.out_features == 64 and model.layers[1].adapter.down.out_features == 256
