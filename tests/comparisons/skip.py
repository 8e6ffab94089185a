"""DAS: the search's gates and plans, step by step, and the adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.comparisons.modules import copy_parameters, gradient_checks, pairs
from tests.conformance import Case, Check, Skipped, close, compares
from trimtab.methods.skip.adapters import Adapter
from trimtab.methods.skip.das import Gates


@compares("C(i)")
def gates(case: Case) -> Iterator[Check | Skipped]:
    """A search on a synthetic loss: the plans drawn, the subsets tried and the gates after each update."""
    tensors, info = case.tensors, case.info

    def loss(subset: list[int]) -> float:
        m = torch.zeros(12)
        m[subset] = 1
        return float(info["base"] + m @ tensors["cost"] + m @ tensors["interaction"] @ m)

    torch.manual_seed(info["torch_manual_seed_before_first_step"])
    search = Gates(12, info["skip_num"])
    update, count, other = 0, 0, 0
    for event in info["timeline"]:
        if "train_select_drawn" not in event:
            continue
        other += search.draw() != event["train_select_drawn"]
        count += 1
        if count >= info["das_turn"] and event["epoch"] >= info["warmup_epoch"]:
            count = 0
            yield close(f"gates before update {update}", search.values, tensors["gate_before"][update], absolute=1e-7)
            subsets = search.subsets(info["das_step"])
            masks = torch.zeros(len(subsets), 12)
            for row, subset in zip(masks, subsets, strict=True):
                row[subset] = 1
            yield Check(f"subsets of update {update}", int((masks != tensors["subset_masks"][update]).sum()), 0)
            search.update(subsets, [loss(s) for s in subsets])
            yield close(f"gates after update {update}", search.values, tensors["gate_after"][update], absolute=1e-7)
            update += 1
    yield Check("plans drawn in training that differ", other, 0)
    yield Check("updates", abs(update - info["n_updates"]), 0)


@compares("C(ii)")
def adapters(case: Case) -> Iterator[Check | Skipped]:
    """Adapters in the published variants that the library has: LayerNorm first, a fixed scale."""
    info = case.info
    for variant, settings in info["variants"].items():
        if settings["layernorm"] != "in" or settings["scalar"] == "learnable_scalar":
            what = f"LayerNorm {settings['layernorm']!r}, scale {settings['scalar']}"
            yield Skipped(f"{variant}: {what}: neither the skip nor the side adapter is of this form")
            continue
        adapter = Adapter(info["d_model"], info["bottleneck"], settings["add_residual"], float(settings["scalar"]))
        part = {k.removeprefix(f"{variant}."): v for k, v in case.tensors.items() if k.startswith(f"{variant}.")}
        names = pairs(norm="adapter_layer_norm_before", down="down_proj", up="up_proj")
        copy_parameters(adapter, part, names)
        out = adapter(part["x"])
        yield close(f"{variant} output", out, part["y"])
        out.square().sum().backward()
        yield from gradient_checks(adapter, part, names)
