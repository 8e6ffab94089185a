"""Image-text retrieval with a cross-encoder, which reads a picture and a text together.

    all pairs     ViLT, METER: every text is fused with every picture
    k candidates  BLIP, X-VLM: vectors of pictures and texts choose k, which are fused and ordered anew

The cost grows with pairs: 1,000 pictures of five captions are 5 million passes, or with k = 256 at most 1.5 million.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.contrast import contrast, hard_pairs
from trimtab.data.draws import choose, shuffled
from trimtab.data.identity import check_grouped
from trimtab.data.images import decode_rows, encoded
from trimtab.metrics import retrieval as measured
from trimtab.processes import in_turn, shared
from trimtab.settings import within
from trimtab.tasks.base import TASKS, Batch, Task
from trimtab.tasks.retrieval import check_folds, many_texts, named, owners

OUTSIDE = -100.0  # score of a pair that was not among the candidates, as published
LOOK = 16  # pictures that are encoded at once in evaluation


@TASKS.register("reranking")
class Reranking(Task):
    """Columns `image`, `captions` (a list a row, of any length; training draws one, evaluation takes all).

    Training:
        rank: each picture with its caption and `negatives` captions of other rows; cross-entropy over which is its own
            (ViLT's and METER's `irtr`, with 15). Theirs come from the whole training set, these from the batch, drawn
            again where it has too few; the matching loss that they add with half its weight is left out. What a run
            counts as one sample is a picture with all these texts.
        contrast: the contrastive loss of the vectors, and matching of each pair against a wrong text and a wrong
            picture drawn by the vectors' similarity (X-VLM; BLIP without momentum encoders and their queue).

    Evaluation orders by what the authors order by (`Backbone.rank`): the ranking head, or the logit of "together", to
    which BLIP adds the cosine. A pair that is not among the candidates comes after all that are, and a picture's own
    caption among them after all others. A record of an answer is `scores`, one a caption, and with `k` the vectors
    `image` (E,) and `text` (C, E).

    Args:
        objective: `rank` or `contrast`.
        k: candidates a query (published for BLIP and X-VLM: 256 on COCO, 128 on Flickr30K; 256 in MULTIFLOW); 0 fuses
            all pairs.
        negatives: wrong captions a picture, for `rank`.
        pairs: that are fused in one pass in evaluation.
        temperature: of the contrastive loss where the model has none of its own, and is left out where it has.
        folds: beside the whole, the mean over so many consecutive blocks of test pictures; needs k: 0.

    Raises:
        ValueError: for another word, or a number that cannot be.
    """

    columns = ("captions",)
    schema = "retrieval"
    primary = "recall@1"
    kinds = ("joint",)
    blank = {"captions": [""]}

    def __init__(
        self,
        objective: Literal["rank", "contrast"] = "rank",
        k: int = 0,
        negatives: int = 15,
        pairs: int = 256,
        temperature: float | None = None,
        folds: int = 1,
    ):
        if objective not in ("rank", "contrast"):
            raise ValueError(f"objective must be one of rank, contrast, found {objective!r}")
        within(locals(), k="[0, inf)", negatives="[1, inf)", pairs="[1, inf)", folds="[1, inf)",
               temperature="(0, inf)")  # fmt: skip
        if k and folds > 1:
            raise ValueError("reranking: candidates are chosen among all pictures: with k leave out `folds`")
        self.objective, self.k, self.negatives, self.pairs = objective, k, negatives, pairs
        self.temperature, self.folds = temperature, folds
        self.together = objective == "rank"  # wrong captions are those of other rows

    def head(self, backbone: Any) -> nn.Module:
        return nn.Identity()

    def check(self, backbone: Any, table: Any) -> None:
        super().check(backbone, table)
        with torch.no_grad():
            batch = backbone.example(2)
            device = next(backbone.parameters()).device
            pixels, ids, mask = (batch[n].to(device) for n in ("pixel_values", "input_ids", "attention_mask"))
            try:
                seen = backbone.look(pixels)
                if self.k or self.objective == "contrast":
                    backbone.image_vector(seen), backbone.text_vector(ids, mask)
                if self.objective == "contrast":
                    self._temperature(backbone)
                backbone.rank(backbone.fuse(seen, ids, mask), torch.zeros(2, device=device))
            except NotImplementedError as error:
                raise ValueError(f"task 'reranking': {error}") from error

    def _temperature(self, backbone: Any) -> Tensor | float:
        return backbone.temperature if self.temperature is None else self.temperature

    # --- training -----------------------------------------------------------------------------------------------------

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        pictures = backbone.images([r["image"] for r in rows])
        if not train:
            return {**pictures, **many_texts(backbone, [r["captions"] for r in rows])}
        own = [choose(r, "caption", r["captions"]) for r in rows]
        if self.objective == "contrast":
            return {**pictures, **backbone.texts(own)}
        return {**pictures, **many_texts(backbone, [[own[i], *self._wrong(rows, i)] for i in range(len(rows))])}

    def _wrong(self, rows: list[dict[str, Any]], i: int) -> list[str]:
        """Captions of other rows of the batch, which are not also this row's; none twice while there are enough."""
        own = set(rows[i]["captions"])
        others = [c for j, row in enumerate(rows) if j != i for c in row["captions"] if c not in own]
        if not others:
            raise ValueError("reranking: the wrong captions of a picture are those of other rows, but the batch has "
                             "none with other captions: take a larger batch")  # fmt: skip
        return [others[k] for k in islice(shuffled(rows[i], "wrong captions", len(others)), self.negatives)]

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        if self.objective == "contrast":
            return batch
        return batch | {n: batch[n][:, None].repeat(1, 1 + self.negatives, 1) for n in ("input_ids", "attention_mask")}

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        seen, ids, mask = backbone.look(batch["pixel_values"]), batch["input_ids"], batch["attention_mask"]
        if self.objective == "contrast":
            return self._contrast(backbone, seen, ids, mask)
        rows, texts = ids.shape[:2]
        picture = torch.arange(rows, device=ids.device).repeat_interleave(texts)
        fused = backbone.fuse(seen[picture], ids.flatten(0, 1), mask.flatten(0, 1))
        logits = backbone.rank(fused, torch.zeros(rows * texts, device=ids.device)).view(rows, texts)
        return F.cross_entropy(logits.float(), torch.zeros(rows, dtype=torch.long, device=ids.device))

    def _contrast(self, backbone: Any, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image, text = backbone.image_vector(seen).float(), backbone.text_vector(ids, mask).float()
        similar, contrastive = contrast(image, text, self._temperature(backbone))
        mine = divided.own(len(similar))  # of a divided batch, these pairs are judged here
        seen, ids, mask = (divided.gathered(x) for x in (seen, ids, mask))
        i = j = pairs = torch.arange(len(ids), device=ids.device)[mine]
        if len(ids) > 1:  # one pair alone, on which costs are counted, has nothing to be told from
            texts, images = (found[mine] for found in hard_pairs(similar))
            i, j = torch.cat([pairs, pairs, images]), torch.cat([pairs, texts, pairs])
        together = backbone.match(backbone.fuse(seen[i], ids[j], mask[j])).float()  # (3 B,)
        right = (torch.arange(len(together), device=ids.device) < len(pairs)).float()
        # Of two logits whose difference this is, the same as their cross-entropy.
        return contrastive + F.binary_cross_entropy_with_logits(together, right)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def predict(self, backbone: Any, head: Any, batch: Batch) -> list[dict[str, Any]]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        there = mask.any(dim=-1)
        counts, picture = there.sum(dim=1).tolist(), there.nonzero()[:, 0]
        seen, flat = backbone.look(batch["pixel_values"]), (ids[there], mask[there])
        similar = torch.zeros(len(picture), device=ids.device)
        vectors: dict[str, Sequence[Tensor]] = {}
        if self.k:
            image, text = backbone.image_vector(seen).float(), backbone.text_vector(*flat).float()
            similar = (image[picture] * text).sum(dim=-1)
            vectors = {"image": image.cpu(), "text": text.cpu().split(counts)}
        scores = self._scores(backbone, seen, flat, picture, torch.arange(len(picture), device=ids.device), similar)
        own = zip(*(part.cpu().split(counts) for part in (scores, *flat)), strict=True)
        return [
            {"scores": s.tolist(), "ids": i, "mask": m, **{name: v[row] for name, v in vectors.items()}}
            for row, (s, i, m) in enumerate(own)
        ]

    def _scores(self, backbone: Any, seen: Tensor, texts: tuple[Tensor, Tensor], i: Tensor, j: Tensor,
                similar: Tensor) -> Tensor:  # fmt: skip
        """Scores of pairs of picture i and text j, (N,), so many at a time as `pairs` says."""
        out = []
        for start in range(0, len(i), self.pairs):
            part = slice(start, start + self.pairs)
            fused = backbone.fuse(seen[i[part]], *(x[j[part]] for x in texts))
            out.append(backbone.rank(fused, similar[part]).float())
        return torch.cat(out)

    def check_test(self, table: Any) -> None:
        check_folds(table, self.folds, self.name)
        super().check_test(table)

    def check_scored(self, table: Any) -> None:
        check_grouped(table, self.name)

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """Adds to each record `best`, the number of the text that its picture finds among all texts of the table."""
        owner = owners([len(r["ids"]) for r in records])
        size = (len(records), len(owner))
        image_scores = torch.full(size, OUTSIDE)
        text_scores = torch.full(size, OUTSIDE) if self.k else image_scores  # of the same pairs, chosen by texts
        by_image, by_text, similar = self._candidates(records)
        for i, (scores, texts) in self._pictures(backbone, records, rows, by_image | by_text, similar):
            row = torch.full(size[1:], OUTSIDE).index_put((texts,), scores)
            image_scores[i] = torch.where(by_image[i], row, OUTSIDE)
            if self.k:
                text_scores[i] = torch.where(by_text[i], row, OUTSIDE)
            records[i]["best"] = int(image_scores[i].argmax())
        if self.k:
            return named(measured.both_ways(measured.ranks(image_scores, owner, text_scores.T)))
        out = named(measured.evaluate_scores(image_scores, owner))
        if self.folds > 1 and len(records) % self.folds == 0:
            folds = named(measured.evaluate_scores(image_scores, owner, self.folds))
            out |= {f"{self.folds} folds: {name}": value for name, value in folds.items()}
        return out

    def _candidates(self, records: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which texts a picture considers, which pictures a text considers, (N, M) bits, and all cosines (N, M)."""
        size = (len(records), sum(len(r["ids"]) for r in records))
        if not self.k:
            everything = torch.ones(size, dtype=torch.bool)
            return everything, everything, None
        images, texts = torch.stack([r["image"] for r in records]), torch.cat([r["text"] for r in records])
        similar = images @ texts.T
        chosen = []
        for axis in (1, 0):
            best = similar.topk(min(self.k, size[axis]), dim=axis).indices
            chosen.append(torch.zeros(size, dtype=torch.bool).scatter_(axis, best, True))
        return chosen[0], chosen[1], similar

    def _pictures(self, backbone: Any, records: list[dict[str, Any]], rows: Any, wanted: Tensor,
                  similar: Tensor | None) -> Any:  # fmt: skip
        """For every picture its number, the scores of the texts that are wanted of it, and those texts' numbers.

        Pictures are read from the table again: their tokens would not fit in memory. Several processes divide them.
        """
        starts = range(0, len(records), LOOK)
        mine = [list(self._block(backbone, records, rows, wanted, similar, starts[n])) for n in shared(len(starts))]
        for block in in_turn(mine, len(starts)):
            yield from block

    def _block(self, backbone: Any, records: list[dict[str, Any]], rows: Any, wanted: Tensor, similar: Tensor | None,
               start: int) -> Any:  # fmt: skip
        """The same for the pictures from `start` on that are encoded at once."""
        device = next(backbone.parameters()).device
        longest = max(r["ids"].shape[1] for r in records)
        padded = [[F.pad(r[name], (0, longest - r[name].shape[1])) for r in records] for name in ("ids", "mask")]
        texts = (torch.cat(padded[0]).to(device), torch.cat(padded[1]).to(device))
        table = encoded(rows)
        block = range(start, min(start + LOOK, len(records)))
        pictures = backbone.images([row["image"] for row in decode_rows(table[i] for i in block)])
        seen = backbone.look(pictures["pixel_values"].to(device))
        i, j = wanted[block.start : block.stop].nonzero().unbind(dim=1)
        cosines = torch.zeros(len(i)) if similar is None else similar[i + start, j]
        scores = self._scores(backbone, seen, texts, i.to(device), j.to(device), cosines.to(device)).cpu()
        counts = torch.bincount(i, minlength=len(block)).tolist()
        return zip(block, zip(scores.split(counts), j.split(counts), strict=True), strict=True)

    def chance(self, rows: Any) -> float | None:
        return 1 / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        """After `score`, which finds the best text; before it there is nothing to show."""
        if any("best" not in records[i] for i in indices):
            return []
        own = list(rows["captions"])
        told = [caption for captions in own for caption in captions]
        return [
            {"query": "picture -> caption", "prediction": told[records[i]["best"]], "target": own[i][0],
             "correct": told[records[i]["best"]] in own[i]}
            for i in indices
        ]  # fmt: skip
