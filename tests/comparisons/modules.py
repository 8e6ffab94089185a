"""Filling our modules with reference parameters, and comparing their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.conformance import Case, Check


def copy_parameters(module: torch.nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Fill a module's parameters from reference names; every parameter must have one."""
    own = dict(module.named_parameters())
    assert own.keys() == names.keys(), own.keys() ^ names.keys()
    for name, reference in names.items():
        own[name].data.copy_(tensors[reference])


def gradient_checks(module: torch.nn.Module, case: Case, names: dict[str, str]) -> Iterator[Check]:
    """The gradients that a backward pass left, each against 1e-4 of the largest wanted.

    The gate's bias has no gradient in exact arithmetic (softmax ignores it): rounding is all there is to compare, which
    the constant allows for. Where the case says that a parameter had none, ours may be 0.
    """
    without = case.info.get("params_without_grad", [])
    for name, parameter in module.named_parameters():
        reference = names[name].removeprefix("param.")
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        want = torch.zeros_like(parameter) if reference in without else case.tensors[f"grad.{reference}"]
        error = float((found - want).abs().max())
        yield Check(f"gradient of {name}", error, 1e-4 * float(want.abs().max()) + 5e-5)


def pairs(**prefixes: str) -> dict[str, str]:
    return {f"{ours}.{p}": f"param.{theirs}.{p}" for ours, theirs in prefixes.items() for p in ("weight", "bias")}
