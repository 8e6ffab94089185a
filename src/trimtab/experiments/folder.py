"""The folder that a run leaves behind: plain files, and the way back from it to a model.

recipe.yaml           resolved: nothing in it depends on anything outside
run.json              name, variant, seed, git state, versions, time; written last: a folder without it is not a run
metrics.json          test metrics and their interval, training curve, steps, scores while it trained (docs/runs.md)
rows.json             what each test row gives to the primary metric
costs.json            see `estimate.py`
policy.json           what the recipe's policy came to, if it has one
fit.json              the methods and what each found (a plan, say), and to which backbone they belong
weights.safetensors   masks and the learned part; these two files are what `Adapted.save` writes
samples/              predictions on a few test rows, with pictures
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from trimtab.data.images import encoded, shown
from trimtab.experiments.assembly import Assembly, assemble
from trimtab.experiments.recipe import expand
from trimtab.experiments.schema import Recipe
from trimtab.files import replace_file
from trimtab.methods.adapted import restore
from trimtab.tasks import Task, TaskModel

FORMAT = 1


class RunError(ValueError):
    """A run folder that cannot be used; the message names the file, what was expected and what was found."""


class BusyError(RunError):
    """A run, or a search, that another process is carrying out at the moment."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from carrying out the same run. A claim ends with the process that has it,
    and leaves nothing. Where the file system has no locks there is a warning and no claim.

    Raises:
        BusyError: if another process has claimed it.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.claim"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{folder}: another process is working on it: wait for that one, or end it") from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{folder}: cannot be locked ({error}): do not start another process for it", stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def is_finished(folder: Path, recipe: Recipe | None = None) -> bool:
    """Whether a folder holds a whole run (of that recipe, if one is given)."""
    try:
        done = json.loads((folder / "run.json").read_text())["status"] == "finished"
        return done and (recipe is None or load_recipe(folder).to_dict() == recipe.to_dict())
    except (OSError, ValueError, KeyError):
        return False


def newer(folder: Path, recipe: Recipe) -> Path | None:
    """A file of its data or weights that was written after a run was finished: the run may not tell of it. What is in
    files is not compared; of a folder those directly in it are looked at."""
    finished = (folder / "run.json").stat().st_mtime
    data = [v for key, v in recipe.data.items() if key != "name"]  # a folder may happen to be called like a source
    named = [Path(v) for v in (*data, recipe.backbone.name) if isinstance(v, (str, Path)) and str(v)]
    for path in (p for p in named if p.exists()):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and file.stat().st_mtime > finished:
                return file
    return None


def load_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    import yaml

    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    name, variant = raw.pop("name"), raw.pop("variant")
    return expand({**raw, "variants": {variant: {}}}, name, where=str(folder / "recipe.yaml"))[0]


def load(folder: str | Path) -> TaskModel:
    """The trained model of a run, ready to answer: see `TaskModel.predict` and `training.evaluate`.

    It is `adapt` on the recipe's backbone; the handle is `load_assembly(folder).fit`.

    Raises:
        RunError: if the folder is no finished run, its weights are truncated, or they do not fit the backbone.
    """
    return load_assembly(folder).model.eval()


def load_assembly(folder: str | Path) -> Assembly:
    """The parts of a run, with its methods attached and what it learned; errors as `load`."""
    folder = Path(folder)
    if not is_finished(folder):
        raise RunError(f"{folder}: not a finished run (no run.json that says so); run its recipe again")
    info = json.loads((folder / "run.json").read_text())
    if info["format"] != FORMAT:
        raise RunError(f"{folder / 'run.json'}: format {info['format']}, this version reads {FORMAT}")
    parts = assemble(load_recipe(folder))
    parts.freeze()
    if not parts.trains:
        parts.model.requires_grad_(False)
    try:
        restore(parts.fit, folder)
    except (ValueError, FileNotFoundError) as error:
        raise RunError(str(error)) from error
    parts.methods = parts.fit.methods
    return parts


def export(folder: str | Path, out: str | Path, dtype: str = "float32", sparse: bool = False) -> Path:
    """Write the backbone of a run as a transformers folder, which `trimtab.load` reads too.

    What methods added is folded into the weights: LoRA's updates are merged, and of a pruned model every zero stays.

    Args:
        folder: the run.
        out: a folder that is not there yet.
        dtype: `float32`, `float16` or `bfloat16`.
        sparse: in trimtab's sparse layout (docs/sparse.md) instead of transformers' own.

    Raises:
        RunError: if the run cannot be loaded, a method of it does not fold, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise RunError(f"{out}: is there already; name a new folder")
    parts = load_assembly(folder)
    backbone = parts.model.backbone
    try:
        backbone.model = parts.fit.folded()
    except ValueError as error:
        raise RunError(f"{folder}: {error}") from error
    parts.task.fold(backbone, parts.model.head)
    backbone.save_pretrained(out, getattr(torch, dtype), sparse=sparse)
    return out


# --- writing ----------------------------------------------------------------------------------------------------------


def write_gallery(task: Task, records: list[dict[str, Any]], table: Any, folder: Path, count: int = 8) -> None:
    rows = encoded(table)
    indices = list(range(min(count, len(records))))
    entries = task.gallery(records, rows, indices)
    if not entries or len(records) != len(rows):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, entry in zip(indices, entries, strict=True):
        if (picture := shown(rows[i])) is not None:
            entry["image"] = f"{i}.png"
            picture.save(folder / entry["image"])
    write_json(folder / "samples.json", entries)


def write(path: Path, text: str) -> None:
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def data_label(data: dict[str, Any]) -> str:
    return ":".join(str(data[k]) for k in ("name", "style", "split") if k in data)


def git_state() -> dict[str, Any]:
    """Commit and whether the tree is changed, of the repository that holds this package, if it is in one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str]:
    names = ("trimtab", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")
    out = {"python": sys.version.split()[0], "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
