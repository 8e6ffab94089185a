"""VSE-infinity: grids of both CNNs, and regions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, compares, stage
from trimtab.backbones.vse.model import hinge_loss


@compares("backbone vse_infty", told=("patched", "n_params"))
def vse(case: Case) -> Iterator[Check | Skipped]:
    model = build(case, f"model_best_{case.stage}.pth", text_heads=case.info["tiny"]["th"])
    given = {k.removeprefix(f"{case.stage}.in."): v for k, v in case.tensors.items()}
    found = {}
    with torch.no_grad():
        text = model.encode_text(given["text_ids"])
        found["bert"] = model.txt_enc.bert(given["text_ids"], (given["text_ids"] != 0).long()).last_hidden_state
        if "image" in given:
            found["grid_features"] = model.img_enc.tokens(given["image"])
            image, pool = model.encode_image(given["image"]), model.img_enc.image_encoder.gpool
            found["image_pool_weights"] = pool.weights(found["grid_features"].shape[1], None).expand(len(image), -1, -1)
        else:
            valid = torch.arange(given["regions"].shape[1]) < given["region_lengths"][:, None]
            image = model.encode_image(given["regions"], valid)
            found["image_pool_weights"] = model.img_enc.gpool.weights(valid.shape[1], valid)
        similar = image @ text.T
        found |= {"image_emb": image, "text_emb": text, "sims": similar}
        found |= {"loss_sum": hinge_loss(similar, hardest=False), "loss_max_violation": hinge_loss(similar)}
        yield from stage(case, found)
