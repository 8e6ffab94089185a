"""Where generated data is kept between runs, and how a file is replaced so that a half-written one is never seen."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def cache_dir() -> Path:
    """The cache folder: `$TRIMTAB_CACHE`, or `trimtab` in the user's cache folder. It is made if it is not there."""
    root = (
        os.environ.get("TRIMTAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "trimtab"
    )
    path = Path(root).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def system_error(error: Exception) -> OSError:
    """A failure to write as the system's error; safetensors gives the system's number as text only."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"os error (\d+)", str(error))
    code = int(found[1]) if found else errno.EIO
    return OSError(code, os.strerror(code) if found else str(error))


def _not_written(path: Path, error: Exception) -> OSError:
    found = system_error(error)
    reason = found.strerror or str(found)
    return OSError(found.errno, f"{path}: not written ({reason}); what was there before stands")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success rename it to `path`, on failure delete it.

    A rename within one folder is atomic, so that a reader sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)  # mkstemp makes private files; these are ordinary ones
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: write to a temporary one, which becomes `path` only when everything is in it.

    If another process finished the same folder first, its result stands and ours is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.replace(path)
        except OSError:
            if not path.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
