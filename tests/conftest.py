from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

# Before any library is imported: nothing comes over the network, and progress bars stay out of captured output.
# Models of tests are so small that more threads only wait for each other.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated data of the tests go to a folder of the session, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_raw() -> Callable[..., dict[str, Any]]:
    """A raw recipe of seconds: random weights, 64 rows, 3 steps; further keywords are training settings."""

    def make(
        backbone: str = "tiny-vilt",
        task: str | dict = "vqa",
        methods: Sequence[str | dict] = ("full",),
        **training: Any,
    ) -> dict[str, Any]:
        if task == "matching":
            task = {"name": "matching", "pool": 8}  # it ranks whole blocks, and there are only 24 test rows
        return {
            "backbone": {"name": backbone, "pretrained": False},
            "task": task,
            "data": {"name": "pictograms", "train": 64, "test": 24, "validation": 32},
            "methods": list(methods),
            "training": {"steps": 3, "batch_size": 8, **training},
        }

    return make
