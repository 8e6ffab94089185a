"""What a search keeps while it works, so that an interrupted run goes on where it was.

    RUN/search/key                    what the search depends on, as a hash: with another, everything here is deleted
    RUN/search/found.json             the finished search, and in found.safetensors what its adapters learned
    RUN/search/gates-STEP.json        DAS: its gates, beside the trainer's checkpoint of that step
    RUN/search/supernet.safetensors   other searches: adapters and heads after their training steps
    RUN/search/losses.json            other searches: every loss that was paid for
    RUN/search/so_far.json            the plan so far of a search that could not go on

The trainer's checkpoints of the search stand in the same folder, which is deleted when the run is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.anatomy import Block
from trimtab.files import replace_file
from trimtab.methods.base import Method
from trimtab.methods.session import Session
from trimtab.storage.learned import fingerprint


class Journal:
    """The files of one search.

    Args:
        folder: where they are; None keeps nothing and knows nothing.
        key: what the search depends on.
    """

    def __init__(self, folder: Path | None, key: str = ""):
        self.folder = folder
        self.key = hashlib.sha256(key.encode()).hexdigest()

    @classmethod
    def of(cls, method: Method, session: Session, candidates: list[Block]) -> Journal:
        """That of a method in a session: the key is its settings, the seed, how and on what is trained, candidates and
        weights. Of batches and rows that a person gives only the number is looked at: a folder is for one set of them.
        """
        if session.folder is None:
            return cls(None)
        spec = getattr(session, "spec", None)
        depends = [method.describe(), session.seed, None if spec is None else asdict(spec),
                   [b.path for b in candidates], fingerprint(session.plain),
                   session.made_of() if hasattr(session, "made_of") else None]  # fmt: skip
        return cls(Path(session.folder) / "search", json.dumps(depends, default=str))

    def begin(self) -> None:
        """Leave nothing of another search, whose checkpoints the trainer would take for its own."""
        if self.folder is None or int(os.environ.get("RANK", "0")) > 0 or self._own():
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        with replace_file(self.folder / "key") as partial:
            partial.write_text(self.key)

    def file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def read(self, name: str) -> Any:
        """What was written under a name; None if there is nothing of this search.

        Raises:
            ValueError: if the file is damaged.
        """
        if not self._own() or not (file := self._file(f"{name}.json")).exists():
            return None
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(file, error) from error

    def write(self, name: str, value: Any) -> None:
        """Keep plain values under a name."""
        if self.folder is not None:
            with replace_file(self._file(f"{name}.json")) as partial:
                partial.write_text(json.dumps(value))

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were kept under a name; None if there are none of this search.

        Raises:
            ValueError: if the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self._own() or not (file := self._file(f"{name}.safetensors")).exists():
            return None
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise self._damaged(file, error) from error

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name."""
        from safetensors.torch import save_file

        if self.folder is not None:
            with replace_file(self._file(f"{name}.safetensors")) as partial:
                save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _own(self) -> bool:
        """Whether the folder is there and of this search."""
        key = self.file("key")
        return key is not None and key.exists() and key.read_text() == self.key

    def _damaged(self, file: Path, error: Exception) -> ValueError:
        return ValueError(f"{file}: cannot be read ({error}); delete {self.folder} to search from the start")
