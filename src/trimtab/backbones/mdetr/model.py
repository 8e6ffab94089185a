"""The modules of MDETR; what they compute is drawn in `trimtab.backbones.mdetr`. Everything is batch first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, RobertaConfig, RobertaModel

from trimtab.backbones.base import check_sizes
from trimtab.backbones.vse.resnet import ResNet, ResNetSizes

# Kinds of answers of GQA in the order of their queries, and how many answers each has.
GQA = {"type": 5, "obj": 3, "rel": 1594, "attr": 403, "cat": 678, "global": 111}


class MdetrConfig(PretrainedConfig):
    """Sizes of an MDETR.

    Args:
        text_config: of the RoBERTa.
        cnn: fields of `ResNetSizes`.
        width, heads, encoder_layers, decoder_layers, feed_forward: of the transformer.
        queries: objects that are looked for.
        classes: text positions to which an object can belong, and one more for "no object".
        align: width of the space in which objects and words are aligned, 0 for none.
        answers: kind of answer -> number of answers, one query each (GQA: `GQA`; one head: `{"": 1853}`).
    """

    model_type = "trimtab_mdetr"
    sub_configs = {"text_config": RobertaConfig}

    def __init__(
        self,
        text_config: Any = None,
        cnn: dict[str, Any] | None = None,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feed_forward: int = 2048,
        queries: int = 100,
        classes: int = 256,
        align: int = 64,
        answers: dict[str, int] | None = None,
        dropout: float = 0.1,
        **rest: Any,
    ):
        if not isinstance(text_config, RobertaConfig):
            text_config = RobertaConfig(**(text_config or {}))
        self.text_config, self.cnn = text_config, cnn or {"frozen": True}
        self.width, self.heads, self.feed_forward, self.dropout = width, heads, feed_forward, dropout
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.queries, self.classes, self.align, self.answers = queries, classes, align, answers or {}
        super().__init__(**rest)


class EncoderLayer(nn.Module):
    """DETR's: positions are added to queries and keys, norms come last. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: MdetrConfig):
        super().__init__()
        width = config.width
        self.self_attn = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, config.feed_forward), nn.Linear(config.feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, padding: Tensor, pos: Tensor) -> Tensor:
        """Stream (B, L, D), where it is padding (B, L), positions (B, L, D)."""
        where = x + pos
        y = self.self_attn(where, where, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(torch.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class DecoderLayer(nn.Module):
    """Queries attend to one another, then to image and text together. (B, Q, D) -> (B, Q, D).

    The released code has no attention to the text alone; its `norm2` went with it, which leaves the names 1, 3, 4.
    """

    def __init__(self, config: MdetrConfig):
        super().__init__()
        width = config.width
        self.self_attn = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.cross_attn_image = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, config.feed_forward), nn.Linear(config.feed_forward, width)
        self.norm1, self.norm3, self.norm4 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor, pos: Tensor, query: Tensor) -> Tensor:
        """Stream (B, Q, D), encoded image and text (B, L, D), their padding and positions, the queries (B, Q, D)."""
        where = x + query
        y = self.self_attn(where, where, x, need_weights=False)[0]
        x = self.norm1(x + self.dropout(y))
        y = self.cross_attn_image(x + query, memory + pos, memory, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm3(x + self.dropout(y))
        y = self.linear2(self.dropout(torch.relu(self.linear1(x))))
        return self.norm4(x + self.dropout(y))


class Encoder(nn.Module):
    def __init__(self, config: MdetrConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, valid: Tensor, pos: Tensor) -> Tensor:
        """(B, L, D), valid tokens (B, L), positions (B, L, D) -> (B, L, D), with no norm at the end."""
        for layer in self.layers:
            x = layer(x, ~valid, pos)
        return x


class Decoder(nn.Module):
    def __init__(self, config: MdetrConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, memory: Tensor, valid: Tensor, pos: Tensor, query: Tensor) -> Tensor:
        """Encoded (B, L, D) and queries (B, Q, D) -> each layer's normalised output, (layers, B, Q, D)."""
        x, outs = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, memory, ~valid, pos, query)
            outs.append(self.norm(x))
        return torch.stack(outs)


class Resizer(nn.Module):
    """Text tokens to the transformer's width."""

    def __init__(self, config: MdetrConfig):
        super().__init__()
        self.fc = nn.Linear(config.text_config.hidden_size, config.width)
        self.layer_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(self.fc(x)))


class BoxMlp(nn.Module):
    """(.., D) -> (.., 4), before the sigmoid."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(x)))))


def sine_positions(valid: Tensor, width: int) -> Tensor:
    """Where every place of a padded grid is in its image, as sines and cosines, rows in the first half of the channels.

    Args:
        valid: (B, H, W).
        width: channels.

    Returns:
        (B, H W, width).
    """
    rows, columns = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    rows = rows / (rows[:, -1:] + 1e-6) * 2 * math.pi
    columns = columns / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
    half = torch.arange(width // 2, dtype=torch.float32, device=valid.device)
    rates = 10000 ** (2 * torch.div(half, 2, rounding_mode="floor") / (width // 2))

    def waves(x: Tensor) -> Tensor:
        x = x[..., None] / rates
        return torch.stack([x[..., 0::2].sin(), x[..., 1::2].cos()], dim=-1).flatten(3)

    return torch.cat([waves(rows), waves(columns)], dim=-1).flatten(1, 2)


class Mdetr(PreTrainedModel):
    """MDETR with its grounding heads, and with answer heads if it was trained for GQA."""

    config_class = MdetrConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MdetrConfig):
        super().__init__(config)
        width, sizes = config.width, ResNetSizes(**config.cnn)
        self.backbone = ResNet(sizes)
        self.input_proj = nn.Conv2d(sizes.width, width, 1)
        self.transformer: Any = nn.Module()
        self.transformer.text_encoder = RobertaModel(config.text_config)
        self.transformer.resizer = Resizer(config)
        self.transformer.encoder, self.transformer.decoder = Encoder(config), Decoder(config)
        self.query_embed = nn.Embedding(config.queries, width)
        self.class_embed, self.bbox_embed = nn.Linear(width, config.classes), BoxMlp(width)
        if config.align:
            self.contrastive_align_projection_image = nn.Linear(width, config.align)
            self.contrastive_align_projection_text = nn.Linear(width, config.align)
        if config.answers:
            self.qa_embed = nn.Embedding(len(config.answers), width)
            for kind, count in config.answers.items():
                setattr(self, answer_head(kind), nn.Linear(width, count))
        self.post_init()

    def encode(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor,
               pixel_mask: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Image and text encoded together.

        Args:
            pixel_values: (B, 3, H, W), padded on the right and below.
            input_ids, attention_mask: (B, L).
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None: no padding.

        Returns:
            `grid` (B, C, h, w), `text` (B, L, D) as it goes in, `memory` (B, h w + L, D), `valid` and `pos` of it.
        """
        # RoBERTa's positions start behind that of padding.
        text_config = self.config.text_config
        check_sizes("MDETR", input_ids, text_config.max_position_embeddings - text_config.pad_token_id - 1)
        grid = self.backbone(pixel_values)
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape)
        padding = F.interpolate((pixel_mask == 0).float()[None], size=grid.shape[-2:])[0]  # the nearest pixel's
        seen = padding == 0
        words = self.transformer.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        text, pos = self.transformer.resizer(words), sine_positions(seen, self.config.width)
        x = torch.cat([self.input_proj(grid).flatten(2).transpose(1, 2), text], dim=1)
        valid = torch.cat([seen.flatten(1), attention_mask != 0], dim=1)
        pos = torch.cat([pos.to(text.dtype), torch.zeros_like(text)], dim=1)  # text has its positions already
        memory = self.transformer.encoder(x, valid=valid, pos=pos)
        return {"grid": grid, "text": text, "memory": memory, "valid": valid, "pos": pos}

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor,
                pixel_mask: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Where the phrases of a text are in an image, and answers.

        Returns:
            `logits` (layers, B, Q, classes) and `boxes` (layers, B, Q, 4: centre and size as parts of the image), of
            which the last layer's are the result; `objects` (layers, B, Q, E) and `words` (B, L, E), aligned, of
            length 1; `answer_<kind>` (B, answers).
        """
        states, text = self.states(pixel_values, input_ids, attention_mask, pixel_mask)
        out = {}
        for i, kind in enumerate(self.config.answers):
            # Answers are read from the FIRST decoder layer, as in the authors' code (they index layers, not the end).
            out[answer_head(kind).removesuffix("_head")] = getattr(self, answer_head(kind))(
                states[0, :, self.config.queries + i]
            )
        return out | found(self, states[:, :, : self.config.queries], text)

    def states(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor,
               pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The decoder's states after each layer, (layers, B, Q + answers, D), and the encoded text, (B, L, D)."""
        seen = self.encode(pixel_values, input_ids, attention_mask, pixel_mask)
        query = self.query_embed.weight
        if self.config.answers:
            query = torch.cat([query, self.qa_embed.weight])
        query = query.repeat(len(pixel_values), 1, 1)  # no view of a parameter: counting on fake tensors refuses that
        states = self.transformer.decoder(seen["memory"], seen["valid"], seen["pos"], query)
        return states, seen["memory"][:, -input_ids.shape[1] :]


def found(heads: Any, objects: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What the grounding heads, attributes of a module, say of objects (layers, B, Q, D) and the text (B, L, D): see
    `Mdetr.forward`."""
    out = {"logits": heads.class_embed(objects), "boxes": heads.bbox_embed(objects).sigmoid()}
    if hasattr(heads, "contrastive_align_projection_image"):
        out["objects"] = F.normalize(heads.contrastive_align_projection_image(objects), dim=-1)
        out["words"] = F.normalize(heads.contrastive_align_projection_text(text), dim=-1)
    return out


class SetHeads(nn.Module):
    """The grounding heads of a model by themselves, under its names: the very modules, not copies of them."""

    def __init__(self, model: Mdetr):
        super().__init__()
        names = ("class_embed", "bbox_embed", "contrastive_align_projection_image", "contrastive_align_projection_text")
        for name in names:
            if hasattr(model, name):
                self.add_module(name, getattr(model, name))

    def forward(self, objects: Tensor, text: Tensor) -> dict[str, Tensor]:
        return found(self, objects, text)


def answer_head(kind: str) -> str:
    """Name of the head of a kind of answer, as in the authors' files."""
    return f"answer_{kind}_head" if kind else "answer_head"


AutoConfig.register(MdetrConfig.model_type, MdetrConfig)
