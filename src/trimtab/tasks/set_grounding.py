"""Referring expressions by set prediction: of all objects that a model finds, the likeliest is meant (MDETR)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.data.images import decode_rows
from trimtab.metrics.boxes import best_first, mdetr_boxes, mdetr_precision
from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.grounding import Grounding, centred, iou
from trimtab.tasks.sets import Things, set_loss, spans_to_tokens

CANDIDATES = 10  # boxes of a sample that are kept: as many as P@10 looks at


@TASKS.register("set-grounding")
class SetGrounding(Grounding):
    """Columns as of `grounding`, and `tokens_positive` if it is there: the character spans of the phrase that name the
    thing; without it the whole phrase does.

    The head is a copy of the model's own: which words, where, and what aligns objects with words. The loss is that of
    MDETR (`sets.py`) on every level that the backbone gives: its decoder layers, or with UniPT the levels of the side
    network, as its authors code it. An object's score is one less the probability of "no object"; metrics are those of
    `grounding`, and P@1, 5, 10 as MDETR's evaluation has them, by generalised IoU.

    Raises:
        ValueError: in `collate` for a tokenizer that does not tell the tokens of characters (a slow one).
    """

    schema = "grounding"
    kinds = ("detector",)
    together = True  # padding counts among the words that a thing is told from

    def head(self, backbone: Any) -> nn.Module:
        return copy.deepcopy(backbone.own_head(self.name))

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        batch = super().collate(backbone, rows, train)
        # Shares are of the picture by itself, not of the batch's frame with its padding.
        sizes = [row["image"].size for row in rows]
        batch["boxes"] = torch.tensor([row["box"] for row in rows], dtype=torch.float32) / _whole(backbone, sizes)
        batch["windows"] = torch.cat([torch.zeros(len(rows), 2), torch.tensor(sizes)], dim=1)
        phrases, length = [row["phrase"] for row in rows], batch["input_ids"].shape[1]
        if not getattr(backbone.tokenizer, "is_fast", False):
            raise ValueError(
                f"{backbone.name}: task {self.name!r} needs a fast tokenizer (tokenizer.json), which tells the token "
                f"of a character, found {type(backbone.tokenizer).__name__}"
            )
        encoding = backbone.tokenizer(phrases, truncation=True, max_length=backbone.max_text)
        tokens = [spans_to_tokens(encoding, i, text, row.get("tokens_positive") or [[0, len(text)]], length)
                  for i, (row, text) in enumerate(zip(rows, phrases, strict=True))]  # fmt: skip
        return {**batch, "tokens": torch.stack(tokens)}

    def example(self, backbone: Any, size: int) -> Batch:
        batch = super().example(backbone, size)
        tokens = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        tokens[:, 1:-1] = True
        return {**batch, "tokens": tokens}

    def _found(self, backbone: Any, head: Any, batch: Batch) -> dict[str, Tensor]:
        words = (batch["input_ids"], batch["attention_mask"])
        return head(*backbone.detect(batch["pixel_values"], *words))

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        boxes, tokens = centred(batch["boxes"])[:, None], batch["tokens"][:, None]
        there = torch.ones(len(boxes), 1, dtype=torch.bool, device=boxes.device)
        return set_loss(self._found(backbone, head, batch), Things(boxes, tokens, there))

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        found = self._found(backbone, head, batch)
        last = (found["logits"][-1].float().cpu(), found["boxes"][-1].float().cpu())
        sizes = batch["windows"][:, 2:].cpu()
        right, records = batch["boxes"].cpu() * sizes.repeat(1, 2), []
        for one, target in zip(mdetr_boxes(*last, sizes.flip(1)), right, strict=True):
            boxes = best_first(one["scores"], one["boxes"])[:CANDIDATES]
            scores = one["scores"].sort(descending=True).values[:CANDIDATES]
            overlap = iou(boxes[:1], target[None])[0].item()
            records.append({"box": boxes[0].tolist(), "iou": overlap, "boxes": boxes, "scores": scores})
        return records

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        out = super().score(backbone, head, records, rows)
        true = torch.tensor([list(box) for box in rows["box"]], dtype=torch.float32)
        found = mdetr_precision([(r["scores"], r["boxes"]) for r in records], true, [self.name] * len(records))
        return out | {name: share for name, share in found[self.name].items() if name != "accuracy"}

    def fold(self, backbone: Any, head: nn.Module) -> None:
        backbone.own_head(self.name).load_state_dict(head.state_dict())


def _whole(backbone: Any, sizes: list[tuple[int, int]]) -> Tensor:
    """Width, height, width, height of pictures (B, 4); ValueError if the backbone crops or frames them, which would
    move what is in them."""
    for size in sizes:
        place = backbone.pictures.place(size)
        if place.offset != (0, 0) or place.frame != place.resized:
            raise ValueError(
                f"{backbone.name}: set-grounding takes pictures whole, but one of {size[0]} x {size[1]} pixels is "
                f"cropped or framed ({place}): squash pictures (`pictures: squash`)"
            )
    return torch.tensor(sizes, dtype=torch.float32).repeat(1, 2)
