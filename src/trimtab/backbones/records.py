"""Published sizes of models that are transformers folders: the folder without its weights, to be counted by name.

configs/NAME/config.json, preprocessor_config.json, ...    what the model's authors published, as far as it tells sizes
             record.json                                   `title`, `source`, and `texts` where words are counted by
                                                           another tokenizer than the model's own

A tokenizer of megabytes is not copied: a small one, which knows the special tokens alone, stands for it. So texts have
nearly as many tokens as with the model's own, pictures exactly as many, and nothing can be trained with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.backbones.family import model_class

FOLDERS: dict[str, Path] = {
    folder.name: folder for folder in sorted((Path(__file__).parent / "configs").iterdir()) if folder.is_dir()
}
"""Name -> folder, which has all that the real one has but weights."""


def told(name: str) -> dict[str, str]:
    """What a record says of itself: `title`, `source`, and `texts` if a tokenizer stands in for the model's own."""
    return json.loads((FOLDERS[name] / "record.json").read_text(encoding="utf-8"))


def architecture(name: str) -> Callable[[], tuple[type, Any]]:
    """A function without settings that gives the model's class and config, as a family's `architecture` does."""

    def build() -> tuple[type, Any]:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(FOLDERS[name])
        return model_class(config.architectures[0]), config

    record = told(name)
    build.__doc__ = f"{record['title']} ({record['source']})."
    return build


def assumed(name: str) -> str:
    """The sentence that says what stands for a folder of that name."""
    record = told(name)
    texts = f"; of a text, {record['texts']}" if "texts" in record else ""
    return f"the sizes of {record['title']} ({record['source']}), since no folder '{name}' is there{texts}"
