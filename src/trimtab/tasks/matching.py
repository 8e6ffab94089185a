"""Image-text matching, with language modelling beside it in training: how fused VLMs are pretrained.

Half of a batch is matched and serves the language loss: some of its words are masked and found again (ViLT, section
3.2; one pass serves both losses, ViLT makes two), or each is predicted from those before it (BLIP, section 3.2). The
other half is whole, and half of that gets a wrong caption, for the matching loss. Wrong captions are, in equal parts,
another picture's and the picture's own with one thing or direction changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data.draws import choose, coin, uniform
from trimtab.data.images import decode_rows
from trimtab.processes import in_turn, shared
from trimtab.settings import within
from trimtab.tasks.base import TASKS, Batch, Task
from trimtab.tasks.retrieval import recalls
from trimtab.tasks.words import IGNORED, Words, next_words


@TASKS.register("matching")
class Matching(Task):
    """Columns `image`, `captions`, `foils`. Evaluation ranks the captions of every block of `pool` pictures.

    The metric is recall@1 within such blocks: every picture is fused with every caption of its block, so that its cost
    grows with the pool.
    """

    columns = ("captions", "foils")
    primary = "recall@1"
    kinds = ("joint",)
    together = True

    def __init__(self, mask_share: float = 0.3, pool: int = 50, words: Literal["masked", "next"] = "masked"):
        within(locals(), mask_share="[0, 1]", pool="[1, inf)")
        if words not in ("masked", "next"):
            raise ValueError(f"words must be 'masked' or 'next', found {words!r}")
        self.mask_share = mask_share
        self.pool = pool
        self.words = words

    def head(self, backbone: Any) -> nn.Module:
        return Words(backbone)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        batch = backbone.images([r["image"] for r in rows])
        if not train:
            return {**batch, **backbone.texts([r["captions"][0] for r in rows])}
        texts = [choose(r, "caption", r["captions"]) for r in rows]
        half, quarter = len(rows) // 2, max(1, 3 * len(rows) // 4)
        matched = torch.ones(len(rows))
        for i in range(quarter, len(rows)):  # the last quarter is mismatched
            foil, other = choose(rows[i], "foil", rows[i]["foils"]), texts[(i + 1) % quarter]
            texts[i] = foil if coin(rows[i], "foil or other") else other
            matched[i] = 0
        encoded = backbone.texts(texts)
        tokenizer = backbone.tokenizer
        ids, words = encoded["input_ids"], encoded["input_ids"].clone()
        if self.words == "next":
            words = next_words(ids, encoded["attention_mask"])
            words[half:] = IGNORED
        else:
            special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
            hidden = torch.zeros_like(special)
            for i, mask in enumerate(encoded["attention_mask"][:half] != 0):
                hidden[i, mask] = uniform(rows[i], "masked words", int(mask.sum())) < self.mask_share
            hidden &= ~special
            words[~hidden] = IGNORED
            encoded["input_ids"] = ids.masked_fill(hidden, tokenizer.mask_token_id)
        matched[:half] = IGNORED
        return {**batch, **encoded, "words": words, "matched": matched}

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        words = torch.full_like(batch["input_ids"], IGNORED)
        words[:, 1:3] = 5
        return {**batch, "words": words, "matched": torch.ones(size)}

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        words, matched = batch["words"], batch["matched"]
        judged = matched != IGNORED
        if self.words == "next":
            writes = (words != IGNORED).any(dim=1)
            seen = backbone.look(batch["pixel_values"][writes])
            tokens = backbone.write(seen, batch["input_ids"][writes], batch["attention_mask"][writes])
            words, pick = words[writes], judged
        else:
            pick = torch.ones_like(judged)
        encoded = backbone.pair(*(batch[k][pick] for k in ("pixel_values", "input_ids", "attention_mask")))
        if self.words == "masked":
            tokens = encoded.tokens
        hidden = words != IGNORED
        logits = head(tokens[:, : words.shape[1]][hidden], backbone.model.get_input_embeddings().weight)
        match = backbone.match(encoded)[judged[pick]].float()
        matching = F.binary_cross_entropy_with_logits(match, matched[judged], reduction="sum")
        language = F.cross_entropy(logits.float(), words[hidden], reduction="sum")
        return divided.mean(language, hidden.sum()) + 2 * divided.mean(matching, judged.sum())

    def fold(self, backbone: Any, head: Any) -> None:
        """The words' head goes where the backbone has one of its own."""
        head.fold(backbone)

    def predict(self, backbone: Any, head: Any, batch: Batch) -> list[dict[str, Any]]:
        length = batch["input_ids"].shape[1]
        return [
            {"pixels": p.cpu(), "ids": i.cpu(), "mask": m.cpu(), "length": length}
            for p, i, m in zip(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], strict=True)
        ]

    def check_scored(self, table: Any) -> None:
        if len(table) < self.pool:
            raise ValueError(
                f"task 'matching' ranks blocks of {self.pool} pictures, the table to evaluate on has {len(table)} "
                f"rows: set task.pool to {len(table)} or fewer, or give more rows"
            )
        if rest := len(table) % self.pool:
            raise ValueError(
                f"task 'matching' ranks blocks of {self.pool} pictures, and of the {len(table)} rows to evaluate on "
                f"{rest} are left over: set task.pool to a divisor of {len(table)}, or give a multiple of {self.pool}"
            )

    def score(self, backbone: Any, head: Any, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        """Adds to each record `best`, the row whose caption its picture finds within its block."""
        captions = [c[0] for c in rows["captions"]]
        blocks = [records[i : i + self.pool] for i in range(0, len(records) - self.pool + 1, self.pool)]
        if not blocks:
            self.check_scored(records)
        found = []
        mine = [self._similarity(backbone, blocks[i]) for i in shared(len(blocks))]  # processes divide the blocks
        for i, (block, similarity) in enumerate(zip(blocks, in_turn(mine, len(blocks)), strict=True)):
            start = i * self.pool
            found.append(recalls(similarity, captions[start : start + self.pool], block))
            for record, best in zip(block, similarity.argmax(dim=1).tolist(), strict=True):
                record["best"] = start + best
        return {key: sum(f[key] for f in found) / len(found) for key in found[0]}

    def _similarity(self, backbone: Any, block: list[dict[str, Any]]) -> Tensor:
        longest = max(int(r["mask"].sum()) for r in block)
        pad = lambda x: F.pad(x, (0, max(0, longest - len(x))))[:longest]  # noqa: E731
        ids, mask = torch.stack([pad(r["ids"]) for r in block]), torch.stack([pad(r["mask"]) for r in block])
        device = next(backbone.parameters()).device
        out = []
        for record in block:
            seen = backbone.look(record["pixels"].to(device)[None]).expand(len(block), -1, -1)
            out.append(backbone.match(backbone.fuse(seen, ids.to(device), mask.to(device))).float().cpu())
        return torch.stack(out)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        """After `score`, which finds the best captions; rows beyond the last whole block have none."""
        captions = [c[0] for c in rows["captions"]]
        if any("best" not in records[i] for i in indices):
            return []
        best = {i: captions[records[i]["best"]] for i in indices}
        return [
            {
                "query": "picture -> caption",
                "prediction": best[i],
                "target": captions[i],
                "correct": best[i] == captions[i],
            }
            for i in indices
        ]

    def chance(self, rows: Any) -> float | None:
        return 1 / self.pool
