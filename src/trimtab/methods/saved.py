"""The folder of an adapted model: what `Adapted.save` writes and `trimtab.adapt(model, folder)` reads.

fit.json               to which base it belongs, and the methods in order: name, settings, what each found (a plan, say)
weights.safetensors    method.I.NAME    what method I found: masks as bits, say
                       learned.PATH     what is trained in the plain model, by its path
                       kept.PATH        what is frozen, but not to be had from the base: adapters that a search has
                                        trained, weights that were trained before they were frozen
                       task.PATH        what is trained around it: a task's head

The base itself is not in it. It is told by its class, towers, precision, configuration and a hash of every element of
its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.anatomy.parts import every_tap, from_plain, to_plain
from trimtab.files import replace_file
from trimtab.storage.learned import fingerprint, precision
from trimtab.storage.shards import open_safetensors

FORMAT = 1
CONFIG, WEIGHTS = "fit.json", "weights.safetensors"
KINDS = ("learned", "kept", "task")


class FitError(ValueError):
    """A folder of an adapted model that cannot be used; the message names the file and what differs."""


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        base: to which model it belongs, see `identity`.
        methods: in order: `name`, `lever`, `settings`, `state`.
        tensors: one dictionary a method.
        learned: what was learned, by names that begin with `learned.`, `kept.` or `task.` (see `Learned`).
        name: of what was learned.
    """

    base: dict[str, Any]
    methods: list[dict[str, Any]]
    tensors: list[dict[str, Tensor]]
    learned: dict[str, Tensor]
    name: str = "default"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "base": self.base, "methods": self.methods, "name": self.name,
            "learned": {kind: sum(k.startswith(f"{kind}.") for k in self.learned) for kind in KINDS},
        }  # fmt: skip

    def all_tensors(self) -> dict[str, Tensor]:
        """As the file of weights has them."""
        found = {f"method.{i}.{k}": v for i, own in enumerate(self.tensors) for k, v in own.items()}
        return {k: v.detach().cpu().contiguous() for k, v in (found | self.learned).items()}

    def write(self, folder: Path) -> None:
        """Write both files into a folder that is there, each whole or not at all."""
        with replace_file(folder / WEIGHTS) as partial:
            save_file(self.all_tensors(), partial)
        with replace_file(folder / CONFIG) as partial:
            partial.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """The content of a folder.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            FitError: if a file is of another version, damaged, or the two do not belong together.
        """
        config = read_config(folder)
        open_safetensors(folder / WEIGHTS)  # names a file that is missing or not whole
        tensors: list[dict[str, Tensor]] = [{} for _ in config["methods"]]
        learned: dict[str, Tensor] = {}
        for key, value in load_file(folder / WEIGHTS).items():
            kind, _, name = key.partition(".")
            if kind == "method":
                number, _, name = name.partition(".")
                if not number.isdigit() or int(number) >= len(tensors):
                    raise FitError(f"{folder / WEIGHTS}: '{key}' belongs to none of the {len(tensors)} methods of "
                                   f"{CONFIG}: copy the folder again")  # fmt: skip
                tensors[int(number)][name] = value
            elif kind in KINDS:
                learned[key] = value
            else:
                raise FitError(f"{folder / WEIGHTS}: expected tensors of {', '.join(KINDS)} or method, found '{key}'")
        found = cls(config["base"], config["methods"], tensors, learned, config["name"])
        if found.to_json()["learned"] != config["learned"]:
            raise FitError(f"{folder / WEIGHTS}: {CONFIG} tells of {config['learned']} tensors, found "
                           f"{found.to_json()['learned']}: the two files do not belong together")  # fmt: skip
        return found


def read_config(folder: Path) -> dict[str, Any]:
    """`fit.json` of a folder; errors as `Saved.read`."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected {CONFIG} and {WEIGHTS}, as `fit.save` writes them; no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FitError(f"{file}: no JSON ({error}): the file is not whole; copy the folder again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise FitError(f"{file}: format {found!r}, this version of trimtab reads {FORMAT}")
    if missing := [k for k in ("base", "methods", "learned", "name") if k not in config]:
        raise FitError(f"{file}: lacks {missing[0]!r}: the file was changed; copy the folder again")
    kinds = {"name": str, "lever": str, "settings": dict, "state": dict}
    for i, method in enumerate(config["methods"] if isinstance(config["methods"], list) else [None]):
        for key, kind in kinds.items():
            if not isinstance(method, dict) or not isinstance(method.get(key), kind):
                raise FitError(
                    f"{file}: methods: number {i} lacks {key!r}: the file was changed; copy the folder again"
                )
    if missing := [k for k in ("model", "precision", "fingerprint", "towers") if k not in config["base"]]:
        raise FitError(f"{file}: base lacks {missing[0]!r}: the file was changed; copy the folder again")
    return config


# --- to which base a folder belongs -----------------------------------------------------------------------------------


def identity(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """What tells a plain model from others, before any method changes it."""
    found = {
        "model": type(model).__name__, "precision": precision(model), "fingerprint": fingerprint(model),
        "towers": {t.name: _tower(t) for t in anatomy.towers}, "configuration": configuration(model),
    }  # fmt: skip
    return found | ({"seen": to_plain(anatomy)} if anatomy.seen else {})


def configuration(model: nn.Module) -> dict[str, Any]:
    """What a model's configuration says of what it computes, as plain JSON; empty without one."""
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    return _without(json.loads(json.dumps(said, sort_keys=True, default=str)))


def _without(value: Any) -> Any:
    """A configuration without names, versions and types of numbers, its parts' too: they change no output."""
    if not isinstance(value, dict):
        return value
    return {k: _without(v) for k, v in value.items() if k not in _NAMES and not k.startswith("_attn")}


_NAMES = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
          "_commit_hash", "output_attentions", "output_hidden_states", "return_dict"}  # fmt: skip


def seen_before(folder: Path, model: nn.Module) -> Anatomy | None:
    """The anatomy that a folder keeps of a model that nobody described; None if it keeps none.

    Raises:
        FileNotFoundError, FitError: if the folder is none, or its anatomy cannot be read.
        AnatomyError: if it does not fit the model.
    """
    kept = read_config(folder)["base"].get("seen")
    if kept is None:
        return None
    try:
        found = from_plain(Anatomy, kept)
    except TypeError as error:
        raise FitError(f"{folder / CONFIG}: base.seen is no anatomy ({error}): copy the folder again") from error
    found.check(model)
    return found


def _tower(tower: Tower) -> dict[str, Any]:
    return {
        "layout": tower.layout, "causal": tower.causal, "blocks": [b.path for b in tower.blocks],
        "widths": [b.width for b in tower.blocks],
        "taps": [f"{what}: {t.path} {t.side} {t.key}" for t, what in every_tap(replace(tower, blocks=()))],
    }  # fmt: skip


def check_base(theirs: Mapping[str, Any], own: Mapping[str, Any], where: Path) -> None:
    """Raise a FitError with the difference unless a folder belongs to the model at hand."""
    start = f"{where}: was made for another base"
    if theirs["model"] != own["model"]:
        raise FitError(f"{start}: a {theirs['model']}, this is a {own['model']}")
    if theirs["towers"].keys() != own["towers"].keys():
        raise FitError(f"{start}: towers {', '.join(theirs['towers'])}, here {', '.join(own['towers'])}")
    for name, tower in theirs["towers"].items():
        for what, value in tower.items():
            if value != own["towers"][name][what]:
                here = short(own["towers"][name][what])
                raise FitError(f"{start}: {what} of tower {name!r} {short(value)}, here {here}")
    if theirs["precision"].keys() == own["precision"].keys() and theirs["precision"] != own["precision"]:
        numbers, here = (sum(p["precision"].values()) for p in (theirs, own))
        if numbers != here:
            raise FitError(
                f"{start}: {numbers:,} parameters, this one has {here:,} (another vocabulary or head, or a module more "
                "or less): load the checkpoint on which it was made"
            )
    if theirs["precision"] != own["precision"]:
        raise FitError(
            f"{start}: the same architecture in another precision: {_types(theirs['precision'])}, here "
            f"{_types(own['precision'])}; load the base in that precision (`dtype=`), adapt it, then cast the model"
        )
    if theirs["fingerprint"] != own["fingerprint"]:
        raise FitError(
            f"{start}: the same architecture and precision with other weights (fingerprint {theirs['fingerprint']}, "
            f"here {own['fingerprint']}): load the checkpoint on which it was made"
        )
    _check_configuration(theirs.get("configuration", {}), own["configuration"], start)


def _check_configuration(theirs: Any, own: Any, start: str, path: str = "") -> None:
    """Raise a FitError unless two configurations agree in what decides outputs. What only one of them has is not
    compared: versions of transformers add and drop settings."""
    if isinstance(theirs, dict) and isinstance(own, dict):
        for name in sorted(theirs.keys() & own.keys() - _NO_OUTPUTS):
            if "drop" not in name:
                _check_configuration(theirs[name], own[name], start, f"{path}.{name}".lstrip("."))
    elif theirs != own:
        raise FitError(
            f"{start}: the same weights with another configuration: {path} {short(theirs)}, here {short(own)}: load "
            "the checkpoint on which it was made, with that setting"
        )


# Names of classes, how weights begin, how a loss is made, and how much is computed at once: no output depends on them.
_NO_OUTPUTS = {"id2label", "label2id", "problem_type", "initializer_range", "initializer_factor", "bos_token_id",
               "forced_eos_token_id", "task_specific_params", "chunk_size_feed_forward",
               "gradient_checkpointing"}  # fmt: skip


def _types(precision: Mapping[str, int]) -> str:
    total = max(1, sum(precision.values()))
    return ", ".join(f"{100 * n / total:.0f} % {name}" for name, n in precision.items())


def short(value: Any) -> str:
    """A value for a message: of a long list its length and its ends."""
    return f"{len(value)}: {value[0]} .. {value[-1]}" if isinstance(value, list) and len(value) > 3 else str(value)
