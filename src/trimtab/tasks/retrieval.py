"""Image-text retrieval with a dual encoder: which caption belongs to which picture.

Symmetric cross-entropy over the cosine similarities of a batch (CLIP, section 2.3); recall@K in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch, Task


class Projections(nn.Module):
    """One linear map a side, the identity at first, so that an untrained head keeps the pretrained space."""

    def __init__(self, width: int, scale: float = 2.6592):
        super().__init__()
        self.image = nn.Linear(width, width, bias=False)
        self.text = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))  # natural logarithm of the temperature's inverse
        with torch.no_grad():
            self.image.weight.copy_(torch.eye(width))
            self.text.weight.copy_(torch.eye(width))


@TASKS.register("retrieval")
class Retrieval(Task):
    """Columns `image`, `captions` (a list a row; training draws one, evaluation takes the first).

    A retrieved caption is right when its words are those of the picture's own caption, so that two scenes with the same
    things do not count as errors of each other.
    """

    name = "retrieval"
    columns = ("captions",)
    primary = "recall@1"
    kinds = ("dual",)

    def head(self, backbone: Any) -> nn.Module:
        scale = getattr(backbone, "logit_scale", None)
        return Projections(backbone.width, float(scale.detach()) if scale is not None else 2.6592)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        pick = [int(torch.randint(len(r["captions"]), ())) if train else 0 for r in rows]
        texts = [r["captions"][k] for r, k in zip(rows, pick, strict=True)]
        return {**backbone.images([r["image"] for r in rows]), **backbone.texts(texts)}

    def embed(self, backbone: Any, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and texts, each (B, D)."""
        image = head.image(backbone.image(batch["pixel_values"]).pooled)
        text = head.text(backbone.text(batch["input_ids"], batch["attention_mask"]).pooled)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        image, text = self.embed(backbone, head, batch)
        logits = head.scale.exp().clamp(max=100) * image @ text.T  # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        image, text = self.embed(backbone, head, batch)
        return [{"image": i.cpu(), "text": t.cpu()} for i, t in zip(image, text, strict=True)]

    def fold(self, backbone: Any, head: nn.Module) -> None:
        """A product of two linear maps is one: the head's maps go into the backbone's projections, its scale too."""
        backbone.fold_projections(head.image.weight, head.text.weight, head.scale)

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        return recalls(_similarity(records), [c[0] for c in rows["captions"]])

    def chance(self, rows: Any) -> float | None:
        return 1 / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        captions = [c[0] for c in rows["captions"]]
        best = _similarity(records).argmax(dim=1).tolist()
        return [
            {"query": "picture -> caption", "prediction": captions[best[i]], "target": captions[i],
             "correct": captions[best[i]] == captions[i]}
            for i in indices
        ]  # fmt: skip


def _similarity(records: list[dict[str, Any]]) -> Tensor:
    return torch.stack([r["image"] for r in records]) @ torch.stack([r["text"] for r in records]).T


def recalls(similarity: Tensor, captions: list[str]) -> dict[str, float]:
    """Recall@1, 5 and 10 in both directions and their mean over directions, from (images, captions) similarities."""
    codes = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([codes[c] for c in captions])
    out = {}
    for direction, scores in (("image to text", similarity), ("text to image", similarity.T)):
        order = scores.argsort(dim=1, descending=True)[:, :10]
        hit = label[order] == label[:, None]
        for k in (1, 5, 10):
            out[f"{direction} recall@{k}"] = hit[:, :k].any(dim=1).float().mean().item()
    means = {
        f"recall@{k}": (out[f"image to text recall@{k}"] + out[f"text to image recall@{k}"]) / 2 for k in (1, 5, 10)
    }
    return {**means, **out}
