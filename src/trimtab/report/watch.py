"""Runs that are under way: the newest lines of their logs, and the report's page again as runs are finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.progress import numbers, span

LOG = "log.jsonl"
PAUSE = 2.0  # seconds between two looks


class Watcher:
    """Logs and finished runs at or below some folders, which need not be there yet.

    Args:
        paths: run folders, or folders that hold them.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = [Path(path) for path in paths]
        self.read: dict[Path, int] = {}  # bytes of each log that were read
        self.first: dict[Path, bytes] = {}  # and its first line
        self.finished: dict[Path, int] = {}  # when each run was finished last

    def lines(self, last: int | None = None) -> Iterator[str]:
        """What has been logged since the last look, as lines for people; at most the `last` ones of each log."""
        for file in self._files(LOG):
            entries = self._new(file)
            for entry in entries if last is None else entries[-last:]:
                yield f"{self._name(file)}: {told(entry)}"

    def changed(self) -> bool:
        """Whether a run was finished since the last look."""
        now = {file: file.stat().st_mtime_ns for file in self._files("run.json")}
        before, self.finished = self.finished, now
        return now != before

    def _files(self, name: str) -> list[Path]:
        return sorted({file for path in self.paths if path.is_dir() for file in path.rglob(name)})

    def _name(self, file: Path) -> str:
        """The run's folder, as seen from the folder that was given."""
        root = next(path for path in self.paths if path in file.parents)
        return str(file.parent.relative_to(root)) if file.parent != root else root.name

    def _new(self, file: Path) -> list[dict[str, Any]]:
        """The whole lines that were added to a log; one that is being written is left for the next look. What is no
        entry (a line whose writing was ended by a kill) is passed over."""
        start, was = self.read.get(file, 0), self.first.get(file)
        with file.open("rb") as opened:
            first = opened.readline()
            # A run that was done again begins its log anew; its first line tells the time.
            if first.endswith(b"\n") and first != was:
                start, self.first[file] = 0, first
            opened.seek(start)
            new = opened.read()
        whole = new.rpartition(b"\n")[0]
        self.read[file] = start + (len(whole) + 1 if whole else 0)
        entries = []
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries


def told(entry: dict[str, Any]) -> str:
    """An entry of a log as a line: when, what, how far."""
    when = str(entry.get("time", ""))[11:19]
    event = entry.get("event", "?")
    if event == "train":
        fields = {"loss": entry.get("loss"), "rate": entry.get("learning_rate"), "waiting": entry.get("waiting")}
        shown = numbers({k: v for k, v in fields.items() if isinstance(v, (int, float))})
        return f"{when} {entry.get('title')}: step {entry.get('step')}, {shown}"
    if event == "progress":
        left = entry.get("seconds_left")
        of = "" if entry.get("total") is None else f" of {entry['total']}"
        return f"{when} {entry.get('title')}: {entry.get('unit')} {entry.get('done')}{of}" + (
            "" if left is None else f", {span(left)} left"
        )
    if event in ("evaluated", "validation"):
        metrics = {k: v for k, v in entry.get("metrics", {}).items() if isinstance(v, (int, float))}
        what = "evaluated" if event == "evaluated" else f"{entry.get('title')}: step {entry.get('step')}, validation"
        return f"{when} {what}: {numbers(metrics)}"
    if event == "failed":
        return f"{when} failed: {entry.get('error')}"
    return f"{when} {event}" + (" again, where it was" if entry.get("resumed") else "")


def watch(paths: Iterable[Path], draw: Callable[[], Any], out: Callable[[str], Any] | None = None,
          looks: int | None = None, pause: float = PAUSE) -> None:  # fmt: skip
    """Print new lines of logs and draw the page again whenever a run is finished, until it is interrupted.

    Args:
        paths: run folders, or folders that hold them; they need not be there yet.
        draw: draws the page.
        out: prints a line; None: to standard output, at once.
        looks: end after so many looks; None for never.
        pause: seconds between two looks.
    """
    watcher = Watcher(paths)
    out = out or partial(print, flush=True)
    count = 0
    while looks is None or count < looks:
        if count:
            time.sleep(pause)
        for line in watcher.lines(5 if not count else None):
            out(line)
        if watcher.changed():
            try:
                draw()
            except ValueError as error:  # a run is done again, say, and was the only one
                out(str(error))
        count += 1
