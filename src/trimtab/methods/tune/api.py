"""Tuning in one call, for a model and a loop of one's own: attach, train, save, share, switch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.files import replace_folder
from trimtab.methods.base import METHODS, Method
from trimtab.registry import unknown
from trimtab.storage.learned import copy_learned, fingerprint, learned_part
from trimtab.storage.shards import open_safetensors

FORMAT = 1
CONFIG, WEIGHTS = "tune.json", "learned.safetensors"


def tune(
    model: nn.Module,
    method: str = "unipt",
    anatomy: Anatomy | None = None,
    heads: bool | tuple[str, ...] = False,
    name: str = "default",
    **settings: Any,
) -> Tuned:
    """Freeze a model, attach a tuning method to it in place, and return the handle to what is trained.

    The model is called as before. What is frozen stays in evaluation mode, whatever `model.train()` is told.

    Args:
        model: any module with an anatomy, a transformers model say; single, half precision or quantised.
        method: name of a tuning method: `unipt`, `lora`, `lst` and so on (`trimtab list methods`).
        anatomy: the model's description; None: the registered one of its class, or one discovered.
        heads: train the anatomy's heads too, or those modules and parameters (dotted paths).
        name: of what is trained, for switching.
        settings: of the method, as in a recipe.

    Raises:
        ValueError: if a name or setting is unknown, the method does not apply, or the model is tuned already.
        AnatomyError: if no anatomy is given and none can be found.
    """
    if "train" in vars(model):
        raise ValueError(f"this {type(model).__name__} is tuned already: use its handle, or load the model again")
    anatomy = anatomy or Anatomy.of(model)
    made = _method(method, settings)
    belongs = _belongs(model, anatomy)
    model.requires_grad_(False)
    made.attach(model, anatomy)
    paths = _heads(model, anatomy) if heads is True else tuple(heads or ())
    for path in paths:
        _part(model, path).requires_grad_(True)
    model.train = MethodType(_train, model)  # type: ignore[method-assign]
    return Tuned(model, made, belongs, paths, name)


def _method(name: str, settings: dict[str, Any]) -> Method:
    names = sorted(n for n, m in METHODS.items() if m.lever == "tune")
    if name not in names:
        raise ValueError(unknown("tuning method", name, names))
    fields = list(METHODS[name].Settings.__dataclass_fields__)
    for key in settings:
        if key not in fields:
            raise ValueError(f"{name}: {unknown('setting', key, fields)}")
    return METHODS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def _heads(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Those of an anatomy's heads that this model has: some classes leave out what others of the family end in."""
    names = {n for n, _ in (*model.named_modules(), *model.named_parameters())}
    return tuple(p for p in anatomy.heads if p in names)


def _part(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The module or parameter of that path."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if path not in modules and path not in parameters:
        raise ValueError(unknown("head", path, [*modules, *parameters]).split("valid:")[0].strip())
    return modules.get(path) or parameters[path]


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """`Module.train`, with frozen parts left in evaluation mode (dropout, statistics)."""
    type(model).train(model, mode)
    for module in model.modules() if mode else ():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return model


class Tuned:
    """What was trained on a model: its tensors can be saved without the model, and several held and switched.

    Attributes:
        model: with the method attached.
        method: with its settings.
        heads: paths that are trained beside it.
        active: name of what the model computes with.
    """

    def __init__(self, model: nn.Module, method: Method, belongs: dict[str, Any], heads: tuple[str, ...], name: str):
        self.model, self.method, self.heads, self.active = model, method, heads, name
        self._belongs = belongs
        self._held: dict[str, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All that are held, the active one included."""
        return sorted({self.active, *self._held})

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, for an optimiser."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Copies of what was learned under a name, by dotted path; None for the active one."""
        name = self.active if name is None else name
        if name == self.active:
            return {k: v.clone() for k, v in learned_part(self.model).items()}
        if name not in self._held:
            raise ValueError(unknown("name of tuned weights", name, self.names))
        return self._held[name]

    def add(self, name: str) -> None:
        """Hold a copy of the active weights under another name, and go on with that one."""
        if name in self.names:
            raise ValueError(f"{name!r} is held already: {', '.join(self.names)}")
        self._held[self.active] = self.tensors()
        self.active = name

    def switch(self, name: str) -> None:
        """Let the model compute with what is held under a name. An optimiser's moments stay: make a new one."""
        if name == self.active:
            return
        new = self.tensors(name)
        self._held[self.active] = self.tensors()
        copy_learned(self.model, new, name)
        del self._held[name]
        self.active = name

    def save_pretrained(self, folder: str | Path, name: str | None = None) -> Path:
        """Write only what was trained, `learned.safetensors`, and `tune.json`, which says to what it belongs.

        Raises:
            FileExistsError: if the folder is there.
            ValueError: if nothing is held under the name.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder}: is there already; name a new folder")
        tensors = self.tensors(name)
        with replace_folder(folder) as partial:
            save_file(tensors, partial / WEIGHTS)
            (partial / CONFIG).write_text(json.dumps(self._config(), indent=1) + "\n")
        return folder

    def _config(self) -> dict[str, Any]:
        return {"format": FORMAT, "method": self.method.describe(), "heads": list(self.heads), **self._belongs}

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | Path, anatomy: Anatomy | None = None, name: str = "default"
    ) -> Tuned:
        """Attach what `save_pretrained` wrote to the model on which it was trained, as it was before.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            ValueError: if the weights are damaged, or belong to another backbone or anatomy; the message says what
                differs.
        """
        folder = Path(folder)
        config = _read(folder)
        anatomy = anatomy or Anatomy.of(model)
        _check(config, _belongs(model, anatomy), folder)
        settings = {k: v for k, v in config["method"].items() if k != "name"}
        tuned = tune(model, config["method"]["name"], anatomy, tuple(config["heads"]), name, **settings)
        copy_learned(model, _tensors(folder), str(folder / WEIGHTS))
        return tuned

    def load(self, folder: str | Path, name: str) -> None:
        """Hold what another `save_pretrained` wrote beside the active weights; `switch` makes it active.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`, or if it was made with another method or settings:
                those need a model of their own.
        """
        folder = Path(folder)
        config = _read(folder)
        _check(config, self._belongs, folder)
        own = json.loads(json.dumps(self._config()))
        for key in ("method", "heads"):
            if config[key] != own[key]:
                raise ValueError(f"{folder / CONFIG}: {key} {config[key]}, the model is tuned with {own[key]}: "
                                 "attach it to another copy of the model")  # fmt: skip
        if name in self.names:
            raise ValueError(f"{name!r} is held already: {', '.join(self.names)}")
        found = _tensors(folder)
        expected = {k: v.shape for k, v in learned_part(self.model).items()}
        if expected != {k: v.shape for k, v in found.items()}:
            raise ValueError(f"{folder / WEIGHTS}: its tensors are not those that are trained here")
        self._held[name] = found


# --- to what learned weights belong -----------------------------------------------------------------------------------


def _belongs(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """The model as it is before a method changes it: class, a fingerprint of its weights, towers."""
    towers = {t.name: _tower(t) for t in anatomy.towers}
    return {"model": type(model).__name__, "fingerprint": fingerprint(model), "anatomy": towers}


def _tower(tower: Tower) -> dict[str, Any]:
    paths = (tower.output, tower.mask, tower.pooled)
    return {
        "layout": tower.layout, "blocks": [b.path for b in tower.blocks], "widths": [b.width for b in tower.blocks],
        "taps": [None if t is None else f"{t.path} {t.side} {t.key}" for t in paths], "causal": tower.causal,
    }  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    config = json.loads(file.read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{file}: format {config.get('format')}, this version reads {FORMAT}")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    open_safetensors(folder / WEIGHTS)  # names a file that is missing or not whole
    return load_file(folder / WEIGHTS)


def _check(config: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """ValueError with the difference unless learned weights belong to the model here."""
    where = f"{folder / CONFIG}: was trained on another backbone"
    if config["model"] != here["model"]:
        raise ValueError(f"{where}: a {config['model']}, this is a {here['model']}")
    theirs, own = config["anatomy"], here["anatomy"]
    if theirs.keys() != own.keys():
        raise ValueError(f"{where}: towers {', '.join(theirs)}, here {', '.join(own)}")
    for name in theirs:
        for what, value in theirs[name].items():
            if value != own[name][what]:
                raise ValueError(f"{where}: {what} of tower {name!r} {_short(value)}, here {_short(own[name][what])}")
    if config["fingerprint"] != here["fingerprint"]:
        raise ValueError(
            f"{where}: the same architecture with other weights (fingerprint {config['fingerprint']}, here "
            f"{here['fingerprint']})"
        )


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value)}: {value[0]} .. {value[-1]}"
    return str(value)
