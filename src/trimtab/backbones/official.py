"""Checkpoint files as their authors published them: read without running what is in them, recognised, translated.

    file --read_checkpoint--> tensors by name, and what lies beside them
         --find_format------> the one family whose `Format` knows these names
         --Format.plan------> a model class and its config, sizes and options inferred from the tensors
         --Format.weights---> (name in the file, name in the model, tensor), position tables resized
         --load_official----> the filled model, and a `LoadReport` of what was used, left over and missing

A family's format stands in `official.py` of its folder and is named in its `Family`. Its model is a transformers
`PreTrainedModel`, theirs or ours, so that what is loaded can be saved and read again like any other model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trimtab.backbones.family import FAMILIES, Family, View
from trimtab.backbones.reading import CheckpointError, read_checkpoint
from trimtab.registry import unknown
from trimtab.storage.checkpoints import quiet

T = TypeVar("T")


class Item(NamedTuple):
    """One translated tensor: its name in the file, its name in the model, and its value."""

    key: str
    name: str
    tensor: Tensor


class Tensors(dict[str, Tensor]):
    """A file's tensors by name, for reading sizes from them; a name that is not there is an error that says so.

    Args:
        state: name -> tensor.
        where: the file, for messages.
        title: what it looks like, for messages.
    """

    def __init__(self, state: dict[str, Tensor], where: str, title: str):
        super().__init__(state)
        self.where, self.title = where, title

    def __missing__(self, key: str) -> Tensor:
        raise CheckpointError(f"{self.where}: looks like {self.title}, but lacks '{key}', from which sizes are read")

    def size(self, key: str, dim: int = 0) -> int:
        """One extent of a tensor."""
        tensor = self[key]
        if tensor.dim() <= dim:
            raise CheckpointError(f"{self.where}: '{key}' has the shape {tuple(tensor.shape)}, with no axis {dim}")
        return tensor.shape[dim]

    def count(self, prefix: str) -> int:
        """How many numbered parts stand under a prefix: 12 for `layer.` if there is a `layer.11.`."""
        found = re.compile(re.escape(prefix) + r"(\d+)\.")
        return 1 + max((int(m[1]) for key in self if (m := found.match(key))), default=-1)


class Format:
    """How one family's files are read.

    Attributes:
        leftovers: patterns of names in the file that its authors' code does not use either.
        fresh: patterns of parts of the model that a file need not have: heads asked for by a setting, for training. One
            of which the file has only some tensors is missing the others.
    """

    leftovers: ClassVar[tuple[str, ...]] = ()
    fresh: ClassVar[tuple[str, ...]] = ()

    def may_lack(self, state: Tensors, config: Any) -> tuple[str, ...]:
        """Those of `fresh` that hold for this file."""
        return self.fresh

    def recognises(self, keys: Collection[str]) -> bool:
        """Whether a file with these names is of this family; must hold for no other family's files."""
        raise NotImplementedError

    def plan(self, state: Tensors, extras: dict[str, Any], **settings: Any) -> tuple[type, Any]:
        """The model's class (a `PreTrainedModel`) and config. Keyword settings are the family's own.

        Raises:
            CheckpointError: if a tensor from which a size is read is missing, or a setting does not fit.
        """
        raise NotImplementedError

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        """Every tensor that goes into the model; one in the file may give several, or none."""
        raise NotImplementedError


FORMATS: View[Format] = View("format", lambda family: {family.name: family.format} if family.format else {})
"""Name of a family -> how its authors' files are read."""


@dataclass(frozen=True)
class LoadReport:
    """What came of a file.

    Attributes:
        path: the file.
        format: name of the family.
        used: names in the file that went into the model.
        leftovers: names in the file that its authors' code does not use either.
        unused: names in the file that nobody expected, and that were passed over.
        fresh: names in the model that the file does not have and need not: random, to be trained.
        resized: name in the model -> shape in the file and shape in the model, for position tables.
    """

    path: str
    format: str
    used: tuple[str, ...]
    leftovers: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {FAMILIES[self.format].title}, {len(self.used)} tensors used"]
        for what, names in (("left over as in the authors' code", self.leftovers),
                            ("not expected and passed over", self.unused), ("new and random", self.fresh)):  # fmt: skip
            if names:
                lines.append(f"  {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
        lines += [f"  {name} resized from {old} to {new}" for name, (old, new) in self.resized.items()]
        return "\n".join(lines)


def find_format(keys: Collection[str], where: str) -> Family:
    """The family whose files have these names.

    Raises:
        CheckpointError: if there is none, with some of the names and the families that are known.
    """
    with_files = [family for family in FAMILIES.values() if family.format is not None]
    for family in with_files:
        if family.format is not None and family.format.recognises(keys):
            return family
    known = ", ".join(sorted(family.title for family in with_files))
    shown = ", ".join(f"'{k}'" for k in list(keys)[:3])
    raise CheckpointError(f"{where}: its {len(keys)} tensors ({shown}, ...) are of no backbone that is known: {known}")


def load_official(path: str | Path, format: str | None = None, **settings: Any) -> tuple[nn.Module, LoadReport]:
    """A model in evaluation mode and float32 from a checkpoint file in its authors' own layout.

    Tensors stay in the mapped file where they can, so that memory holds them once.

    Args:
        path: the file: a torch archive of any name, or safetensors.
        format: a name in `FORMATS` that the file must be of; None recognises it from its names.
        settings: of that format: `image_size` to resize position tables, say (see `Format.plan` of the family).

    Raises:
        FileNotFoundError: if the file is not there.
        CheckpointError: if it cannot be read or would run code, is of no known or of another family, or tensors are
            missing or of other shapes (the first three are named).
        ValueError: if a setting is not one of the format's.
    """
    state, extras = read_checkpoint(path)
    return build_official(state, extras, str(path), format, **settings)


def build_official(state: dict[str, Tensor], extras: dict[str, Any], where: str, format: str | None = None,
                   **settings: Any) -> tuple[nn.Module, LoadReport]:  # fmt: skip
    """As `load_official`, from tensors that were read already."""
    family = find_format(state, where)
    found, title = family.format, family.title
    assert found is not None
    if format is not None and family.name != format:
        wanted = FAMILIES[format].title if format in FORMATS else unknown("format", format, FORMATS)
        raise CheckpointError(f"{where}: this looks like {title}, not like {wanted}")
    _check_settings(family, settings)
    tensors = Tensors(state, where, title)
    model_class, config = found.plan(tensors, extras, **settings)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in model_class(config).state_dict().items()}
    items = list(found.weights(tensors, extras, config))
    fresh = _check(found.may_lack(tensors, config), tensors, shapes, items)
    model = _fill(model_class, config, {i.name: i.tensor for i in items})
    used = dict.fromkeys(i.key for i in items)
    rest = [k for k in state if k not in used]
    leftovers = [k for k in rest if any(re.search(p, k) for p in found.leftovers)]
    resized = {
        i.name: (tuple(state[i.key].shape), tuple(i.tensor.shape))
        for i in items if "pos" in i.key and i.key in state and state[i.key].numel() != i.tensor.numel()
    }  # fmt: skip
    report = LoadReport(where, family.name, tuple(used), tuple(leftovers),
                        tuple(k for k in rest if k not in set(leftovers)), fresh, resized)  # fmt: skip
    return model, report


def _check_settings(family: Family, settings: dict[str, Any]) -> None:
    assert family.format is not None
    valid = [n for n, p in inspect.signature(family.format.plan).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in valid:
            raise ValueError(unknown(f"setting of a {family.title} checkpoint", name, valid))


def _check(
    new: Collection[str], state: Tensors, shapes: dict[str, tuple[int, ...]], items: list[Item]
) -> tuple[str, ...]:  # fmt: skip
    """Raise unless the items fill the model; returns the names that stay random."""
    where, title = state.where, state.title
    there = {i.name for i in items}
    if stray := sorted(there - shapes.keys()):
        raise CheckpointError(f"{where}: {title} has no place for {_three(stray)}")
    wrong = [
        f"'{i.key}' has {tuple(i.tensor.shape)} where {shapes[i.name]} is expected"
        for i in items if tuple(i.tensor.shape) != shapes[i.name]
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{where}: {len(wrong)} tensors of a wrong shape for {title}: {_three(wrong, '')}")
    missing = sorted(shapes.keys() - there)
    fresh = [n for n in missing if _is_new(n, new, there)]
    if lost := [n for n in missing if n not in set(fresh)]:
        raise CheckpointError(
            f"{where}: looks like {title}, but {len(lost)} of {len(shapes)} tensors are missing: {_three(lost)}; "
            "download the whole file again"
        )
    return tuple(fresh)


def _is_new(name: str, new: Collection[str], there: set[str]) -> bool:
    """Whether a missing tensor may be random: its part may, and the file has nothing of that part."""
    parts = [name[: match.end()] for pattern in new if (match := re.search(pattern, name))]
    return any(not any(n.startswith(part) for n in there) for part in parts)


def _three(names: list[str], quote: str = "'") -> str:
    shown = ", ".join(f"{quote}{n}{quote}" for n in names[:3])
    return shown + (" and more" if len(names) > 3 else "")


def _fill(model_class: Any, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights in float32; transformers ties what is tied and fills what is not saved."""
    with quiet():
        model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    return model.eval()


# --- what several formats need ----------------------------------------------------------------------------------------


def renamed(state: Tensors, rules: Iterable[tuple[str, str | tuple[str, ...]]]) -> Iterator[Item]:
    """Items by rules (pattern, replacement), of which the first whose pattern matches a whole name applies.

    A replacement that is a tuple splits the tensor along its first axis into equal parts, one a name; an empty one
    leaves it to the caller. A name that no rule matches is left over.
    """
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    for key, tensor in state.items():
        for pattern, new in compiled:
            if not (match := pattern.fullmatch(key)):
                continue
            names = (new,) if isinstance(new, str) else new
            if names and tensor.dim() and tensor.shape[0] % len(names):
                raise CheckpointError(
                    f"{state.where}: '{key}' has {tuple(tensor.shape)}, expected a first axis of {len(names)} parts"
                )
            parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,) * len(names)
            for name, part in zip(names, parts, strict=True):
                yield Item(key, match.expand(name), part)
            break


def resize_grid(table: Tensor, side: int, extra: int = 1) -> Tensor:
    """A table of learned positions for another square grid, as timm and its descendants resize it: bicubic.

    Args:
        table: (extra + old * old, D).
        side: of the new grid.
        extra: rows in front that belong to no place (class tokens); they stay.

    Returns:
        (extra + side * side, D), or the table itself if the grid stays.
    """
    old = round((len(table) - extra) ** 0.5)
    if old == side:
        return table
    grid = table[extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()  # (1, D, old, old)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:extra], grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def grid_side(state: Tensors, key: str, patch: int, image_size: int | None, extra: int = 1) -> int:
    """Side of the image for which a model is built: the setting's, or that of the table of positions in the file.

    Raises:
        CheckpointError: if the table is of no square, or the image is no multiple of the patch.
    """
    table = state[key]
    places = table.shape[-2] - extra
    side = round(max(places, 0) ** 0.5)
    if side * side != places:
        raise CheckpointError(f"{state.where}: '{key}' has {places} places, which are no square grid")
    if image_size is None:
        return side * patch
    if image_size < patch or image_size % patch:
        raise CheckpointError(f"image_size {image_size} is no multiple of the patch of {patch} pixels of {state.title}")
    return image_size


def head_count(width: int, given: int | None, setting: str) -> int:
    """Attention heads of a width: as given, else of 64 channels each, as all published sizes have them.

    Raises:
        CheckpointError: if the width is no multiple of them.
    """
    heads = given or max(width // 64, 1)
    if width % heads or (given is None and width % 64):
        raise CheckpointError(f"no tensor tells the number of attention heads of a width of {width}: set `{setting}`")
    return heads


def bert_config(state: Tensors, prefix: str, heads: int | None = None, kind: Any = None, **fixed: Any) -> Any:
    """The config of a BERT or a relative from the tensors under a prefix of a checkpoint file.

    Args:
        state: of the file.
        prefix: what stands before `embeddings.` and `encoder.layer.`.
        heads: attention heads, the setting `text_heads`; None for heads of 64 channels, as all published sizes have.
        kind: class of the config; None for `BertConfig`.
        fixed: further fields.

    Raises:
        CheckpointError: if a tensor from which a size is read is missing, or the width is no multiple of the heads.
    """
    from transformers import BertConfig

    width = state.size(f"{prefix}embeddings.word_embeddings.weight", 1)
    return (kind or BertConfig)(
        vocab_size=state.size(f"{prefix}embeddings.word_embeddings.weight"), hidden_size=width,
        num_hidden_layers=state.count(f"{prefix}encoder.layer."),
        num_attention_heads=head_count(width, heads, "text_heads"),
        intermediate_size=state.size(f"{prefix}encoder.layer.0.intermediate.dense.weight"),
        max_position_embeddings=state.size(f"{prefix}embeddings.position_embeddings.weight"),
        type_vocab_size=state.size(f"{prefix}embeddings.token_type_embeddings.weight"), **fixed,
    )  # fmt: skip


# Of RoBERTa-base, where it is not what `RobertaConfig` has by default.
ROBERTA_BASE: dict[str, Any] = {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip


def choose(what: str, value: str, valid: Mapping[str, T]) -> T:
    """A setting's entry in a table; ValueError with the valid ones if it has none."""
    if value not in valid:
        raise ValueError(unknown(what, value, valid))
    return valid[value]
