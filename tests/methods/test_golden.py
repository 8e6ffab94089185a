"""Our methods against numbers that the authors' released code computed (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toy_vlm import ToyVLM
from trimtab.methods.prune.base import InputNorms, prune_masks
from trimtab.methods.prune.baselines import OMP
from trimtab.methods.prune.multiflow import Multiflow, by_modality, flow
from trimtab.methods.skip.adapters import Adapter
from trimtab.methods.skip.das import Gates
from trimtab.methods.tune.unipt import TokenUniPT, VectorUniPT

GOLDEN = Path(__file__).parents[1] / "golden"


def case(name: str) -> tuple[dict, dict]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def copy_parameters(module: torch.nn.Module, tensors: dict, names: dict[str, str]) -> None:
    """Fill a module's parameters from reference names; every parameter must have one."""
    own = dict(module.named_parameters())
    assert own.keys() == names.keys()
    for name, reference in names.items():
        own[name].data.copy_(tensors[reference])


def assert_gradients(module: torch.nn.Module, tensors: dict, names: dict[str, str]) -> None:
    for name, parameter in module.named_parameters():
        want = tensors["grad." + names[name].removeprefix("param.")]
        # The gate's bias has no gradient in exact arithmetic (softmax ignores it): rounding is all there is to compare.
        atol = 1e-4 * float(want.abs().max()) + 5e-5
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=atol)


def pairs(**prefixes: str) -> dict[str, str]:
    return {f"{ours}.{p}": f"param.{theirs}.{p}" for ours, theirs in prefixes.items() for p in ("weight", "bias")}


def test_unipt_on_tokens_is_the_published_side_network_of_clip_vil():
    tensors, info = case("a4_clipvil")
    layers = info["layers"]
    side = TokenUniPT(info["hidden_size"], layers, info["reduction_factor"])
    names = {}
    for i in range(layers + 1):
        theirs = "side_first_downsample_l" if i == 0 else f"side_downsamples_l.{i - 1}"
        names |= pairs(**{f"down.{i}.{j}": f"{theirs}.{j}" for j in (0, 1)})
    names |= pairs(**{f"project.{i}": f"side_projection_l.{i}" for i in (0, 2, 3)}, up="side_final_upsample_l.0")
    gate = next(k for k in tensors if k.startswith("param.side_gate") and k.endswith("weight"))
    names |= {"gate.weight": gate, "gate.bias": gate.replace("weight", "bias")}
    copy_parameters(side, tensors, names)
    out = side([tensors[f"joint.{i}"] for i in range(layers + 1)], tensors["side_mask"].float())
    text = tensors["lang_output"].shape[1]
    torch.testing.assert_close(out[:, :text], tensors["lang_output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, text:], tensors["visn_output"], rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert_gradients(side, tensors, names)


@pytest.mark.parametrize("name", ["a3_clip4clip_image", "a3_clip4clip_text"])
def test_unipt_on_vectors_is_the_published_side_network_of_clip4clip(name):
    tensors, info = case(name)
    n = info["num_layer"]
    side = VectorUniPT(info["hidden_size"][0], n - 1, info["embed_size"], info["downsample_D_factor"])
    names = pairs(**{f"down.{i}": f"downsample_layers.{i}.1" for i in range(n)})
    names |= pairs(anchor="downsample_layer.1", up="upsample_layer.1", gate="gate_layer")
    copy_parameters(side, tensors, names)
    mask, position = tensors.get("mask"), tensors.get("position")
    maps = [tensors[f"input.{i}"] for i in range(n)]
    out = side(maps, None if mask is None else mask.float(), tensors["raw_anchor"][:, 0], position)
    torch.testing.assert_close(out, tensors["output"], rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert_gradients(side, tensors, names)


def toy() -> tuple[ToyVLM, list[dict]]:
    tensors, info = case("b1_model")
    model = ToyVLM(**info["config"])
    model.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    fields = ("images", "text_ids", "text_atts")
    return model.eval(), [{f: tensors[f"batch.{i}.{f}"] for f in fields} for i in range(info["num_batches_per_step"])]


def test_multiflow_gives_the_published_statistics_scores_and_masks():
    tensors, info = case("b1_multiflow")
    model, batches = toy()
    anatomy = model.anatomy()
    weights = {w: model.get_parameter(w.path).detach() for w in anatomy.weights(model)}
    assert [w.path for w in weights] == case("b1_model")[1]["prunable"]
    norms = InputNorms(model, anatomy, weights)
    with torch.no_grad():
        for i in info["batches_used"]:
            model(**batches[i])
    statistics = norms.result()
    for weight, tensor in weights.items():
        path = weight.path
        torch.testing.assert_close(statistics[path], tensors[f"actn_sq_norm.{path}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(flow(tensor, statistics[path]), tensors[f"score.{path}"], rtol=1e-5, atol=1e-8)
    for sparsity in info["sparsities"]:
        masks = prune_masks(weights, statistics, flow, by_modality, sparsity)
        for path, mask in masks.items():
            assert torch.equal(mask, tensors[f"s{sparsity * 100:.0f}.mask.{path}"]), (sparsity, path)


@pytest.mark.parametrize(("allocation", "name"), [(OMP.allocate, "global"), (Multiflow.allocate, "modality")])
def test_magnitude_masks_are_the_published_ones(allocation, name):
    tensors, _ = case("b1_mag")
    model, _ = toy()
    weights = {w: model.get_parameter(w.path).detach() for w in model.anatomy().weights(model)}
    for s in (63, 75, 90):
        # The published masks come from one threshold; shares and a threshold a tensor must give the same weights.
        for path, mask in prune_masks(weights, {}, OMP.score, allocation, s / 100).items():
            want = tensors[f"{name}.s{s}.mask.{path}"]
            assert int((mask != want).sum()) <= 1, (s, path)  # int(share * n) can floor to one weight fewer


def test_gates_repeat_the_published_search():
    tensors, info = case("c1_gate_vilt")

    def loss(subset: list[int], factor: float = 1.0) -> float:
        m = torch.zeros(12)
        m[subset] = 1
        return float(factor * (info["base"] + m @ tensors["cost"] + m @ tensors["interaction"] @ m))

    torch.manual_seed(info["torch_manual_seed_before_first_step"])
    gates = Gates(12, info["skip_num"])
    update, count = 0, 0
    for event in info["timeline"]:
        if "train_select_drawn" not in event:
            continue
        assert gates.draw() == event["train_select_drawn"]
        count += 1
        if count >= info["das_turn"] and event["epoch"] >= info["warmup_epoch"]:
            count = 0
            torch.testing.assert_close(gates.values, tensors["gate_before"][update])
            subsets = gates.subsets(info["das_step"])
            masks = torch.zeros(len(subsets), 12)
            for row, subset in zip(masks, subsets, strict=True):
                row[subset] = 1
            assert torch.equal(masks, tensors["subset_masks"][update])
            gates.update(subsets, [loss(s) for s in subsets])
            torch.testing.assert_close(gates.values, tensors["gate_after"][update], rtol=1e-5, atol=1e-7)
            update += 1
    assert update == info["n_updates"]


@pytest.mark.parametrize("variant", ["v0", "v1"])
def test_adapters_are_the_published_ones(variant):
    tensors, info = case("c2_adapter")
    settings = info["variants"][variant]
    adapter = Adapter(info["d_model"], info["bottleneck"], settings["add_residual"], float(settings["scalar"]))
    part = {k.removeprefix(f"{variant}."): v for k, v in tensors.items() if k.startswith(f"{variant}.")}
    names = pairs(norm="adapter_layer_norm_before", down="down_proj", up="up_proj")
    copy_parameters(adapter, part, names)
    out = adapter(part["x"])
    torch.testing.assert_close(out, part["y"], rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert_gradients(adapter, part, names)
