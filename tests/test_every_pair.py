"""Every method on every backbone that the matrix promises: it trains what it should, is saved, and comes back the same.

The fast ones are a row and three columns of the table; `slow` are all others.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.small_session import SmallSession
from trimtab import matrix
from trimtab.anatomy import Anatomy
from trimtab.backbones.examples import EXAMPLES, objective, tensors
from trimtab.methods import METHODS
from trimtab.methods.prune.masks import Masks

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
ROW, COLUMNS = "clip", ("multiflow", "das", "unipt")
# A search of two evaluations, where it can have so few.
SEARCH = {"search_steps": 2, "turn": 2, "subsets": 2, "draws": 2, "evaluations": 2, "steps": 1}
# Parameters that have no gradient at first: LoRA's A before B has left 0; in MDETR what reads the queries of its
# decoder, which start as zeros, before a bias ahead of it has left 0.
SILENT = ("lora_A",)
SILENT_IN = {"mdetr": ("transformer.decoder.layers.0.das_0.", "decoder.layers.0.parallel_adapter_0.")}


def pairs(lever: str) -> list[Any]:
    names = [n for n in METHODS if METHODS[n].lever == lever]
    fast = {(b, n) for b in EXAMPLES for n in names if b == ROW or n in COLUMNS}
    return [
        pytest.param(b, n, marks=[] if (b, n) in fast else [pytest.mark.slow], id=f"{b}-{n}")
        for n in names for b in EXAMPLES
    ]  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    fields = METHODS[name].Settings.__dataclass_fields__
    found = matrix.small_settings(name) | {k: v for k, v in SEARCH.items() if k in fields}
    # Of 16 channels an eighth are two: two ReLUs that are both off let no gradient through.
    return found | ({"reduction": 2} if METHODS[name].lever == "skip" else {})


@cache
def plain(backbone: str) -> tuple[nn.Module, Anatomy, frozenset[str]]:
    """The example's model, its anatomy, and parameters that its output does not depend on."""
    try:
        model = EXAMPLES[backbone].model()
    except ImportError as error:
        pytest.skip(str(error))
    loss(model, backbone).backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    model.zero_grad()
    return model, Anatomy.of(model), frozenset(unused)


@cache
def promised() -> dict[tuple[str, str], str]:
    """(backbone, method) -> its cell in docs/matrix.md, which tests/test_matrix.py holds against the command."""
    out, groups = {}, []
    for line in PAGE.read_text().splitlines():
        first, *cells = [c.strip() for c in line.strip("|").split("|")]
        if line.startswith("| |"):
            groups = [c.split("<br>") for c in cells]
        elif (backbone := first.partition(" ")[0]) in EXAMPLES:
            out |= {(backbone, n): cell for names, cell in zip(groups, cells, strict=True) for n in names}
    return out


def start(backbone: str, name: str) -> tuple[nn.Module, Anatomy, frozenset[str]]:
    """A copy of the model, and the anatomy of the towers on which the matrix says that the method works."""
    model, anatomy, unused = plain(backbone)
    cell = promised()[backbone, name]
    towers = [t.name for t in anatomy.towers if t.name not in EXAMPLES[backbone].idle]
    if cell.startswith("not "):  # `not vision [1], text, encoder [2]`
        towers = [t for t in towers if t not in re.findall(r"[\w.-]+", cell)]
    elif cell != "yes":
        assert re.fullmatch(r"no( \[\d+\])+", cell), cell
        towers = []
    if not towers:
        pytest.skip(cell)
    return copy.deepcopy(model), matrix.only(anatomy, towers), unused


def run(model: nn.Module, backbone: str) -> Any:
    torch.manual_seed(0)  # transformers' ViLT draws an order of the patches
    return model(**EXAMPLES[backbone].batch)


def loss(model: nn.Module, backbone: str) -> Tensor:
    return objective(run(model, backbone))


@torch.no_grad()
def outputs(model: nn.Module, backbone: str) -> Tensor:
    return torch.cat([t.flatten().float() for t in tensors(run(model, backbone))])


def step(model: nn.Module, backbone: str, unused: frozenset[str]) -> None:
    """One step of training; a gradient must reach all that is trained and nothing that is frozen."""
    loss(model, backbone).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    silent = SILENT + SILENT_IN.get(backbone, ())
    assert trained
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert parameter.requires_grad or parameter.grad is None, name
        if parameter.requires_grad and name.replace(".base_layer", "") not in unused:
            assert reached or any(s in name for s in silent), name
    torch.optim.SGD(trained, 0.01).step()


def zeros(model: nn.Module, anatomy: Anatomy) -> int:
    return sum(int((model.get_parameter(w.path) == 0).sum()) for w in anatomy.weights(model))


def saved_and_attached(fit: trimtab.Adapted, backbone: str, anatomy: Anatomy, tmp_path: Path) -> None:
    """The handle's folder, attached to another copy of the model, gives the same outputs."""
    again = copy.deepcopy(plain(backbone)[0])
    trimtab.adapt(again, fit.save(tmp_path / "fit"), anatomy=anatomy)
    assert torch.equal(outputs(again.eval(), backbone), outputs(fit.model.eval(), backbone))


@pytest.mark.parametrize(("backbone", "name"), pairs("tune"))
def test_tuned(backbone, name, tmp_path):
    model, anatomy, unused = start(backbone, name)
    before = outputs(model, backbone)
    fit = trimtab.tune(model, name, anatomy, heads=name == "linear-probe", **settings(name))
    step(model, backbone, unused)
    assert not torch.equal(outputs(model, backbone), before)
    saved_and_attached(fit, backbone, anatomy, tmp_path)


@pytest.mark.parametrize(("backbone", "name"), pairs("skip"))
def test_skipped(backbone, name, tmp_path):
    model, anatomy, unused = start(backbone, name)
    fit = trimtab.adapt(model, anatomy=anatomy)
    method = METHODS.make(name, **settings(name))
    method.prepare(SmallSession(EXAMPLES[backbone], model, anatomy))
    (path,) = method.state["skip"]
    weights = sum(p.numel() for p in model.get_submodule(path).parameters())
    fit.attach(method)
    assert {b.path for b in anatomy.blocks()} - {b.path for b in fit.anatomy.blocks()} == {path}
    assert sum(p.numel() for p in model.get_submodule(path).parameters()) < weights
    step(model, backbone, unused)
    saved_and_attached(fit, backbone, anatomy, tmp_path)


@pytest.mark.parametrize(("backbone", "name"), pairs("prune"))
def test_pruned(backbone, name, tmp_path):
    model, anatomy, _ = start(backbone, name)
    fit = trimtab.prune(model, name, 0.5, [EXAMPLES[backbone].batch], anatomy, objective, **settings(name))
    masks = fit.masks
    assert zeros(model, anatomy) == masks.prunable - masks.kept
    # TAMT's scores move by one small step from two values: those that stayed equal go together.
    assert masks.sparsity >= 0.5 - 0.01 if name == "tamt" else abs(masks.sparsity - 0.5) < 0.01
    pruned = outputs(model, backbone)
    masks.save(tmp_path / "masks.safetensors")
    again = copy.deepcopy(plain(backbone)[0])
    Masks.read(tmp_path / "masks.safetensors", again).apply(again)
    assert torch.equal(outputs(again, backbone), pruned)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    fit.keep(optimizer)
    loss(model, backbone).backward()
    optimizer.step()
    assert zeros(model, anatomy) == masks.prunable - masks.kept
    assert not torch.equal(outputs(model, backbone), pruned)


def test_every_description_has_an_example():
    """A family without a row would be left out of the matrix, and of these tests."""
    from trimtab.anatomy.lookup import described

    seen = {kind.__name__ for name in EXAMPLES for module in plain(name)[0].modules() for kind in type(module).__mro__}
    functions = {f for kind, f in described() if kind in seen}
    missing = sorted(kind for kind, f in described() if f not in functions)
    assert not missing, f"add an `Example` of {missing} to trimtab.backbones.examples"
