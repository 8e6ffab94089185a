"""A run seen from outside: its log, which grows while it runs, and the services that get its numbers.

    RUN/log.jsonl    {"time": ..., "event": "start"}, then "train" at each logged step, "validation" at each
                     evaluation in between, "progress" every 30 seconds of whatever is at work, "evaluated", and
                     "finished" or "failed" with the reason

Each entry is a whole line that is handed to the system at once: a run that is killed leaves what it has written, and
one that is taken up again appends. `trimtab report --watch` and `tail -f` show it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trimtab import progress
from trimtab.experiments.plateau import PREFIX
from trimtab.report.watch import LOG

# Of each service the packages one of which it needs; the first is what is to be installed.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",),
            "trackio": ("trackio",)}  # fmt: skip


def check_services(names: Sequence[str]) -> None:
    """Raise an ImportError that names the first service whose package is not installed, and how to get it."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise ImportError(
                f"training.report_to: {name!r} needs the package {PACKAGES[name][0]!r}, which is not installed: "
                f"pip install {PACKAGES[name][0]}, or leave it out"
            )


@contextmanager
def tensorboard_in(folder: Path | None) -> Iterator[None]:
    """Let TensorBoard's files go to a folder, if nobody has said where they are to go; else they would stand beside the
    checkpoints, and go with them."""
    name = "TENSORBOARD_LOGGING_DIR"
    if folder is None or name in os.environ:
        yield
        return
    os.environ[name] = str(folder / "tensorboard")
    try:
        yield
    finally:
        del os.environ[name]


class RunLog:
    """The log of a run, as `progress.listening` fills it; it begins with the first entry.

    Args:
        folder: the run's folder, made if need be.
        fresh: begin anew: what is there is of a run that was finished.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        self.path, self.fresh = folder / LOG, fresh
        self.file: Any = None

    def __call__(self, entry: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        resumed = {}
        if self.file is None:
            resumed = {"resumed": self._open()}
        self.file.write(json.dumps({"time": now, **_plain(entry), **resumed}) + "\n")
        self.file.flush()

    def _open(self) -> bool:
        """Open the file; whether it holds entries of a run that was ended."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.fresh:
            self.path.unlink(missing_ok=True)
        before = self.path.read_bytes() if self.path.is_file() else b""
        self.file = self.path.open("a", encoding="utf-8")
        if before and not before.endswith(b"\n"):  # the writing of a line was ended
            self.file.write("\n")
        return bool(before)


def _plain(value: Any) -> Any:
    """As JSON that every reader takes: what is no finite number is written as a word."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def logged(folder: Path, fresh: bool = False) -> Iterator[None]:
    """Keep a run's log while it runs, from what it tells first; only one of several processes does. A run that ends
    before it has told anything has none."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    log = RunLog(folder, fresh)
    try:
        with progress.listening(log):
            yield
        if log.file is not None:
            log({"event": "finished"})
    except BaseException as error:
        if log.file is not None:
            log({"event": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if log.file is not None:
            log.file.close()


class Told(TrainerCallback):
    """Training as progress, with the loss and the learning rate that were logged last."""

    def __init__(self, title: str):
        self.title = title
        self.job: progress.Job | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job = progress.Job(self.title, state.max_steps, done=state.global_step)
        self.job.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.job is not None:
            self.job.total = state.max_steps  # fewer than at first when a plateau ends the training
            self.job.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and self.job is not None:
            self.job.update(loss=float(logs["loss"]), rate=float(logs.get("learning_rate", 0.0)))
            numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float))}
            progress.tell({"event": "train", "title": self.title, "step": state.global_step, **numbers})
        elif found := {k.removeprefix(PREFIX): v for k, v in (logs or {}).items() if k.startswith(PREFIX)}:
            progress.tell({"event": "validation", "title": self.title, "step": state.global_step, "metrics": found})

    def close(self) -> None:
        """When training is over, also by an error."""
        if self.job is not None:
            self.job.stop()
