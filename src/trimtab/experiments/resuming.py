"""Checkpoints from which an interrupted training goes on as if nothing had happened.

    checkpoint-8/   what transformers writes: weights, optimizer, schedule, generators, state
                    whole.json, written last: its files with their sizes, to which training it belongs, the running loss

A kill while a checkpoint is written leaves a folder without `whole.json`, which is never taken; the checkpoint before
it is deleted only when the newer one is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather

from trimtab.data import draws
from trimtab.data.images import encoded
from trimtab.experiments.plateau import Judge
from trimtab.experiments.schema import TrainingSpec
from trimtab.files import replace_file

log = logging.getLogger(__name__)

WHOLE = "whole.json"
# Settings that change nothing of what is trained.
FREE = ("workers", "save_every", "evaluation_batch")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def training_key(model: nn.Module, spec: TrainingSpec, seed: int, steps: int, rows: int, table: str,
                 made_of: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """To which training a checkpoint belongs, as plain JSON.

    Args:
        model: what is trained.
        spec: how.
        seed: of order and draws.
        steps: in all.
        rows: of the table.
        table: its print (`cached.table_print`).
        made_of: what the model was made of beside its parameters' shapes: base, methods, task.
    """
    shapes = [(n, list(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    return {
        **{k: v for k, v in json.loads(json.dumps(asdict(spec))).items() if k not in FREE}, "steps": steps,
        "seed": seed, "rows": rows, "table": table, "draws": draws.VERSION,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "parameters": _print(shapes), **{k: _print(v) for k, v in (made_of or {}).items()},
    }  # fmt: skip


def _print(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def mark_whole(folder: Path, key: dict[str, Any], running: dict[str, float]) -> None:
    """Say of a checkpoint that it is whole, when all that it holds has reached the disk."""
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != WHOLE):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    with replace_file(folder / WHOLE) as partial:
        partial.write_text(json.dumps({"training": key, "running": running, "files": sizes}, indent=1) + "\n")


def content(folder: Path) -> dict[str, Any] | None:
    """What `whole.json` says of a checkpoint; None unless all its files are there in their sizes."""
    try:
        found = json.loads((folder / WHOLE).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in found["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return found if whole else None


def last_whole(folder: Path, key: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of this training; a warning for each that is not taken, and why."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in Path(folder).glob("checkpoint-*")
                if p.is_dir() and p.name.rpartition("-")[2].isdecimal()]  # fmt: skip
    for _, checkpoint in sorted(numbered, reverse=True):
        found = content(checkpoint)
        if found is None:
            log.warning("%s: not whole (it was being written when the run was interrupted): left aside", checkpoint)
            continue
        other = [k for k in {**found["training"], **key} if found["training"].get(k) != key.get(k)]
        if not other:
            return checkpoint
        was, now = (str(k.get(other[0]))[:40] for k in (found["training"], key))
        log.warning("%s: of another training (%s was %s, is %s): left aside, training starts anew", checkpoint,
                    other[0], was, now)  # fmt: skip
    return None


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; one that is deleted in part is not whole."""
    (checkpoint / WHOLE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


class Resumable(_Base):
    """Part of a `Trainer` whose checkpoints are whole or not taken, and with which the curve of the loss goes on too.

    Attributes:
        key: to which training its checkpoints belong.
    """

    spec: TrainingSpec
    judge: Judge | None
    key: dict[str, Any]
    made_of: Mapping[str, Any] | None
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int

    def last_checkpoint(self, table: Any) -> str | None:
        """The checkpoint from which this training goes on, None for none; its own will say that they are of it."""
        from trimtab.experiments.cached import table_print

        assert self.model is not None
        self.key = training_key(self.model, self.spec, self.args.seed, self.args.max_steps, len(table),
                                table_print(encoded(table)), self.made_of)  # fmt: skip
        self.key |= {} if self.judge is None else self.judge.key()
        found = last_whole(Path(str(self.args.output_dir)), self.key)
        if found is not None:
            self.add_callback(GoOn(self, found))
        return None if found is None else str(found)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which would train one step more if it goes on from a checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        loss = float(nested_gather(self._tr_loss, self.args.parallel_mode).mean())
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial=trial))
        newest = folder / f"checkpoint-{self.state.global_step}"
        mark_whole(newest, self.key, {"loss": loss, "logged": self._globalstep_last_logged})
        for old in folder.glob("checkpoint-*"):
            if old != newest:
                remove(old)


class GoOn(TrainerCallback):
    """Gives a resumed training the loss of the steps since the last point of its curve."""

    def __init__(self, trainer: Resumable, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        running = (content(self.checkpoint) or {})["running"]
        self.trainer._tr_loss += running["loss"]
        self.trainer._globalstep_last_logged = running["logged"]
