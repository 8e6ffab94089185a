"""The built-in world: pictures and clips composed from real art, with language that is true of them.

`load(kind, ...)` gives a `datasets.Dataset`, made once and then read from the cache folder. A kind is one schema; to
add one, write a function from the world and a number to rows and register it in `KINDS` (see `kinds.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.pictograms import concepts as _concepts
from trimtab.data.pictograms import hidden, kinds, language, motion, pairs, programs, scenes, variation
from trimtab.data.pictograms.kinds import KINDS, Kind
from trimtab.data.pictograms.language import answers
from trimtab.files import cache_dir, replace_folder
from trimtab.registry import unknown
from trimtab.settings import within

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["KINDS", "Kind", "answers", "hidden", "load", "motion", "pairs", "programs"]

CHUNK = 250  # numbers of a split that one process makes at a time


def load(
    kind: str,
    style: str = "twemoji",
    split: str = "train",
    rows: int = 1000,
    seed: int = 0,
    size: int = 64,
    per_scene: int = 1,
    count: int = 240,
    questions: Sequence[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """The first `rows` rows of a split, from the cache folder if they were made before.

    Args:
        kind: name in `KINDS`: `retrieval`, `vqa`, `grounding`, `groups`, `pairs`, `entailment`, `programs`, `video`.
        style: `twemoji`, `openmoji`, `twemoji-varied` or `illustrators-varied` (`concepts.ARTISTS`).
        split: `train`, `validation`, `test`, `unseen-concepts` or `unseen-combinations` (see `scenes.compose`).
        rows: number of rows; scenes that give none (no phrase fits one thing alone) are passed over.
        seed: another seed gives other scenes.
        size: side of the images in pixels.
        per_scene: at most this many rows from one scene, of kinds whose rows stand each for itself.
        count: number of concepts in the world.
        questions: kinds of question to ask (`language.QUESTION_KINDS`), None for all; only `vqa` has them.
        progress: show a progress bar for work of more than two seconds.

    Returns:
        A table with the kind's columns. Pictures are PNG, decoded on access; a video is the path of an MP4 file that
        lies beside the table.

    Raises:
        ValueError: if a name is unknown, or a number is too small.
        ImportError: if the extra `world` is not installed.
        FileNotFoundError: if a further illustrator's drawings are not there; it says how to fetch them.
    """
    from datasets import Dataset, Features, load_from_disk

    _check(kind, style, split, questions)
    within(locals(), rows="[1, inf)", seed="[0, inf)", size="[8, inf)", per_scene="[1, inf)", count="[1, inf)")
    schema = KINDS[kind]
    settings = {
        "kind": kind, "style": style, "split": split, "rows": rows, "seed": seed, "size": size,
        "per_scene": per_scene, "count": count, "questions": list(questions or ()),
    }  # fmt: skip
    made_of = [settings, _code_stamp(schema), *_concepts.packages(style)]
    stamp = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / f"pictograms-{kind}-{style}-{split}-{rows}-{stamp}"
    if not folder.is_dir():
        _concepts.art(style, count)  # drawn once here, so that no worker draws it
        made = list(_generate(settings, progress))
        columns = {name: [row[name] for row in made] for name in made[0]}
        with replace_folder(folder) as partial:
            if "video" in columns:
                columns["video"] = _files(columns["video"], columns["video_id"], partial, folder)
            table = Dataset.from_dict(columns, features=Features(schema.features()))
            table.save_to_disk(partial, num_shards=1)
    _quiet()
    return load_from_disk(str(folder))


def _check(kind: str, style: str, split: str, questions: Sequence[str] | None) -> None:
    """Raise the ValueError of a wrong word among the arguments of `load`."""
    for value, valid, what in ((style, _concepts.STYLES, "style"), (split, scenes.SPLITS, "split")):
        if value not in valid:
            raise ValueError(unknown(what, value, valid))
    if questions and kind != "vqa":
        raise ValueError(f"only 'vqa' rows have kinds of question, {kind!r} rows have none: leave out `questions`")
    for question in questions or ():
        if question not in language.QUESTION_KINDS:
            raise ValueError(unknown("kind of question", question, language.QUESTION_KINDS))


def _files(videos: Sequence[bytes], names: Sequence[str], written: Path, read: Path) -> list[str]:
    """Write videos into one folder, and give the paths that they have once it is renamed."""
    for name, content in zip(names, videos, strict=True):
        (written / f"{name}.mp4").write_bytes(content)
    return [str(read / f"{name}.mp4") for name in names]


def _quiet() -> None:
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _code_stamp(schema: Kind) -> str:
    """A hash of the code that makes the rows, so that a changed generator never reads an old cache."""
    sources = (_concepts, variation, scenes, language, kinds, sys.modules[schema.rows.__module__])
    return hashlib.sha256("".join(map(inspect.getsource, sources)).encode()).hexdigest()


def _generate(settings: dict[str, Any], progress: bool) -> Iterator[dict[str, Any]]:
    """Rows in the order of their scenes, made in one process or, from 2,000 on, in as many as there are cores."""
    from rich.progress import track

    wanted = settings["rows"]
    starts = iter(range(0, 1 << 62, CHUNK))
    parallel = wanted >= 2000 and multiprocessing.get_start_method(allow_none=True) in (None, "fork")
    pool = multiprocessing.get_context("fork").Pool() if parallel else None
    title = f"making {wanted} rows of {settings['style']} {settings['kind']}"
    try:
        jobs = ((settings, start) for start in starts)
        done = 0
        bar = track(range(wanted), title, disable=not (progress and wanted >= 1500), transient=True)
        ticks = iter(bar)
        # imap would run ahead of us without end: hand out one round of chunks at a time.
        while done < wanted:
            block = [next(jobs) for _ in range(8 if pool else 1)]
            for part in pool.imap(_chunk, block) if pool else map(_chunk, block):
                for row in part[: wanted - done]:
                    done += 1
                    next(ticks, None)
                    yield row
    finally:
        if pool:
            pool.terminate()


def _chunk(job: tuple[dict[str, Any], int]) -> list[dict[str, Any]]:
    settings, start = job
    s, kind = settings, KINDS[settings["kind"]]
    world = scenes.World(s["style"], s["split"], s["seed"], s["size"], s["count"])
    out = []
    for index in range(start, start + CHUNK):
        rows = kind.rows(world, index)
        rows = [r for r in rows if not s["questions"] or r.get("kind") in s["questions"]]
        out += rows if kind.whole else rows[: s["per_scene"]]
    return out
