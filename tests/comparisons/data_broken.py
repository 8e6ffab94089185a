"""Broken files of the data sets of `data_second.py`, and pickles that run code."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.comparisons.data import broken
from tests.comparisons.stand_in import stand_in
from tests.conformance import FOLDERS
from trimtab.data import pickles, tables
from trimtab.data.formats import cc3m, cifar, flowers102, msrvtt, msvd, refcoco
from trimtab.data.reading import Kept

VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov")


def _annotations(content: Any) -> list[Any]:
    found = content.get("annotations") if isinstance(content, dict) else None
    return found if isinstance(found, list) and found and isinstance(found[0], dict) else []


@broken(lambda path, content: any("tokens_positive" in a for a in _annotations(content)))
def broken_mdetr(path: Path, beside: dict[str, Path]) -> None:
    list(refcoco.mdetr(path, Kept()))


@broken(lambda path, content: any("bbox" in a and "tokens_positive" not in a for a in _annotations(content)))
def broken_instances(path: Path, beside: dict[str, Path]) -> None:
    instances = refcoco.Instances.read(path)
    for file in sorted(beside["refcoco"].rglob("refs(*).p")):
        refs = list(refcoco.refs(file))
        if any(r.number("image_id") in instances.pictures for r in refs):  # the refs of this set
            for ref in refs:
                refcoco.expressions(ref, instances)


@broken(lambda path, content: path.suffix == ".csv" and ("msrvtt" in path.name.lower() or (
    isinstance(content, str) and all(re.fullmatch(r"video\d+", line) for line in content.split()))))  # fmt: skip
def broken_msrvtt(path: Path, beside: dict[str, Path]) -> None:
    list(msrvtt.train_videos(path, Kept()))


@broken(lambda path, content: path.suffix == ".txt")
def broken_msvd(path: Path, beside: dict[str, Path]) -> None:
    source = next(beside["msvd"].rglob("raw-captions.pkl"))
    list(msvd.listed(path, pickles.read(source, types=(dict,)), source, Kept()))


@broken(lambda path, content: path.suffix == ".tsv")
def broken_tsv(path: Path, beside: dict[str, Path]) -> None:
    list(cc3m.tsv(path, Kept()))


@broken(lambda path, content: path.suffix == ".mat")
def broken_flowers(path: Path, beside: dict[str, Path]) -> None:
    labels = next(beside["flowers102"].rglob("imagelabels.mat"))
    ids = "setid" in path.name or "labels" not in path.name
    other = next(beside["flowers102"].rglob("setid.mat"))
    for split in flowers102.LISTS:
        list(flowers102.numbered(*((path, labels) if ids else (other, path)), split, Kept()))


@broken(lambda path, content: path.suffix in (".p", ".pkl", ".pickle") or (
    not path.suffix and not str(content).startswith("{")))  # fmt: skip
def broken_pickle(path: Path, beside: dict[str, Path]) -> None:
    """What a pickle holds tells whose it is: a list of refs, captions by video, or a batch of pictures."""
    found = pickles.read(path, arrays=True, encoding="latin1", types=(dict, list))
    if isinstance(found, list):
        for file in sorted(beside["refcoco"].rglob("refs(*).p")):
            if {r.number("image_id") for r in refcoco.refs(file)} & {r.number("image_id") for r in refcoco.refs(path)}:
                stand_in(path, "refcoco", beside["refcoco"], file)
    elif any(isinstance(value, list) and value and isinstance(value[0], list) for value in found.values()):
        for file in sorted(beside["msvd"].rglob("*_list.txt")):
            list(msvd.listed(file, pickles.read(path, types=(dict,)), path, Kept()))
    elif not {"data", b"data"} & set(found):
        cifar.names(path, "fine_label_names" if "fine_label_names" in found else "label_names")
    else:
        list(cifar.batch(path, "fine_labels" if "fine_labels" in found else "labels"))


@broken(lambda path, content: path.suffix in VIDEOS)
def broken_video(path: Path, beside: dict[str, Path]) -> None:
    """Decoding names the video; reading that looks at videos names the row too, and leaves it out if asked."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "test_list.txt").write_text(f"{path.stem}\n")
        (root / "raw-captions.pkl").write_bytes(pickle.dumps({path.stem: [["a", "film"]]}))
        (root / path.name).symlink_to(path)
        kept = Kept("skip")
        msvd.MSVD(root=root, on_error="skip").read("video-retrieval", "test", kept)
    if kept.left_out:
        raise ValueError(kept.left_out[0])


@broken(lambda path, content: path.suffix == ".jsonl" and ("imagefolder" in path.name or (
    isinstance(content, tuple) and isinstance(content[0], dict)
    and not {"gold_label", "identifier", "pairID", "sentence", "clip_name", "elems"} & set(content[0]))))  # fmt: skip
def broken_imagefolder(path: Path, beside: dict[str, Path]) -> None:
    folder = Path(tempfile.mkdtemp()) / path.name  # the file's name is that of its folder, so that the error has it
    try:
        folder.mkdir()
        shutil.copy(path, folder / "metadata.jsonl")
        tables.read(folder)
    finally:
        shutil.rmtree(folder.parent)


def evil(folder: Path) -> Iterator[dict[str, Any]]:
    """Pickles that would run code: each must be refused, and nothing of it may have run."""
    for path in sorted(p for p in folder.rglob("*evil*") if p.is_file()):
        line = {"case": f"{path.parent.name}/{path.name}", "kind": "pickle that runs code"}
        try:
            pickles.read(path, arrays=True, encoding="latin1", types=(list, dict))
            told, refused = "it was read", False
        except ValueError as error:
            told, refused = str(error), path.name in str(error)
        yield line | {"pass": refused and "TRIMTAB_PICKLE_RAN" not in os.environ, "told": told}


FOLDERS.append(evil)
