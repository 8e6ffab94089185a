"""Image-text retrieval with a dual encoder: which caption belongs to which picture.

Symmetric cross-entropy over the cosine similarities of a batch (CLIP, section 2.3), or VSE's triplets with the hardest
negative (VSE++: Faghri et al., BMVC 2018, eq. 6) over vectors pooled by a learned operator (VSE-infinity: Chen et al.,
CVPR 2021). Recall@K in both directions over all captions of every picture, as the papers report it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data.draws import choose
from trimtab.data.identity import check_grouped
from trimtab.data.images import decode_rows
from trimtab.metrics import retrieval as measured
from trimtab.metrics.checking import finite
from trimtab.pooling import GPO, lengths_of, size_augmented
from trimtab.settings import within
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
    """Tokens (B, L, F) and which are valid, (B, L) or None -> vectors (B, D): a linear map, then GPO. In training up to
    the share `drop` of a sample's tokens is left out."""

    def __init__(self, features: int, width: int, drop: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.pool = GPO()
        self.drop = drop

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.drop and self.training:
            kept = size_augmented(tokens, self.drop)
            mask = kept if mask is None else kept & (mask != 0)
        if mask is None:
            return self.pool(self.linear(tokens))
        if lengths := lengths_of(mask != 0):  # of some captions half is padding
            return self.pool.of_lengths(self.linear(tokens.flatten(0, 1).index_select(0, lengths.places)), lengths)
        return self.pool(self.linear(tokens), mask != 0)


class PooledSides(nn.Module):
    """VSE-infinity's heads, one a side; `scale` as in `Projections`."""

    def __init__(self, backbone: Any, scale: float, drop: float = 0.0):
        super().__init__()
        image, text = (PooledSide(_token_width(backbone, side), backbone.width, drop) for side in ("image", "text"))
        self.image, self.text = image, text
        self.scale = nn.Parameter(torch.tensor(scale))


@TASKS.register("retrieval")
class Retrieval(Task):
    """Columns `image`, `captions` (a list a row, of any length; training draws one, evaluation takes all).

    A record of an answer is `image`, a unit vector (D,), and `text`, one a caption (C, D).

    Args:
        pooling: `own` takes the backbone's vectors, a linear map a side behind them; `gpo` pools its tokens by
            VSE-infinity's learned operator. Side networks must then hand on tokens (`unipt` with `form: token`).
        drop: in training up to this share of a sample's tokens is left out of `gpo`, anew each time (VSE-infinity's
            size augmentation; its authors' share is 0.2).
        objective: `contrastive` (CLIP) or `triplet` (VSE++: the hardest negative of the batch, hinge at `margin`).
        margin: of the triplets, in units of cosine similarity.
        all_negatives: so many training batches at first count all negatives of a triplet, not the hardest alone, from
            which a random space learns nothing (VSE-infinity: the batches of one epoch).
        captions: which captions of a picture evaluation ranks. `all`, as the papers do: a caption belongs to its own
            picture alone. `first` takes one a picture, and any caption with its words is right, so that two scenes with
            the same things do not count as errors of each other; the built-in world, where scenes are alike, is
            measured so.
        most: captions of a picture that count with `all`, the first ones; 0 counts all. VSE's files of MS-COCO have 5.
        folds: beside the whole, the mean over so many consecutive blocks of pictures; 5 of MS-COCO's 5,000 are "1K".
            Test rows have to be a multiple of it; validation rows that are not are scored as a whole alone.

    Raises:
        ValueError: for another word, or a number that cannot be.
    """

    columns = ("captions",)
    primary = "recall@1"
    kinds = ("dual",)
    blank = {"captions": [""]}

    def __init__(
        self,
        pooling: Literal["own", "gpo"] = "own",
        objective: Literal["contrastive", "triplet"] = "contrastive",
        margin: float = 0.2,
        all_negatives: int = 0,
        captions: Literal["all", "first"] = "all",
        most: int = 0,
        folds: int = 1,
        drop: float = 0.0,
    ):
        for field, found, known in (
            ("pooling", pooling, ("own", "gpo")), ("objective", objective, ("contrastive", "triplet")),
            ("captions", captions, ("all", "first")),
        ):  # fmt: skip
            if found not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, found {found!r}")
        within(locals(), margin="[0, inf)", all_negatives="[0, inf)", most="[0, inf)", folds="[1, inf)", drop="[0, 1)")
        if captions == "first" and (most or folds > 1):
            raise ValueError("captions 'first' ranks one caption a picture: leave out `most` and `folds`")
        if drop and pooling == "own":
            raise ValueError(f"drop leaves out tokens that `pooling: gpo` pools: found {drop} with {pooling!r}")
        self.captions, self.most, self.folds, self.drop = captions, most, folds, drop
        self.pooling, self.objective, self.margin, self.all_negatives = pooling, objective, margin, all_negatives

    def head(self, backbone: Any) -> nn.Module:
        scale = getattr(backbone, "logit_scale", None)
        start = float(scale.detach()) if scale is not None else 2.6592
        head = Projections(backbone.width, start) if self.pooling == "own" else PooledSides(backbone, start, self.drop)
        if self.objective == "triplet":
            head.register_buffer("seen", torch.zeros((), dtype=torch.long))  # training batches so far
        return head

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        pictures = backbone.images([r["image"] for r in rows])
        if not train:
            return {**pictures, **many_texts(backbone, [self._told(r["captions"]) for r in rows])}
        return {**pictures, **backbone.texts([choose(r, "caption", r["captions"]) for r in rows])}

    def _told(self, captions: Sequence[str]) -> list[str]:
        """The captions of a picture that evaluation ranks."""
        return list(captions[: 1 if self.captions == "first" else self.most or None])

    def embed(self, backbone: Any, head: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures (B, D), and of texts: (B, D), or of all captions one after another (N, D)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        seen = backbone.image(batch["pixel_values"])
        image = self._pooled(head.image, seen)

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            return self._pooled(head.text, backbone.text(ids, mask))

        if ids is not None and ids.ndim == 3:  # (B, C, L), rows with fewer captions padded
            there = mask.any(dim=-1)
            ids, mask = ids[there], mask[there]
            text = by_length(read, ids, mask) if getattr(backbone, "pads_to_longest", False) else read(ids, mask)
        else:
            text = read(ids, mask)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def _pooled(self, side: Any, seen: Any) -> Tensor:
        if self.pooling == "own":
            return side(seen.pooled)
        if seen.tokens is None:
            raise ValueError("pooling 'gpo' reads tokens, but only vectors are given (as from a cache of activations)")
        return side(seen.tokens, seen.mask)

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        image, text = (divided.gathered(x) for x in self.embed(backbone, head, batch))
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
        counts = batch["attention_mask"].any(dim=-1).sum(dim=1).tolist()
        return [{"image": i, "text": t} for i, t in zip(image.cpu(), text.cpu().split(counts), strict=True)]

    def fold(self, backbone: Any, head: Any) -> None:
        """A product of two linear maps is one: the head's maps go into the backbone's projections, its scale too."""
        if self.pooling != "own":
            return  # no architecture here has a place for pooled heads: they stay with the task
        backbone.fold_projections(head.image.weight, head.text.weight, head.scale)

    def check_test(self, table: Any) -> None:
        check_folds(table, self.folds, self.name)
        super().check_test(table)

    def check_scored(self, table: Any) -> None:
        if self.captions == "all":
            check_grouped(table, self.name)

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        images, texts = torch.stack([r["image"] for r in records]), torch.cat([r["text"] for r in records])
        if self.captions == "first":
            return recalls(images @ texts.T, [c[0] for c in rows["captions"]], records)
        counts = [len(r["text"]) for r in records]
        owner = owners(counts)
        ranks = measured.ranks_of_embeddings(images, texts, owner)
        out = named(measured.both_ways(ranks))
        found = (ranks.text_to_image == 0).double().split(counts)
        share = len(records) / len(texts)  # a picture with more captions counts more in the mean over captions
        for record, rank, own in zip(records, ranks.image_to_text.tolist(), found, strict=True):
            record["credit"] = ((rank == 0) + share * float(own.sum())) / 2
        if self.folds > 1 and len(records) % self.folds == 0:
            folds = named(measured.evaluate(images, texts, owner, self.folds))
            out |= {f"{self.folds} folds: {name}": value for name, value in folds.items()}
        return out

    def chance(self, rows: Any) -> float | None:
        return 1 / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        texts, own = torch.cat([r["text"] for r in records]), [self._told(c) for c in rows["captions"]]
        told = [caption for captions in own for caption in captions]
        best = {i: told[int((texts @ records[i]["image"]).argmax())] for i in indices}
        return [
            {"query": "picture -> caption", "prediction": best[i], "target": own[i][0], "correct": best[i] in own[i]}
            for i in indices
        ]


def many_texts(backbone: Any, texts: Sequence[Sequence[str]]) -> Batch:
    """Several texts a row -> `input_ids` and `attention_mask` (B, C, L); rows with fewer are padded with texts of no
    token.

    Raises:
        ValueError: for a row without a text, with its number in the batch.
    """
    for i, row in enumerate(texts):
        if not len(row):
            raise ValueError(f"row {i} of the batch has no caption: a picture needs one at least")
    flat = backbone.texts([text for row in texts for text in row])
    most, there = max(map(len, texts)), torch.tensor([len(row) for row in texts])
    place = torch.arange(most) < there[:, None]  # (B, C)
    out = {}
    for name, values in flat.items():
        padded = values.new_zeros(len(texts), most, values.shape[1])
        padded[place] = values
        out[name] = padded
    return out


def by_length(read: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor, rows: int = 64) -> Tensor:
    """What `read` makes of texts (N, L) and their mask, padding behind the words: (N, D). Texts of like length are read
    together, which leaves out most of the padding."""
    if torch.compiler.is_compiling() or len(ids) <= rows:
        return read(ids, mask)
    lengths = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    order = lengths.argsort(stable=True)
    parts = [read(ids[some, : lengths[some[-1]]], mask[some, : lengths[some[-1]]]) for some in order.split(rows)]
    return torch.cat(parts)[order.argsort()]


def owners(counts: Sequence[int]) -> Tensor:
    """The picture of every caption, (N,), from the number of captions of every picture."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _token_width(backbone: Any, side: str) -> int:
    """Channels of a side's tokens, found by one tiny input."""
    with torch.no_grad():
        example = backbone.example(1)
        inputs = ("pixel_values",) if side == "image" else ("input_ids", "attention_mask")
        tokens = getattr(backbone, side)(*(example[name] for name in inputs)).tokens
    if tokens is None:
        raise ValueError(f"pooling 'gpo' needs tokens, but {backbone.name!r} gives one vector for its {side}s")
    return int(tokens.shape[-1])


WAYS = {"i2t": "image to text", "t2i": "text to image"}


def check_folds(table: Any, folds: int, task: str) -> None:
    """Raise a ValueError unless the pictures of a table fall into so many equal folds."""
    if len(table) % folds:
        raise ValueError(
            f"task {task!r}: the {len(table)} pictures to test on do not fall into {folds} equal folds: set task.folds "
            "to 1, or give a multiple of it"
        )


def named(found: dict[str, Any]) -> dict[str, float]:
    """What `trimtab.metrics.retrieval` found under this library's names: recalls as shares, of each direction and their
    mean; `rsum`, the six recalls in percent added; median and mean ranks, counted from 1."""
    out = {}
    for k in (1, 5, 10):
        out[f"recall@{k}"] = sum(found[way][f"R@{k}"] for way in WAYS) / 200
    out["rsum"] = found["rsum"]
    for way, name in WAYS.items():
        out |= {f"{name} recall@{k}": found[way][f"R@{k}"] / 100 for k in (1, 5, 10)}
        out |= {f"{name} median rank": found[way]["medr"], f"{name} mean rank": found[way]["meanr"]}
    return out


def recalls(similarity: Tensor, captions: list[str], records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Recall@1, 5 and 10 in both directions and their mean over directions, from (images, captions) similarities; each
    record gets as `credit` what its row gives to the mean recall@1."""
    finite(similarity, "similarities")
    codes = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([codes[c] for c in captions])
    out, first = {}, torch.zeros(len(captions), dtype=torch.double)
    for direction, scores in (("image to text", similarity), ("text to image", similarity.T)):
        own = (label[:, None] == label[None]).to(scores.device)
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        rank = ((scores >= best) & ~own).sum(dim=1).cpu()  # a wrong one with the same score stands before
        first += (rank == 0).double() / 2
        for k in (1, 5, 10):
            out[f"{direction} recall@{k}"] = (rank < k).double().mean().item()
    means = {
        f"recall@{k}": (out[f"image to text recall@{k}"] + out[f"text to image recall@{k}"]) / 2 for k in (1, 5, 10)
    }
    for record, credit in zip(records, first.tolist(), strict=True):
        record["credit"] = credit
    return {**means, **out}
