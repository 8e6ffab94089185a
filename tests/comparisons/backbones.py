"""Reading the checkpoint files of a backbone's folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.conformance import Case
from trimtab.backbones.official import build_official
from trimtab.backbones.reading import read_checkpoint


def build(case: Case, *files: str, **settings: Any) -> nn.Module:
    """The model of a file of the case's folder, with the tensors of further files in place of its own."""
    state, extras = read_checkpoint(case.folder / files[0])
    for other in files[1:]:
        state |= read_checkpoint(case.folder / other)[0]
    return build_official(state, extras, str(case.folder / files[0]), **settings)[0]
