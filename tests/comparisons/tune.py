"""UniPT's side networks: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator

from tests.comparisons.modules import copy_parameters, gradient_checks, pairs
from tests.conformance import Case, Check, Skipped, close, compares
from trimtab.methods.tune.unipt import TokenUniPT, VectorUniPT


@compares("A4")
def tokens(case: Case) -> Iterator[Check | Skipped]:
    """The side network of CLIP-ViL, on tokens."""
    tensors, info = case.tensors, case.info
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
    yield close("text output", out[:, :text], tensors["lang_output"])
    yield close("vision output", out[:, text:], tensors["visn_output"])
    out.square().sum().backward()
    yield from gradient_checks(side, tensors, names)


@compares("A3")
def vectors(case: Case) -> Iterator[Check | Skipped]:
    """The side network of CLIP4Clip, on vectors."""
    tensors, info = case.tensors, case.info
    n = info["num_layer"]
    side = VectorUniPT(info["hidden_size"][0], n - 1, info["embed_size"], info["downsample_D_factor"])
    names = pairs(**{f"down.{i}": f"downsample_layers.{i}.1" for i in range(n)})
    names |= pairs(anchor="downsample_layer.1", up="upsample_layer.1", gate="gate_layer")
    copy_parameters(side, tensors, names)
    mask, position = tensors.get("mask"), tensors.get("position")
    maps = [tensors[f"input.{i}"] for i in range(n)]
    out = side(maps, None if mask is None else mask.float(), tensors["raw_anchor"][:, 0], position)
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, tensors, names)
