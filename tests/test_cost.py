from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from trimtab import counting
from trimtab.experiments import assembly, recipe
from trimtab.experiments import estimate as cost
from trimtab.experiments.run import run
from trimtab.methods import METHODS
from trimtab.sizes import sizes_only


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda: nn.Linear(3, 5)(torch.ones(2, 3)), 2 * 3 * 5),
        (lambda: nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 8, 8)), 6 * 6 * 4 * 3 * 3 * 3),
        (lambda: nn.Conv2d(4, 4, 3, groups=4)(torch.ones(1, 4, 8, 8)), 6 * 6 * 4 * 3 * 3),
        (lambda: torch.ones(2, 3) @ torch.ones(3, 7), 2 * 3 * 7),
        (lambda: torch.ones(9, 9).exp() + 1, 0),
    ],
    ids=["linear", "convolution", "depthwise", "product", "pointwise"],
)
def test_count_macs(function, macs):
    assert counting.count_macs(function) == macs


def test_attention_counts_the_same_fused_and_plain():
    q, k, v = (torch.randn(2, 3, length, 8) for length in (4, 6, 6))
    fused = counting.count_macs(lambda: F.scaled_dot_product_attention(q, k, v))
    plain = counting.count_macs(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    assert fused == plain == 2 * 3 * (4 * 6 * 8 + 4 * 6 * 8)


# --- bytes kept for backward ------------------------------------------------------------------------------------------


def test_a_storage_saved_twice_is_counted_once():
    x = torch.ones(10, 10, requires_grad=True)
    once = counting.saved_bytes(lambda: (x * 2).sin().sum(), nn.Module())

    def twice() -> torch.Tensor:
        y = x * 2
        return (y.sin() + y.cos() + y.view(-1).sin().view(10, 10)).sum()

    assert once == counting.saved_bytes(twice, nn.Module()) == 400


def test_two_storages_are_both_counted():
    x = torch.ones(10, 10, requires_grad=True)
    assert counting.saved_bytes(lambda: ((x * 2).sin() + (x * 3).sin()).sum(), nn.Module()) == 800


def test_parameters_and_buffers_are_left_out():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5, bias=False)
            self.register_buffer("scale", torch.full((5,), 2.0))

        def forward(self, x):
            return self.linear(x) * self.scale

    model, x = Scaled(), torch.ones(2, 3)
    assert counting.saved_bytes(lambda: model(x).sum(), model) == x.nbytes  # the input alone, for the weight's gradient
    x.requires_grad_()
    assert counting.saved_bytes(lambda: model(x).sum(), model) == x.nbytes
    other = Scaled()
    assert counting.saved_bytes(lambda: model(x).sum(), other) == x.nbytes + 4 * (15 + 5)  # not the asked model's own


def test_a_frozen_model_keeps_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)).requires_grad_(False)
    assert counting.saved_bytes(lambda: model(torch.ones(4, 8)).sum(), model) == 0
    model[2].requires_grad_(True)
    assert counting.saved_bytes(lambda: model(torch.ones(4, 8)).sum(), model) == 4 * 8 * 4  # what enters the last layer


def test_saved_bytes_count_under_no_grad_too():
    x = torch.ones(10, requires_grad=True)
    with torch.no_grad():
        assert counting.saved_bytes(lambda: x.sin().sum(), nn.Module()) == 40


# --- files, time, memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "types",
    [
        "float32", "bfloat16", "float64", "int64", "float32 int64 uint8", "float16 float32",
        "float32 bool", "float32 int32", "float32 int8", "float16 bfloat16", "float64 int64",
        "uint16 uint32 uint64 int16", "complex64 float64", "float8_e4m3fn float8_e5m2 int8", "float4_e2m1fn_x2 bool",
    ],
)  # fmt: skip
def test_safetensors_size_is_the_size_of_the_file(types, tmp_path):
    dice = random.Random(0)
    for number in range(40):
        tensors = {}
        for i in range(number % 13):
            shape = [dice.randint(0, 40) for _ in range(dice.randint("float4" in types, 3))]  # four bits fill no byte
            name = f"{i}." + "".join(dice.choice("abc._") for _ in range(dice.randint(1, 20)))
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dice.choice(types.split())))
        save_file(tensors, tmp_path / "file")
        assert counting.safetensors_size(tensors) == (tmp_path / "file").stat().st_size, {
            k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()
        }


def test_a_type_that_no_file_holds_is_named():
    with pytest.raises(ValueError, match=r"b: a safetensors file holds no torch\.complex128: cast it"):
        counting.safetensors_size({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex128)})


def test_latency_gives_ordered_percentiles_in_milliseconds():
    calls = []

    def work() -> None:
        calls.append(torch.is_inference_mode_enabled())
        time.sleep(0.002 if len(calls) > 3 else 0.1)  # what happens in warm-up does not count

    found = counting.latency(work, repeats=10, warmup=3)
    assert set(found) == {"median", "p10", "p90"}
    assert 2 <= found["p10"] <= found["median"] <= found["p90"]
    assert found["median"] < 50
    assert len(calls) == 13 and all(calls)


def test_macs_of_torchs_fused_layers_and_of_experts():
    x = torch.randn(2, 5, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    assert counting.count_macs(lambda: encoder(x)) == 10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 5 * 5 * 16
    lstm = nn.LSTM(16, 8, batch_first=True).eval()
    assert counting.count_macs(lambda: lstm(x)) == 10 * 4 * 8 * (16 + 8)
    assert counting.count_macs(lambda: torch.ones(3, 4) @ torch.ones(4)) == 12
    pairs = nn.Bilinear(6, 8, 5)
    assert counting.count_macs(lambda: pairs(torch.randn(2, 3, 6), torch.randn(2, 3, 8))) == 6 * 5 * 6 * 8
    found = set()
    for kind in ("grouped_mm", "eager"):
        config = MixtralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=2, num_local_experts=4, vocab_size=40)  # fmt: skip
        config._experts_implementation = kind
        model = MixtralForCausalLM(config).eval()
        found.add(counting.count_macs(lambda model=model: model(input_ids=torch.arange(10).view(2, 5))))
    assert len(found) == 1 and found.pop() > 10 * 2 * 3 * 16 * 32  # each token is read by two experts


def test_peak_memory_sees_what_a_call_needs():
    found = [counting.peak_memory(lambda n=n: torch.ones(n * 2**18).sum()) for n in (1, 128)]
    if None in found:
        pytest.skip("the peak cannot be read here")
    assert found[1] > 100 * 2**20 > found[0]


# --- before and after -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "task", "methods"),
    [("tiny-vilt", "vqa", ["full"]), ("tiny-clip", "retrieval", ["linear-probe"])],
    ids=["vqa", "retrieval"],
)
def test_the_estimate_is_what_a_run_measures(backbone, task, methods, tiny_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "latency", lambda function: {})  # counted are numbers and bytes, not time
    (r,) = recipe.expand(tiny_raw(backbone, task, methods, batch_size=4), "test")
    estimated = cost.estimate(r)
    parts = assembly.assemble(r)
    parts.attach()
    save_file(parts.fit.stored(), tmp_path / "weights")
    measured = cost.measure(parts, cost.dense(r), r.training, tmp_path / "weights")
    for key in ("params", "trainable_params", "macs", "dense_macs", "checkpoint_bytes", "batch_size"):
        assert estimated[key] == measured[key], key
    assert estimated["saved_activation_bytes"] == pytest.approx(measured["saved_activation_bytes"], rel=0.02)
    assert estimated["params"] == sum(p.numel() for p in parts.model.parameters())
    if methods == ["full"]:
        assert 0 < estimated["trainable_params"] < estimated["params"] == estimated["nonzero_params"]
        batch = parts.model.example(4)
        parts.model(**batch)["loss"].backward()
        reached = sum(p.numel() for p in parts.model.parameters() if p.grad is not None)
        parts.model.zero_grad()
        assert estimated["trainable_params"] == reached  # ViLT's pooler and matching head have no part in the answer
        assert estimated["saved_activation_bytes"] > 1e6
    else:
        assert estimated["trainable_params"] == sum(p.numel() for p in parts.model.head.parameters())
        assert estimated["saved_activation_bytes"] < 1e5
    assert estimated["macs"] == estimated["dense_macs"] > 1e7
    assert all(p.grad is None for p in parts.model.parameters())


def test_training_in_half_precision_leaves_the_counts_of_a_run_as_estimated(tiny_raw, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "latency", lambda function: {})
    (r,) = recipe.expand(tiny_raw("tiny-vilt", "vqa", ["full"], batch_size=4, precision="bf16"), "test")
    costs = json.loads((run(r, tmp_path / "run") / "costs.json").read_text())
    assert costs["saved_activation_bytes"] == pytest.approx(cost.estimate(r)["saved_activation_bytes"], rel=0.02)


def test_the_estimate_grows_with_the_batch(tiny_raw):
    raws = [tiny_raw("tiny-clip", "retrieval", ["full"], batch_size=n) for n in (4, 8)]
    one, two = (cost.estimate(recipe.expand(raw, "test")[0]) for raw in raws)
    assert (one["batch_size"], two["batch_size"]) == (4, 8)
    assert 1.8 < two["saved_activation_bytes"] / one["saved_activation_bytes"] < 2.2
    assert one["macs"] == two["macs"]  # of one sample


def test_the_estimate_knows_what_pruning_leaves(tiny_raw):
    raw = tiny_raw("tiny-vilt", "vqa", [{"name": "multiflow", "sparsity": 0.5}, "full"], batch_size=2)
    found = cost.estimate(recipe.expand(raw, "test")[0])
    assert 0.4 < found["nonzero_params"] / found["params"] < 0.7


@pytest.mark.parametrize("budget", ["30% macs", "20% params"])
def test_a_budget_is_counted_in_its_own_unit(budget, tiny_raw):
    raw = tiny_raw("tiny-vilt", "vqa", [{"name": "random-skip", "budget": budget}], batch_size=2)
    (r,) = recipe.expand(raw, "test")
    with sizes_only():
        found = cost._estimate(r)
    cost._COUNTED.clear()  # or it would not be counted again
    assert {k: v for k, v in cost._estimate(r).items() if "macs" in k or "params" in k} == {
        k: v for k, v in found.items() if "macs" in k or "params" in k
    }  # the same on real tensors
    (bare,) = recipe.expand(tiny_raw("tiny-vilt", "vqa", ["full"], batch_size=2), "test")
    share, unit = float(budget.split("%")[0]) / 100, budget.split()[1]
    dense = {"macs": found["dense_macs"], "params": cost.estimate(bare)["params"]}[unit]
    block = dense / 8  # of its 8 blocks one more would be too many
    assert (1 - share) * dense - block < found[unit] <= (1 - share) * dense


def test_a_budget_of_latency_needs_real_tensors(tiny_raw, monkeypatch):
    from trimtab.methods.skip import budget

    monkeypatch.setattr(budget, "time_inside", counting.count_inside)  # time itself decides no test
    raw = tiny_raw("tiny-vilt", "vqa", [{"name": "random-skip", "budget": "30% latency"}], batch_size=2)
    (r,) = recipe.expand(raw, "test")
    with pytest.raises(RuntimeError, match="fake tensors take no time"), sizes_only():
        cost._estimate(r)
    found = cost.estimate(r)
    assert found["macs"] <= 0.7 * found["dense_macs"]


SIZED = [["multiflow", "lora"], [{"name": "das", "skip": 2}], *([n] for n, m in METHODS.items() if m.lever == "tune")]


@pytest.mark.parametrize("methods", SIZED, ids=str)
def test_methods_are_counted_without_memory(methods, tiny_raw):
    (r,) = recipe.expand(tiny_raw("tiny-vilt", "vqa", methods, batch_size=2), "test")
    with sizes_only():
        assert cost._estimate(r)["macs"] > 1e7


def test_the_peak_is_of_what_lives_at_one_time():
    def step() -> torch.Tensor:
        return torch.ones(1000).sum() + torch.ones(500).sum()  # the first is gone when the second is made

    assert 4000 <= counting.training_peak(step, nn.Module()) < 4100
    model = nn.Linear(100, 10, bias=False)
    x = torch.ones(2, 100)
    peak = counting.training_peak(lambda: model(x).sum(), model)
    assert 4 * 4000 <= peak < 4 * 4000 + 2000  # weight, gradient and two moments; the rest is small
    model.requires_grad_(False)
    assert 4000 <= counting.training_peak(lambda: model(x).sum(), model) < 4300
    assert model.weight.grad is None


def test_a_graph_that_is_gone_is_not_counted():
    x = torch.ones(1000, requires_grad=True)

    def function(gone: bool) -> torch.Tensor:
        if gone:
            torch.tanh(x * 2)  # keeps its own output
        return x.sum()

    assert counting.saved_bytes(lambda: function(True), nn.Module()) == 0
    left, nothing = (counting.training_step(partial(function, gone), nn.Module()) for gone in (True, False))
    assert left.saved == nothing.saved == 0
    with counting.Alive([]) as alive:
        for _ in range(3):
            counting.saved_bytes(lambda: function(True), nn.Module())
    assert alive.now == 0


def test_an_architecture_has_a_price_and_no_weights(tiny_raw):
    raw = tiny_raw("clip4clip", "retrieval", ["linear-probe"], batch_size=2)
    raw["backbone"] |= {"settings": {"patch": 16}, "max_text": 32}
    (r,) = recipe.expand(raw, "test")
    found = cost.estimate(r)
    assert found["params"] == 149_620_737 + found["trainable_params"]
    with pytest.raises(recipe.RecipeError, match=r"architecture, 'clip4clip', without weights, .*: give the path"):
        assembly.assemble(replace(r, backbone=replace(r.backbone, pretrained=True)))
    wrong = replace(r, backbone=replace(r.backbone, settings={"pach": 16}))
    with pytest.raises(recipe.RecipeError, match="architecture 'clip4clip' 'pach': did you mean 'patch'"):
        assembly.assemble(wrong)
    assembly.check(r)


def test_costs_of_a_loss_that_needs_two_rows_are_those_of_one():
    """BLIP's pretraining takes wrong pairs from the batch."""
    r = recipe.expand({"backbone": {"name": "blip", "settings": {"task": "pretrain", "image_size": 32}, "max_text": 6},
                       "task": "pretraining", "data": "pictograms", "methods": ["omp"],
                       "training": {"steps": 0, "batch_size": 2}}, "pairs")[0]  # fmt: skip
    found = cost.estimate(r)
    assert found["macs"] == found["dense_macs"] > 0 and found["nonzero_params"] < found["params"]
