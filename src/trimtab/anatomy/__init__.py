"""The seam between models and methods: what a method may know about a model."""

from trimtab.anatomy.calls import arguments, called_like, parameter_names
from trimtab.anatomy.description import Anatomy
from trimtab.anatomy.lookup import describes, part_of
from trimtab.anatomy.parts import Block, Modality, Sublayer, Tap, Tower, Weight
from trimtab.anatomy.seen.sublayers import SeenBlock, see_sublayers
from trimtab.anatomy.structure import AnatomyError, mark_added, mark_wraps, unwrapped
from trimtab.anatomy.taps import argument, entering, pick, pre_hook, put, read, read_stream, rewrite

__all__ = ["Anatomy", "AnatomyError", "Block", "Modality", "SeenBlock", "Sublayer", "Tap", "Tower", "Weight",
           "argument", "arguments", "called_like", "describes", "entering", "mark_added", "mark_wraps",
           "parameter_names", "part_of", "pick", "pre_hook", "put", "read", "read_stream", "rewrite", "see_sublayers",
           "unwrapped"]  # fmt: skip
