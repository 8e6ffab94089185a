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

    def forward(self, images, text_ids, text_atts, image_atts=None, idx_to_group_img=None, counted_tokens=None,
                text_ids_masked=None, masked_pos=None, masked_ids=None):  # fmt: skip
        """Fused text tokens (B, L, D), or the loss if the masked text is given, as `{"loss": itc + itm + mlm}`.

        `counted_tokens` is not used: a place for another mask than the model's own, for statistics to read.
        """
        images = self.see(images, idx_to_group_img)
        seen = torch.ones(images.shape[:2]) if image_atts is None else image_atts
        text = self.write(text_ids, text_atts)
        if masked_ids is None:
            return self.fuse(text, images, seen)
        losses = (self.contrast(images, text), self.match(images, seen, text))
        hidden = self.fuse(self.write(text_ids_masked, text_atts), images, seen)
        hidden = hidden.gather(1, masked_pos[..., None].expand(-1, -1, hidden.shape[-1]))
        mlm = F.cross_entropy(self.text_encoder.cls(hidden).flatten(0, 1), masked_ids.flatten())
        return {"loss": sum(losses) + mlm, "losses": torch.stack([*losses, mlm])}

    def see(self, images: Tensor, index: Tensor | None) -> Tensor:
        for layer in self.vision_encoder.vit.layers:
            images = layer(images)
        images = self.vision_encoder.vit.norm(images)
        return images if index is None else images[index]

    def write(self, text_ids: Tensor, text_atts: Tensor) -> Tensor:
        x = self.text_encoder.bert.word_embeddings(text_ids)
        for key in self.text_layers:
            x = self.text_encoder.bert.encoder.layer[key](x, x, text_atts)
        return x

    def fuse(self, x: Tensor, images: Tensor, seen: Tensor) -> Tensor:
        for key in self.fusion_layers:
            x = self.text_encoder.bert.encoder.layer[key](x, images, seen)
        return x

    def contrast(self, images: Tensor, text: Tensor) -> Tensor:
        v, t = F.normalize(self.vision_proj(images.mean(1)), dim=-1), F.normalize(self.text_proj(text[:, 0]), dim=-1)
        similar, target = v @ t.T / 0.2, torch.arange(len(v))
        return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2

    def match(self, images: Tensor, seen: Tensor, text: Tensor) -> Tensor:
        right = self.fuse(text, images, seen)[:, 0]
        wrong = self.fuse(text, images.roll(1, 0), seen.roll(1, 0))[:, 0]
        target = torch.tensor([1] * len(right) + [0] * len(wrong))
        return F.cross_entropy(self.itm_head(torch.cat([right, wrong])), target)

    def anatomy(self, mask: str = "text_atts") -> Anatomy:
        """Its description; `mask` is the argument that says which text tokens count."""
        vit, bert = "vision_encoder.vit", "text_encoder.bert.encoder.layer"
        width, text_width = self.vision_encoder.vit.norm.normalized_shape[0], self.text_encoder.cls.in_features

        def text(name, keys):
            paths = tuple(f"{bert}.{k}" for k in keys)
            return Tower(name, name, tuple(Block(p, text_width) for p in paths), paths, output=Tap(paths[-1]),
                         mask=Tap("", "input", mask))  # fmt: skip

        blocks = tuple(Block(f"{vit}.layers.{i}", width) for i in range(len(self.vision_encoder.vit.layers)))
        vision = Tower("vision", "vision", blocks, (vit,), output=Tap(f"{vit}.norm"))
        return Anatomy((vision, text("text", self.text_layers), text("fusion", self.fusion_layers)),
                       heads=("vision_proj", "text_proj", "itm_head", "text_encoder.cls"))  # fmt: skip
