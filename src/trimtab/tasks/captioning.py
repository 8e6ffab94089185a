"""Captioning: say what is in a picture, each word predicted from the picture and those before it (BLIP, LM loss)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data.draws import choose
from trimtab.data.identity import check_grouped
from trimtab.data.images import decode_rows
from trimtab.metrics import captions as official
from trimtab.settings import within
from trimtab.tasks.base import TASKS, Batch, Task
from trimtab.tasks.words import IGNORED, Words, next_words
from trimtab.tasks.writing import Limits, write


@TASKS.register("captioning")
class Captioning(Task):
    """Columns `image`, `captions` (a list a row; training draws one, evaluation compares with all).

    Captions begin with the tokenizer's class token and end with its separator. BLIP's settings on COCO are
    `beams: 3, prompt: "a picture of ", longest: 19, shortest: 4, smoothing: 0.1` (its lengths of 20 and 5 count the
    first token).

    Args:
        longest: tokens at most after the first, prompt and end included; never more than the backbone reads.
        smoothing: of labels, in training (published for BLIP and X-VLM: 0.1).
        prompt: stands before every caption, is given in writing, and counts neither in the loss nor in the caption.
        shortest: tokens at least after the first, prompt included.
        beams: of beam search; 1 writes greedily.
        no_repeat: no run of so many tokens occurs twice in a caption; 0 allows all.
        length_penalty: power of the length by which a beam's log-probability is divided.
        java: score with the official Java tokeniser, and METEOR too; needs `pycocoevalcap` and Java.

    Raises:
        ValueError: for a number that cannot be.
    """

    columns = ("captions",)
    primary = "cider"
    kinds = ("joint",)
    blank = {"captions": [""]}
    causal = True

    def __init__(
        self,
        longest: int = 30,
        smoothing: float = 0.0,
        prompt: str = "",
        shortest: int = 0,
        beams: int = 1,
        no_repeat: int = 0,
        length_penalty: float = 1.0,
        java: bool = False,
    ):
        within(locals(), longest="[1, inf)", shortest=f"[0, {longest}]", beams="[1, inf)", no_repeat="[0, inf)",
               smoothing="[0, 1)", length_penalty="(-inf, inf)")  # fmt: skip
        self.longest, self.smoothing, self.prompt, self.shortest = longest, smoothing, prompt, shortest
        self.beams, self.no_repeat, self.length_penalty = beams, no_repeat, length_penalty
        self.java = java

    def head(self, backbone: Any) -> nn.Module:
        return Words(backbone)

    def _start(self, backbone: Any) -> Tensor:
        """Ids of the token that starts a caption and of the prompt, (S,)."""
        tokenizer = backbone.tokenizer
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise ValueError(f"captioning: the tokenizer of {backbone.name} has no class token and separator, with "
                             "which captions begin and end; for models that chat use the task 'answer'")  # fmt: skip
        if not self.prompt:
            return torch.tensor([tokenizer.cls_token_id])
        ids = tokenizer(self.prompt)["input_ids"]
        if ids[0] != tokenizer.cls_token_id or ids[-1] != tokenizer.sep_token_id:
            raise ValueError(f"captioning: expected {backbone.name}'s tokenizer to put a prompt between its class "
                             f"token and separator, found {tokenizer.convert_ids_to_tokens(ids)}")  # fmt: skip
        return torch.tensor(ids[:-1])

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        told = [choose(r, "caption", r["captions"]) if train else r["captions"][0] for r in rows]
        texts = backbone.texts([self.prompt + caption for caption in told])
        labels = next_words(texts["input_ids"], texts["attention_mask"])
        if self.prompt:
            labels[:, : len(self._start(backbone)) - 1] = IGNORED
        return {**backbone.images([r["image"] for r in rows]), **texts, "labels": labels}

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        return {**batch, "labels": next_words(batch["input_ids"], batch["attention_mask"])}

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        seen = backbone.look(batch["pixel_values"])
        tokens = backbone.write(seen, batch["input_ids"], batch["attention_mask"])
        told = batch["labels"] != IGNORED
        logits = head(tokens[told], backbone.model.get_input_embeddings().weight)
        labels = batch["labels"][told]
        total = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing, reduction="sum")
        return divided.mean(total, len(labels))

    def check_scored(self, table: Any) -> None:
        check_grouped(table, self.name)

    def predict(self, backbone: Any, head: Any, batch: Batch) -> list[dict[str, Any]]:
        pixels = batch["pixel_values"]
        start = self._start(backbone).to(pixels.device)
        limits = Limits(
            min(1 + self.longest, backbone.max_text), 1 + self.shortest, self.beams, self.no_repeat, self.length_penalty
        )
        ids = write(backbone, head, backbone.look(pixels), start.repeat(len(pixels), 1), limits)
        told = backbone.tokenizer.batch_decode(ids[:, len(start) :], skip_special_tokens=True)
        return [{"caption": text.strip()} for text in told]

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """CIDEr-D (10 is perfect), BLEU and ROUGE-L as the COCO evaluation gives them, and the share of captions that
        are one of the references word by word; CIDEr's rarity of words is that of this table."""
        captions: dict[Hashable, str] = dict(enumerate(r["caption"] for r in records))
        references: dict[Hashable, Sequence[str]] = dict(enumerate(rows["captions"]))
        found = official.evaluate(captions, references, java=self.java)
        for record, credit in zip(records, found["by_caption"]["CIDEr"], strict=True):
            record["credit"] = credit
        out = {"cider": found["CIDEr"], **{f"bleu@{n}": found[f"BLEU-{n}"] for n in (4, 3, 2, 1)}}
        out |= {
            "rouge-l": found["ROUGE-L"],
            "one of them": sum(c in references[i] for i, c in captions.items()) / len(rows),
        }
        return out | ({"meteor": found["METEOR"]} if self.java else {})

    def fold(self, backbone: Any, head: Any) -> None:
        """The words' head goes where the backbone has one of its own."""
        head.fold(backbone)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": "caption", "prediction": records[i]["caption"], "target": rows[i]["captions"][0],
             "correct": records[i]["caption"] in rows[i]["captions"]}
            for i in indices
        ]  # fmt: skip
