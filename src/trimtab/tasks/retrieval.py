"""Image-text retrieval with a dual encoder: which caption belongs to which picture.

Symmetric cross-entropy over the cosine similarities of a batch (CLIP, section 2.3), or VSE's triplets with the hardest
negative (VSE++: Faghri et al., BMVC 2018, eq. 6) over vectors pooled by a learned operator (VSE-infinity: Chen et al.,
CVPR 2021). Recall@K in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.pooling import GPO
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


class PooledSide(nn.Module):
    """Tokens (B, L, F) and which are valid, (B, L) or None -> vectors (B, D): a linear map, then GPO."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.pool = GPO()

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.pool(self.linear(tokens), None if mask is None else mask != 0)


class PooledSides(nn.Module):
    """VSE-infinity's heads, one a side; `scale` as in `Projections`."""

    def __init__(self, backbone: Any, scale: float):
        super().__init__()
        image, text = (_token_width(backbone, side) for side in ("image", "text"))
        self.image, self.text = PooledSide(image, backbone.width), PooledSide(text, backbone.width)
        self.scale = nn.Parameter(torch.tensor(scale))


@TASKS.register("retrieval")
class Retrieval(Task):
    """Columns `image`, `captions` (a list a row; training draws one, evaluation takes the first).

    A retrieved caption is right when its words are those of the picture's own caption, so that two scenes with the same
    things do not count as errors of each other.

    Args:
        pooling: `own` takes the backbone's vectors, a linear map a side behind them; `gpo` pools its tokens by
            VSE-infinity's learned operator. Side networks must then hand on tokens (`unipt` with `form: token`).
        objective: `contrastive` (CLIP) or `triplet` (VSE++: the hardest negative of the batch, hinge at `margin`).
        margin: of the triplets, in units of cosine similarity.
        all_negatives: so many training batches at first count all negatives of a triplet, not the hardest alone, from
            which a random space learns nothing (VSE-infinity: the batches of one epoch).

    Raises:
        ValueError: for another word.
    """

    columns = ("captions",)
    primary = "recall@1"
    kinds = ("dual",)

    def __init__(
        self,
        pooling: Literal["own", "gpo"] = "own",
        objective: Literal["contrastive", "triplet"] = "contrastive",
        margin: float = 0.2,
        all_negatives: int = 0,
    ):
        for field, found, known in (
            ("pooling", pooling, ("own", "gpo")), ("objective", objective, ("contrastive", "triplet"))
        ):  # fmt: skip
            if found not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, found {found!r}")
        self.pooling, self.objective, self.margin, self.all_negatives = pooling, objective, margin, all_negatives

    def head(self, backbone: Any) -> nn.Module:
        scale = getattr(backbone, "logit_scale", None)
        start = float(scale.detach()) if scale is not None else 2.6592
        head = Projections(backbone.width, start) if self.pooling == "own" else PooledSides(backbone, start)
        if self.objective == "triplet":
            head.register_buffer("seen", torch.zeros((), dtype=torch.long))  # training batches so far
        return head

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        pick = [int(torch.randint(len(r["captions"]), ())) if train else 0 for r in rows]
        texts = [r["captions"][k] for r, k in zip(rows, pick, strict=True)]
        return {**backbone.images([r["image"] for r in rows]), **backbone.texts(texts)}

    def embed(self, backbone: Any, head: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and texts, each (B, D)."""
        seen = backbone.image(batch["pixel_values"])
        read = backbone.text(batch["input_ids"], batch["attention_mask"])
        if self.pooling == "own":
            image, text = head.image(seen.pooled), head.text(read.pooled)
        elif seen.tokens is None or read.tokens is None:
            raise ValueError("pooling 'gpo' reads tokens, but only vectors are given (as from a cache of activations)")
        else:
            image, text = head.image(seen.tokens, seen.mask), head.text(read.tokens, read.mask)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        image, text = self.embed(backbone, head, batch)
        if self.objective == "triplet":
            return self._triplets(head, image @ text.T)
        logits = head.scale.exp().clamp(max=100) * image @ text.T  # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def _triplets(self, head: Any, cosines: Tensor) -> Tensor:
        """Hinges of each picture's and each text's wrong partners in the batch, summed over (B, B) cosines."""
        own = cosines.diagonal()
        itself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
        texts = (self.margin + cosines - own[:, None]).clamp(min=0).masked_fill(itself, 0)
        images = (self.margin + cosines - own[None]).clamp(min=0).masked_fill(itself, 0)
        hardest = texts.amax(dim=1).sum() + images.amax(dim=0).sum()
        loss = torch.where(head.seen < self.all_negatives, texts.sum() + images.sum(), hardest)
        if head.training:
            head.seen += 1
        return loss

    def predict(self, backbone: Any, head: Any, batch: Batch) -> list[dict[str, Any]]:
        image, text = self.embed(backbone, head, batch)
        return [{"image": i.cpu(), "text": t.cpu()} for i, t in zip(image, text, strict=True)]

    def fold(self, backbone: Any, head: Any) -> None:
        """A product of two linear maps is one: the head's maps go into the backbone's projections, its scale too."""
        if self.pooling != "own":
            return  # no architecture here has a place for pooled heads: they stay with the task
        backbone.fold_projections(head.image.weight, head.text.weight, head.scale)

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
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


def _token_width(backbone: Any, side: str) -> int:
    """Channels of a side's tokens, found by one tiny input."""
    with torch.no_grad():
        example = backbone.example(1)
        inputs = ("pixel_values",) if side == "image" else ("input_ids", "attention_mask")
        tokens = getattr(backbone, side)(*(example[name] for name in inputs)).tokens
    if tokens is None:
        raise ValueError(f"pooling 'gpo' needs tokens, but {backbone.name!r} gives one vector for its {side}s")
    return int(tokens.shape[-1])


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
