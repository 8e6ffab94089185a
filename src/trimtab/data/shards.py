"""WebDataset shards: tar files whose neighbouring members with one key make a sample. Read as a stream, never unpacked.

Python's own tarfile reads them; the package webdataset is not needed. Of sets larger than memory a table says where in
the shards each picture lies (`in_place`), which is read when it is needed:

    shard.tar::00017.jpg::9216:48211        shard, member, first byte, bytes
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import Any

from trimtab.data.reading import DataError, Entry

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")
_PART = re.compile(r"(.+)::(.+)::(\d+):(\d+)")
_NAME = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]+)")  # the key ends at the first dot of the file's name


def shards(root: Path, pattern: str = "**/*.tar") -> list[Path]:
    """The tar files below a folder, in the order of their names, or the file itself.

    Raises:
        DataError: if there is none.
    """
    root = Path(root)
    found = [root] if root.is_file() else sorted(p for p in root.glob(pattern) if p.is_file())
    if not found:
        raise DataError(f"{root}: expected shards ({pattern}), found none")
    return found


def samples(paths: Iterable[Path], in_place: bool = False) -> Iterator[Entry]:
    """Each sample of the shards as an entry: suffix -> bytes, and `__key__` -> its key.

    A shard is opened when the one before is read to its end, and read from front to back.

    Args:
        paths: the shards.
        in_place: pictures are not read; the entry says where each lies.

    Raises:
        DataError: if a shard is not there, damaged or cut.
        RowError: where a sample has two members of one suffix.
    """
    for path in paths:
        key, parts = "", dict[str, Any]()
        for name, content in _members(path, in_place):
            match = _NAME.fullmatch(name)
            if match is None:
                continue  # a folder's own file, such as `._x` or a name without a suffix
            if match[1] != key:
                if parts:
                    yield _sample(path, key, parts)
                key, parts = match[1], {}
            suffix = match[2].lower()
            if suffix in parts:
                raise _sample(path, key, parts).error(f"expected one member with the suffix {suffix!r}, found two")
            parts[suffix] = content
        if parts:
            yield _sample(path, key, parts)


def _sample(path: Path, key: str, parts: dict[str, Any]) -> Entry:
    return Entry({"__key__": key, **parts}, path, f"sample {key!r}")


def _members(path: Path, in_place: bool = False) -> Iterator[tuple[str, Any]]:
    """Name and content of each file; with `in_place` of pictures where they lie."""
    try:
        mode = "r:" if in_place else "r|*"
        with tarfile.open(path, mode, tarinfo=_Whole) as archive:  # type: ignore[call-overload]
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if in_place and content is not None and member.name.lower().endswith(PICTURES):
                    if member.offset_data + member.size > path.stat().st_size:
                        raise DataError(f"{path}: cut off in {member.name!r}")
                    yield member.name, f"{path}::{member.name}::{member.offset_data}:{member.size}"
                elif content is not None:
                    data = content.read()
                    if len(data) != member.size:
                        raise DataError(f"{path}: cut off in {member.name!r}")
                    yield member.name, data
                archive.members = []  # type: ignore[attr-defined]  # otherwise it remembers every member of the shard
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such shard") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a tar file, it seems damaged or cut ({error})") from error


class _Whole(tarfile.TarInfo):
    """A member's head. Where tarfile takes one that it cannot read, or none, for the end of the archive, and so leaves
    out in silence what follows, this raises: only empty blocks are an end, and only if nothing stands behind them."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            while rest := tarfile.fileobj.read(1 << 20):
                if rest.count(0) != len(rest):
                    what = "an overwritten head, or a second archive (`tar -A` joins two)"
                    raise ReadError(f"{what} follows the empty block at byte {tarfile.offset}") from None
            raise
        except HeaderError as error:
            if tarfile.offset == 0:
                raise
            raise ReadError(f"no head of a member, and no end, at byte {tarfile.offset}: {error}") from error


def picture(entry: Entry) -> dict[str, Any]:
    """The picture of a sample as a cell of a picture column.

    Raises:
        RowError: if it has none.
    """
    for suffix in PICTURES:
        if isinstance(entry.values.get(suffix), str):
            return {"path": entry.get(suffix, str), "bytes": None}
        if suffix in entry:
            return {"path": None, "bytes": entry.get(suffix, bytes)}
    raise entry.error(f"expected a picture ({', '.join(PICTURES)}), found {_suffixes(entry)}")


def stamp(value: Any) -> str:
    """A value of a row as text; of the path of a file, or of what lies in a shard, with the file's size and time."""
    if not isinstance(value, str) or len(value) >= 1024 or "\0" in value:
        return str(value)
    part = _PART.fullmatch(value)
    file = Path(part[1] if part else value)
    return f"{value} {file.stat().st_size} {file.stat().st_mtime_ns}" if file.is_file() else value


def opened(path: Any) -> Any:
    """What PIL opens for the path of a picture: the path itself, or the bytes of a picture in a shard.

    Raises:
        OSError: if the shard is not there or shorter than that.
    """
    part = _PART.fullmatch(str(path))
    if part is None:
        return path
    with Path(part[1]).open("rb") as shard:
        shard.seek(int(part[3]))
        found = shard.read(int(part[4]))
    if len(found) < int(part[4]):
        raise OSError("the shard is shorter than it was")
    return io.BytesIO(found)


def about(entry: Entry) -> dict[str, Any]:
    """The json of a sample; empty if it has none.

    Raises:
        RowError: if it is no JSON object.
    """
    if "json" not in entry:
        return {}
    try:
        found = json.loads(entry.get("json", bytes))
    except ValueError as error:
        raise entry.error(f"expected its json to be a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise entry.error("expected its json to be a JSON object, found another value")
    return found


def words(entry: Entry) -> str | None:
    """The text of a sample as it is written; None if it has none.

    Raises:
        RowError: if it is not in UTF-8.
    """
    if "txt" not in entry:
        return None
    try:
        return entry.get("txt", bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise entry.error(f"expected its txt in UTF-8, found other bytes at position {error.start}") from error


def caption(entry: Entry) -> str:
    """The caption of a sample: its txt, or the `caption` of its json.

    Raises:
        RowError: if it has neither.
    """
    found = words(entry)
    if found is None:
        found = about(entry).get("caption")
    if not isinstance(found, str) or not found.strip():
        raise entry.error(f"expected a caption (its txt, or 'caption' in its json), found {_suffixes(entry)}")
    return found


def _suffixes(entry: Entry) -> str:
    return ", ".join(k for k in entry.values if k != "__key__") or "nothing"
