"""One file a method; the levers are the packages `prune`, `skip` and `tune`. `METHODS` is the registry."""

from trimtab.methods import prune, skip, tune  # noqa: F401
from trimtab.methods.base import METHODS, Method
from trimtab.methods.session import BatchSession, Session

__all__ = ["METHODS", "BatchSession", "Method", "Session"]
