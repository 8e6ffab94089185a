"""UniPT's side networks: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.comparisons.modules import copy_parameters, gradient_checks, pairs
from tests.conformance import Case, Check, Skipped, close, compares
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt import PUBLISHED, DecoderUniPT, PyramidUniPT, TokenUniPT, VectorUniPT


def numbered(theirs: str, count: int) -> dict[str, str]:
    """The layers and norms of `down`, as they are named in their list."""
    return pairs(**{f"down.{i}.{j}": f"{theirs}.{i}.{j}" for i in range(count) for j in (0, 1)})


@compares("A1")
def words(case: Case) -> Iterator[Check | Skipped]:
    """The side network of VSE's texts, on tokens."""
    tensors, info = case.tensors, case.info
    n, factor = info["num_layer"], info["downsample_D_factor"]
    how = replace(PUBLISHED["vse-text"], skip_padding=False)
    side = TokenUniPT(info["hidden_size"][0], n - 1, factor, how, info["embed_size"])
    names = numbered("downsample_layers", n)
    names |= pairs(**{f"project.{i}": f"projection_layer.{i}" for i in (0, 1)})
    names |= pairs(**{"up.1": "upsample_layer.1"}, gate="gate_layer")
    copy_parameters(side, tensors, names)
    maps = [tensors[f"input.{i}"] for i in range(n)]
    mask = torch.arange(maps[0].shape[1])[None] < tensors["lengths"][:, None]
    out = side(Seen(maps, mask.float(), maps[-1]))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, tensors, names)


@compares("A2")
def grids(case: Case) -> Iterator[Check | Skipped]:
    """The side network of VSE's images, on four grids, in evaluation mode."""
    tensors, info = case.tensors, case.info
    side = PyramidUniPT(info["hidden_size"], info["embed_size"], info["downsample_D_factor"]).eval()
    names = numbered("downsample_layers", 4)
    names |= pairs(**{f"guide.{i}": f"identity_layers.{i}.0" for i in range(3)})
    names |= pairs(**{f"project.{i}": f"projection_layer.{i}" for i in (0, 1)})
    names |= pairs(up="upsample_layer.1", gate="gate_layer")
    copy_parameters(side, tensors, names)
    norms = {n: m for n, m in side.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        theirs = names[f"{name}.weight"].removesuffix("weight")
        norm.running_mean.copy_(tensors[f"{theirs}running_mean"])
        norm.running_var.copy_(tensors[f"{theirs}running_var"])
    maps = [tensors[f"input.{i}"] for i in range(4)]
    out = side(Seen(maps, None, maps[-1]))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, tensors, names)


@compares("A4")
def tokens(case: Case) -> Iterator[Check | Skipped]:
    """The side network of CLIP-ViL, on tokens."""
    tensors, info = case.tensors, case.info
    layers = info["layers"]
    how = replace(PUBLISHED["clip-vil"], skip_padding=False)
    side = TokenUniPT(info["hidden_size"], layers, info["reduction_factor"], how)
    names = {}
    for i in range(layers + 1):
        theirs = "side_first_downsample_l" if i == 0 else f"side_downsamples_l.{i - 1}"
        names |= pairs(**{f"down.{i}.{j}": f"{theirs}.{j}" for j in (0, 1)})
    names |= pairs(**{f"project.{i}": f"side_projection_l.{i}" for i in (0, 2, 3)}, up="side_final_upsample_l.0")
    gate = next(k for k in tensors if k.startswith("param.side_gate") and k.endswith("weight"))
    names |= {"gate.weight": gate, "gate.bias": gate.replace("weight", "bias")}
    copy_parameters(side, tensors, names)
    maps = [tensors[f"joint.{i}"] for i in range(layers + 1)]
    out = side(Seen(maps, tensors["side_mask"].float(), maps[-1]))
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
    out = side(Seen(maps, None if mask is None else mask.float(), tensors["raw_anchor"][:, 0], position))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, tensors, names)


@compares("A5")
def queries(case: Case) -> Iterator[Check | Skipped]:
    """The side networks of MDETR's encoder and decoder, on their layers' outputs."""
    tensors, info = case.tensors, case.info
    chosen, width = info["select_layers"], info["d_model"]
    encoder = TokenUniPT(width, len(chosen), 2, replace(PUBLISHED["mdetr-encoder"], skip_padding=False))
    decoder = DecoderUniPT(width, len(chosen), 2, replace(PUBLISHED["mdetr-decoder"], skip_padding=False), levels=True)
    names = {}
    for part, side in (("encoder", encoder), ("decoder", decoder)):
        theirs = [f"side_downsamples_{part}.{i}" for i in range(len(chosen))] + [f"side_downsample0_{part}"]
        own = pairs(**{f"down.{i}.{j}": f"{t}.{j}" for i, t in enumerate(theirs) for j in (0, 1)})
        own |= pairs(
            **{f"project.{i}": f"side_projection_{part}.{i}" for i in (0, 2, 3)}, gate=f"side_gate_layer_{part}"
        )
        if part == "decoder":
            crosses = {f"cross.{i}.{j}": f"side_projection_crosser.{i}.{j}" for i in range(3) for j in (0, 1)}
            own |= pairs(**crosses, **{f"up.{i}": f"side_final_upsample.{i}" for i in (1, 2)})
        copy_parameters(side, tensors, own)
        names[part] = own

    def maps(first: Tensor, layers: Tensor) -> list[Tensor]:
        """The chosen of the layers' inputs, and the last output; batch first."""
        inputs = [first, *layers[:-1]]
        return [m.transpose(0, 1) for m in [inputs[i] for i in chosen] + [layers[-1]]]

    valid = (~tensors["joint_mask"]).float()
    read = maps(tensors["encoder_input"], tensors["encoder_all"])
    memory = encoder(Seen(read, valid, read[-1]))
    yield close("memory", memory, tensors["side_img_memory"])
    first = torch.zeros_like(tensors["decoder_all"][0])
    read = maps(first, tensors["decoder_all"])
    out = decoder(Seen(read, None, read[-1][None], memory=memory, memory_mask=valid))
    yield close("output", out, tensors["output_hs"])
    out.square().sum().backward()
    yield from gradient_checks(encoder, tensors, names["encoder"])
    yield from gradient_checks(decoder, tensors, names["decoder"])
