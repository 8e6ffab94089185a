"""The seam between models and methods: what a method may know about a model."""

from trimtab.anatomy.calls import arguments, called_like, parameter_names
from trimtab.anatomy.description import Anatomy, AnatomyError, Block, Modality, Sublayer, Tap, Tower, Weight
from trimtab.anatomy.lookup import describes, part_of
from trimtab.anatomy.taps import argument, pick, put, read, rewrite

__all__ = ["Anatomy", "AnatomyError", "Block", "Modality", "Sublayer", "Tap", "Tower", "Weight", "argument",
           "arguments", "called_like", "describes", "parameter_names", "part_of", "pick", "put", "read", "rewrite"]  # fmt: skip
