"""Lever 3: what is trained, in or beside a model that otherwise stays as it is."""

from trimtab.methods.tune import (  # noqa: F401
    adapter,
    bitfit,
    full,
    ladder,
    lora,
    norms,
    partial,
    prompt,
    sherl,
    sidetuning,
    unipt,
)
