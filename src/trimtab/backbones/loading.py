"""Models by name: a registered backbone, a transformers folder, a file of its authors, an architecture without weights.

    trimtab.load("meter", pretrained=False, image_size=384)                random weights
    backbone: {name: meter, settings: {tasks: [irtr], image_size: 384}}    in a recipe, for `trimtab cost`

The name of an architecture is that of the format of its official files, and settings that files have too mean the same,
so that a recipe whose costs are known is run by putting the file's path in the name's place. Its sizes are those that
`tests/models/layouts.py` and the authors' configurations have. Models that are transformers folders have the names of
those folders (`records.py`), and no settings.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.backbones import chat, records
from trimtab.backbones.base import Backbone
from trimtab.backbones.family import FAMILIES, View, model_class
from trimtab.backbones.official import LoadReport, load_official
from trimtab.registry import unknown
from trimtab.storage.checkpoints import Conversion, load_weights, new_folder, save_pretrained, weight_sizes
from trimtab.storage.shards import SHARD_SIZE

BACKBONES: View[Any] = View("backbone", lambda family: family.pretrained)
"""Name of weights that come with trimtab or a package -> function that gives the `Backbone`."""

ARCHITECTURES: View[Any] = View(
    "architecture", lambda family: {family.name: family.architecture} if family.architecture else {},
    {name: records.architecture(name) for name in records.FOLDERS},
)  # fmt: skip
"""Name -> function of settings that gives the model's class and config."""

_FOLDERS: View[Any] = View("model_type", lambda family: family.folders)


def load(name_or_path: str | Path, pretrained: bool = True, tokenizer: Any = None,
         pictures: Literal["own", "squash"] = "own", kind: str | None = None,
         **settings: Any) -> Backbone:  # fmt: skip
    """A backbone by registered name, from a local transformers folder, or from a checkpoint file of its authors.

    Args:
        name_or_path: a name in `BACKBONES`, a folder with config.json and safetensors weights, a file whose format
            is recognised from the names of its tensors (`FORMATS`), or a name in `ARCHITECTURES`, which has no weights;
            where that is a folder's, its tokenizer only counts words.
        pretrained: False gives the same model with fresh random weights (not for files).
        tokenizer: a tokenizer, or the folder of one, in place of the backbone's own. Files hold none, nor do folders
            that were converted from them; without it texts must be given as ids there.
        pictures: `own` prepares pictures as the model's authors, or the image processor in its folder, do; `squash`
            resizes them whole to a square, whatever their shape.
        kind: `chat` takes a folder of a model that writes answers as one, also where another kind of backbone is made
            of such folders (LLaVA, PaliGemma, Idefics3, SmolVLM: `joint`). None: that other kind.
        settings: for files, of their format, such as `image_size`; for architectures, those of their function.

    Raises:
        ValueError: if the name is unknown, the weights are truncated, missing, or do not fit, weights are asked for of
            an architecture, there are settings for what is neither a file nor an architecture, or a folder's image
            processor gives pictures of another size than the model takes.
        FileNotFoundError: if the folder lacks a file.
    """
    name = str(name_or_path)
    if is_architecture(name) and pretrained:
        raise ValueError(
            f"{name}: an architecture, which has no weights: give the path of a checkpoint file or of a folder in "
            "its place, or take random weights (pretrained: false); `trimtab cost` needs none"
        )
    if Path(name).is_file() and name not in BACKBONES:
        model, report = load_official(name, **settings)
        backbone = FAMILIES[report.format].backbone(name, model)
        backbone.load_report = report
    elif is_architecture(name) and name not in records.FOLDERS:
        backbone = FAMILIES[name].backbone(name, build(name, **settings))
    elif settings:
        raise ValueError(f"{name}: {', '.join(settings)}: only official checkpoint files and architectures of such "
                         "files have settings")  # fmt: skip
    elif name in BACKBONES:
        backbone = BACKBONES[name](pretrained)
    else:
        folder, family, _ = _read_folder(name)
        chats = chat.reads(family) and (kind == "chat" or family not in _FOLDERS)
        if not chats and family not in _FOLDERS:
            raise ValueError(f"{folder / 'config.json'}: {unknown('model_type', family, _FOLDERS)}")
        backbone = (chat.load if chats else _FOLDERS[family])(folder, name, pretrained)
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        backbone.adopt(tokenizer)
    if isinstance(backbone, Backbone):
        backbone.prepare(pictures)
    return backbone


def is_architecture(name: str) -> bool:
    """Whether a name stands for an architecture: a backbone or a folder of that name comes first."""
    return name in ARCHITECTURES and name not in BACKBONES and not Path(name).exists()


def assumed(name: str) -> str | None:
    """What is assumed of a backbone that is not there, a sentence; None for one that is, or that has random weights."""
    if not is_architecture(name):
        return None
    if name in records.FOLDERS:
        return records.assumed(name)
    title = (ARCHITECTURES[name].__doc__ or "").strip().split("\n")[0].rstrip(".")
    return f"the published sizes of {title}, since no file or folder '{name}' is there"


def only_counted(name: str) -> bool:
    """Whether a name stands for a model whose tokenizer is not here, so that it can be counted and not trained."""
    return is_architecture(name) and name in records.FOLDERS and "texts" in records.told(name)


def build(name: str, **settings: Any) -> nn.Module:
    """The plain model of an architecture in evaluation mode on torch's default device, with fresh random weights.

    Raises:
        ValueError: if the name or a setting is unknown.
    """
    function = ARCHITECTURES[name]
    for key in settings:
        if key not in (valid := inspect.signature(function).parameters):
            raise ValueError(unknown(f"setting of the architecture {name!r}", key, valid))
    kind, config = function(**settings)
    return kind._from_config(config).eval()


def load_model(name_or_path: str | Path) -> tuple[nn.Module, Anatomy]:
    """A plain model and its anatomy: a registered backbone's, of any transformers folder (weights are not read), of an
    official checkpoint file, or of an architecture.

    Raises:
        ValueError: if the name is unknown, the file cannot be used, or no anatomy is registered or discovered.
        FileNotFoundError: if the folder lacks config.json.
    """
    name = str(name_or_path)
    if name in BACKBONES:
        backbone = BACKBONES[name](False)
        return backbone.model, backbone.anatomy
    if Path(name).is_file():
        model, _ = load_official(name)
        return model, Anatomy.of(model)
    if is_architecture(name):
        with torch.device("meta"):
            model = build(name)
        return model, Anatomy.of(model)
    import transformers

    folder, _, architecture = _read_folder(name)
    kind = model_class(architecture)
    config = transformers.AutoConfig.from_pretrained(folder)  # after our class is imported, which makes it known
    with torch.device("meta"):  # shapes are all that is asked for
        model = kind._from_config(config) if kind else transformers.AutoModel.from_config(config)
    return model, Anatomy.of(model)


def from_pretrained(folder: str | Path) -> Any:
    """The model of a transformers folder, sparse or dense, of the class that its config names; in evaluation mode.

    From a sparse folder every tensor comes back bit for bit in the type in which it was saved.

    Args:
        folder: config.json and weights.

    Raises:
        FileNotFoundError: if the folder, its config or its weights are not there.
        ValueError: if the class is neither one of transformers' nor ours, or weights are damaged, missing or of other
            shapes.
    """
    import transformers

    folder = Path(folder)
    if (folder / "fit.json").is_file():
        raise ValueError(
            f"{folder}: holds an adapted model (fit.json): load its base, then `trimtab.adapt(base, {str(folder)!r})`"
        )
    _, architecture = _read_config(folder)
    kind = model_class(architecture)
    if kind is None:
        raise ValueError(
            f"{folder / 'config.json'}: architectures names {architecture or None!r}, which is no class of "
            "transformers or trimtab"
        )
    return load_weights(kind, folder, transformers.AutoConfig.from_pretrained(folder), dtype=None)


def convert_official(
    path: str | Path, out: str | Path, sparse: bool = False, max_shard_size: int | str = SHARD_SIZE, **settings: Any
) -> tuple[Conversion, LoadReport]:
    """Write a checkpoint file of its authors as a folder that `from_pretrained` and `trimtab.load` read.

    Args:
        path: the file (see `trimtab.backbones.load_official`).
        out: a folder that is not there yet.
        sparse: write the sparse layout.
        max_shard_size: bytes a weight file, such as 10**9 or "500MB" (powers of ten).
        settings: of the file's format, such as `image_size`.

    Raises:
        FileExistsError: if `out` is there.
        FileNotFoundError, ValueError: as `load_official`.
        OSError: if it cannot be written (the disk is full); nothing is left then.
    """
    out = new_folder(out)
    model, report = load_official(path, **settings)
    if report.fresh:
        raise ValueError(
            f"{path}: {len(report.fresh)} tensors would be random, such as '{report.fresh[0]}'; train first"
        )
    save_pretrained(model, out, sparse, max_shard_size)
    return Conversion(weight_sizes(out), Path(path).stat().st_size), report


def _read_folder(name: str) -> tuple[Path, str, str]:
    """A transformers folder that a name stands for, its model type and the class that it names."""
    folder = records.FOLDERS[name] if is_architecture(name) and name in records.FOLDERS else Path(name)
    if not folder.is_dir():
        raise ValueError(f"{unknown('backbone', name, [*BACKBONES, *ARCHITECTURES])}; nor is there a folder of that "
                         "name")  # fmt: skip
    return folder, *_read_config(folder)


def _read_config(folder: Path) -> tuple[str, str]:
    """The model type and the class that a folder's config.json names; an empty text for what it does not name."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: expected a transformers folder with config.json, found none")
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config}: no JSON ({error})") from error
    return str(content.get("model_type") or ""), str((content.get("architectures") or [""])[0])
