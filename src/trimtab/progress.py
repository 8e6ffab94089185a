"""How far a long piece of work is: a bar at a terminal, a plain line every 30 seconds without one.

    with progress("calibration", total=100, unit="batch") as job:
        for batch in batches:
            ...
            job.add()

Training, searches, calibration, evaluation and caches all tell their progress through here. `listening` hands the same
to a function, which a run writes to its log. Work inside other work shows no bar of its own. Only one of several
processes (RANK 0) tells anything.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 30.0
"""Seconds between two lines, and between two entries of a log, of everything that works."""

_told = 0.0  # when the last line was printed or handed on, or the first work began
_open: list[Job] = []  # what is at work, the outermost first
_listeners: list[Callable[[dict[str, Any]], None]] = []


class Job:
    """One piece of work.

    Args:
        title: what is done.
        total: how many units it takes; None if that is not known.
        unit: of what is counted.
        done: how many were done before, by a run that goes on.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "step", done: int = 0):
        self.title, self.total, self.unit, self.done, self.before = title, total, unit, done, done
        self.fields: dict[str, float] = {}
        self.bar: Any = None
        self.quiet = int(os.environ.get("RANK", "0")) > 0

    def start(self) -> None:
        global _told
        self.started = time.monotonic()
        if not _open:
            _told = _told or self.started
        _open.append(self)
        if not self.quiet and len(_open) == 1 and sys.stdout and sys.stdout.isatty():
            self._show()

    def _show(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[more]}"), transient=True)
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, more="")

    def add(self, count: int = 1) -> None:
        """So many more units are done."""
        self.update(self.done + count)

    def update(self, done: int | None = None, **fields: float) -> None:
        """So many units are done in all; `fields` are numbers to show beside (loss, rate)."""
        global _told
        self.done = self.done if done is None else done
        self.fields |= fields
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total, more=numbers(self.fields))
        now = time.monotonic()
        if not self.quiet and now - _told >= EVERY:
            _told = now
            if not any(job.bar for job in _open):
                print(self.line(), file=sys.stderr, flush=True)
            tell({"event": "progress", **self.state()})

    def state(self) -> dict[str, Any]:
        """What is known, as plain JSON."""
        left = self.left()
        more = {} if left is None else {"seconds_left": round(left, 1)}
        return {"title": self.title, "unit": self.unit, "done": self.done, "total": self.total, **self.fields, **more}

    def left(self) -> float | None:
        """Seconds until it is done at the pace so far; None if that is not known."""
        new = self.done - self.before
        if self.total is None or new <= 0:
            return None
        return (time.monotonic() - self.started) / new * max(0, self.total - self.done)

    def line(self) -> str:
        """One line for a log file."""
        parts = [f"{self.unit} {self.done}" + ("" if self.total is None else f" of {self.total}")]
        parts += [numbers(self.fields)] if self.fields else []
        if self.done > self.before:
            parts.append(f"{(time.monotonic() - self.started) / (self.done - self.before):.3g} s a {self.unit}")
        if (left := self.left()) is not None:
            parts.append(f"{span(left)} left")
        return f"{self.title}: {', '.join(parts)}"

    def stop(self) -> None:
        if self in _open:
            _open.remove(self)
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def progress(title: str, total: int | None = None, unit: str = "step", done: int = 0) -> Iterator[Job]:
    """A piece of work while it is done; see `Job`."""
    job = Job(title, total, unit, done)
    job.start()
    try:
        yield job
    finally:
        job.stop()


def tell(entry: dict[str, Any]) -> None:
    """Hand an entry to whoever listens."""
    for listener in list(_listeners):
        listener(entry)


@contextmanager
def listening(listener: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let a function have what is told meanwhile, one dict an entry."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def span(seconds: float) -> str:
    """A span of time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def numbers(fields: dict[str, float]) -> str:
    """Named numbers in a line. Rates are small: two digits and a power of ten; others have four digits."""
    return ", ".join(f"{k} {v:.1e}" if k == "rate" else f"{k} {v:.4g}" for k, v in fields.items())
