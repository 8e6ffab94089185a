"""The one record of a family: what a new one needs, what is refused, and that the shipped ones are whole."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import trimtab
from trimtab import backbones
from trimtab.backbones import ARCHITECTURES, BACKBONES, FAMILIES, FORMATS, Family, add, family
from trimtab.backbones.examples import EXAMPLES
from trimtab.cli import main

SOURCE = Path(trimtab.__file__).parent

NEW = {
    "__init__.py": """
from trimtab.backbones import Family
from newcomer import features
FAMILY = Family("newcomer", "Newcomer", __name__, folders={"newcomer": features.load}, own=("Newcomer",),
                pretrained={"tiny-newcomer": features.tiny}, architecture=features.architecture)
""",
    "features.py": '''
def load(folder, name, pretrained=True):
    return f"{name} from {folder.name}"


def tiny(pretrained=True):
    """Ours."""
    return f"tiny, {pretrained}"


def architecture(width: int = 8):
    """A tower of two blocks."""
    from newcomer.model import Newcomer, NewcomerConfig
    return Newcomer, NewcomerConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=2, vocab_size=9,
                                    intermediate_size=8)
''',
    "model.py": """
from transformers import AutoConfig, BertConfig, BertModel


class NewcomerConfig(BertConfig):
    model_type = "newcomer"


class Newcomer(BertModel):
    config_class = NewcomerConfig


AutoConfig.register("newcomer", NewcomerConfig)
""",
    "examples.py": """
import torch
from trimtab.backbones.examples import Example
from newcomer.features import architecture


def build():
    kind, config = architecture()
    return kind(config)


EXAMPLES = {"newcomer": Example("Newcomer", build, {"input_ids": torch.tensor([[1, 2]])})}
""",
}


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A family in a package of its own."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "newcomer").mkdir()
    for name, text in NEW.items():
        (folder / "newcomer" / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import newcomer

        add(newcomer.FAMILY)
        yield newcomer.FAMILY
        del FAMILIES["newcomer"]
        for name in [n for n in sys.modules if n.split(".")[0] == "newcomer"]:
            del sys.modules[name]


def test_a_new_family_is_found_everywhere_by_its_record_alone(newcomer, tmp_path, capsys):
    assert backbones.load("tiny-newcomer", pretrained=False) == "tiny, False"
    assert "newcomer" in ARCHITECTURES and "newcomer" not in FORMATS
    model, anatomy = backbones.load_model("newcomer")
    assert len(anatomy.tower("text").blocks) == 2 and next(model.parameters()).is_meta
    trimtab.save_pretrained(backbones.build("newcomer", width=16), tmp_path / "saved")
    assert type(trimtab.from_pretrained(tmp_path / "saved")).__name__ == "Newcomer"
    assert backbones.load(tmp_path / "saved") == f"{tmp_path / 'saved'} from saved"
    assert EXAMPLES["newcomer"].model()(**EXAMPLES["newcomer"].batch).last_hidden_state.shape == (1, 2, 8)
    assert main(["list", "backbones"]) == 0
    assert "tiny-newcomer" in capsys.readouterr().out


def test_what_a_family_does_not_have_is_refused_by_name(newcomer):
    with pytest.raises(ValueError, match=r"Newcomer has no tasks of ours yet; `trimtab.backbones.load_model`"):
        backbones.load("newcomer", pretrained=False)
    with pytest.raises(ValueError, match="unknown setting of the architecture 'newcomer' 'with': did you mean 'width'"):
        backbones.build("newcomer", **{"with": 8})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "clip"}, "family 'clip' is added twice, from trimtab.backbones.clip and elsewhere"),
        ({"pretrained": {"tiny-clip": None}}, "elsewhere: pretrained 'tiny-clip' is that of trimtab.backbones.clip"),
        ({"folders": {"blip": None}}, "elsewhere: folders 'blip' is that of trimtab.backbones.blip already"),
        ({"own": ("MeterModel",)}, "elsewhere: own 'MeterModel' is that of trimtab.backbones.meter already"),
    ],
)
def test_names_are_taken_once(fields, message):
    with pytest.raises(ValueError, match=message):
        add(Family(**{"name": "elsewhere", "title": "Elsewhere", "package": "elsewhere", **fields}))
    assert "elsewhere" not in FAMILIES


@pytest.mark.parametrize("view", [BACKBONES, ARCHITECTURES, FORMATS, EXAMPLES], ids=lambda v: v.kind)
def test_a_wrong_name_gets_the_nearest(view):
    name = next(iter(view))
    assert name in view and len(view) == len(list(view)) == len(dict(view.items()))
    with pytest.raises(ValueError, match=f"unknown {view.kind} '{name}x': did you mean '{name}'"):
        view[f"{name}x"]


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_families_are_whole(name):
    found = FAMILIES[name]
    folder = SOURCE / "backbones" / found.package.rpartition(".")[2]
    assert folder.name == name
    for own in found.own:
        assert issubclass(found.own_class(own), PreTrainedModel) and family.model_class(own) is found.own_class(own)
    assert (found.format is None) == (found.architecture is None) == (not (folder / "official.py").is_file())
    assert bool(found.folders or found.pretrained or found.features) == (folder / "features.py").is_file()
    assert found.examples, "the matrix needs a tiny model of every family"
    if found.architecture:
        with torch.device("meta"):
            assert type(backbones.build(name)).__module__.startswith((found.package, "transformers."))


def test_every_folder_with_a_description_is_a_family():
    folders = {path.parent.name for path in (SOURCE / "backbones").glob("*/describe.py")}
    assert folders <= set(FAMILIES)


def test_what_lies_below_backbones_does_not_import_them():
    for path in [*(SOURCE / "storage").glob("*.py"), *(SOURCE / "anatomy").glob("*.py")]:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not [n for n in names if n.startswith("trimtab.backbones")], path
