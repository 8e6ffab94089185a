"""Captioning: say what is in a picture, each word predicted from the picture and those before it (BLIP, LM loss)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.metrics.captions import bleu4, cider
from trimtab.tasks.base import TASKS, Batch, Task
from trimtab.tasks.words import IGNORED, Words, next_words


@TASKS.register("captioning")
class Captioning(Task):
    """Columns `image`, `captions` (a list a row; training draws one, evaluation compares with all).

    Captions begin with the tokenizer's class token and end with its separator; they are written greedily.
    """

    columns = ("captions",)
    primary = "cider"
    kinds = ("joint",)
    blank = {"captions": [""]}
    causal = True

    def __init__(self, longest: int = 30, smoothing: float = 0.0):
        self.longest = longest
        self.smoothing = smoothing  # of labels, in training (published for BLIP and X-VLM: 0.1)

    def head(self, backbone: Any) -> nn.Module:
        return Words(backbone)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        pick = [int(torch.randint(len(r["captions"]), ())) if train else 0 for r in rows]
        texts = backbone.texts([r["captions"][k] for r, k in zip(rows, pick, strict=True)])
        labels = next_words(texts["input_ids"], texts["attention_mask"])
        return {**backbone.images([r["image"] for r in rows]), **texts, "labels": labels}

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        return {**batch, "labels": next_words(batch["input_ids"], batch["attention_mask"])}

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        seen = backbone.look(batch["pixel_values"])
        tokens = backbone.write(seen, batch["input_ids"], batch["attention_mask"])
        told = batch["labels"] != IGNORED
        logits = head(tokens[told], backbone.model.get_input_embeddings().weight)
        return F.cross_entropy(logits.float(), batch["labels"][told], label_smoothing=self.smoothing)

    def predict(self, backbone: Any, head: Any, batch: Batch) -> list[dict[str, Any]]:
        tokenizer, pixels = backbone.tokenizer, batch["pixel_values"]
        embeddings = backbone.model.get_input_embeddings().weight
        seen = backbone.look(pixels)
        ids = torch.full((len(pixels), 1), tokenizer.cls_token_id, device=pixels.device)
        done = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        for _ in range(min(self.longest, backbone.max_text - 1)):
            last = backbone.write(seen, ids, torch.ones_like(ids))[:, -1]
            word = head(last, embeddings).argmax(dim=-1).masked_fill(done, tokenizer.pad_token_id)
            ids = torch.cat([ids, word[:, None]], dim=1)
            done |= word == tokenizer.sep_token_id
            if done.all():
                break
        return [{"caption": text} for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        captions, references = [r["caption"] for r in records], rows["captions"]
        exact = sum(c in refs for c, refs in zip(captions, references, strict=True)) / len(captions)
        return {"cider": cider(captions, references), "bleu@4": bleu4(captions, references), "one of them": exact}

    def fold(self, backbone: Any, head: Any) -> None:
        """The words' head goes where the backbone has one of its own."""
        head.fold(backbone)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": "caption", "prediction": records[i]["caption"], "target": rows[i]["captions"][0],
             "correct": records[i]["caption"] in rows[i]["captions"]}
            for i in indices
        ]  # fmt: skip
