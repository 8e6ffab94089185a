"""RefCOCO, MSR-VTT, MSVD, CC3M, Visual Genome, CIFAR, Flowers-102 and image folders against tables of rows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.comparisons.data import Rows, data_set, rows_of
from trimtab.data import boxes, shards, tables, video, wording
from trimtab.data.formats import cc3m, cifar, flowers102, msrvtt, msvd, refcoco, visual_genome
from trimtab.data.formats.users import ImageFolder
from trimtab.data.reading import Entry, Kept, NotThere, json_rows

REFERRING = {"refcoco": refcoco.RefCOCO, "refcoco+": refcoco.RefCOCOPlus, "refcocog": refcoco.RefCOCOg}


def relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def agree(what: str, ours: Any, again: Any) -> None:
    """Two ways to the same rows, the format's own reading and the source's table."""
    if ours != again:
        raise ValueError(f"{what}: the format's rows {ours!r} are not those of the table {again!r}"[:400])


# --- referring expressions --------------------------------------------------------------------------------------------


@data_set("refcoco", "refs(*).p", "finetune_refcoco*.json")
def referring(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    kind = re.fullmatch(r"(mdetr_)?(refcoco[g+]?)(?:_(unc|umd|google))?(_splits|_\w+)?", table)
    if kind is None:
        return None
    mdetr, name, by, rest = kind.groups()
    if mdetr:
        return _mdetr(REFERRING[name](root=root, form="mdetr"), root, name, rest[1:])
    wanted = expected["tables"][table]
    source = _of_table(REFERRING[name](root=root, by=by), wanted)
    path, instances = source._refer()
    refs = list(refcoco.refs(path))
    if rest == "_splits":
        splits = [row[wanted["columns"].index("split")] for row in wanted["rows"]]
        return [{"split": s, "ref_ids": [r.number("ref_id") for r in refs if refcoco.belongs(r.text("split"), s)]}
                for s in splits]  # fmt: skip
    found = [e for ref in refs for e in refcoco.expressions(ref, instances)]
    images = {}
    for split in source.splits:
        own = [(e.phrase, str(e.ref_id)) for e in found if refcoco.belongs(e.split, split)]
        if own:
            rows = rows_of(source.table("grounding", split), root)
            images |= {r["image_id"]: r["image"] for r in rows}
            agree(split, own, [(r["phrase"], r["ref_id"]) for r in rows])
    return [{**vars(e), "image": images[str(e.image_id)], "expression": e.phrase, "box_xyxy": e.box,
             "box_xywh_file": e.written, "width": e.size[0], "height": e.size[1]} for e in found]  # fmt: skip


def _of_table(source: Any, wanted: dict[str, Any]) -> Any:
    """The source with the splits of a table: a folder may hold several `refs(<by>).p`, and the refs tell which."""
    if source.by is not None:
        return source
    column = "ref_ids" if "ref_ids" in wanted["columns"] else "ref_id"
    cells = [row[wanted["columns"].index(column)] for row in wanted["rows"]]
    told = {ref for cell in cells for ref in (cell if isinstance(cell, list) else [cell])}
    for by in ("unc", "umd", "google"):
        each = replace(source, by=by)
        with contextlib.suppress(NotThere):
            found = {ref.number("ref_id") for ref in refcoco.refs(each._refer()[0])}
            if told <= found:
                return each
    return source


def _mdetr(source: Any, root: Path, name: str, split: str) -> Rows:
    path = next(root.rglob(f"finetune_{name}_{split}.json"))
    found = [target for _, target in refcoco.mdetr(path, Kept())]
    rows = rows_of(source.table("grounding", split), root)
    agree(split, [(t.phrase, t.picture, t.box) for t in found],
          [(r["phrase"], Path(r["image"]).name, r["box"]) for r in rows])  # fmt: skip
    return [{"image": t.picture, "expression": t.phrase, "box_xyxy_clamped": t.box, "dataset_name": t.dataset,
             "image_id": t.number, "original_image_id": t.image_id, "area": t.area} for t in found]  # fmt: skip


# --- videos -----------------------------------------------------------------------------------------------------------


def frames(root: Path, wanted: dict[str, Any]) -> Rows:
    """Decoded frames; a mean colour within the tolerance that the table names counts as the table's."""
    import numpy as np

    told = re.search(r"(?:\+-|\+/-|±)\s*(\d+)", wanted["how"])
    most = int(told[1]) if told else 0
    out = []
    for name, _, _, colours in wanted["rows"]:
        length = video.measure(root / name)
        read = video.read(root / name, lambda length: range(length.frames))
        means = [np.asarray(picture, float).mean((0, 1)).round(1).tolist() for picture in read]
        near = len(means) == len(colours) and np.abs(np.subtract(means, colours)).max() <= most
        out.append({"video": name, "n_frames": length.frames, "fps": length.fps,
                    "mean_rgb_of_each_frame": colours if near else means})  # fmt: skip
    return out


@data_set("msrvtt", "MSRVTT_*.csv", "MSRVTT_data.json")
def msr_vtt(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    if table == "frames":
        return frames(root, expected["tables"][table])
    if table == "videos":
        rows = json_rows(next(root.rglob("MSRVTT_data.json")), "videos")
        return [{"video_id": e.id("video_id"), "json_split": e.text("split"), "category": e.number("category")}
                for e in rows]  # fmt: skip
    if train := re.fullmatch(r"train_(7k|9k)(_folded)?", table):
        source = msrvtt.MSRVTT(root=root, train=train[1], validation=0, unfold=not train[2])
        return [{**r, "caption": r["captions"][0]} for r in source.table("video-retrieval", "train")]
    if table not in ("test_1kA", "blip_test"):
        return None
    blip = table == "blip_test"
    source = msrvtt.MSRVTT(root=root, form="blip" if blip else "csv")
    rows = list(source.table("video-retrieval", "test"))
    file = next(root.rglob("msrvtt_test.jsonl" if blip else "MSRVTT_JSFUSION_test.csv"))
    keys = [key for _, key, _, _ in msrvtt.test_rows(file, Kept())]
    # BLIP's code names the file that it wants by adding .mp4, whatever is there.
    return [{"video": f"{r['video_id']}.mp4" if blip else relative(r["video"], root), "video_id": r["video_id"],
             "caption": r["captions"][0], "caption_after_pre_caption": wording.caption(r["captions"][0], "blip", 40),
             "key": key} for r, key in zip(rows, keys, strict=True)]  # fmt: skip


@data_set("msvd", "raw-captions.pkl")
def msvd_(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    if table == "frames":
        return frames(root, expected["tables"][table])
    split, _, what = table.partition("_")
    if split not in msvd.MSVD.splits or what not in ("", "cut_off_points"):
        return None
    rows = list(msvd.MSVD(root=root, unfold=False).table("video-retrieval", split))
    if what:
        ends = itertools.accumulate(len(r["captions"]) for r in rows)
        return [{"cumulative_number_of_captions": end} for end in ends]
    return [{"video": relative(r["video"], root), "video_id": r["video_id"], "caption": c}
            for r in rows for c in r["captions"]]  # fmt: skip


# --- pictures and texts -----------------------------------------------------------------------------------------------


@data_set("cc3m", "*GCC*.tsv", "*_annot.json")
def cc3m_(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    form, _, split = table.partition("_")
    if form == "tsv":
        path = next(p for p in sorted(root.rglob("*.tsv")) if p.name.lower().startswith(split))
        return [{"caption": caption, "url": url} for caption, url in cc3m.tsv(path, Kept())]
    if form == "webdataset":
        return _samples(root)
    if form == "vilt":
        path = next(root.rglob(f"{split}_annot.json"))
        rows = [(path.parent / name, captions) for _, name, captions in cc3m.vilt(path, Kept())]
        if split == "train":
            source = cc3m.CC3M(root=root, form="vilt").table("retrieval", "train")
            agree(table, [(relative(p, root), c) for p, c in rows],
                  [(r["image"], r["captions"]) for r in rows_of(source, root)])  # fmt: skip
        return [{"image": relative(p, root), "captions": c, "image_id": p.name, "split": split} for p, c in rows]
    if form != "multiflow":
        return None
    path = next(root.rglob("cc3m_pretrain.json"))
    kinds = [kind for *_, kind in cc3m.multiflow(path, Kept())]
    above = next(p for p in root.rglob("images") if p.is_dir()).parent
    source = cc3m.CC3M(root=above, annotations=path.parent, form="multiflow")
    rows = rows_of(source.table("retrieval", "train"), root)
    return [{"image": r["image"], "caption": r["captions"][0], "dataset": kind,
             "caption_after_pre_caption": wording.caption(r["captions"][0], "xvlm", 40)}
            for r, kind in zip(rows, kinds, strict=True)]  # fmt: skip


def _samples(root: Path) -> Rows:
    out = []
    for entry in shards.samples(shards.shards(root)):
        told = shards.about(entry)
        content = shards.picture(entry)["bytes"]
        out.append({
            "shard": entry.file.name, "key": entry.text("__key__"), "txt": shards.words(entry),
            "jpg_sha256_16": hashlib.sha256(content).hexdigest()[:16], "json_caption": told.get("caption"),
            "url": told.get("url"),
        })  # fmt: skip
    rows = cc3m.WebDataset(root=root, on_error="skip").table("retrieval", "train")
    agree("webdataset", [r["txt"] or r["json_caption"] for r in out if r["txt"] or r["json_caption"]],
          [r["captions"][0] for r in rows])  # fmt: skip
    return out


@data_set("visual_genome", "region_descriptions.json", "vg_regions*")
def genome(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    wanted = expected["tables"][table]
    if table == "regions":
        return _published(root)
    if table == "multiflow_vg":
        found = list(visual_genome.pretraining(next(root.rglob("vg_pretrain*.json")), Kept()))
        return [{"image": p.picture, "captions": [r.phrase for r in p.regions],
                 "boxes_xyxy": [r.box for r in p.regions]} for _, p in found]  # fmt: skip
    if table not in ("xvlm_lines", "multiflow_regions"):
        return None
    lines = table == "xvlm_lines"
    files = sorted(root.rglob("part-*")) if lines else [next(root.rglob("vg_regions*.json"))]
    found = [each for file in files for each in visual_genome.regions(file, Kept(), lines)]
    if wanted["n_rows"] != len(found):  # the table is without pictures that X-VLM leaves out
        found = [(e, p) for e, p in found if all(boxes.inside(r.box, _size(root, p)) for r in p.regions)]
    return [{"image": p.picture, "whole_image_captions": p.captions, "region_captions": [r.phrase for r in p.regions],
             "boxes_xyxy": [r.box for r in p.regions], "attributes": [r.attributes for r in p.regions]}
            for _, p in found]  # fmt: skip


def _size(root: Path, pictured: visual_genome.Pictured) -> tuple[int, int]:
    cell = {"bytes": pictured.content, "path": None if pictured.content else str(root / pictured.picture)}
    return boxes.size_of(Entry({}, root, "a picture"), cell)


def _published(root: Path) -> Rows:
    path = next(root.rglob("region_descriptions.json"))
    source = visual_genome.VisualGenome(root=root, on_error="skip", rows=None)
    find, out = source._find(), []
    for entry, number, region in visual_genome.published(path, Kept()):
        cell = find(entry, f"{number}.jpg")
        valid = boxes.inside(region.box, boxes.size_of(entry, cell))
        out.append({"image": relative(cell["path"], root), "phrase": region.phrase, "box_xyxy": region.box,
                    "image_id": number, "box_valid_for_xvlm": valid})  # fmt: skip
    rows = rows_of(source.table("grounding", "train"), root)
    agree("grounding", sorted((r["image"], r["phrase"], r["box_xyxy"]) for r in out if r["box_valid_for_xvlm"]),
          sorted((r["image"], r["phrase"], [int(v) for v in r["box"]]) for r in rows))  # fmt: skip
    return out


# --- classes ----------------------------------------------------------------------------------------------------------


@data_set("cifar10", "batches.meta")
def cifar10(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    return _cifar(cifar.CIFAR10(root=root), table)


@data_set("cifar100", "cifar-100-python")
def cifar100(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    return _cifar(cifar.CIFAR100(root=root), table, cifar.CIFAR100(root=root, labels="coarse"))


def _cifar(source: Any, split: str, groups: Any = None) -> Rows | None:
    import numpy as np

    if split not in source.splits:
        return None
    classes, out = list(source.classes()), []
    coarse = list(groups.table("classification", split)["label"]) if groups else []
    for i, row in enumerate(source.table("classification", split)):
        pixels = np.asarray(row["image"])
        out.append({
            "index": i, "label": classes.index(row["label"]), "class": row["label"],
            "sha256_16_of_HWC_bytes": hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
            "pixel_row0_col0_rgb": pixels[0, 0].tolist(), "pixel_row5_col9_rgb": pixels[5, 9].tolist(),
        } | ({"coarse_label": list(groups.classes()).index(coarse[i])} if groups else {}))  # fmt: skip
    return out


@data_set("flowers102", "setid.mat", "imagelabels.mat")
def flowers(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    form, split = ("csv", table[10:]) if table.startswith("multiflow_") else ("mat", table)
    if split not in flowers102.LISTS:
        return None
    source = flowers102.Flowers102(root=root, form=form, pictures=next(p for p in root.rglob("jpg") if p.is_dir()))
    classes = list(source.classes())
    rows = rows_of(source.table("classification", split), root)
    return [{"image": Path(r["image"]).name if form == "csv" else r["image"], "label": classes.index(r["label"]),
             "class": r["label"]} for r in rows]  # fmt: skip


@data_set("hf_imagefolder", "metadata.jsonl", "metadata.csv")
def imagefolder(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    if not (root / table).is_dir():
        return None
    rows = {r["image"]: r for r in rows_of(tables.read(root / table, typed=()), root)}
    split = next((split for split, paths in tables.splits(root).items() if root / table in paths), None)
    if split:
        agree(
            table, set(rows), {r["image"] for r in rows_of(ImageFolder(root=root, train=split).load("", "train"), root)}
        )
    wanted = expected["tables"][table]
    at = wanted["columns"].index("image")  # the order of rows is not part of the format
    return [rows.pop(row[at], {"image": "missing"}) for row in wanted["rows"]] + list(rows.values())
