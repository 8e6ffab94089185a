"""Readers of published data sets, one file a set; importing this registers each under its name in `SOURCES`."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)  # so that a new file is all that a new reader takes
