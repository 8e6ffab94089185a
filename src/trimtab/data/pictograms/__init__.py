"""The built-in world: pictures composed from real art, with language that is true of them.

`load(kind, ...)` gives a `datasets.Dataset`, made once and then read from the cache folder. A kind is one schema; to
add one (video, image pairs, classification, ...) write a function from scenes to rows and register it in `KINDS`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.data.pictograms import concepts as _concepts
from trimtab.data.pictograms import language, scenes, variation
from trimtab.data.pictograms.language import answers
from trimtab.files import cache_dir, replace_folder
from trimtab.registry import Registry, unknown

if TYPE_CHECKING:
    from datasets import Dataset, Features

__all__ = ["KINDS", "Kind", "answers", "load"]


@dataclass(frozen=True)
class Kind:
    """One schema of rows.

    Attributes:
        rows: from (scene, random generator, number of concepts) to the rows that the scene gives, images left out.
        features: the columns beside `image`, as a `datasets.Features` would describe them.
        choose: which of those rows are kept when a scene gives several: the first `per_scene`.
    """

    rows: Callable[[scenes.Scene, np.random.Generator, int], list[dict[str, Any]]]
    features: Callable[[], dict[str, Any]]


KINDS: Registry[Kind] = Registry("kind of pictogram data")


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
        kind: name in `KINDS`: `retrieval`, `vqa` or `grounding`.
        style: `twemoji`, `openmoji` or `twemoji-varied`.
        split: `train`, `validation`, `test`, `unseen-concepts` or `unseen-combinations` (see `scenes.compose`).
        rows: number of rows; scenes that give none (no phrase fits one thing alone) are passed over.
        seed: another seed gives other scenes.
        size: side of the images in pixels.
        per_scene: at most this many rows from one scene.
        count: number of concepts in the world.
        questions: kinds of question to ask (`language.QUESTION_KINDS`), None for all; only `vqa` has them.
        progress: show a progress bar for work of more than two seconds.

    Returns:
        A table with the column `image` (PNG, decoded on access) and the kind's own columns.

    Raises:
        ValueError: if a name is unknown.
        ImportError: if the extra `world` is not installed.
    """
    from datasets import Dataset, load_from_disk

    _check(kind, style, split, rows, questions)
    schema = KINDS[kind]
    settings = {
        "kind": kind, "style": style, "split": split, "rows": rows, "seed": seed, "size": size,
        "per_scene": per_scene, "count": count, "questions": list(questions or ()),
    }  # fmt: skip
    stamp = hashlib.sha256(json.dumps([settings, _code_stamp()], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / f"pictograms-{kind}-{style}-{split}-{rows}-{stamp}"
    if not folder.is_dir():
        _concepts.art(style, count)  # drawn once here, so that no worker draws it
        made = list(_generate(settings, progress))
        columns = {name: [row[name] for row in made] for name in made[0]}
        table = Dataset.from_dict(columns, features=_features(schema))
        with replace_folder(folder) as partial:
            table.save_to_disk(partial, num_shards=1)
    _quiet()
    return load_from_disk(str(folder))


def _check(kind: str, style: str, split: str, rows: int, questions: Sequence[str] | None) -> None:
    """Raise the ValueError of a wrong argument of `load`."""
    for value, valid, what in ((style, _concepts.STYLES, "style"), (split, scenes.SPLITS, "split")):
        if value not in valid:
            raise ValueError(unknown(what, value, valid))
    if questions and kind != "vqa":
        raise ValueError(f"only 'vqa' rows have kinds of question, {kind!r} rows have none: leave out `questions`")
    for question in questions or ():
        if question not in language.QUESTION_KINDS:
            raise ValueError(unknown("kind of question", question, language.QUESTION_KINDS))
    if rows < 1:
        raise ValueError(f"rows must be at least 1, found {rows}")


def _features(schema: Kind) -> Features:
    from datasets import Features, Image

    return Features({"image": Image(), **schema.features()})


def _quiet() -> None:
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _code_stamp() -> str:
    """A hash of the code that makes the rows, so that a changed generator never reads an old cache."""
    sources = (inspect.getsource(module) for module in (_concepts, variation, scenes, language))
    own = "".join(inspect.getsource(kind.rows) for _, kind in KINDS.items())
    return hashlib.sha256(("".join(sources) + own).encode()).hexdigest()


def _generate(settings: dict[str, Any], progress: bool) -> Iterator[dict[str, Any]]:
    """Rows in the order of their scenes, made in one process or, from 2,000 on, in as many as there are cores."""
    from rich.progress import track

    wanted, chunk = settings["rows"], 250
    starts = iter(range(0, 1 << 62, chunk))
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
    s = settings
    out = []
    for index in range(start, start + 250):
        scene = scenes.compose(s["style"], s["split"], s["seed"], index, s["size"], s["count"])
        rng = np.random.default_rng([s["seed"], scenes.SPLITS.index(s["split"]), index, 1])
        rows = KINDS[s["kind"]].rows(scene, rng, s["count"])
        rows = [r for r in rows if not s["questions"] or r.get("kind") in s["questions"]][: s["per_scene"]]
        if rows:
            image = {"bytes": scene.png(), "path": None}
            out += [{"image": image, **row} for row in rows]
    return out


def _strings() -> Any:
    from datasets import List, Value

    return List(Value("string"))


def _value(dtype: str) -> Any:
    from datasets import Value

    return Value(dtype)


def _retrieval(scene: scenes.Scene, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Four wordings of the caption, and four captions that are each wrong in one point."""
    return [
        {
            "captions": [language.caption(scene, rng) for _ in range(4)],
            "foils": [language.foil(scene, rng, count) for _ in range(4)],
        }
    ]


def _vqa(scene: scenes.Scene, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    return [{"question": q.text, "answer": q.answer, "kind": q.kind} for q in language.questions(scene, rng, count)]


def _grounding(scene: scenes.Scene, rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    return [{"phrase": phrase, "box": list(box)} for phrase, box in language.phrases(scene, rng)]


def _boxes() -> Any:
    from datasets import List, Value

    return List(Value("int32"), length=4)


KINDS.register("retrieval")(Kind(_retrieval, lambda: {"captions": _strings(), "foils": _strings()}))
KINDS.register("vqa")(Kind(_vqa, lambda: {name: _value("string") for name in ("question", "answer", "kind")}))
KINDS.register("grounding")(Kind(_grounding, lambda: {"phrase": _value("string"), "box": _boxes()}))
