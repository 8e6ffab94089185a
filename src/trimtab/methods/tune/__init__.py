"""Lever 3: what is trained, in or beside a model that otherwise stays as it is."""

from trimtab.methods.tune import full, lora, unipt  # noqa: F401
