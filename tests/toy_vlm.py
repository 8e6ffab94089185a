"""The toy vision-text-fusion model of the pruning reference tensors (`b1_*`), described by its anatomy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Anatomy, Block, Tap, Tower


class VisionLayer(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class TextLayer(nn.Module):
    """Single-head attention on `context` (itself, or the image), then a feed-forward part, both post-norm."""

    def __init__(self, width: int, hidden: int, context: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(context).transpose(1, 2) / x.shape[-1] ** 0.5
        scores = scores + (1 - mask.float())[:, None] * -10000
        x = self.norm1(x + self.out(scores.softmax(-1) @ self.value(context)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class ToyVLM(nn.Module):
    def __init__(self, dv, hv, nv, dt, ht, text_layers, fusion_layers, dp, vocab, **_):
        super().__init__()
        self.text_layers, self.fusion_layers = text_layers, fusion_layers
        self.vision_encoder = nn.Module()
        self.vision_encoder.vit = nn.Module()
        self.vision_encoder.vit.layers = nn.ModuleList(VisionLayer(dv, hv) for _ in range(nv))
        self.vision_encoder.vit.norm = nn.LayerNorm(dv)
        self.text_encoder = nn.Module()
        self.text_encoder.bert = nn.Module()
        self.text_encoder.bert.word_embeddings = nn.Embedding(vocab, dt)
        self.text_encoder.bert.encoder = nn.Module()
        layers = {k: TextLayer(dt, ht, dt) for k in text_layers} | {k: TextLayer(dt, ht, dv) for k in fusion_layers}
        self.text_encoder.bert.encoder.layer = nn.ModuleDict(layers)
        self.text_encoder.cls = nn.Linear(dt, vocab)
        self.vision_proj, self.text_proj, self.itm_head = nn.Linear(dv, dp), nn.Linear(dt, dp), nn.Linear(dt, 2)

    def forward(self, images: Tensor, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        for layer in self.vision_encoder.vit.layers:
            images = layer(images)
        images = self.vision_encoder.vit.norm(images)
        x = self.text_encoder.bert.word_embeddings(text_ids)
        for key in self.text_layers:
            x = self.text_encoder.bert.encoder.layer[key](x, x, text_atts)
        for key in self.fusion_layers:
            x = self.text_encoder.bert.encoder.layer[key](x, images, torch.ones(images.shape[:2]))
        return x

    def anatomy(self) -> Anatomy:
        vit, bert = "vision_encoder.vit", "text_encoder.bert.encoder.layer"
        width, text_width = self.vision_encoder.vit.norm.normalized_shape[0], self.text_encoder.cls.in_features

        def text(name, keys):
            paths = tuple(f"{bert}.{k}" for k in keys)
            return Tower(name, name, tuple(Block(p, text_width) for p in paths), paths, output=Tap(paths[-1]),
                         mask=Tap("", "input", "text_atts"))  # fmt: skip

        blocks = tuple(Block(f"{vit}.layers.{i}", width) for i in range(len(self.vision_encoder.vit.layers)))
        vision = Tower("vision", "vision", blocks, (vit,), output=Tap(f"{vit}.norm"))
        return Anatomy((vision, text("text", self.text_layers), text("fusion", self.fusion_layers)),
                       heads=("vision_proj", "text_proj", "itm_head", "text_encoder.cls"))  # fmt: skip
