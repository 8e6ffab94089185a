"""What calibration finds out: inputs of attentions, of layers that share a tensor, and behind padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import trimtab
from tests import conformance
from tests.comparisons.prune import LOSS, Toy
from trimtab import Anatomy, Block, Tap, Tower
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect

GOLDEN = Path(__file__).parents[1] / "golden"


class Attends(nn.Module):
    def __init__(self, batch_first: bool, cross: bool, kdim: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)])
        self.cross = cross

    def forward(self, x, memory):
        memory = memory if self.cross else x
        return self.blocks[0](x, memory, memory)[0]


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_projections_of_attentions_get_their_own_inputs(batch_first, cross, kdim):
    if kdim and not cross:
        pytest.skip("self-attention has one width")
    model = Attends(batch_first, cross, kdim).eval()
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, kdim or 8)
    swap = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    batch = {"x": swap(x), "memory": swap(memory)}
    tower = Tower("vision", "vision", (Block("blocks.0", 8),), ("blocks",), Tap("blocks.0"))
    calibration = Calibration(model, model, Anatomy((tower,)), lambda: [batch])
    weights = calibration.anatomy.weights(model)
    before = model(**batch)
    found = {w.path: e for w, e in collect(calibration, weights, {"squares"}, [batch]).items()}
    torch.testing.assert_close(model(**batch), before, rtol=0, atol=0)

    query, other = x.square().sum((0, 1)) / 3, (memory if cross else x).square().sum((0, 1)) / 3
    if kdim:
        parts = [("blocks.0.q_proj_weight", 0, query), ("blocks.0.k_proj_weight", 0, other)]
        parts.append(("blocks.0.v_proj_weight", 0, other))
    elif cross:
        assert [e.rows for e in found["blocks.0.in_proj_weight"]] == [8, 8, 8]
        parts = [("blocks.0.in_proj_weight", i, s) for i, s in enumerate((query, other, other))]
    else:
        assert [e.rows for e in found["blocks.0.in_proj_weight"]] == [24]
        parts = [("blocks.0.in_proj_weight", 0, query)]
    for path, i, squares in parts:
        torch.testing.assert_close(found[path][i].squares, squares)
    # The output projection's input is the attention's output before it: undo the projection.
    out = model.blocks[0].out_proj
    context = torch.linalg.solve(out.weight, (swap(before) - out.bias).reshape(-1, 8).T).T
    torch.testing.assert_close(
        found["blocks.0.out_proj.weight"][0].squares, context.square().sum(0) / 3, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["multiflow", "sparsegpt", "snip"])
def test_encoders_of_torch_and_transposed_linears_are_pruned(name):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
            self.mix = nn.ModuleList(nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(8, 12)) for _ in range(2))

        def forward(self, x):
            for layer, mix in zip(self.layers, self.mix, strict=True):
                x = mix(layer(x))
            return {"loss": x.square().mean()}

    torch.manual_seed(0)
    model = Encoder().eval()
    batches = [{"x": torch.randn(4, 3, 8)} for _ in range(3)]
    masks = trimtab.prune(
        model, name, 0.5, batches, allocation="uniform"
    ).masks  # Conv1D begins with much smaller weights
    assert masks["mix.0.0.weight"].shape == (8, 12)
    assert len(masks) == 2 * 6
    assert all(not p[~masks[n]].any() for n, p in model.named_parameters() if n in masks)
    assert abs(masks.sparsity - 0.5) < 0.02


def test_an_input_is_summed_anew_when_it_was_changed_between_two_layers():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))

        def forward(self, x):
            for first, second, third in self.blocks:
                x = x + 1
                out = first(x) + second(x)
                x.mul_(2)
                out = out + third(x)
            return out

    torch.manual_seed(0)
    model = Reused()
    batch = {"x": torch.randn(4, 3, 8)}
    blocks = (Block("blocks.0", 8), Block("blocks.1", 8))  # lists, which are never called themselves
    anatomy = Anatomy((Tower("text", "text", blocks, ("blocks",), Tap("blocks.1")),))
    calibration = Calibration(model, model, anatomy, lambda: [batch])
    weights = calibration.anatomy.weights(model)
    found = {w.path: e[0].squares for w, e in collect(calibration, weights, {"squares"}, [batch]).items()}
    seen = batch["x"] + 1
    for block in range(2):
        wanted = seen.square().sum((0, 1)) / 4
        torch.testing.assert_close(found[f"blocks.{block}.0.weight"], wanted)
        torch.testing.assert_close(found[f"blocks.{block}.1.weight"], wanted)
        torch.testing.assert_close(found[f"blocks.{block}.2.weight"], 4 * wanted)
        seen = 2 * seen + 1


def test_the_padding_of_a_memory_is_left_out_whatever_the_order_of_arguments():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, memory, hidden_states):
            return hidden_states + self.own(hidden_states) + self.other(memory)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.fusion = nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([Reader()])

        def forward(self, image, x, mask):
            for block in self.text:
                x = block(x)
            for block in self.fusion:
                image = block(x, hidden_states=image)
            return image

    torch.manual_seed(0)
    model = Two()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"image": torch.randn(2, 3, 8), "x": torch.randn(2, 3, 8), "mask": mask}
    text = Tower("text", "text", (Block("text.0", 8),), ("text",), Tap("text.0"), mask=Tap("", "input", "mask"))
    fusion = Tower("fusion", "fusion", (Block("fusion.0", 8),), ("fusion",), Tap("fusion.0"), memory="text")
    anatomy = Anatomy((text, fusion))
    calibration = Calibration(model, model, anatomy, lambda: [batch])
    found = collect(calibration, anatomy.weights(model), {"squares"}, [batch])
    squares = {w.path: e[0].squares for w, e in found.items()}
    torch.testing.assert_close(squares["fusion.0.own.weight"], batch["image"].square().sum((0, 1)) / 2)
    memory = model.text[0](batch["x"])[mask.bool()]
    torch.testing.assert_close(squares["fusion.0.other.weight"], memory.square().sum(0) / 2)


def test_calibration_in_half_precision_sums_in_single():
    toy = Toy(conformance.Case("b1_model", json.loads((GOLDEN / "b1_model.json").read_text()), GOLDEN))
    data = list(toy.batches(LOSS))
    whole, half = (
        Calibration(toy.model, toy.model, toy.model.anatomy(), lambda: data, precision=p) for p in ("fp32", "bf16")
    )
    weights = toy.model.anatomy().weights(toy.model)
    ours, theirs = (collect(c, weights, {"squares"}, data) for c in (half, whole))
    for weight in weights:
        a, b = ours[weight][0].squares, theirs[weight][0].squares
        assert a.dtype == torch.float32 and torch.allclose(a, b, rtol=0.05, atol=1e-3 * float(b.max()))
    assert any(not torch.equal(ours[w][0].squares, theirs[w][0].squares) for w in weights)  # it was half precision
