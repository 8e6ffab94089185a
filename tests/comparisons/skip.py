"""DAS: the search's gates and plans, step by step, the adapters, and blocks with their adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import BertConfig, ViltConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.vilt.modeling_vilt import ViltEncoder

from tests.comparisons.modules import copy_parameters, gradient_checks, pairs
from tests.conformance import Case, Check, Skipped, close, compares
from trimtab.anatomy import Block, Sublayer, Tap
from trimtab.methods.skip.adapters import Adapter, add_adapters
from trimtab.methods.skip.search.das import Gates


@compares(
    "C(i)",
    told=("index_order", "epochs", "steps_per_epoch", "draws_including_rejected"),
    assumes={
        "loss": r"\(1\.0 for validation, 1\.1 for training\) \* \(base \+ sum_i m_i\*cost_i \+ m\^T interaction m\).*",
        "equation": r"gate \+= sum_k \(r_k - mean r\) \* m_k \* p\*\(1-p\), .*",
    },
)
def gates(case: Case) -> Iterator[Check | Skipped]:
    """A search on a synthetic loss: the plans drawn, the subsets tried, the gates after each update, the choices.

    From the epoch `das_epoch` on nothing is drawn and no gate moves: the last choice stays.
    """
    tensors, info = case.tensors, case.info
    candidates = len(tensors["cost"])

    def loss(subset: list[int]) -> float:
        m = _mask([subset], candidates)[0]
        return float(info["base"] + m @ tensors["cost"] + m @ tensors["interaction"] @ m)

    torch.manual_seed(info["torch_manual_seed_before_first_step"])
    search = Gates(candidates, info["skip_num"])
    count, plans, chosen, updates = 0, 0, 0, []
    for event in info["timeline"]:
        searching = event["epoch"] < info["das_epoch"]
        if event.get("epoch_end"):
            chosen += sorted(search.best()) != event["selected_indices"]
            continue
        drawn = search.draw() if searching else search.best()
        wanted = torch.tensor(event["train_mask"])
        plans += not torch.equal(_mask([drawn], candidates)[0], wanted)
        plans += searching and drawn != event["train_select_drawn"]
        count += searching
        if searching and count >= info["das_turn"] and event["epoch"] >= info["warmup_epoch"]:
            count, update = 0, len(updates)
            updates.append([event["epoch"], event["step"]])
            yield close(f"gates before update {update}", search.values, tensors["gate_before"][update], absolute=1e-7)
            subsets = search.subsets(info["das_step"])
            different = int((_mask(subsets, candidates) != tensors["subset_masks"][update]).sum())
            yield Check(f"subsets of update {update}", different, 0)
            search.update(subsets, [loss(s) for s in subsets])
            yield close(f"gates after update {update}", search.values, tensors["gate_after"][update], absolute=1e-7)
    yield Check("training steps with another plan", plans, 0)
    yield Check("epochs with another choice", chosen, 0)
    yield Check("updates", abs(len(updates) - info["n_updates"]), 0)
    yield Check("steps of the updates that differ", updates != info.get("update_epoch_step", updates), 0)


def _mask(subsets: list[list[int]], candidates: int) -> Tensor:
    """1 where a plan skips a candidate, (plans, candidates)."""
    mask = torch.zeros(len(subsets), candidates)
    for row, subset in zip(mask, subsets, strict=True):
        row[subset] = 1
    return mask


@compares("C(ii)", told=("skip_adapter", "side_adapter"), assumes={"activation": "ReLU"})
def adapters(case: Case) -> Iterator[Check | Skipped]:
    """Adapters in the published variants."""
    info = case.info
    for variant, settings in info["variants"].items():
        learned = settings["scalar"] == "learnable_scalar"
        adapter = Adapter(info["d_model"], info["bottleneck"], settings["add_residual"],
                          "learned" if learned else float(settings["scalar"]), settings["layernorm"])  # fmt: skip
        part = {k.removeprefix(f"{variant}."): v for k, v in case.tensors.items() if k.startswith(f"{variant}.")}
        unknown = settings.keys() - {"layernorm", "scalar", "add_residual", "explicit_residual"}
        yield Check(f"{variant}: settings that are not known", len(unknown), 0)
        names = pairs(down="down_proj", up="up_proj")
        if settings["layernorm"] != "none":
            names |= pairs(norm="adapter_layer_norm_before")
        if learned:
            names |= {"scale": "param.scale"}
        copy_parameters(adapter, part, names)
        out = adapter(part["x"], part.get("residual"))
        yield close(f"{variant} output", out, part["y"])
        out.square().sum().backward()
        yield from gradient_checks(adapter, replace(case, tensors=part), names)


@compares("C(ii) blocks", told=("vilt", "meter"))
def blocks(case: Case) -> Iterator[Check | Skipped]:
    """A kept block of ViLT and a fusion layer of METER with their adapters, put into transformers' classes."""
    info = case.info
    for name, build in (("vilt", _vilt), ("meter", _meter)):
        part = {k.removeprefix(f"{name}."): v for k, v in case.tensors.items() if k.startswith(f"{name}.")}
        model, block, call = build(info, part)
        add_adapters(model, block, info["adapter_bottleneck"])
        for i in range(len(block.sublayers)):
            adapter = model.get_submodule(f"{block.path}.das_{i}")
            prefix = ADAPTERS[name][i]
            names = {"norm": "adapter_layer_norm_before", "down": "down_proj", "up": "up_proj"}
            copy_parameters(adapter, part, pairs(**{k: f"{prefix}.{v}" for k, v in names.items()}))
        with torch.no_grad():
            yield close(f"{name} block", call(model.eval()), part["y"])


ADAPTERS = {
    "vilt": ("adapter0", "adapter1"),
    "meter": ("attention.output.adapter", "crossattention.output.adapter", "adapter"),
}


def _vilt(info: dict, part: dict[str, Tensor]) -> tuple[ViltEncoder, Block, Callable]:
    d = info["d"]
    config = ViltConfig(hidden_size=d, num_hidden_layers=1, num_attention_heads=info["heads"], layer_norm_eps=1e-6,
                        intermediate_size=d * info["mlp_ratio"])  # fmt: skip
    model = ViltEncoder(config)
    q, k, v = (f"attention.attention.{x}" for x in ("query", "key", "value"))
    state = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
             "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}  # fmt: skip
    loaded = {f"{a}.{p}": part[f"param.{b}.{p}"] for a, b in state.items() for p in ("weight", "bias")}
    for p in ("weight", "bias"):
        loaded |= dict(zip((f"{x}.{p}" for x in (q, k, v)), part[f"param.attn.qkv.{p}"].chunk(3), strict=True))
    model.layer[0].load_state_dict(loaded)
    block = Block("layer.0", d, (
        Sublayer("attention", Tap("layer.0.layernorm_before", "input"), Tap("layer.0.attention.output")),
        Sublayer("mlp", Tap("layer.0.layernorm_after", "input"), Tap("layer.0.output")),
    ), returns_tuple=True)  # fmt: skip
    mask = (1 - part["mask"][:, None, None].float()) * -1e9
    return model, block, lambda m: m.layer[0](part["x"], mask)[0]


def _meter(info: dict, part: dict[str, Tensor]) -> tuple[torch.nn.Module, Block, Callable]:
    config = BertConfig(hidden_size=info["d"], num_attention_heads=info["heads"], is_decoder=True, vocab_size=2,
                        intermediate_size=info["d"] * info["mlp_ratio"], add_cross_attention=True,
                        attn_implementation="eager")  # fmt: skip
    model = torch.nn.Module()
    model.layer = BertLayer(config, layer_idx=0)
    model.layer.load_state_dict({k.removeprefix("param."): v for k, v in part.items() if k.startswith("param.") and
                                 "adapter" not in k})  # fmt: skip
    block = fusion_block("layer", info["d"])
    return model, block, lambda m: m.layer(part["x"], part["mask_ext"], part["ctx"], part["ctx_mask_ext"])


def fusion_block(path: str, width: int) -> Block:
    """METER's fusion layer: adapters join the attention's output before the LayerNorm, the MLP's after it."""
    parts = [
        Sublayer(f"{kind}attention", Tap(f"{path}.{name}", "input"), Tap(f"{path}.{name}.output.dropout"))  # type: ignore
        for kind, name in (("", "attention"), ("cross-", "crossattention"))
    ]
    return Block(path, width, (*parts, Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output"))))
