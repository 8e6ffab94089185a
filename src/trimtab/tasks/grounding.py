"""Phrase grounding: the box of the one thing that a phrase means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch, Task


class BoxHead(nn.Module):
    """Every image token draws a box around itself; the box is their mean, weighted by how well they fit the words.

    As in FCOS (Tian et al., ICCV 2019), a token gives its distances to the four sides, so that the centre need not be
    learned from the features. A token's weight is a bias of its own plus the product of a key from it and a query from
    the words: image-text matching teaches words to look at patches, not patches to look at words. The tokens are a
    grid in row-major order (`Encoded.image_tokens`), square or of the rows and columns given.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, words: Tensor, shape: tuple[int, int] | None = None,
                there: Tensor | None = None, filled: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Image tokens (B, P, D) and the words' mean (B, D) -> corners as shares of what the model sees of the picture
        (B, 4), and the log of each token's weight in them (B, P).

        Args:
            tokens, words: see above.
            shape: rows and columns of the tokens; None for a square.
            there: which tokens are picture and not padding, (B, P); None for all.
            filled: as of `grid`.
        """
        votes, sides = self.layers(tokens).float().split([1, 4], dim=-1)
        meant = (self.key(tokens) @ self.query(words)[..., None]).float() / tokens.shape[-1] ** 0.5  # (B, P, 1)
        vote = (votes + meant).squeeze(-1)
        if there is not None:
            vote = vote.masked_fill(there == 0, torch.finfo(vote.dtype).min)
        shares = vote.log_softmax(dim=1)
        here = torch.cat([grid(tokens.shape[1], tokens.device, shape, filled)] * 2, dim=-1)  # (..., P, 4): x, y, x, y
        # A start of 0.2 of the picture to each side is a box of the usual size.
        reach = (sides - 1.4).sigmoid() * torch.tensor([-1.0, -1.0, 1.0, 1.0], device=tokens.device)
        return (shares.exp()[..., None] * (here + reach)).sum(dim=1), shares


def grid(tokens: int, device: torch.device, shape: tuple[int, int] | None = None,
         filled: Tensor | None = None) -> Tensor:  # fmt: skip
    """Centres (x, y) of a grid of that many patches as shares of what the model sees, row by row, (tokens, 2).

    Padding to the largest picture of a batch is no part of a picture: its patches lie beyond 1, so that the same
    picture has the same shares in any batch.

    Args:
        shape: rows and columns; None for a square.
        filled: how much of the batch's width and height each picture fills, (B, 2); the centres are (B, tokens, 2)
            then. None for all of it.

    Raises:
        ValueError: if the number is no square, or not that of the rows and columns.
    """
    rows, columns = shape or (math.isqrt(tokens),) * 2
    if rows * columns != tokens:
        wanted = f"a grid of {rows} x {columns}" if shape else "a square grid"
        raise ValueError(f"grounding needs image tokens that form {wanted}, the backbone gives {tokens}")
    y, x = torch.meshgrid(*((torch.arange(n, device=device) + 0.5) / n for n in (rows, columns)), indexing="ij")
    places = torch.stack([x, y], dim=-1).flatten(0, 1)
    return places if filled is None else places / filled[:, None]


@TASKS.register("grounding")
class Grounding(Task):
    """Columns `image`, `phrase`, `box` (left, top, right, bottom in pixels of the picture).

    Boxes go through the same resizing, cropping and padding as the picture (`Pictures.windows`). In training a box is
    cut at the edge of what the model sees, and one that was cropped off whole asks for nothing; in evaluation the whole
    box is what counts, so that a crop costs what it hides.

    Loss as in DETR (section 3.1): 5 x L1 + 2 x generalised IoU, and beside it the log of the share in the vote of the
    patches inside the box, as MDETR aligns phrases and regions. Accuracy: share of boxes with IoU of at least 0.5.
    """

    columns = ("phrase", "box")
    primary = "accuracy@0.5"
    kinds = ("joint",)
    blank = {"box": (0, 0, 1, 1)}

    def head(self, backbone: Any) -> nn.Module:
        return BoxHead(backbone.token_width)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        sizes = [r["image"].size for r in rows]
        windows = backbone.pictures.windows(sizes)
        frame = torch.tensor([backbone.pictures.place(size).frame for size in sizes], dtype=torch.float32)
        origin, span = frames(windows)
        return {
            **backbone.images([r["image"] for r in rows]),
            **backbone.texts([r["phrase"] for r in rows]),
            "boxes": (torch.tensor([r["box"] for r in rows], dtype=torch.float32) - origin) / span,
            "windows": windows,
            "filled": frame / frame.amax(dim=0),
        }

    def example(self, backbone: Any, size: int) -> Batch:
        box = torch.tensor([0.2, 0.2, 0.6, 0.6]).expand(size, 4)
        return {**backbone.example(size), "boxes": box, "windows": torch.tensor([0.0, 0, 1, 1]).expand(size, 4),
                "filled": torch.ones(size, 2)}  # fmt: skip

    def _boxes(self, backbone: Any, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, 4), shares of the vote (B, P), and where the patches are, (P, 2) or (B, P, 2)."""
        encoded = backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        if encoded.image_tokens is None:
            raise ValueError(f"grounding needs image tokens among the fused ones: {backbone.name!r} gives none")
        mask = batch["attention_mask"][..., None].to(encoded.tokens.dtype)
        first = 0 if encoded.image_tokens.start > 0 else encoded.image_tokens.stop  # of the text, before or after
        words = (encoded.tokens[:, first : first + mask.shape[1]] * mask).sum(dim=1) / mask.sum(dim=1)
        there = None if encoded.mask is None else encoded.mask[:, encoded.image_tokens]
        tokens, shape, filled = encoded.tokens[:, encoded.image_tokens], encoded.grid, batch.get("filled")
        centre = grid(tokens.shape[1], tokens.device, shape, filled)
        return *head(tokens, words, shape, there, filled), centre

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        found, shares, centre = self._boxes(backbone, head, batch)
        target, seen = visible(batch["boxes"], found)
        _, generalised = iou(found, target)
        inside = ((centre > target[:, None, :2]) & (centre < target[:, None, 2:])).all(dim=-1)  # (B, P)
        # A box between the centres of four patches asks nothing of the vote.
        inside |= ~inside.any(dim=1, keepdim=True) | ~seen
        vote = -shares.masked_fill(~inside, -torch.inf).logsumexp(dim=1).mean()
        return 5 * F.l1_loss(centred(found), centred(target)) + 2 * (1 - generalised).mean() + vote

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        boxes = self._boxes(backbone, head, batch)[0].clamp(0, 1)
        overlap, _ = iou(boxes, batch["boxes"])
        origin, span = frames(batch["windows"])
        pixels = (boxes * span + origin).tolist()
        return [{"box": box, "iou": o} for box, o in zip(pixels, overlap.tolist(), strict=True)]

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        overlap = torch.tensor([r["iou"] for r in records])
        for record, credit in zip(records, (overlap >= 0.5).double().tolist(), strict=True):
            record["credit"] = credit
        return {"accuracy@0.5": (overlap >= 0.5).float().mean().item(), "mean IoU": overlap.mean().item()}

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": rows[i]["phrase"], "prediction": f"IoU {records[i]['iou']:.2f}", "target": "box",
             "correct": records[i]["iou"] >= 0.5, "box_predicted": [round(x, 1) for x in records[i]["box"]],
             "box_target": list(rows[i]["box"])}
            for i in indices
        ]  # fmt: skip


def visible(boxes: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (B, 4), the boxes cut at the edge of what the model sees, and whether anything of them is left, (B, 1);
    what was cropped off whole has the box found as its target, so that it costs nothing."""
    target = boxes.clamp(0, 1)
    seen = (target[:, 2:] > target[:, :2]).all(dim=-1, keepdim=True)
    return torch.where(seen, target, found.detach()), seen


def frames(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and spans (B, 4) each, as x, y, x, y, of windows (B, 4): `(box - origin) / span` are shares of them."""
    low, high = windows.split(2, dim=-1)
    return low.repeat(1, 2), (high - low).repeat(1, 2)


def centred(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) -> (centre x, centre y, width, height), last axis 4."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), last axis 4."""
    middle, sides = boxes.split(2, dim=-1)
    return torch.cat([middle - sides / 2, middle + sides / 2], dim=-1)


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of boxes in pairs, (..., 4) corners that
    broadcast -> (...), (...)."""

    def area(x: Tensor) -> Tensor:
        return (x[..., 2:] - x[..., :2]).clamp(min=0).prod(dim=-1)

    inner = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1)
    common, enclosing = area(inner), area(hull).clamp(min=1e-9)
    union = (area(a) + area(b) - common).clamp(min=1e-9)
    overlap = common / union
    return overlap, overlap - (enclosing - union) / enclosing
