"""Tiny models of today's vision-language families, members of the zoo like those in `tests.models.zoo`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.models.zoo import BLOCK, WIDE, ZOO, Member
from trimtab.anatomy import Anatomy
from trimtab.backbones.described import examples as described
from trimtab.backbones.examples.inputs import (
    DECODER_MASK,
    FLORENCE,
    GRIDS,
    GROUNDING,
    NAMED,
    PALIGEMMA,
    PATCH_GRID,
    QWEN,
    SEEN_MASK,
    SMOL,
    TASK,
)
from trimtab.backbones.reader import examples as reader

_GATED = BLOCK + 16 * 32  # gated feed-forward parts have a third matrix
_DEFORMABLE = 32 * 3 * 4 * 3 * 2 + 2 * 32 * 32  # offsets and weights of 4 heads, 3 grids, 2 points; value, output

_LANGUAGE: dict[str, Any] = {
    "masks": {"text": SEEN_MASK},
    "padding": {"input_ids": SEEN_MASK == 0},
    "generates": True,
}
_SEES = {"vision": ("vision", 3, 3 * WIDE)}

MODERN: dict[str, Member] = {
    **{
        name.lower(): Member(
            partial(reader.idefics, name), SMOL, {**_SEES, "text": ("text", 2, 2 * _GATED)}, {"vision": 16, "text": 9},
            {"text": SEEN_MASK, "vision": PATCH_GRID.flatten(1)}, {"input_ids": SEEN_MASK == 0}, generates=True,
        )
        for name in ("Idefics3", "SmolVLM")
    },
    "qwen3-vl": Member(
        described.qwen3, QWEN,
        {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48)), "text": ("text", 3, 3 * _GATED)},
        {"vision": 16, "text": 9}, **_LANGUAGE,
    ),
    **{
        name: Member(
            partial(reader.paligemma, text), PALIGEMMA, {**_SEES, "text": ("text", 2, 2 * _GATED)},
            {"vision": 4, "text": 9}, **_LANGUAGE,
        )
        for name, text in (("paligemma", "gemma"), ("paligemma2", "gemma2"))
    },
    "florence2": Member(
        described.florence, FLORENCE,
        {"vision": ("vision", 3, 16 * (8 * 8 + 2 * 16 * 16)), "encoder": ("text", 2, 2 * BLOCK),
         "decoder": ("text", 2, 2 * (BLOCK + 4 * 16 * 16))},
        {"vision": 16, "encoder": 8, "decoder": 4},
        {"encoder": (TASK > 0).long(), "decoder": DECODER_MASK},
        {"input_ids": TASK == 0, "decoder_input_ids": DECODER_MASK == 0},
        {"vision": [], "decoder": ["attention", "cross-attention", "mlp"]},
        generates=True, streams={"vision": [(2, 8, 4, 4), (2, 16, 2, 2), (2, 16, 2, 2)]},
    ),
    "grounding-dino": Member(
        described.grounding_dino, GROUNDING,
        {"vision": ("vision", 4, 2 * 12 * (8 * 8 + 16 * 16) + 32 * 16), "text": ("text", 2, 2 * BLOCK),
         "fusion-image": ("fusion", 2, 2 * (_DEFORMABLE + 2 * 32 * 64 + 3 * 32 * 32)),
         "fusion-text": ("fusion", 2, 2 * (4 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 32)),
         "decoder": ("fusion", 2, 2 * (8 * 32 * 32 + _DEFORMABLE + 2 * 32 * 64))},
        {"vision": 64, "text": 5, "fusion-image": 84, "fusion-text": 5, "decoder": 3},
        {"text": (NAMED > 0).long(), "fusion-text": (NAMED > 0).long(), "fusion-image": GRIDS},
        sublayers={"decoder": ["attention", "cross-attention", "cross-attention", "mlp"]},
        streams={"vision": [(2, 64, 8), (2, 64, 8), (2, 16, 16), (2, 16, 16)]},
        lossless=True,
    ),
}  # fmt: skip

MEMBERS = MODERN | {name: ZOO[name] for name in ("siglip", "siglip2", "qwen2.5-vl")}
# Members that write, with three blocks in their decoder.
DEEPER: dict[str, tuple[str, Callable[[], Any], str]] = {
    "smolvlm": ("smolvlm", partial(reader.idefics, "SmolVLM", 3), "text"),
    "idefics3": ("idefics3", partial(reader.idefics, "Idefics3", 3), "text"),
    "qwen2.5-vl": ("qwen2.5-vl", partial(described.qwen25_vl, 3), "text"),
    "qwen3-vl": ("qwen3-vl", described.qwen3, "text"),
    "paligemma": ("paligemma", partial(reader.paligemma, "gemma", 3), "text"),
    "paligemma2": ("paligemma2", partial(reader.paligemma, "gemma2", 3), "text"),
    "florence2": ("florence2", partial(described.florence, 3), "decoder"),
}


def deeper(name: str) -> tuple[Any, Member, list[str]]:
    """A model with three blocks in its decoder, its member of the zoo, and the decoder's blocks."""
    member, build, tower = DEEPER[name]
    model = Member(build, {}, {}, {}).model()
    return model, MEMBERS[member], [b.path for b in Anatomy.of(model).blocks(tower)]


def written(model: Any, member: Member, cache: bool | None = None) -> torch.Tensor:
    """The logits of five words in a row, (5, B, V); with a key-value cache, without one, or as the model is set."""
    prompt = {k: v for k, v in member.batch.items() if not k.startswith(("labels", "decoder"))}
    # A model of 30 words would also write tokens that stand for pictures.
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [26, 27, 28, 29]}
    if cache is not None:
        options["use_cache"] = cache
    with torch.no_grad():
        out = model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def outputs(model: Any, member: Member) -> list[torch.Tensor]:
    """All finite tensors that the model returns."""
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**member.batch).to_tuple()
    return [v[v.isfinite()] for v in out if isinstance(v, torch.Tensor) and v.is_floating_point()]
