"""Models saved sparse and loaded, and folders converted between layouts: nothing changes but the bytes on disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltForImageAndTextRetrieval,
)

import trimtab
from trimtab import backbones, cli
from trimtab.backbones import from_pretrained
from trimtab.storage import sparse
from trimtab.storage.checkpoints import DenseReader, convert, save_pretrained

FILE = "model.sparse.safetensors"


def clip() -> CLIPModel:
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 8}  # fmt: skip
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def vilt() -> ViltForImageAndTextRetrieval:
    return ViltForImageAndTextRetrieval(ViltConfig(
        vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    ))  # fmt: skip


def pruned(make) -> torch.nn.Module:
    """A model with three quarters of every matrix zero."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(torch.rand_like(parameter) < 0.75, 0)  # a product would give -0.0, no zero
    return model


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """The same class, parameters and buffers, those that are not saved included."""
    assert type(a) is type(b)
    for kind in ("named_parameters", "named_buffers"):
        left, right = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (a, b))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype, name
            assert torch.equal(tensor, right[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("make", [clip, t5, vilt])
def test_models_come_back_the_same(make, is_sparse, tmp_path):
    model = pruned(make)
    assert trimtab.save_pretrained(model, tmp_path / "out", sparse=is_sparse) == tmp_path / "out"
    assert sparse.is_sparse(tmp_path / "out") == is_sparse
    again = trimtab.from_pretrained(tmp_path / "out")
    assert_same(model, again)
    assert not again.training and again.name_or_path == str(tmp_path / "out")
    model.save_pretrained(tmp_path / "theirs")
    others = [{k: v for k, v in contents(tmp_path / f).items() if "model." not in k} for f in ("out", "theirs")]
    assert others[0] == others[1] and "config.json" in others[0]


def test_what_is_saved_is_read_by_transformers_unless_the_sparse_layout_is_asked_for(tmp_path):
    model = pruned(clip)
    trimtab.save_pretrained(model, tmp_path / "out")
    assert_same(model, type(model).from_pretrained(tmp_path / "out"))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    save_pretrained(pruned(t5), tmp_path / "out", sparse=True)
    names = sparse.SparseReader(tmp_path / "out").keys()
    assert "shared.weight" in names and "lm_head.weight" not in names
    again = from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.shared.weight is again.encoder.embed_tokens.weight


def test_the_weights_are_those_that_transformers_saves(tmp_path):
    model = pruned(clip)
    model.save_pretrained(tmp_path / "dense")
    save_pretrained(model, tmp_path / "sparse", sparse=True)
    theirs, ours = load_file(tmp_path / "dense" / "model.safetensors"), sparse.load_file(tmp_path / "sparse")
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_every_weight_keeps_its_own_type(tmp_path):
    model = pruned(clip).to(torch.bfloat16)
    model.logit_scale.data = model.logit_scale.data.float()
    save_pretrained(model, tmp_path / "out", sparse=True)
    assert_same(model, from_pretrained(tmp_path / "out"))


def test_how_a_model_generates_is_kept(tmp_path):
    model = pruned(t5)
    model.generation_config = GenerationConfig(
        max_new_tokens=7, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0
    )
    save_pretrained(model, tmp_path / "out", sparse=True)
    assert from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7


def test_shards(tmp_path):
    model = pruned(t5)
    save_pretrained(model, tmp_path / "out", sparse=True, max_shard_size="20KB")
    assert (tmp_path / "out" / f"{FILE}.index.json").is_file() and not list((tmp_path / "out").glob(".*"))
    assert_same(model, from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-vilt"])
def test_backbones_are_saved_and_loaded_sparse(name, tmp_path):
    backbone = backbones.load(name)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter[parameter.abs() < 0.02] = 0
    backbone.save_pretrained(tmp_path / "out", sparse=True)
    assert not list((tmp_path / "out").glob("model.safetensors"))
    again = backbones.load(tmp_path / "out")
    assert_same(backbone.model, again.model)
    assert type(again) is type(backbone) and again.texts(["a cat"])["input_ids"].shape[0] == 1


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path):
    save_pretrained(pruned(vilt), tmp_path / "out", sparse=True)
    with pytest.raises(FileExistsError, match="out: is there already"):
        save_pretrained(pruned(vilt), tmp_path / "out", sparse=True)
    with pytest.raises(ValueError, match="Linear is no transformers model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "linear", sparse=True)
    with pytest.raises(FileNotFoundError, match="folder with config.json, found none"):
        from_pretrained(tmp_path)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("ViltForImageAndTextRetrieval", "ViltForNothing"))
    with pytest.raises(ValueError, match="names 'ViltForNothing', which is no class of transformers"):
        from_pretrained(tmp_path / "out")
    (tmp_path / "out" / FILE).unlink()
    config.write_text(config.read_text().replace("ViltForNothing", "ViltForImageAndTextRetrieval"))
    with pytest.raises(FileNotFoundError, match="expected safetensors weights"):
        from_pretrained(tmp_path / "out")


def test_missing_and_misshapen_weights_are_refused(tmp_path):
    save_pretrained(pruned(vilt), tmp_path / "out", sparse=True)
    tensors = sparse.load_file(tmp_path / "out")
    name = next(n for n in tensors if n.endswith("pooler.dense.weight"))
    for change in ("missing", "do not fit"):
        (tmp_path / "out" / FILE).unlink()
        changed = {n: t for n, t in tensors.items() if n != name} | (
            {} if change == "missing" else {name: torch.ones(3)}
        )
        sparse.save_file(changed, tmp_path / "out")
        with pytest.raises(ValueError, match=change):
            from_pretrained(tmp_path / "out")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.storage.shards.save_file", full)
    with pytest.raises(OSError, match="out: not written .No space left on device"):
        save_pretrained(pruned(vilt), tmp_path / "out", sparse=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense checkpoint with files of other kinds beside its weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "dense"
    pruned(t5).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "notes.txt").write_text("notes")
    (folder / "tf_model.h5").write_bytes(b"other weights")
    (folder / ".hidden").write_text("hidden")
    return folder


@pytest.mark.parametrize("size", ["2GB", "20KB"])
def test_there_and_back_is_the_same(size, checkpoint, tmp_path):
    there = convert(checkpoint, tmp_path / "sparse", "sparse", size)
    back = convert(tmp_path / "sparse", tmp_path / "dense", "dense", size)
    before, after = DenseReader(checkpoint), DenseReader(tmp_path / "dense")
    tensors = [{n: t for _, batch in reader.batches() for n, t in batch.items()} for reader in (before, after)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    assert (len(after.files) > 1) == (size == "20KB")
    kept = {"config.json", "generation_config.json", "tokenizer.json", "onnx/notes.txt"}
    for folder in (tmp_path / "sparse", tmp_path / "dense"):
        found = contents(folder)
        assert {name for name in found if not name.startswith("model")} == kept
        assert all(found[name] == (checkpoint / name).read_bytes() for name in kept)
    assert_same(pruned(t5), T5ForConditionalGeneration.from_pretrained(tmp_path / "dense"))
    assert there.bytes_before == (checkpoint / "model.safetensors").stat().st_size
    assert there.sizes == sparse.sizes(tmp_path / "sparse") and there.sizes.file_bytes < 0.6 * there.bytes_before
    assert back.sizes.nonzeros == there.sizes.nonzeros == sum(int(t.ne(0).sum()) for t in tensors[0].values())


def test_sharded_checkpoints_are_read(tmp_path):
    model = pruned(t5)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(DenseReader(tmp_path / "dense").files) > 1
    convert(tmp_path / "dense", tmp_path / "out", "sparse")
    assert [f.name for f in (tmp_path / "out").glob("model*")] == [FILE]
    assert_same(model, from_pretrained(tmp_path / "out"))
    shard = DenseReader(tmp_path / "dense").files[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name}: not a whole safetensors file"):
        convert(tmp_path / "dense", tmp_path / "again", "sparse")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: no such file"):
        convert(tmp_path / "dense", tmp_path / "again", "sparse")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_checkpoints_are_read_without_running_them(shards, checkpoint, tmp_path):
    model = pruned(t5)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        where = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(where.values()):
            torch.save({n: t for n, t in state.items() if where[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    done = convert(folder, tmp_path / "out", "sparse")
    loaded = sparse.load_file(tmp_path / "out")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[n], t) for n, t in state.items())
    if shards == 1:  # one memory has four names
        assert done.sizes.tensors == len({t.data_ptr() for t in state.values()}) == len(state) - 3


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("content", [{"w": Evil()}, {"w": 3}, [1], b"no archive"])
def test_pickles_of_anything_else_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="pytorch_model.bin: (not a whole file of tensors alone|expected a model's state)"
    ):
        convert(folder, tmp_path / "out", "sparse")
    assert [f.name for f in tmp_path.iterdir()] == ["pickled"]


def test_evil_would_have_worked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "touched").exists()


def test_what_cannot_be_converted_is_refused(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "sparse", "sparse")
    (tmp_path / "empty").mkdir()
    for folder, out, to, error, message in [
        (checkpoint, tmp_path / "empty", "sparse", FileExistsError, "empty: is there already"),
        (tmp_path / "empty", tmp_path / "out", "sparse", FileNotFoundError, "expected weights .*found none"),
        (tmp_path / "empty", tmp_path / "out", "dense", ValueError, "are dense already"),
        (tmp_path / "sparse", tmp_path / "out", "sparse", ValueError, "are sparse already"),
        (tmp_path / "nowhere", tmp_path / "out", "sparse", FileNotFoundError, "nowhere: no such folder"),
        (checkpoint, checkpoint / "out", "sparse", ValueError, "lies inside"),
    ]:
        with pytest.raises(error, match=message):
            convert(folder, out, to)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "sparse"]


def test_the_command(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    assert cli.main(["convert", str(checkpoint), "--to", "sparse", str(out)]) == 0
    sizes, printed = sparse.sizes(out), capsys.readouterr().out
    assert f"{sizes.nonzeros:,}" in printed and f"{sizes.file_bytes:,}" in printed
    before = (checkpoint / "model.safetensors").stat().st_size
    assert f"{before:,}" in printed and f"{sizes.file_bytes / before:.3f}" in printed
    assert cli.main(["convert", str(checkpoint), str(out), "--to", "sparse"]) == 2
    assert "trimtab convert:" in (error := capsys.readouterr().err) and "is there already" in error
    assert cli.main(["convert", str(out), str(tmp_path / "dense"), "--to", "dense", "--max-shard-size", "20KB"]) == 0
    assert_same(pruned(t5), from_pretrained(tmp_path / "dense"))
