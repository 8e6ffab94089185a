"""Cases of metrics: retrieval, videos and boxes against the numbers of the official code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from tests.comparisons.metrics import numbers, same, table
from tests.conformance import Case, Check, Skipped, metric
from trimtab.data import video
from trimtab.metrics import boxes, eccv, retrieval, videos


def _owners(info: dict[str, Any], scores: torch.Tensor) -> torch.Tensor:
    """The picture of each text: as the case says, or equally many of each, in order."""
    pictures, texts = scores.shape
    info.get("n_images")
    if (owner := info.get("txt2img")) is not None:
        return torch.tensor(owner)
    if isinstance(counts := info.get("captions_per_image"), list):
        return torch.repeat_interleave(torch.arange(pictures), torch.tensor(counts))
    if texts % pictures:
        raise ValueError(f"{texts} texts of {pictures} pictures: how many each has is not known")
    return torch.arange(texts) // (texts // pictures)


def _scores(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@metric("retrieval", "sims", "official.full", told=("how", "what", "layout", "notes"))
def retrieval_ranks(case: Case) -> Iterator[Check | Skipped]:
    scores, official = _scores(case.info["sims"]), case.info["official"]
    owner = _owners(case.info, scores)
    ranks, full = retrieval.ranks(scores, owner), official["full"]
    yield from _both_ways("full", retrieval.both_ways(ranks), full)
    for name, found in (("i2t_ranks0", ranks.image_to_text), ("t2i_ranks0", ranks.text_to_image)):
        if name in full:
            yield numbers(name, found.tolist(), full[name])
    for name, best in (("i2t_top1", scores.argmax(dim=1)), ("t2i_top1", scores.argmax(dim=0))):
        if name in full:
            yield numbers(name, best.tolist(), full[name])
    if folds := official.get("folds"):
        parts = retrieval.fold_indices(owner, len(scores), len(folds))
        for i, ((pictures, own), wanted) in enumerate(zip(parts, folds, strict=True)):
            part = retrieval.ranks(scores[pictures][:, own], owner[own] - pictures.start)
            yield from _both_ways(f"fold {i}", retrieval.both_ways(part), wanted)
        mean = retrieval.evaluate_scores(scores, owner, folds=len(folds))
        yield from _both_ways("mean of folds", mean, official["mean_of_folds"])
    # The same ranks from embeddings whose products are these scores, in blocks of a few rows.
    blocks = retrieval.ranks_of_embeddings(scores, torch.eye(scores.shape[1]).double(), owner, block_bytes=40_000)
    yield same("ranks in blocks", blocks.image_to_text.tolist(), ranks.image_to_text.tolist())
    yield same("ranks in blocks", blocks.text_to_image.tolist(), ranks.text_to_image.tolist())


def _both_ways(name: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Check]:
    yield from table(name, found, {key: wanted[key] for key in ("i2t", "t2i", "rsum") if key in wanted})


@metric("retrieval with equal scores", "sims", "bounds.i2t",
        told=("how", "what", "layout", "notes", "official_on_this_machine"))  # fmt: skip
def retrieval_ties(case: Case) -> Iterator[Check | Skipped]:
    """The official order is not defined: ours must be within the bounds, and each rule where the case says it is."""
    scores = _scores(case.info["sims"])
    owner, bounds = _owners(case.info, scores), case.info["bounds"]
    default = retrieval.both_ways(retrieval.ranks(scores, owner))
    rules = {"favourable": "for", "unfavourable": "against"}
    for way in ("i2t", "t2i"):
        for name, high in bounds[way]["favourable"].items():
            low, found = bounds[way]["unfavourable"][name], default[way][name]
            yield Check(f"{way} {name} within bounds", max(low - found, found - high, 0), 1e-6)
        for name, rule in rules.items():
            result = retrieval.both_ways(retrieval.ranks(scores, owner, ties=rule))[way]  # type: ignore[arg-type]
            wanted = bounds[way][name]
            yield from table(f"{way} {name}", {key: result[key] for key in wanted}, wanted)
    if stable := case.info.get("with_stable_sort"):
        later = retrieval.both_ways(retrieval.ranks(scores, owner, ties="later"))
        for way in stable.keys() & {"i2t", "t2i"}:
            yield from table(f"{way} later first", {key: later[way][key] for key in stable[way]}, stable[way])


@metric("matching", "scores_i2t", "scores_t2i", told=("how", "what", "notes"))
def matching(case: Case) -> Iterator[Check | Skipped]:
    owner = case.info["txt2img"]
    for name, part in (("all pairs", case.info), ("k_test", case.info.get("topk"))):
        if part is not None:
            ranks = retrieval.ranks(_scores(part["scores_i2t"]), owner, _scores(part["scores_t2i"]))
            yield from table(name, retrieval.matching_summary(ranks), part["official"])


@metric("several right items", "ground_truth", "ranked", told=("how", "what", "notes"))
def several_right(case: Case) -> Iterator[Check | Skipped]:
    official = case.info["official"]
    ks = sorted({1, *(int(k) for k in official.get("recall", {}))})
    result = eccv.evaluate(case.info["ground_truth"], case.info["ranked"], ks)
    names = {"eccv_map_at_r": "map@r", "eccv_rprecision": "r-precision", "eccv_r1": "recall@1",
             "rprecision_pmrp": "r-precision"}  # fmt: skip
    found = {theirs: result[ours] for theirs, ours in names.items() if theirs in official}
    yield from table("eccv", found | {"recall": {k: result[f"recall@{k}"] for k in ks if str(k) in
                                                 official.get("recall", {})}}, official)  # fmt: skip


def _video_names(result: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    found = result | {"MR": result["MedianR"], "cols": result["ranks"]}
    return {key: value for key, value in found.items() if key in wanted}


@metric("video retrieval, one sentence", "sims", "official.t2v",
        told=("how", "what", "layout", "notes", "bounds_t2v", "bounds_v2t"))  # fmt: skip
def video_one(case: Case) -> Iterator[Check | Skipped]:
    scores = _scores(case.info["sims"])
    result = videos.one_sentence(scores)
    for way, wanted in case.info["official"].items():
        yield from table(way, _video_names(result[way], wanted), wanted)
    if "blip" in case.info:
        ranks = retrieval.ranks(scores.T, range(len(scores)), scores)
        yield from table("blip", retrieval.matching_summary(ranks, item="vid"), case.info["blip"])


@metric(
    "video retrieval, several sentences",
    "sims",
    "captions_per_video",
    "official.t2v",
    told=("how", "what", "layout", "notes"),
)
def video_several(case: Case) -> Iterator[Check | Skipped]:
    result = videos.several_sentences(_scores(case.info["sims"]), case.info["captions_per_video"])
    for way, wanted in case.info["official"].items():
        yield from table(way, _video_names(result[way], wanted), wanted)


@metric("video frames", "clip4clip", told=("how", "what", "notes"))
def video_frames(case: Case) -> Iterator[Check | Skipped]:
    keep = {0: "first", 1: "last", 2: "spread"}
    for row in case.info["clip4clip"]:
        length, rate = video.Length(row["n_frames"], row["fps"]), row["feature_framerate"]
        name = f"CLIP4Clip, {row['n_frames']} frames at {row['fps']}"
        yield same(name, video.by_second(length, int(rate)), row["indices_read"])
        for rule, wanted in row.get("kept", {}).items():
            most, where = map(int, re.findall(r"\d+", rule))
            found = video.by_second(length, int(rate), most, keep[where])  # type: ignore[arg-type]
            yield same(f"{name}, {rule}", found, wanted)
    for row in case.info.get("blip", ()):
        count, wanted = row["num_frm"], row["uniform"]
        name = f"BLIP, {count} of {row['n_frames']} frames"
        if count > row["n_frames"]:
            yield Skipped(f"{name}: refused, the video is shorter than the frames asked for")
            continue
        if len(wanted) > count:
            yield Skipped(f"{name}: {len(wanted) - count} more than asked for by a rounding error, not compared")
        yield same(name, video.evenly(video.Length(row["n_frames"], 1.0), count), wanted[:count])


def _mdetr_inputs(info: dict[str, Any]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, list[str]]:
    predictions = [
        (torch.tensor(row["scores"]), torch.tensor(row["boxes_xyxy"])) for row in info["predictions"]
    ]  # fmt: skip
    true = boxes.corners(_scores(info["ground_truth_xywh"]))
    return predictions, true, [row["dataset_name"] for row in info["images"]]


@metric("mdetr precision", "ground_truth_xywh", "predictions", "images", told=("how", "what", "notes"))
def mdetr_precision(case: Case) -> Iterator[Check | Skipped]:
    predictions, true, groups = _mdetr_inputs(case.info)
    result = boxes.mdetr_precision(predictions, true, groups)
    for group, wanted in case.info["official"].items():
        # A data set without an expression here is 0 in the official list.
        found = result.get(group, {f"P@{k}": 0.0 for k in (1, 5, 10)})
        yield numbers(group, sorted(found[f"P@{k}"] for k in (1, 5, 10)), wanted)
    if usual := case.info.get("precision_iou_05"):
        found = {group: result[group]["accuracy"] for group in usual["value"]}
        yield from table("IoU of 0.5", found, usual["value"])
    first = torch.stack([boxes.best_first(*prediction)[0] for prediction in predictions])
    for name, overlap in (("top1_iou", boxes.iou), ("top1_giou", boxes.giou)):
        if name in case.info:
            yield numbers(name, overlap(first, true.float()).tolist(), case.info[name])


@metric("x-vlm boxes", "inputs", "xvlm_iou", told=("how", "what", "notes"))
def xvlm_boxes(case: Case) -> Iterator[Check | Skipped]:
    rows = case.info["inputs"]
    sizes = _scores([[row["width"], row["height"]] * 2 for row in rows])
    found = boxes.centred_corners(_scores([row["pred_cxcywh_normalised"] for row in rows]) * sizes)
    true = boxes.corners(_scores([row["truth_xywh"] for row in rows]))
    splits = [row["split"] for row in rows]
    theirs, plain = boxes.accuracy(found, true, rule="x-vlm")["iou"], boxes.accuracy(found, true)["iou"]
    yield numbers("x-vlm IoU", theirs.tolist(), case.info["xvlm_iou"])
    shares = boxes.accuracy_by(splits, theirs)
    wanted = case.info["official"]
    yield from table("x-vlm", {name: shares[name.removesuffix("_d")] for name in wanted}, wanted)
    if "plain_iou" in case.info:
        yield numbers("plain IoU", plain.tolist(), case.info["plain_iou"])
    if usual := case.info.get("plain_accuracy_iou_05"):
        shares = boxes.accuracy_by(splits, plain)
        yield from table("plain", {name: shares[name] for name in usual}, usual)


@metric("mdetr boxes", "pred_logits", "pred_boxes_cxcywh", told=("how", "what", "notes"))
def mdetr_boxes(case: Case) -> Iterator[Check | Skipped]:
    parts = (_scores(case.info[name]) for name in ("pred_logits", "pred_boxes_cxcywh", "target_sizes_hw"))
    for i, (found, wanted) in enumerate(zip(boxes.mdetr_boxes(*parts), case.info["official"], strict=True)):
        yield numbers(f"picture {i} scores", found["scores"].tolist(), wanted["scores"])
        yield numbers(
            f"picture {i} boxes", found["boxes"].flatten().tolist(), _scores(wanted["boxes"]).flatten().tolist()
        )
