"""Flickr30K, COCO, VQA v2, GQA, NLVR2 and SNLI-VE against tables of rows, and their broken files."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.comparisons.data import Rows, broken, data_set, rows_of
from trimtab.data.formats.coco import COCO, COCOCaptions
from trimtab.data.formats.gqa import GQA
from trimtab.data.formats.karpathy import Captioned, Flickr30K
from trimtab.data.formats.nlvr2 import NLVR2
from trimtab.data.formats.snli_ve import LABELS, SNLIVE
from trimtab.data.formats.vqav2 import VQAv2
from trimtab.data.reading import find_file, json_lines, json_rows
from trimtab.data.tables import PICTURES


@data_set("flickr30k", "dataset_flickr30k.json", "flickr30k_*.json")
def flickr30k(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    form, _, split = table.partition("_")
    if form == "karpathy":
        return karpathy(Flickr30K(root=root), split, root)
    return lists(Flickr30K, root, split, "xvlm") if form == "xvlm" else None


@data_set("coco", "dataset_coco.json", "coco_karpathy_*.json", "captions_*20*.json")
def coco(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    form, _, split = table.partition("_")
    if form == "karpathy":
        return karpathy(COCO(root=root), split, root)
    if form == "captions":
        return rows_of(COCOCaptions(root=root).table("captioning", split), root)
    if form == "vse":
        return vse(root, split)
    if form != "blip":
        return None
    if split.endswith("_int_ids"):
        rows = rows_of(COCO(root=root, form="xvlm").table("captioning", split.removesuffix("_int_ids")), root)
        return [{"image": r["image"], "coco_id": r["image_id"]} for r in rows]
    plain = split.removesuffix("_xvlm_pre")
    return lists(COCO, root, plain, "blip" if plain == split else "xvlm")


def karpathy(source: Captioned, split: str, root: Path) -> Rows:
    rows = rows_of(source.table("retrieval", split), root)
    return [{**r, "split": split, "sentids": [int(i) for i in r["caption_ids"]]} for r in rows]


def lists(source: type[Captioned], root: Path, split: str, words: str) -> Rows:
    """X-VLM's and BLIP's lists, with the numbers that their readers give captions and pictures."""
    forms = (source(root=root, form="xvlm", wording=w, train_rows="caption") for w in ("as written", words))
    written, told = (rows_of(each.table("retrieval", split), root) for each in forms)
    if split == "train":
        number = {image: i for i, image in enumerate(dict.fromkeys(r["image_id"] for r in written))}
        return [{**r, "caption": r["captions"][0], "caption_after_pre_caption": t["captions"][0],
                 "image_index": number[r["image_id"]]} for r, t in zip(written, told, strict=True)]  # fmt: skip
    out, count = [], 0
    for row in told:
        indices = list(range(count, count + len(row["captions"])))
        out.append({**row, "captions_after_pre_caption": row["captions"], "caption_indices": indices})
        count += len(indices)
    return out


def vse(root: Path, split: str) -> Rows:
    """One row a caption, in the order of the lines. The picture's number is that of its line of ids."""
    rows = rows_of(COCO(root=root, form="precomp").table("retrieval", split), root)
    left = {r["image_id"]: iter(r["captions"]) for r in rows}
    image = {r["image_id"]: r["image"] for r in rows}
    ids = next(root.rglob(f"{split}_ids.txt")).read_text().split()
    each = sum(len(r["captions"]) for r in rows) // len(ids)
    rows = []
    for k in range(each * len(ids)):
        number = ids[k // each]
        rows.append({"image": image[number], "caption": next(left[number]), "image_index": k // each, "index": k})
    return rows


# --- VQA v2 -----------------------------------------------------------------------------------------------------------


@data_set("vqav2", "v2_OpenEnded_mscoco_*_questions.json", "vqa_train.json")
def vqav2(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    from trimtab.metrics.answers import soft_targets
    from trimtab.metrics.words import normalise_vilt

    form, _, split = table.partition("_")
    if table == "normalised_targets":
        source = VQAv2(root=root, outside="keep")
        classes = list(source.answers())
        if classes != (wanted := expected["notes"]["vocabulary_in_order"]):
            raise ValueError(f"vocabulary: expected {wanted}, found {classes}")
        known = {a: i for i, a in enumerate(classes)}
        return [{
            "question_id": r["question_id"], "multiple_choice_answer": r["answer"],
            "multiple_choice_answer_normalised": normalise_vilt(r["answer"]),
            "answer_to_score": {classes[i]: s for i, s in soft_targets(r["answers"], known, normalise_vilt).items()},
        } for r in source.table("vqa", "train", "val")]  # fmt: skip
    if form == "vilt":
        source = VQAv2(root=root)
        rows = rows_of(source.table("vqa", split), root)
        classes = list(source.answers())
        targets = [soft_targets(r["answers"], {a: i for i, a in enumerate(classes)}) for r in rows]
        return [{**r, "split": split, "answers": [classes[i] for i in t], "answer_labels": list(t),
                 "answer_scores": list(t.values())} for r, t in zip(rows, targets, strict=True)]  # fmt: skip
    if table == "vg_question_answers":
        rows = rows_of(VQAv2(root=root).table("vqa", "vg"), root)
        return [{**r, "qa_id": r["question_id"]} for r in rows]
    return vqa_lists(root, split.removeprefix("vqa_").removesuffix("_qa")) if form == "xvlm" else None


def vqa_lists(root: Path, split: str) -> Rows:
    written, xvlm, blip = (
        rows_of(VQAv2(root=root, form="xvlm", outside="keep", wording=w).table("vqa", split), root)
        for w in ("as written", "xvlm", "blip")
    )
    file = find_file(root, "vg_qa.json" if split == "vg" else f"vqa_{split}.json")
    out = []
    for row, x, b, entry in zip(written, xvlm, blip, json_rows(file), strict=True):
        weights: dict[str, float] = {}
        for answer, weight in zip(row["answers"], row["weights"], strict=True):
            weights[answer] = weights.get(answer, 0.0) + weight
        # The table has the path as it is written, below the picture root of its own set.
        listed = entry.values
        if Path(row["image"]).name != Path(listed["image"]).name:
            raise entry.error(f"its picture was read as {row['image']}")
        out.append({**row, "image": listed["image"], "question_xvlm": x["question"], "question_blip": b["question"],
                    "dataset": listed.get("dataset"), "answers": list(weights),
                    "weights": list(weights.values())})  # fmt: skip
    return out


# --- GQA, NLVR2, SNLI-VE ----------------------------------------------------------------------------------------------


@data_set("gqa", "*_balanced_questions.json", "finetune_gqa_*.json")
def gqa(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    if table.startswith("mdetr_"):
        split = table.removeprefix("mdetr_")
        split = split if split in GQA.splits else f"{split}_balanced"
        rows = rows_of(GQA(root=root, form="mdetr").table("vqa", split), root)
        return [{**r, "image": Path(r["image"]).name, "question_type": r["semantic"]} for r in rows]
    rows = rows_of(GQA(root=root).table("vqa", table), root)
    return [{**r, "isBalanced": r["balanced"]} for r in rows]


@data_set("nlvr2", "balanced_dev.json", "nlvr_*.json")
def nlvr2(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    if table.startswith("xvlm_"):
        split = table.removeprefix("xvlm_")
        source = NLVR2(root=root, form="xvlm", wording="xvlm")
        rows = rows_of(source.table("pairs", "test1" if split == "test" else split), root)
        return [{**r, "sentence_after_pre_caption": r["statement"], "label": int(r["label"] == "true")} for r in rows]
    rows = rows_of(NLVR2(root=root).table("pairs", table), root)
    return [{"left_image": r["images"][0], "right_image": r["images"][1], "sentence": r["statement"],
             "label": r["label"] == "true", "identifier": r["identifier"], "split": table,
             "pair": r["identifier"].rpartition("-")[0]} for r in rows]  # fmt: skip


@data_set("snli_ve", "snli_ve_*.jsonl")
def snli_ve(root: Path, table: str, expected: dict[str, Any]) -> Rows | None:
    rows = rows_of(SNLIVE(root=root).table("entailment", table), root)
    path = next(root.rglob(f"snli_ve_{table}.jsonl"))
    told = {e.id("pairID"): e.values.get("annotator_labels") for e in json_lines(path)}
    return [{**r, "hypothesis": r["statement"], "premise_text": r["premise"], "split": table,
             "label_id_meter": LABELS.index(r["label"]), "annotator_labels": told[r["pair_id"]]}
            for r in rows]  # fmt: skip


# --- broken files -----------------------------------------------------------------------------------------------------


def _first(content: Any, *keys: str) -> bool:
    """Whether a file holds objects, the first of which has these fields: as a list, or one a line."""
    rows = content if isinstance(content, (list, tuple)) else []
    while isinstance(rows, (list, tuple)) and rows:
        rows = rows[0]
    return isinstance(rows, dict) and all(key in rows for key in keys)


def _listed(content: Any, name: str, *keys: str) -> bool:
    return isinstance(content, dict) and _first(content.get(name), *keys)


@broken(lambda path, content: _listed(content, "images", "sentences"))
def captions(path: Path, beside: dict[str, Path]) -> None:
    from trimtab.data.reading import Kept

    images = json.loads(path.read_text())["images"]
    source = (
        COCO(root=beside.get("coco", path.parent))
        if "filepath" in images[0]
        else Flickr30K(root=beside.get("flickr30k", path.parent))
    )
    for split in ("train", "val", "test"):
        source.read_file(path, split, Kept())


@broken(lambda path, content: path.suffix.lower() in PICTURES)
def picture(path: Path, beside: dict[str, Path]) -> None:
    """Decoding names the picture; reading that looks at pictures names the row too, and leaves it out if asked."""
    from trimtab.data.images import ImageError, decode
    from trimtab.data.reading import Kept

    try:
        decode({"path": str(path)})
        return
    except ImageError as error:
        if str(path) not in str(error):
            raise AssertionError(f"the picture is not named: {error}") from error
    row = {"filename": path.name, "split": "train", "sentences": [{"raw": "a picture"}]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dataset_flickr30k.json"
        file.write_text(json.dumps({"images": [row]}))
        kept = Kept("skip")
        Flickr30K(root=path.parent, on_error="skip").read_file(file, "train", kept)
    raise ValueError(kept.left_out[0])


@broken(lambda path, content: _listed(content, "annotations", "multiple_choice_answer"))
def annotations(path: Path, beside: dict[str, Path]) -> None:
    from trimtab.data.reading import Kept

    part = json.loads(path.read_text())["data_subtype"]
    questions = next(beside["vqav2"].rglob(f"v2_OpenEnded_mscoco_{part}_questions.json"))
    split = {"train2014": "train", "val2014": "val"}[part]
    VQAv2(root=beside["vqav2"], outside="keep").read_file(questions, path, split, Kept())


@broken(lambda path, content: _first(content, "identifier", "sentence"))
def statements(path: Path, beside: dict[str, Path]) -> None:
    from trimtab.data.reading import Kept

    NLVR2(root=beside.get("nlvr2", path.parent)).read_file(path, "pairs", "dev", Kept())


@broken(lambda path, content: _first(content, "gold_label"))
def entailment(path: Path, beside: dict[str, Path]) -> None:
    from trimtab.data.reading import Kept

    SNLIVE(root=beside.get("snli_ve", path.parent)).read_file(path, "dev", Kept())


@broken(lambda path, content: (_first(content, "question_id", "answer") and not _first(content, "question"))
        or _first(content, "questionId", "prediction"))  # fmt: skip
def predictions(path: Path, beside: dict[str, Path]) -> None:
    form = "vqa" if "question_id" in json.loads(path.read_text())[0] else "gqa"
    told = {"vqa": ("vqav2", "v2_OpenEnded_*_questions.json"), "gqa": ("gqa", "*_balanced_questions.json")}
    _predicted(form, path, beside, *told[form])


@broken(lambda path, content: path.suffix == ".csv" and bool(re.match(r"[\w-]+-\d+-\d+-\d+,", str(content))))
def pairs(path: Path, beside: dict[str, Path]) -> None:
    _predicted("nlvr2", path, beside, "nlvr2", "*.json")


def _predicted(form: str, path: Path, beside: dict[str, Path], name: str, pattern: str) -> None:
    """Hold predictions against the file of questions with which they have most ids in common."""
    from trimtab.metrics import results

    text, best = path.read_text(), (0, [])
    for questions in sorted(beside[name].rglob(pattern)):
        try:
            known = results.ids_of(questions)
        except ValueError:  # another file of the set, of another form
            continue
        shared = sum(str(i) in text for i in known)
        best = max(best, (shared, known), key=lambda found: found[0])
    results.read(form, path, best[1])


@broken(lambda path, content: isinstance(content, str) and path.suffix == ".json")
def cut_off(path: Path, beside: dict[str, Path]) -> None:
    """No JSON at all, so that nothing tells whose it is: every reader reads it like this."""
    from trimtab.data.reading import read_json

    read_json(path)
