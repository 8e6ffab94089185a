"""Checkpoint files that somebody else wrote: what is read, what is refused and by which name."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trimtab.backbones import official
from trimtab.backbones.family import FAMILIES, Family, add
from trimtab.backbones.official import CheckpointError, Format, Item, load_official, renamed, resize_grid
from trimtab.backbones.reading import read_checkpoint

WIDTH = 8


@pytest.fixture
def toy(monkeypatch):
    """A format of a tiny BERT whose files call a layer a `floor`, and fuse query, key and value."""
    from transformers import BertConfig, BertModel

    class Toy(Format):
        leftovers = (r"^extra\.",)
        fresh = (r"^pooler\.",)

        def recognises(self, keys):
            return any(k.startswith("floor.") for k in keys)

        def plan(self, state, extras, *, pooler=False):
            width, layers = state.size("word", 1), state.count("floor.")
            sizes = {"vocab_size": state.size("word"), "max_position_embeddings": state.size("position")}
            config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
                                intermediate_size=state.size("floor.0.up.weight"), **sizes)  # fmt: skip
            return (BertModel if pooler else WithoutPooler), config

        def weights(self, state, extras, config):
            layer, attention = r"encoder.layer.\1", r"encoder.layer.\1.attention"
            yield from renamed(state, [
                ("word", "embeddings.word_embeddings.weight"), ("position", "embeddings.position_embeddings.weight"),
                ("kind", "embeddings.token_type_embeddings.weight"), (r"norm\.(\w+)", r"embeddings.LayerNorm.\1"),
                (r"floor\.(\d+)\.qkv\.(\w+)", tuple(rf"{attention}.self.{n}.\2" for n in ("query", "key", "value"))),
                (r"floor\.(\d+)\.out\.(\w+)", rf"{attention}.output.dense.\2"),
                (r"floor\.(\d+)\.norm1\.(\w+)", rf"{attention}.output.LayerNorm.\2"),
                (r"floor\.(\d+)\.up\.(\w+)", rf"{layer}.intermediate.dense.\2"),
                (r"floor\.(\d+)\.down\.(\w+)", rf"{layer}.output.dense.\2"),
                (r"floor\.(\d+)\.norm2\.(\w+)", rf"{layer}.output.LayerNorm.\2"),
            ])  # fmt: skip

    class WithoutPooler(BertModel):
        def __init__(self, config):
            super().__init__(config, add_pooling_layer=False)

    add(Family("toy", "Toy", "toy", format=Toy()))
    yield Toy
    del FAMILIES["toy"]


def toy_state(layers: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"word": (11, WIDTH), "position": (6, WIDTH), "kind": (2, WIDTH), "norm.weight": (WIDTH,)}
    shapes["norm.bias"] = (WIDTH,)
    for i in range(layers):
        for name, out, into in (("qkv", 3 * WIDTH, WIDTH), ("out", WIDTH, WIDTH), ("up", 16, WIDTH),
                                ("down", WIDTH, 16)):  # fmt: skip
            shapes |= {f"floor.{i}.{name}.weight": (out, into), f"floor.{i}.{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"floor.{i}.{norm}.{p}": (WIDTH,) for p in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Exploit:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_sizes_come_from_the_tensors_and_fused_ones_are_split(toy, tmp_path):
    state = toy_state(3)
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "any.name")
    model, report = load_official(tmp_path / "any.name")
    assert len(model.encoder.layer) == 3 and model.config.vocab_size == 11
    assert torch.equal(model.encoder.layer[2].attention.self.key.weight, state["floor.2.qkv.weight"][WIDTH : 2 * WIDTH])
    assert set(report.used) == set(state) and not report.unused and not report.fresh
    assert not model.training
    assert torch.equal(model.embeddings.position_ids, torch.arange(6)[None]), "buffers that are not saved are filled"


def test_what_is_left_over_is_told_apart_from_what_nobody_expected(toy):
    state = toy_state() | {"extra.head": torch.zeros(1), "surprise": torch.zeros(1)}
    _, report = official.build_official(state, {}, "toy.pth")
    assert report.leftovers == ("extra.head",) and report.unused == ("surprise",)
    assert "1 not expected and passed over: surprise" in str(report)


def test_new_parts_are_reported_and_only_where_the_format_allows_them(toy):
    model, report = official.build_official(toy_state(), {}, "toy.pth", pooler=True)
    assert set(report.fresh) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.isfinite(model.pooler.dense.weight).all()


def test_a_new_part_of_which_the_file_has_some_tensors_is_not_new(toy, monkeypatch):
    state = toy_state() | {"top": torch.zeros(WIDTH)}
    plain = toy.weights

    def weights(self, state, extras, config):
        yield from plain(self, state, extras, config)
        yield Item("top", "pooler.dense.bias", state["top"])

    monkeypatch.setattr(toy, "weights", weights)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing: 'pooler.dense.weight'"):
        official.build_official(state, {}, "toy.pth", pooler=True)


def test_missing_tensors_are_counted_and_the_first_three_named(toy):
    state = {k: v for k, v in toy_state().items() if ".norm" not in k and k != "kind"}
    with pytest.raises(
        CheckpointError, match=r"toy.pth: looks like Toy, but 9 of \d+ tensors are missing: '.*' and more"
    ):
        official.build_official(state, {}, "toy.pth")
    del state["word"]
    with pytest.raises(CheckpointError, match="lacks 'word', from which sizes are read"):
        official.build_official(state, {}, "toy.pth")


def test_wrong_shapes_are_named_as_the_file_names_them(toy):
    state = toy_state()
    state["floor.1.out.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    with pytest.raises(CheckpointError, match=re.escape("'floor.1.out.weight' has (8, 9) where (8, 8) is expected")):
        official.build_official(state, {}, "toy.pth")
    state["floor.1.qkv.weight"] = torch.zeros(3 * WIDTH + 1, WIDTH)
    with pytest.raises(CheckpointError, match="expected a first axis of 3 parts"):
        official.build_official(state, {}, "toy.pth")


def test_unknown_families_other_families_and_unknown_settings(toy):
    with pytest.raises(
        CheckpointError, match=r"its 2 tensors \('a', 'b', ...\) are of no backbone that is known: .*Toy"
    ):
        official.build_official({"a": torch.zeros(1), "b": torch.zeros(1)}, {}, "x.pth")
    with pytest.raises(CheckpointError, match="this looks like Toy, not like"):
        official.build_official(toy_state(), {}, "x.pth", "other")
    with pytest.raises(ValueError, match=r"unknown setting of a Toy checkpoint 'poolr': did you mean 'pooler'"):
        official.build_official(toy_state(), {}, "x.pth", poolr=True)


def test_a_translation_that_invents_a_name_is_an_error(toy, monkeypatch):
    monkeypatch.setattr(
        toy, "weights", lambda self, state, extras, config: iter([Item("word", "no.such", state["word"])])
    )
    with pytest.raises(CheckpointError, match="Toy has no place for 'no.such'"):
        official.build_official(toy_state(), {}, "toy.pth")


def test_nesting_prefixes_and_what_lies_beside_the_tensors(tmp_path):
    tensor, options = torch.arange(3.0), argparse.Namespace(lr=1)
    cases = {
        "bare": ({"a": tensor}, {"a"}, {}),
        "bare with a number": ({"a": tensor, "epoch": 3}, {"a"}, {"epoch": 3}),
        "model": ({"model": {"a": tensor}, "epoch": 3}, {"a"}, {"epoch": 3}),
        "data parallel": ({"module.a": tensor, "module.b": tensor}, {"a", "b"}, {}),
        "two parts": ({"model": [{"module.a": tensor}, {"module.a": tensor}]}, {"0.a", "1.a"}, {}),
        "namespace": ({"model": {"a": tensor}, "args": options}, {"a"}, {"args": options}),
        "numpy": ({"model": {"a": tensor}, "best": np.float64(3.5)}, {"a"}, {"best": 3.5}),
    }  # fmt: skip
    for name, (content, keys, extras) in cases.items():
        torch.save(content, tmp_path / "f.pth")
        state, beside = read_checkpoint(tmp_path / "f.pth")
        assert set(state) == keys and beside == extras, name
        assert all(torch.equal(t, tensor) for t in state.values()), name
    torch.save({"a": tensor}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.bin")[0]["a"], tensor)
    save_file({"module.a": tensor}, tmp_path / "f.th")
    assert torch.equal(read_checkpoint(tmp_path / "f.th")[0]["a"], tensor)


def test_bookkeeping_of_a_training_library_is_read_without_it(tmp_path, monkeypatch):
    """Lightning's files hold its hyperparameters and callbacks by class; the library need not be there."""
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    parents = ("pytorch_lightning", "pytorch_lightning.utilities")
    kind = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = kind
    with monkeypatch.context() as patch:
        for name in (*parents, module.__name__):
            patch.setitem(sys.modules, name, module)
        content = {
            "state_dict": {"a": torch.zeros(1)},
            "hyper_parameters": kind(rate=1),
            "callbacks": {kind: {"best": 2}},
        }
        torch.save(content, tmp_path / "lightning.ckpt")
    assert module.__name__ not in sys.modules
    state, extras = read_checkpoint(tmp_path / "lightning.ckpt")
    assert list(state) == ["a"] and dict(extras["hyper_parameters"]) == {"rate": 1}
    assert list(extras["callbacks"].values()) == [{"best": 2}]


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "older than torch 1.6"])
def test_a_hostile_file_is_refused_by_name_and_does_not_run(archive, tmp_path):
    mark, file = tmp_path / "it_ran", tmp_path / "hostile.pth"
    torch.save({"model": {"a": torch.zeros(2)}, "args": Exploit(mark)}, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"hostile.pth: refused: .*'posix.system'"):
        load_official(file)
    file.write_bytes(pickle.dumps({"a": Exploit(mark)}, protocol=2))
    with pytest.raises(CheckpointError, match="hostile.pth"):
        load_official(file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists(), "the exploit is a real one"


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused_by_name(keep, toy, tmp_path):
    torch.save(toy_state(), tmp_path / "whole.pth")
    save_file(toy_state(), tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / "cut").write_bytes(content[: int(keep * len(content))])
        with pytest.raises(ValueError, match=r"cut: not a whole"):
            load_official(tmp_path / "cut")


def test_files_of_no_tensors_are_refused(tmp_path):
    for content, message in (([1, 2], "found a list"), ({"epoch": 1}, "no tensors in its entries epoch"),
                             ({"model": {}}, "no tensors under 'model'")):  # fmt: skip
        torch.save(content, tmp_path / "f.pth")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "f.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def test_a_table_of_places_is_resized_and_its_class_row_stays():
    table = torch.randn(1 + 9, 4, generator=torch.Generator().manual_seed(0))
    bigger = resize_grid(table, 5)
    assert bigger.shape == (26, 4) and torch.equal(bigger[0], table[0])
    assert resize_grid(table, 3) is table
    # A constant field stays constant, and the middle of an odd grid stays the middle.
    assert torch.allclose(resize_grid(torch.ones(10, 4), 6), torch.ones(37, 4))
    assert torch.allclose(bigger[1 + 12], table[1 + 4])
