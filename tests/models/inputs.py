"""Inputs for a tiny model of any family, made from its configuration and the arguments of its forward pass.

Two rows that differ in words and pictures; the second is padded on the right.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.own_inputs import ADDED, BEFORE, NUMBERS, PICTURES, WHOLE, flat, plain, shaped
from tests.models.shrink import VOCABULARY
from tests.models.values import PADDED, ROWS, WORDS, Batch, field, floats, words

TOKENS = {"image": ("image_token_id", "image_token_index"), "audio": ("audio_token_id", "audio_token_index"),
          "video": ("video_token_id", "video_token_index")}  # fmt: skip


def arguments(model: nn.Module) -> set[str]:
    """Names that the forward pass takes; where it hands on what it does not name, those of the model inside too."""
    found: set[str] = set()
    module: Any = model
    while module is not None:
        parameters = inspect.signature(module.forward).parameters
        found |= parameters.keys()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        module = getattr(module, "model", None) if open_ended else None
    return found


def pictures(model: Any, takes: set[str]) -> Batch:
    """What a model is shown; nothing if it sees none."""
    if (layout := PICTURES.get(model.config.model_type)) is not None:
        return layout(model)
    if "pixel_values" not in takes:
        return {}
    if "image_grid_thw" in takes:
        return flat(model)
    return (shaped if "spatial_shapes" in takes else plain)(model)


def tokens_for(model: Any, seen: Batch, kind: str) -> int:
    """How many placeholders a row's pictures or sounds take among its words, by running the part that takes them in."""
    if model.config.model_type in NUMBERS:
        return NUMBERS[model.config.model_type]
    if field(model, *TOKENS[kind]) is None:
        return 0
    inner: Any = model
    while (look := getattr(inner, f"get_{kind}_features", None)) is None:
        inner = next((m for n in ("model", "vlm", "thinker") if (m := getattr(inner, n, None)) is not None), None)
        if inner is None:
            return 0
    takes = inspect.signature(look).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    with torch.no_grad():
        out = look(**{k: v for k, v in seen.items() if k in takes or open_ended})
    width = inner.get_input_embeddings().weight.shape[-1]
    found = getattr(out, "pooler_output", None)
    if found is None:
        found = getattr(out, "last_hidden_state", out)
    return sum(v.numel() for v in tensors(found)) // (width * ROWS)


def tensors(value: Any, without: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """All tensors in an output, in its order; not those of fields with these names."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name not in without:
                yield from tensors(item, without)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item, without)


# --- words ------------------------------------------------------------------------------------------------------------


def text(model: Any, takes: set[str], placeholders: dict[str, int]) -> Batch:
    """Words behind the placeholders of pictures and sounds; the second row ends with padding."""
    ids = words(ROWS, WORDS)
    mask = torch.ones_like(ids)
    mask[1, -PADDED:] = 0
    pad = field(model, "pad_token_id", default=0) or 0
    ids[mask == 0] = pad if 0 <= pad < VOCABULARY else 0
    front = [words(ROWS, 1, seed=3)]
    for kind, number in placeholders.items():
        if not number or (token := field(model, *TOKENS[kind])) is None:
            continue
        start, end = (field(model, f"vision_{edge}_token_id", f"{kind}_{edge}_token_id") for edge in ("start", "end"))
        front += [torch.full((ROWS, n), t) for t, n in ((start, 1), (token, number), (end, 1)) if t is not None]
    if len(front) > 1:
        ids = torch.cat([*front, ids], dim=1)
        mask = torch.cat([torch.ones(ROWS, ids.shape[1] - mask.shape[1], dtype=torch.long), mask], dim=1)
    out = {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in takes and (token := field(model, *TOKENS["image"])) is not None:
        out["mm_token_type_ids"] = (ids == token).long()
        around = [field(model, f"image_{edge}_token_id") for edge in ("start", "end")]  # these too, for the experts
        pictured = torch.tensor([token, *(t for t in around if t is not None)])
        out["moe_mm_token_type_ids"] = torch.isin(ids, pictured).long()
    return {k: v for k, v in out.items() if k in takes}


def inputs(model: Any) -> Batch:
    """The arguments of one forward pass of two rows, which the model has been run on.

    Raises:
        Exception: whatever the model raises on the last try.
    """
    family = model.config.model_type
    if family in WHOLE:
        return WHOLE[family](model)
    takes = arguments(model)
    before = BEFORE[family](model, {}) if family in BEFORE else {}
    seen = {**before, **pictures(model, takes)}
    error: Exception | None = None
    for heard in sounds(model, takes):
        try:
            return fitted(model, takes, {**seen, **heard}, bool(heard))
        except Exception as why:
            error = error or why
    assert error is not None
    raise error


def fitted(model: Any, takes: set[str], seen: Batch, hears: bool) -> Batch:
    """A batch with as many placeholders as the model asks for, which it may say in an error."""
    numbers = {"audio": 0, "image": 0}
    if hears:
        numbers["audio"] = tokens_for(model, seen, "audio")
    if any(k.startswith(("pixel", "image")) for k in seen):
        numbers["image"] = tokens_for(model, seen, "image")
    for last in (False, True):
        batch = assembled(model, takes, seen, numbers)
        try:
            with torch.no_grad():
                model(**batch)
            break
        except ValueError as error:
            asked = re.search(r"tokens: \d+, features:? (\d+)", str(error))
            if last or asked is None:
                raise
            numbers["image" if "mage" in str(error) else "audio"] = int(asked[1]) // ROWS
    return batch


def assembled(model: Any, takes: set[str], seen: Batch, numbers: dict[str, int]) -> Batch:
    """What is seen and heard, with words for it."""
    family, out = model.config.model_type, dict(seen)
    if "input_ids" in takes:
        out |= text(model, takes, numbers)
    if "decoder_input_ids" in takes and getattr(model.config, "is_encoder_decoder", False):
        out["decoder_input_ids"] = words(ROWS, 5, seed=2)
    if family in ADDED:
        out |= ADDED[family](model, out)
    return out


def sounds(model: Any, takes: set[str]) -> Iterator[Batch]:
    """Sounds in one form after another, for a model that hears; nothing for others."""
    if "input_features" in takes and not takes & {"pixel_values"}:
        mel = field(model, "num_mel_bins", "input_dim", "feature_size", "n_mel_bins", default=16)
        mel *= field(model, "num_stacked_frames", default=1)
        length = 2 * field(model, "n_window", "max_source_positions", default=16)
        masks = {
            k: torch.ones(ROWS, length).long() for k in ("input_features_mask", "feature_attention_mask") if k in takes
        }
        if "padding_mask" in takes:
            masks["padding_mask"] = torch.ones(ROWS, length).long()
        for shape in ((ROWS, mel, length), (ROWS, length, mel)):
            yield {"input_features": floats(*shape), **masks}
    if "input_values" in takes:
        yield {"input_values": floats(ROWS, 1, 6400), **({"sample": False} if "sample" in takes else {})}
    yield {}
