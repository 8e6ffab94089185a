"""CLIP4Clip: the four heads, and patches over three frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.comparisons.backbones import build
from tests.conformance import Case, Check, Skipped, close, compares, stage
from trimtab.backbones.clip4clip.model import symmetric_loss


@compares("backbone clip4clip", told=("dtypes", "n_params"))
def clip4clip(case: Case) -> Iterator[Check | Skipped]:
    name, precision = str(case.stage).split(".")  # `seqLSTM.fp32`, say
    tiny = case.info["tiny"]
    heads = {"vision_heads": tiny["vh"], "text_heads": tiny["th"], "cross_heads": tiny["ch"]}
    model = build(case, f"pytorch_model_{name}.bin.0", **heads)
    given = {k.removeprefix("meanP.in."): v for k, v in case.tensors.items() if ".in." in k}  # shared by all heads
    with torch.no_grad():
        text = model.encode_text(given["input_ids"][:, 0])
        frames = model.encode_video(given["video"][:, 0, :, 0])
        similar = model.compare(text, frames, given["video_mask"][:, 0])
        found = {"sequence_output": text[:, None], "visual_output": frames, "sim_logits_text_by_video": similar,
                 "loss": symmetric_loss(similar)}  # fmt: skip
        if precision == "fp16":  # computed in half precision; ours from the same weights in float32
            for key, value in found.items():
                if (wanted := case.tensors.get(f"{case.stage}.out.{key}")) is not None:
                    yield close(key, value, wanted, relative=1e-2, absolute=1e-2)
            return
        yield from stage(case, found)
        started = {k.removeprefix(f"{name}.init."): v for k, v in case.tensors.items() if k.startswith(f"{name}.init.")}
        if started:
            new = build(case, "pytorch_model_meanP.bin.0", head=name, cross_layers=tiny["cl"], **heads)
            for key, wanted in started.items():
                ours = key.replace("resblocks", "layers").replace("ln_1", "layer_norm1")
                yield Check(f"start of {key}", float((new.get_parameter(ours) - wanted).abs().max()), 0.0)
