"""Tiny models from files in their authors' layout, and what a person has who starts from such a file: the file, a
tokenizer's folder, pictures with texts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.models import layouts
from tests.models.chats import write_chat
from tests.models.published import PUBLISHED, tensors
from trimtab.backbones.official import build_official, load_official

TEXTS = ["a red dog", "two cats and a dog", "a cat", "a red apple left of a dog", "an apple", "two red cats"]
ANSWERS = ["yes", "no", "two"]
# Ids of the special tokens, in the order: begins a text, padding, ends it, unknown, masked.
ROBERTA = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
CLIP = {"<|startoftext|>": 1, "<pad>": 0, "<|endoftext|>": 59, "<unk>": 3, "<mask>": 4}  # the end is the largest id
BERT = {"[CLS]": 1, "[PAD]": 0, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4}


BLIP_HEADS = {"vision_heads": 2, "text_heads": 2}
BLIP_FILES = {
    "pretrain": ("text_encoder", "text_decoder", "contrast", "itm"), "retrieval": ("text_encoder", "contrast", "itm"),
    "vqa": ("text_encoder", "text_decoder"), "caption": ("text_decoder",), "nlvr2": ("nlvr2",),
}  # fmt: skip
METER_HEADS = {"vision_heads": 2, "text_heads": 2, "fusion_heads": 2}


def tied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the copies of shared weights that the authors' files hold."""
    if "text_encoder.encoder.layer.0.output.dense.weight" in state and "itm_head.weight" in state:
        for key in [k for k in state if k.startswith("text_decoder.bert.") and ".attention." not in k]:
            state[key] = state[key.replace("text_decoder.bert.", "text_encoder.")]
    head = "text_decoder.cls.predictions"
    if f"{head}.bias" in state:
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
        state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    return state


def blip(file: str = "pretrain", **settings):
    shapes = layouts.blip(BLIP_FILES[file], momentum=file in ("pretrain", "retrieval"), **layouts.TINY_BLIP)
    return build_official(tied(layouts.fill(shapes)), {}, "blip.pth", **BLIP_HEADS, **settings)


def meter(*tasks: str, **settings):
    state = layouts.fill(layouts.meter(tasks or ("mlm", "itm"), 7, **layouts.TINY_METER))
    return build_official(state, {}, "meter.ckpt", **METER_HEADS, **settings)


def vilt(*tasks: str, **settings):
    state = layouts.fill(layouts.vilt(tasks or ("mlm", "itm"), 7, **layouts.TINY_VILT))
    return build_official(state, {}, "vilt.ckpt", heads=2, **settings)


def clip_vil(tmp_path, task: str = "pretrain", **settings):
    torch.save(layouts.fill(layouts.clip_vil(task, 7, **layouts.TINY_CLIP_VIL)), tmp_path / "LXRT.pth")
    return load_official(tmp_path / "LXRT.pth", heads=2, **settings)


def tokenizer(folder: Path, size: int, special: dict[str, int] = BERT) -> Path:
    """A folder with a tokenizer of whole words, as many as a model has embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for t in [*TEXTS, *ANSWERS, "is it"] for w in t.split()})
    vocabulary = {**special, **{w: 5 + i for i, w in enumerate(words)}}
    vocabulary |= {f"unused{i}": i for i in set(range(size)) - set(vocabulary.values())}
    assert sorted(vocabulary.values()) == list(range(size))
    start, pad, end, unknown, masked = special
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(start, special[start]), (end, special[end])]
    made.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token=start, pad_token=pad, sep_token=end, unk_token=unknown, mask_token=masked
    ).save_pretrained(folder)
    return folder


def rows(folder: Path, count: int = 12) -> Path:
    """`rows.jsonl` with pictures beside it: captions, questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    lines = []
    for i in range(count):
        pixels = random.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        text = TEXTS[i % len(TEXTS)]
        row = {"image": f"{i}.png", "captions": [text, f"is it {text}"], "question": f"is it {text}",
               "answer": ANSWERS[i % 3]}  # fmt: skip
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def _dino(folder: Path) -> Path:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return folder


# Backbones that are folders, under the names that recipes give them.
FOLDERS: dict[str, Any] = {"dino-vitb16": _dino, "llava-1.5-7b-hf": partial(write_chat, "llava")}


def file(folder: Path, family: str) -> tuple[Path, dict[str, Any], Path | None]:
    """A checkpoint file in its authors' layout, the settings that tiny sizes need, and a tokenizer's folder; of a
    family in `FOLDERS` a folder with everything in it."""
    if family == "blip":
        state = {"model": tied(layouts.fill(layouts.blip(BLIP_FILES["pretrain"], momentum=True, **layouts.TINY_BLIP)))}
        # 38 words and the two that BLIP adds
        settings, words, special = {**BLIP_HEADS, "sep_token_id": 2}, layouts.TINY_BLIP["words"] - 2, BERT
    elif family == "meter":
        state = {"state_dict": layouts.fill(layouts.meter(**layouts.TINY_METER))}
        settings = dict(METER_HEADS)
        words, special = layouts.TINY_METER["words"], ROBERTA
    elif family == "vilt":
        state = {"state_dict": layouts.fill(layouts.vilt(**layouts.TINY_VILT))}
        settings, words, special = {"heads": 2}, layouts.TINY_VILT["words"], BERT
    elif family == "clip_vil":
        state = layouts.fill(layouts.clip_vil("pretrain", 7, **layouts.TINY_CLIP_VIL))
        settings, words, special = {"heads": 2}, layouts.TINY_CLIP_VIL["words"], BERT
    elif family in FOLDERS:
        return FOLDERS[family](folder / family), {}, None
    else:
        name = {"vse": "vse_grid", "xvlm": "xvlm_clip", "clip4clip": "clip4clip_meanP", "mdetr": "mdetr"}[family]
        state, settings, words = PUBLISHED[name].file(tensors(name)), PUBLISHED[name].settings, 60
        special = {"clip4clip": CLIP, "mdetr": ROBERTA}.get(family, BERT)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{family}.pth")
    return folder / f"{family}.pth", settings, tokenizer(folder / f"{family}-words", words, special)


def converted(folder: Path, family: str, **more: Any) -> Path:
    """The folder that `trimtab convert` makes of it, with the tokenizer put into it."""
    import trimtab

    path, settings, words = file(folder, family)
    trimtab.load(path, tokenizer=words, **settings, **more).save_pretrained(folder / f"{family}-folder")
    return folder / f"{family}-folder"
