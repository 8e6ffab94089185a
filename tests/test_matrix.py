"""The matrix of methods and backbones: its cells, its tables, the command, and the page in the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab import backbones, matrix
from trimtab.anatomy import Anatomy
from trimtab.backbones.base import WEIGHTS
from trimtab.backbones.examples import EXAMPLES, Example
from trimtab.cli import main
from trimtab.matrix import Cell
from trimtab.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"


def cell(backbone: str, method: str) -> Cell:
    model = EXAMPLES[backbone].model()
    return matrix.cell(model, Anatomy.of(model), method)


def test_a_cell_is_what_attaching_does():
    assert cell("vse", "multiflow").towers == ("text",)
    assert "nothing to prune" in cell("vse", "multiflow").reasons["vision"]
    skipping = cell("mdetr", "das")
    assert skipping.towers == ("text", "encoder", "decoder")
    assert skipping.reasons["vision"].startswith("das: none of the 5 blocks in ('vision',) can be skipped")
    assert cell("vilt", "unipt") == Cell(("fusion",), {})


def test_the_model_of_an_example_is_not_changed_by_its_cells():
    model = EXAMPLES["vilt"].model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("das", "multiflow", "lora", "full"):
        matrix.cell(model, Anatomy.of(model), name)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_a_missing_package_is_the_reason_of_a_whole_row(monkeypatch):
    example = Example("ViLT", EXAMPLES["vilt"].build, {}, needs=("no_such_package",))
    monkeypatch.setattr(matrix, "EXAMPLES", {"vilt": example})
    ((_, _, found),) = matrix.compute(["vilt"], ["full"])
    assert found.towers == () and "needs the package 'no-such-package'" in found.reasons[""]


def test_methods_with_the_same_cells_share_a_column_and_cells_share_notes():
    bad = {"vision": "{}: tower 'vision' is a grid"}
    cells = {
        ("vse", name): Cell(("text",), {k: v.format(name) for k, v in bad.items()}) for name in ("adapter", "lst")
    } | {("vse", "full"): Cell(("vision", "text"), {}), ("vse", "das"): Cell((), {"": "das: no blocks"})}
    tables, notes = matrix.tables(cells)
    assert [t.lever for t in tables] == ["skip", "tune"]
    assert tables[0].rows == {"vse": ["no [1]"]} and tables[0].columns == [["das"]]
    assert tables[1].columns == [["adapter", "lst"], ["full"]]
    assert tables[1].rows == {"vse": ["not vision [2]", "yes"]}
    assert notes == ["no blocks", "the tower is a grid"]
    assert "| vse (VSE-infinity, grid) | not vision [2] | yes |" in matrix.markdown(cells)


def test_every_registered_backbone_is_of_a_class_with_an_example():
    built = {type(EXAMPLES[n].build()).__name__ for n in EXAMPLES if not EXAMPLES[n].needs} | {"DualEncoder"}
    names = {n: WEIGHTS / n / "config.json" for n in backbones.BACKBONES}
    for name, config in names.items():
        if config.is_file():  # the other's class is that of `lite0-minilm`, whose packages may be missing
            (architecture,) = json.loads(config.read_text())["architectures"]
            family = architecture.split("For")[0].removesuffix("Model")
            assert any(b.startswith(family) for b in built), f"{name}: {architecture}"


def test_the_command_prints_what_patterns_ask_for(capsys):
    assert main(["list", "--matrix", "--backbone", "vse*", "--method", "unipt", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| | unipt |" in out and "vse-regions" in out and "meter" not in out
    assert main(["list", "--matrix", "--backbone", "vse", "--method", "multiflow"]) == 0
    assert "nothing to prune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matrix", "--backbone", "vlit"], "unknown backbone 'vlit': did you mean 'vilt'"),
        (["--matrix", "--method", "unip"], "did you mean 'unipt'"),
        (["methods", "--markdown"], "--markdown is for the matrix"),
    ],
)
def test_wrong_patterns_say_what_there_is(arguments, message, capsys):
    assert main(["list", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_is_what_the_command_prints():
    try:
        EXAMPLES["lite0-minilm"].model()
    except ImportError as error:
        pytest.skip(str(error))
    assert matrix.markdown(matrix.find()) in PAGE.read_text(), (
        "docs/matrix.md is behind: paste what `trimtab list --matrix --markdown` prints"
    )


def test_the_page_has_the_combinations():
    """Which levers go together is asked of the rules, on this page and in recipes alike."""
    assert matrix.combinations() in PAGE.read_text(), (
        "docs/matrix.md is behind: paste what `trimtab list --matrix --markdown` prints"
    )
    heads, rows, notes = matrix.together()
    assert len(heads) == 4 and len(rows) == 4 and len(notes) == 5
    das = next(row for label, row in rows.items() if "das (adapters)" in label)
    assert [cell[:3] for cell in das] == ["yes", "no ", "yes", "yes"]


def test_the_page_names_every_method_and_backbone():
    page = PAGE.read_text()
    assert not [n for n in (*METHODS, *EXAMPLES) if n not in page]
