"""A folder's own processor, also where the package that its videos need is missing.

transformers' video processors need torchvision, and those of some families are made whether or not there are videos.
Here such a processor is made without its video part: pictures and words are prepared by the same code as with it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a processor is read from; `save` copies these and the tokenizer's files.
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
         "chat_template.json", "chat_templates")  # fmt: skip


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a transformers folder, as `AutoProcessor` finds it; without videos if they cannot be read.

    Raises:
        ValueError: if the folder names no processor that transformers has, or lacks a file of it.
    """
    kind = _class(folder, model_type)
    if "video_processor" in kind.get_attributes() and not _reads_videos():
        kind = _without_videos(kind)
    try:
        with _spoken_numbers(kind):
            return kind.from_pretrained(folder)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{folder}: its {kind.__name__} cannot be made: {type(error).__name__}: {error}. Put the files of the "
            "model's own processor there: AutoProcessor.from_pretrained(MODEL).save_pretrained(FOLDER)"
        ) from error


def _class(folder: Path, model_type: str) -> Any:
    """The class of a folder's processor: what a file of it names, else what transformers has for its model."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    found = None
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        if found is None and file.is_file():
            try:
                found = json.loads(file.read_text()).get("processor_class")
            except ValueError as error:
                raise ValueError(f"{file}: no JSON ({error})") from error
    found = found or PROCESSOR_MAPPING_NAMES.get(model_type)
    kind = getattr(transformers, found, None) if isinstance(found, str) else None
    if kind is None:
        raise ValueError(
            f"{folder}: expected the files of a processor, which says how pictures and words are prepared; "
            + (f"its 'processor_class' is {found!r}, which transformers does not have" if found else
               f"found none, and transformers names none for the model type {model_type!r}")
            + ". Save the model's own there: AutoProcessor.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )  # fmt: skip
    return kind


def _reads_videos() -> bool:
    from transformers.utils import is_torchvision_available

    return is_torchvision_available()


class _NoVideos:
    """What stands in a video processor's place; SmolVLM's template asks it for two defaults."""

    num_frames = fps = None

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ImportError("videos need the package torchvision, which is not installed here; pictures do not")


def _without_videos(kind: Any) -> Any:
    """The same class without the part for videos."""

    class Pictures(kind):
        video_processor = _NoVideos()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]  # the videos' part comes last

    Pictures.__name__ = Pictures.__qualname__ = kind.__name__
    Pictures.__module__ = kind.__module__
    return Pictures


@contextmanager
def _spoken_numbers(kind: Any) -> Iterator[None]:
    """Let SmolVLM's processor be made without the package `num2words`, of which it uses one function, for videos."""
    module = importlib.import_module(kind.__module__)
    missing = hasattr(module, "num2words") and module.num2words is None
    if missing:
        module.num2words = _no_videos  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            module.num2words = None  # type: ignore[attr-defined]


def _no_videos(*_: Any) -> str:
    raise ImportError("videos need the package num2words: pip install num2words")
