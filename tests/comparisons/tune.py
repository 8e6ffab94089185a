"""UniPT's side networks: outputs and gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.comparisons.modules import copy_parameters, gradient_checks, pairs
from tests.conformance import Case, Check, Skipped, close, compares
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt import PUBLISHED, Computation, DecoderUniPT, PyramidUniPT, TokenUniPT, VectorUniPT

# Sizes of the inputs, which they show, and how the case was made.
SIZES = ("batch", "seq", "lengths")
LOSS = {"mode": "eval", "loss": r"sum\(output\*\*2\).*"}


def eps(case: Case) -> float:
    """What guards the sums of rows: the number in the formula that a case states."""
    (found,) = re.findall(r"\d+(?:\.\d+)?e-\d+", case.info["l1norm"])
    return float(found)


def numbered(theirs: str, count: int) -> dict[str, str]:
    """The layers and norms of `down`, as they are named in their list."""
    return pairs(**{f"down.{i}.{j}": f"{theirs}.{i}.{j}" for i in range(count) for j in (0, 1)})


@compares("A1", told=SIZES, assumes=LOSS)
def words(case: Case) -> Iterator[Check | Skipped]:
    """The side network of VSE's texts, on tokens."""
    tensors, info = case.tensors, case.info
    n, factor = info["num_layer"], info["downsample_D_factor"]
    how = replace(PUBLISHED["vse-text"], eps=eps(case), skip_padding=False)
    side = TokenUniPT(info["hidden_size"], n - 1, factor, how, info["embed_size"])
    yield Check("width of the side network", abs(side.width - info.get("mapping_size", side.width)), 0)
    names = numbered("downsample_layers", n)
    names |= pairs(**{f"project.{i}": f"projection_layer.{i}" for i in (0, 1)})
    names |= pairs(**{"up.1": "upsample_layer.1"}, gate="gate_layer")
    copy_parameters(side, tensors, names)
    maps = [tensors[f"input.{i}"] for i in range(n)]
    mask = torch.arange(maps[0].shape[1])[None] < tensors["lengths"][:, None]
    out = side(Seen(maps, mask.float(), maps[-1]))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, case, names)


@compares(
    "A2",
    told=(*SIZES, "HW_size", "HW_rate", "geometry_change"),
    assumes=LOSS | {"batchnorm": r"eval; running_mean/var randomised; eps 1e-5"},
)
def grids(case: Case) -> Iterator[Check | Skipped]:
    """The side network of VSE's images, on a grid of each size, in evaluation mode."""
    tensors, info = case.tensors, case.info
    widths = info["hidden_size"]
    side = PyramidUniPT(widths, info["embed_size"], info["downsample_D_factor"]).eval()
    names = numbered("downsample_layers", len(widths))
    names |= pairs(**{f"guide.{i}": f"identity_layers.{i}.0" for i in range(len(widths) - 1)})
    names |= pairs(**{f"project.{i}": f"projection_layer.{i}" for i in (0, 1)})
    names |= pairs(up="upsample_layer.1", gate="gate_layer")
    copy_parameters(side, tensors, names)
    norms = {n: m for n, m in side.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        theirs = names[f"{name}.weight"].removesuffix("weight")
        norm.running_mean.copy_(tensors[f"{theirs}running_mean"])
        norm.running_var.copy_(tensors[f"{theirs}running_var"])
    maps = [tensors[f"input.{i}"] for i in range(len(widths))]
    out = side(Seen(maps, None, maps[-1]))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, case, names)


@compares(
    "A4",
    told=(
        "batch", "text_len", "text_lens", "vis_len", "visual_feat_dim", "detach_visual_projection", "joint",
        "num_attention_heads", "intermediate_size", "hidden_act",  # of the frozen layers: their outputs are given
    ),
    assumes=LOSS | {
        "loss": r"sum\(lang_output\*\*2\)\+sum\(visn_output\*\*2\); only grads of side_\* stored",
        "layernorm_eps": r"\{'side': '1e-5 .*",
    },
)  # fmt: skip
def tokens(case: Case) -> Iterator[Check | Skipped]:
    """The side network of CLIP-ViL, on tokens."""
    tensors, info = case.tensors, case.info
    layers = info["layers"]
    how = replace(PUBLISHED["clip-vil"], eps=eps(case), skip_padding=False)
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
    yield from gradient_checks(side, case, names)


@compares("A3", told=(*SIZES, "mask", "position"), assumes=LOSS)
def vectors(case: Case) -> Iterator[Check | Skipped]:
    """The side network of CLIP4Clip, on vectors."""
    tensors, info = case.tensors, case.info
    n = info["num_layer"]
    how = Computation(eps=eps(case))
    side = VectorUniPT(info["hidden_size"], n - 1, info["embed_size"], info["downsample_D_factor"], how)
    names = pairs(**{f"down.{i}": f"downsample_layers.{i}.1" for i in range(n)})
    names |= pairs(anchor="downsample_layer.1", up="upsample_layer.1", gate="gate_layer")
    copy_parameters(side, tensors, names)
    mask, position = tensors.get("mask"), tensors.get("position")
    maps = [tensors[f"input.{i}"] for i in range(n)]
    out = side(Seen(maps, None if mask is None else mask.float(), tensors["raw_anchor"][:, 0], position))
    yield close("output", out, tensors["output"])
    out.square().sum().backward()
    yield from gradient_checks(side, case, names)


@compares(
    "A5",
    told=(
        "batch", "H", "W", "text_len", "text_lens", "num_queries", "valid_width", "text",
        "nhead", "dim_feedforward", "num_encoder_layers", "num_decoder_layers",  # frozen: their outputs are given
        "pass_pos_and_query", "contrastive_loss", "left_out",
    ),
    assumes=LOSS | {"loss": r"sum\(output_hs\*\*2\); grads of side_\*.*", "activation": "relu"},
)  # fmt: skip
def queries(case: Case) -> Iterator[Check | Skipped]:
    """The side networks of MDETR's encoder and decoder, on their layers' outputs."""
    tensors, info = case.tensors, case.info
    chosen, width = info["select_layers"], info["d_model"]
    own = {"eps": eps(case), "skip_padding": False}
    factor = width // info["d_side"]
    encoder = TokenUniPT(width, len(chosen), factor, replace(PUBLISHED["mdetr-encoder"], **own))
    decoder = DecoderUniPT(width, len(chosen), factor, replace(PUBLISHED["mdetr-decoder"], **own), levels=True)
    names = {}
    for part, side in (("encoder", encoder), ("decoder", decoder)):
        theirs = [f"side_downsamples_{part}.{i}" for i in range(len(chosen))] + [f"side_downsample0_{part}"]
        own = pairs(**{f"down.{i}.{j}": f"{t}.{j}" for i, t in enumerate(theirs) for j in (0, 1)})
        own |= pairs(
            **{f"project.{i}": f"side_projection_{part}.{i}" for i in (0, 2, 3)}, gate=f"side_gate_layer_{part}"
        )
        if part == "decoder":
            crosses = {f"cross.{i}.{j}": f"side_projection_crosser.{i}.{j}" for i in range(len(chosen)) for j in (0, 1)}
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
    yield from gradient_checks(encoder, case, names["encoder"])
    yield from gradient_checks(decoder, case, names["decoder"])
