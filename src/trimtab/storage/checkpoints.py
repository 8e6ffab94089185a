"""Transformers checkpoints, dense or sparse on disk: models of a given class saved and loaded, folders converted.

The sparse layout is that of `trimtab.storage.sparse`. Config, tokenizer and all other files are the same in both.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy.structure import HANDLE
from trimtab.files import replace_folder
from trimtab.storage import sparse as layout
from trimtab.storage.shards import DENSE, SHARD_SIZE, ShardWriter, find, open_safetensors, read_index

# Other copies of a model's weights that checkpoints carry; what is converted must not take them along.
_WEIGHTS = (
    "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "tf_model*.h5", "flax_model*.msgpack",
)  # fmt: skip


def save_pretrained(
    model: Any, folder: str | Path, sparse: bool = False, max_shard_size: int | str = SHARD_SIZE
) -> Path:
    """Write a transformers model as its own `save_pretrained` does, or with its weights in the sparse layout.

    For the sparse layout the dense checkpoint is written first, inside the unfinished folder, and goes shard by shard:
    for that moment the disk needs room for it.

    Args:
        model: a `PreTrainedModel`.
        folder: a folder that is not there yet.
        sparse: write the sparse layout, which `trimtab.from_pretrained` and `trimtab.load` read and transformers does
            not; `trimtab convert` makes it dense again.
        max_shard_size: bytes a weight file, such as 10**9 or "500MB" (powers of ten).

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder is there.
        ValueError: if the model is no transformers model.
        OSError: if it cannot be written (the disk is full); nothing is left then.
    """
    folder = new_folder(folder)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is no transformers model: it has no config and save_pretrained")
    with replace_folder(folder) as partial:
        write_pretrained(model, partial, sparse, max_shard_size)
    return folder


def write_pretrained(model: Any, folder: Path, sparse: bool, max_shard_size: int | str = SHARD_SIZE) -> None:
    """As `save_pretrained`, into a folder that is there, for callers that add files before it is finished."""
    handle = getattr(model, HANDLE, None)
    if handle is not None and (lost := handle.lost()):
        raise ValueError(
            f"this {type(model).__name__} is adapted, and a plain folder would lose {', '.join(lost)}: "
            "`fit.save(folder)` keeps it, `fit.export(folder)` makes it part of the weights where that is possible"
        )
    dense = folder / ".dense" if sparse else folder
    with quiet():
        model.save_pretrained(dense, max_shard_size=max_shard_size)
    if sparse:
        _check_named(model, DenseReader(dense))
        _write(DenseReader(dense), folder, "sparse", max_shard_size, consume=True)
        _copy_others(dense, folder)
        shutil.rmtree(dense)
    for file in folder.glob("model*.safetensors"):
        file.chmod(0o644)


def _check_named(model: Any, written: DenseReader) -> None:
    """ValueError if what transformers wrote cannot be read back with each weight's own type."""
    if not written.files:
        raise ValueError(f"{type(model).__name__}.save_pretrained wrote no weights of the model beside its config: "
                         "merge adapters into it first (PEFT: `merge_and_unload()`)")  # fmt: skip
    own = model.state_dict()
    kinds = {t.dtype for t in own.values() if t.is_floating_point()}
    names = (name for file in written.files for name in sorted(open_safetensors(file).keys()))
    if len(kinds) > 1 and (other := next((name for name in names if name not in own), None)):
        raise ValueError(
            f"{type(model).__name__} has weights of several types ({', '.join(sorted(map(str, kinds)))}), and "
            f"transformers writes them under other names than the model's ('{other}'), so that each one's type would "
            "be lost in the sparse layout: give all one type first (`model.to(torch.float32)`), or leave out `sparse`"
        )


def load_weights(model_class: Any, folder: Path, config: Any, dtype: torch.dtype | None, **options: Any) -> nn.Module:
    """A transformers model of a class with a folder's weights, sparse or dense; in evaluation mode.

    Args:
        model_class: a subclass of `PreTrainedModel`.
        folder: where weights are.
        config: of that class.
        dtype: into which weights are converted; None leaves them as they were saved.
        options: further arguments of `model_class.from_pretrained`.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if they cannot be read (truncated, damaged), some are missing, or have other shapes. Weights for
            which the model has no place are passed over, as transformers does.
    """
    tensors: dict[str, Tensor] | None = None
    if layout.is_sparse(folder):
        tensors = layout.load_file(folder)
        source: dict[str, Any] = {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    else:
        if not DenseReader(folder).files:
            raise FileNotFoundError(f"{folder}: expected safetensors weights beside config.json, found none")
        source = {"pretrained_model_name_or_path": folder, "config": config}
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                **source, dtype=dtype or "auto", output_loading_info=True, **options
            )
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights do not fit {model_class.__name__} ({error})") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder}: {len(missing)} weights of {model_class.__name__} are missing, first '{missing[0]}'"
        )
    if tensors is not None:
        _settle(model, folder, tensors if dtype is None else {})
    return model.eval()


def _settle(model: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """What loading from a dictionary leaves out: each tensor's own type, where it came from, how it generates."""
    from transformers import GenerationConfig

    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in tensors.items():
        # transformers gives all weights one type; a model may have been saved with several.
        if name in own and own[name].dtype != tensor.dtype and own[name].shape == tensor.shape:
            own[name].data = tensor
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging and from showing progress: what it would say is checked by the caller."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@dataclass
class Conversion:
    """What `convert` did: the weights (`sizes`, with the written bytes), and bytes of the weight files before."""

    sizes: layout.Sizes
    bytes_before: int


def weight_sizes(folder: Path) -> layout.Sizes:
    """What the weights in a folder hold, dense or sparse; dense ones are read once, to count what is not zero."""
    if layout.is_sparse(folder):
        return layout.sizes(folder)
    sizes = layout.Sizes()
    for _, tensors in DenseReader(folder).batches():
        for tensor in tensors.values():
            sizes.add(tensor.shape, tensor.element_size(), layout.count_nonzeros(tensor), False)
    sizes.file_bytes = layout.stored_bytes(folder, DENSE)
    return sizes


def convert(folder: str | Path, out: str | Path, to: Literal["sparse", "dense"],
            max_shard_size: int | str = SHARD_SIZE) -> Conversion:  # fmt: skip
    """Write a checkpoint folder again with its weights in the other layout, and its other files as they are.

    Weights go one after another, one written shard in memory at a time. All names and bits stay. Hidden files, and
    copies of the weights in other formats, are left behind.

    Args:
        folder: a folder with sparse weights, or dense: safetensors, one file or shards, or else `pytorch_model.bin`,
            which is read without running any code in it.
        out: a folder that is not there yet.
        to: the layout to write.
        max_shard_size: bytes a weight file, such as 10**9 or "500MB" (powers of ten).

    Raises:
        FileExistsError: if `out` is there.
        FileNotFoundError: if the folder, its weights or one of their shards are not there.
        ValueError: if weights cannot be read (truncated, damaged), are in the layout asked for, or `out` is inside
            the folder.
        OSError: if it cannot be written (the disk is full); nothing is left then.
    """
    folder, out = Path(folder), new_folder(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if folder.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: lies inside {folder}; name a folder beside it")
    is_sparse = layout.is_sparse(folder)
    if is_sparse == (to == "sparse"):
        raise ValueError(f"{folder}: its weights are {to} already")
    reader: DenseReader | _SparseBatches = _SparseBatches(folder) if is_sparse else DenseReader(folder)
    if not reader.files:
        raise FileNotFoundError(
            f"{folder}: expected weights (model.safetensors, its shards, or pytorch_model.bin), found none"
        )
    with replace_folder(out) as partial:
        sizes = _write(reader, partial, to, max_shard_size)
        _copy_others(folder, partial)
    return Conversion(sizes, sum(file.stat().st_size for file in reader.files))


def new_folder(folder: str | Path) -> Path:
    """A folder's path; FileExistsError if something of that name is there."""
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder}: is there already; name a new folder")
    return folder


def _write(reader: DenseReader | _SparseBatches, folder: Path, to: str, max_shard_size: int | str,
           consume: bool = False) -> layout.Sizes:  # fmt: skip
    """Write what a reader holds in a layout; with `consume`, each of its files is deleted once it is written."""
    if to == "sparse":
        with layout.SparseWriter(folder, max_shard_size) as writer:
            for file, tensors in reader.batches():
                writer.add(tensors)
                if consume:
                    file.unlink()
        sizes = writer.sizes
    else:
        sizes = layout.Sizes()
        with ShardWriter(folder, DENSE, max_shard_size, lambda notes: {"format": "pt"}) as shards:
            for _, tensors in reader.batches():
                for name, tensor in tensors.items():
                    shards.put(name, {name: tensor})
                    sizes.add(tensor.shape, tensor.element_size(), layout.count_nonzeros(tensor), False)
    sizes.file_bytes = layout.stored_bytes(folder, layout.SUFFIX if to == "sparse" else DENSE)
    return sizes


def _copy_others(folder: Path, out: Path) -> None:
    """Copy what is no weights: config, tokenizer, preprocessor, folders; not what is hidden."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_file() and any(path.match(pattern) for pattern in _WEIGHTS)):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copy2(path, out / path.name)


class DenseReader:
    """The dense weights of a folder, file by file: safetensors, or `pytorch_model.bin` where there are none.

    Attributes:
        files: all weight files; empty if there are none.

    Raises:
        FileNotFoundError, ValueError: as `trimtab.storage.shards.find`, or if a safetensors file is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.files, where = find(folder, DENSE)
        for file in self.files:
            open_safetensors(file)  # all are looked at before the first is converted
        if not self.files:
            index, single = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
            where = read_index(index) if index.is_file() else None
            self.files = [folder / name for name in sorted(set(where.values()))] if where else [single]
            self.files = [file for file in self.files if where or file.is_file()]
        self.where = where

    def batches(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Files and their tensors by name. The tensors lie in mapped files: memory holds only what is looked at.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if one cannot be read, or lacks what the index says.
        """
        for file in self.files:
            tensors = _pickled(file) if file.suffix == ".bin" else open_safetensors(file)
            names = tensors.keys()
            lost = [n for n, f in (self.where or {}).items() if f == file.name and n not in set(names)]
            if lost:
                raise ValueError(f"{file}: lacks '{lost[0]}', which the index looks for there; copy it again")
            if isinstance(tensors, dict):
                yield file, tensors
            else:
                yield file, {name: tensors.get_tensor(name) for name in names}


def _pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `pytorch_model.bin`; nothing in it is run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are no archives and cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a whole file of tensors alone, and nothing else is read ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a model's state dictionary, found a {type(found).__name__}")
    if wrong := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path}: expected a model's state dictionary, but '{wrong[0]}' is no tensor")
    return dict(found)


class _SparseBatches:
    """A sparse folder as `DenseReader` has a dense one, a tensor a batch."""

    def __init__(self, folder: Path) -> None:
        self.files, _ = find(folder, layout.SUFFIX)
        self.reader = layout.SparseReader(folder)

    def batches(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        for name in self.reader:
            yield self.files[0], {name: self.reader.get_tensor(name)}
