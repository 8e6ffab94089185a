"""Files of tensors that somebody else wrote: read whole or refused, and nothing in them is run.

Torch archives are pickles, and a pickle can call any function. `torch.load(weights_only=True)` calls none but those of
an allow-list; ours adds the few plain types that published files hold beside their tensors. Bookkeeping classes of
training libraries are read as an inert stand-in, so that neither the library nor its code is needed.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.storage.shards import open_safetensors

# Where files keep their tensors, in the order in which their authors' code looks: Lightning, then everybody else.
_ENTRIES = ("state_dict", "model")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what was found."""


class Inert:
    """Stands for a class of a training library."""


def _allowed() -> list[Any]:
    lightning = "pytorch_lightning."
    return [
        argparse.Namespace,  # MDETR's `args`, VSE-infinity's `opt`
        # NumPy numbers (a best score); older files name the module without the underscore.
        np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        np.dtype, type(np.dtype("float64")), type(np.dtype("float32")), type(np.dtype("int64")),
        (dict, lightning + "utilities.parsing.AttributeDict"),  # it is one, with attributes besides
        (Inert, lightning + "callbacks.model_checkpoint.ModelCheckpoint"),
        (Inert, lightning + "callbacks.lr_monitor.LearningRateMonitor"),
    ]  # fmt: skip


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file by name, and what lies beside them.

    The tensors are those under `state_dict` or `model`, or the file's own top level. A list of dictionaries
    (VSE-infinity's image and text parts) is joined under the prefixes `0.` and `1.`. The prefix `module.` of
    `DataParallel` is taken off. Tensors lie in the mapped file, read when they are looked at.

    Args:
        path: a torch archive of any name (.ckpt, .pth, .th, .bin), or safetensors, which is told by its content.

    Returns:
        Name -> tensor, and the other top-level entries.

    Raises:
        FileNotFoundError: if the file is not there.
        CheckpointError: if it is not whole, would run code or holds objects that are not on the allow-list (the first
            is named), or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # eight bytes of length, then JSON
        opened = open_safetensors(path)
        content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    else:
        content = _load(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found a {type(content).__name__}")
    entry = next((e for e in _ENTRIES if isinstance(content.get(e), (dict, list))), None)
    found = content[entry] if entry else content
    extras = {k: v for k, v in content.items() if k != entry} if entry else {}
    state: dict[str, Tensor] = {}
    parts = enumerate(found) if isinstance(found, list) else [(None, found)]
    for number, part in parts:
        tensors = {str(k): v for k, v in part.items() if isinstance(v, Tensor)} if isinstance(part, dict) else {}
        prefix = "" if number is None else f"{number}."
        state |= {prefix + k: v for k, v in unprefixed(tensors).items()}
        if entry is None and isinstance(part, dict):
            extras |= {str(k): v for k, v in part.items() if not isinstance(v, Tensor)}
    if not state:
        where = f"under '{entry}'" if entry else f"in its entries {', '.join(map(str, list(content)[:5]))}"
        raise CheckpointError(f"{path}: no tensors {where}")
    return state, extras


def unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix `module.` of `DataParallel`, if all have it."""
    wrapped = all(k.startswith("module.") for k in tensors)
    return {k.removeprefix("module."): v for k, v in tensors.items()} if wrapped else tensors


def _load(path: Path) -> Any:
    """What a torch archive holds, under the allow-list."""
    try:
        with torch.serialization.safe_globals(_allowed()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # older than torch 1.6: no archive
    except pickle.UnpicklingError as error:
        reason = str(error)
        if called := re.search(r"(?:GLOBAL|global|class) ([\w.]+)", reason):
            raise CheckpointError(
                f"{path}: refused: beside tensors it holds '{called[1]}', which is not on the list of harmless types; "
                "nothing in it was run. If you trust its source, save its tensors alone as safetensors"
            ) from error
        raise _damaged(path, reason) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    inner = reason.partition("WeightsUnpickler error:")[2] or reason  # torch wraps it in advice that is not ours
    first = (inner.strip().splitlines() or ["empty"])[0].strip()[:200]
    return CheckpointError(f"{path}: not a whole checkpoint file ({first}); download it again")
