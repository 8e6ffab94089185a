"""Video-text retrieval: which sentence belongs to which video (CLIP4Clip: Luo et al., Neurocomputing 2022).

    video --frames--> (B, F, 3, H, W) --backbone, frame by frame--> (B, F, E) --+
                                                                                +-- compare --> (texts, videos)
    sentences --backbone--> (T, E) ---------------------------------------------+

How the two are compared is the backbone's: a CLIP4Clip has one of four heads in it (meanP, seqLSTM, seqTransf,
tightTransf), any other dual encoder takes the mean of the frames. What of such a head is trained is said by the method
or the recipe's policy, as of every other part of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import divided
from trimtab.data import video as videos
from trimtab.data.draws import choose
from trimtab.metrics.videos import one_sentence, several_sentences
from trimtab.settings import within
from trimtab.tasks.base import TASKS, Batch, Task
from trimtab.tasks.classification import Scale

PAIRS = 4096  # texts times videos that are compared at once


@TASKS.register("video-retrieval")
class VideoRetrieval(Task):
    """Columns `video` (path of the file), `captions` (the sentences of a video, at least one).

    Training draws one sentence a video and takes the symmetric cross-entropy of the batch's similarities (section 3.4).
    The authors make a row of every sentence; drawn, each is as likely, but an epoch is shorter. Evaluation takes all
    sentences: with one a video as MSR-VTT 1k-A is scored, with several as MSVD.

    Args:
        frames: at most so many of a video; what is missing is masked.
        per_second: so many of each second, its first.
        keep: which ones if there are more: the `first`, the `last`, or `spread` evenly.
    """

    sees = "video"
    columns = ("captions",)
    primary = "recall@1"
    kinds = ("dual", "video")

    def __init__(self, frames: int = 12, per_second: int = 1, keep: Literal["first", "last", "spread"] = "spread"):
        within(locals(), frames="[1, inf)", per_second="[1, inf)")
        if keep not in videos.KEEP:
            raise ValueError(f"keep must be one of {', '.join(videos.KEEP)}, found {keep!r}")
        self.frames, self.per_second, self.keep = frames, per_second, keep

    def head(self, backbone: Any) -> nn.Module:
        """Nothing but a scale, and that only where the model has none of its own."""
        return nn.Module() if backbone.own_scale else Scale(backbone)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        """`pixel_values` (B, F, 3, H, W), `video_mask` (B, F); in training one text a row, `input_ids` (B, L), in
        evaluation all of them, (B, N, L), with an empty mask where a video has fewer than N."""
        for row in rows:
            if not row["captions"]:
                raise ValueError(f"{row['video']}: has no caption, expected at least one")
        batch = self._watched(backbone, rows)
        if train:
            return batch | backbone.texts([choose(r, "caption", r["captions"]) for r in rows])
        words = backbone.texts([text for row in rows for text in row["captions"]])
        counts = [len(row["captions"]) for row in rows]
        for name, values in words.items():
            parts = [F.pad(part, (0, 0, 0, max(counts) - len(part))) for part in values.split(counts)]
            batch[name] = torch.stack(parts)
        return batch

    def _watched(self, backbone: Any, rows: list[dict[str, Any]]) -> Batch:
        def rule(length: videos.Length) -> list[int]:
            return videos.by_second(length, self.per_second, self.frames, self.keep)

        seen = [videos.read(row["video"], rule) for row in rows]
        # All together, so that frames of other shapes are padded alike.
        pixels = backbone.images([frame for frames in seen for frame in frames])["pixel_values"]
        parts = pixels.split([len(frames) for frames in seen])
        pixels = torch.stack([F.pad(p, (0,) * 7 + (self.frames - len(p),)) for p in parts])  # (B, F, 3, H, W)
        return {"pixel_values": pixels, "video_mask": torch.tensor([[i < len(f) for i in range(self.frames)]
                                                                    for f in seen]).long()}  # fmt: skip

    def example(self, backbone: Any, size: int) -> Batch:
        batch = backbone.example(size)
        pixels = batch["pixel_values"][:, None].expand(-1, self.frames, -1, -1, -1)
        return {**batch, "pixel_values": pixels, "video_mask": torch.ones(size, self.frames, dtype=torch.long)}

    def _compared(self, backbone: Any, head: Any, text: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        return backbone.compare(text, frames, mask, getattr(head, "scale", None)).float()

    def loss(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        text = backbone.text(batch["input_ids"], batch["attention_mask"]).pooled
        frames, mask = (divided.gathered(x) for x in (backbone.frames(batch["pixel_values"]), batch["video_mask"]))
        similar = divided.gathered(self._compared(backbone, head, text, frames, mask))  # (B, B), texts by videos
        target = torch.arange(len(similar), device=similar.device)
        return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        frames = backbone.frames(batch["pixel_values"])
        mask = batch["attention_mask"]
        there = mask.any(dim=-1)  # (B, N)
        text = backbone.text(batch["input_ids"][there], mask[there]).pooled.split(there.sum(dim=1).tolist())
        return [{"frames": f, "mask": m, "texts": t} for f, m, t in zip(frames, batch["video_mask"], text, strict=True)]

    def finish(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One record a video: `similar`, its similarities with the sentences of all videos in their order, (S,), and
        `sentences`, how many of them are its own."""
        if not records:
            return []
        frames, mask = (torch.stack([r[name] for r in records]) for name in ("frames", "mask"))
        texts = torch.cat([r["texts"] for r in records])
        with torch.inference_mode():
            blocks = [
                torch.cat([self._compared(backbone, head, text, f, m).cpu()
                           for text in texts.split(max(1, PAIRS // len(f)))])  # (S, videos of the block)
                for f, m in zip(frames.split(PAIRS), mask.split(PAIRS), strict=True)
            ]  # fmt: skip
        similar = torch.cat(blocks, dim=1)
        return [{"similar": s, "sentences": len(r["texts"])} for s, r in zip(similar.T, records, strict=True)]

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        similar = torch.stack([r["similar"] for r in records], dim=1)  # (S, videos)
        counts = [r["sentences"] for r in records]
        found = one_sentence(similar) if set(counts) == {1} else several_sentences(similar, counts)
        out: dict[str, float] = {}
        for name, way in (("text to video", found["t2v"]), ("video to text", found["v2t"])):
            out |= {f"{name} recall@{k}": way[f"R{k}"] / 100 for k in (1, 5, 10)}
            out |= {f"{name} median rank": way["MedianR"], f"{name} mean rank": way["MeanR"]}
        means = {f"recall@{k}": (out[f"text to video recall@{k}"] + out[f"video to text recall@{k}"]) / 2
                 for k in (1, 5, 10)}  # fmt: skip
        return {**means, **out}

    def chance(self, rows: Any) -> float | None:
        """Drawing at random; video to text ranks the best sentence of every video, so that the chances are alike."""
        return 1 / len(rows)

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        captions = list(rows["captions"])
        texts = [text for own in captions for text in own]
        best = [texts[int(records[i]["similar"].argmax())] for i in indices]
        return [
            {"query": "video -> sentence", "prediction": found, "target": captions[i][0],
             "correct": found in captions[i]}
            for i, found in zip(indices, best, strict=True)
        ]  # fmt: skip
