"""Pruners on the toy vision-text-fusion model: evidence, scores and masks at each sparsity, changed weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conformance import Case, Check, Skipped, close, compares
from tests.models.toy_vlm import ToyVLM
from trimtab.anatomy import Weight
from trimtab.methods import METHODS
from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence, collect
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.prunable import prunable
from trimtab.methods.prune.scores import SCORES

TEXT = ("text_ids", "text_atts")
# The toy model has no dropout: only for TAMT, which trains, is it in training mode.
EVAL = {"mode": "eval"}
SAME = ("sequential_run_with_reset_identical",)  # of masks found one after another in one run
LOSS = (*TEXT, "text_ids_masked", "masked_pos", "masked_ids")
REGION = ("idx_to_group_img", "image_atts")


class Toy:
    """The toy model of a case with its batches, read from the case's folder."""

    def __init__(self, case: Case):
        import json

        name = case.info.get("model", case.name)
        self.info = json.loads((case.folder / f"{name}.json").read_text())
        self.tensors = load_file(case.folder / f"{name}.safetensors")
        self.model = ToyVLM(**self.info["config"])
        prefix = "weight."
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)})
        self.model.eval()
        self.rounds = self.info["num_batches_per_step"]

    def batches(self, fields: tuple[str, ...], kind: str = "batch") -> list[dict[str, Tensor]]:
        """All batches of a kind (`batch` or `region`), with the images and the given fields."""
        count = len({k.split(".")[1] for k in self.tensors if k.startswith(f"{kind}.")})
        return [{f: self.tensors[f"{kind}.{i}.{f}"] for f in ("images", *fields)} for i in range(count)]

    def calibration(self, batches: list[dict], per_round: int, mask: str = "text_atts") -> Calibration:
        return Calibration(self.model, self.model, self.model.anatomy(mask), lambda: batches, per_round)


def label(sparsity: float) -> str:
    return f"s{sparsity * 100:.0f}"


def different(name: str, masks: Masks | dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> Check:
    """How many bits of the masks are not the reference's."""
    wanted = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert masks.keys() == wanted.keys()
    return Check(name, sum(int((masks[path] != wanted[path]).sum()) for path in wanted), 0)


def pruner(name: str, **settings: Any) -> Pruner:
    return METHODS[name](**settings)


def found(method: Pruner, calibration: Calibration, case: Case) -> Iterator[tuple[str, Masks]]:
    """Masks at each of a case's sparsities that it has tensors for."""
    have = [s for s in case.info["sparsities"] if any(k.startswith(f"{label(s)}.mask.") for k in case.tensors)]
    yield from zip(map(label, have), method.find(calibration, have), strict=True)


def missing(case: Case) -> Iterator[Skipped]:
    """The sparsities at which the reference code gave nothing."""
    for sparsity in case.info["sparsities"]:
        name = label(sparsity)
        if not any(k.startswith(f"{name}.mask.") for k in case.tensors):
            errors = sorted({v for k, v in case.info["stats"].items() if k.startswith(f"{name}.error")})
            yield Skipped(f"{name}: the reference code failed there: {', '.join(errors) or 'no tensors'}")


@compares(
    "B toy model",
    told=("description", "n_prunable", "pruning_steps", "keys_to_exclude", "config", "num_batches_per_step"),
)
def toy(case: Case) -> Iterator[Check | Skipped]:
    """The toy model itself: prunable weights, modalities, and the losses of both kinds of batches."""
    model = Toy(case)
    weights = model.model.anatomy().weights(model.model)
    yield Check("prunable weights and their order", [w.path for w in weights] != case.info["prunable"], 0)
    yield Check("modalities", {w.path: w.modality for w in weights} != case.info["modality"], 0)
    for kind, name, fields in (
        ("batch", "loss_per_batch", LOSS),
        ("region", "region_loss_per_batch", (*LOSS, *REGION)),
    ):
        with torch.no_grad():
            losses = torch.stack([model.model(**batch)["losses"] for batch in model.batches(fields, kind)])
        yield close(name, losses, case.tensors[name])


@compares("pruner mag", assumes=EVAL)
def magnitude(case: Case) -> Iterator[Check | Skipped]:
    model, names = Toy(case), {"global": "omp", "local": "local-mp", "modality": "modality-mp"}
    for scope in case.info["scopes"]:
        masks = pruner(names[scope]).find(model.calibration([], 0), case.info["sparsities"])
        for sparsity, mask in zip(case.info["sparsities"], masks, strict=True):
            prefix = f"{scope}.{label(sparsity)}.mask."
            yield different(prefix.rstrip("."), mask, case.tensors, prefix)


@compares("pruner l2", "pruner lamp", assumes=EVAL)
def weights_only(case: Case) -> Iterator[Check | Skipped]:
    model, method = Toy(case), pruner(case.info["pruner"])
    for weight, tensor in prunable(model.model, model.model.anatomy()).items():
        own = SCORES[method.score](tensor, [Evidence(len(tensor))])
        # The reference takes LAMP's sums from the total, which costs it up to 8e-6 of the largest scores.
        yield close(f"score of {weight.path}", own, case.tensors[f"score.{weight.path}"], absolute=1e-12)
    for name, masks in found(method, model.calibration([], 0), case):
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")


def both_kinds(case: Case, model: Toy, fields: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """A case's calibration batches: general ones, each followed by a region batch if the case combines them."""
    general, region = model.batches(fields), model.batches((*fields, *REGION), "region")
    used = case.info.get("batches_used", range(model.rounds))
    combined = case.info.get("combined_general_and_region")
    return [b for i in used for b in ([general[i], region[i]] if combined else [general[i]])]


@compares("pruner snip", told=SAME, assumes=EVAL)
def snip(case: Case) -> Iterator[Check | Skipped]:
    model, method = Toy(case), pruner("snip")
    batches = both_kinds(case, model, LOSS)
    calibration = model.calibration(batches, len(batches))
    weights = prunable(model.model, calibration.anatomy)
    evidence = collect(calibration, weights, {"gradient"}, batches)
    yield from normalised(
        "score", {w: SCORES[method.score](t, evidence[w]) for w, t in weights.items()}, case, "score."
    )
    for name, masks in found(method, calibration, case):
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")


def normalised(name: str, scores: dict[Weight, Tensor], case: Case, prefix: str) -> Iterator[Check]:
    """Scores against reference scores, which are divided by their sum over the model."""
    total = sum(s.sum() for s in scores.values())
    for weight, own in scores.items():
        yield close(f"{name} of {weight.path}", own / total, case.tensors[prefix + weight.path], 1e-4, 1e-9)


@compares(
    "pruner itersnip",
    told=SAME,
    assumes=EVAL | {"schedule": "exp", "batches_used": re.escape("step i uses batches [i*NB,(i+1)*NB)")},
)
def itersnip(case: Case) -> Iterator[Check | Skipped]:
    model = Toy(case)
    method = pruner("itersnip", steps=case.info["steps"])
    calibration = model.calibration(model.batches(LOSS), model.rounds)
    for sparsity in case.info["sparsities"]:
        name = label(sparsity)
        levels = torch.tensor(case.info["schedule_values"][name])
        yield close(f"{name}: sparsity after each step", torch.tensor(method.settings.levels(sparsity)), levels)
        scores = {}
        for i, (scores, masks) in enumerate(method.trace(calibration, sparsity)):  # noqa: B007
            own = {w.path: m for w, m in masks.items()}
            yield different(f"{name}.step{i}.mask", own, case.tensors, f"{name}.step{i}.mask.")
        yield from normalised(f"{name}.final_score", scores, case, f"{name}.final_score.")
    for name, masks in found(method, calibration, case):
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")


@compares("pruner multiflow", told=SAME, assumes=EVAL)
def multiflow(case: Case) -> Iterator[Check | Skipped]:
    """Where region batches are calibrated on too, the published code takes a region's token ids for its mask, so that
    only tokens of the id 1 count. That is a mistake in what is read as the mask, so the comparison lets the anatomy
    read it."""
    model, method = Toy(case), pruner("multiflow")
    batches = both_kinds(case, model, TEXT)
    for batch in batches:
        batch["counted_tokens"] = batch["text_ids"] == 1 if "image_atts" in batch else batch["text_atts"]
    calibration = model.calibration(batches, len(batches), mask="counted_tokens")
    weights = prunable(model.model, calibration.anatomy)
    evidence = collect(calibration, weights, {"squares"}, batches)
    for weight, tensor in weights.items():
        path, (part,) = weight.path, evidence[weight]
        yield close(f"mean squares of {path}", part.squares, case.tensors[f"actn_sq_norm.{path}"], absolute=1e-6)
        yield close(f"score of {path}", SCORES["flow"](tensor, [part]), case.tensors[f"score.{path}"], absolute=1e-8)
    for name, masks in found(method, calibration, case):
        shares = dict(
            zip(case.info["order_of_distribution"], case.tensors[f"{name}.distribution"].tolist(), strict=True)
        )
        gone = {path: int((~mask).sum()) for path, mask in masks.items()}
        wrong = sum(gone[path] != int(share * masks[path].numel()) for path, share in shares.items())
        yield Check(f"{name}: tensors that give another number", wrong, 0)
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")


@compares("pruner chita", "pruner chitapp", assumes=EVAL | {"schedule": "exp", "steps": "1"})
def chita(case: Case) -> Iterator[Check | Skipped]:
    """Weights within 1e-5, or within one and a half times what the reference's weights move by when it is run in double
    precision, which the case states: ours are solved for in double precision."""
    model, info = Toy(case), case.info
    settings = {"ridge": info["lambda_"], "block_size": int(info["block_size"]), "faithful": True}
    method = (
        pruner("chita", **settings) if info["pruner"] == "chita" else pruner("chita++", steps=info["steps"], **settings)
    )
    calibration = model.calibration(model.batches(LOSS), info["num_batches"])
    weights = prunable(model.model, calibration.anatomy)
    rows = method.quadratic(calibration, weights, next(calibration.rounds()), torch.ones(1)).rows
    yield close("gradients of the first step", rows, case.tensors["grad_matrix_step0"], 3e-4, 1e-7)
    for name, masks in found(method, calibration, case):
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")
        pairs = [(masks.weights[path], case.tensors[f"{name}.weight.{path}"]) for path in masks]
        error = max(float((own - wanted).abs().max()) for own, wanted in pairs)
        drift = info["stats"][f"{name}.float64_rerun"]["max_abs_weight_diff"]
        yield Check(f"{name}.weight", error, max(1e-5, 1.5 * drift))
    yield from missing(case)


@compares(
    "pruner tamt",
    assumes={
        "mode": "train",
        "optimizer": r"AdamW defaults \(betas \.9/\.999, eps 1e-8, weight_decay 0\.01\)",
        "schedule": "linear to 0 over num_batches_per_step, no warm-up",
    },
)
def tamt(case: Case) -> Iterator[Check | Skipped]:
    """Learned mask values, and the masks they give. Adam's first steps are as large as the learning rate whatever the
    gradient's size, so where a gradient is nearly zero rounding decides its direction: values may be a few steps apart,
    and masks by the weights whose values lie that close to the threshold."""
    model, info = Toy(case), case.info
    batches = [model.batches(LOSS)[i] for i in info["batches_used"]]
    method = pruner("tamt", learning_rate=info["lr"], alpha=info["alpha"], faithful=True)
    calibration = model.calibration(batches, len(batches))
    for sparsity in info["sparsities"]:
        name = label(sparsity)
        *_, (first, last) = method.trace(calibration, sparsity)
        for what, values in (("init_mask_values", first), ("mask_values", last)):
            for weight, own in values.items():
                wanted = case.tensors[f"{name}.{what}.{weight.path}"]
                yield close(f"{name}.{what} of {weight.path}", own.abs(), wanted.abs(), 1e-4, 1e-6)
    for name, masks in found(method, calibration, case):
        yield different(f"{name}.mask", masks, case.tensors, f"{name}.mask.")
