"""The modules of the dual encoder, and of the writer made of the same towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 512


class DualEncoder(nn.Module):
    """A convolutional and a text tower, each pooled by its mean and projected to one width.

    Args:
        vision: an `EfficientNet` of efficientnet-lite-pytorch; its classifier is taken off.
        text: a `BertModel`; its pooler is taken off.
        width: of the common space.
        generator: of the projections; None draws from the global one.
    """

    def __init__(self, vision: Any, text: Any, width: int = WIDTH, generator: torch.Generator | None = None):
        super().__init__()
        channels = vision._fc.in_features
        vision._fc = nn.Identity()
        text.pooler = None
        self.vision = vision
        self.text = text
        # A name for the grid that is handed on: the package calls one activation module after the stem and at the end.
        self.grid = nn.Identity()
        self.visual_projection = nn.Linear(channels, width, bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, width, bias=False)
        for linear in (self.visual_projection, self.text_projection):
            # In double precision, so that the rounded result does not depend on threads or on the LAPACK in use.
            weight = torch.empty(linear.weight.shape, dtype=torch.float64)
            nn.init.orthogonal_(weight, generator=generator)
            with torch.no_grad():
                linear.weight.copy_(weight)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> vectors (B, width) and grid (B, 1280, H/32, W/32)."""
        grid = self.grid(self.vision.extract_features(pixel_values))
        return self.visual_projection(grid.mean(dim=(2, 3))), grid

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) each -> vectors (B, width) and tokens (B, L, D)."""
        tokens = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # a text of no tokens gives zeros
        return self.text_projection(mean), tokens

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of pictures and of texts, each (B, width)."""
        return self.encode_image(pixel_values)[0], self.encode_text(input_ids, attention_mask)[0]

    def set_attn_implementation(self, name: str) -> None:
        """transformers' attention implementation of the text tower (`eager`, `sdpa`)."""
        self.text.set_attn_implementation(name)


class PrefixWriter(nn.Module):
    """A convolutional tower whose grid stands, through one linear map, before the words of a text tower that reads
    from left to right (a "prefix", as in ClipCap: Mokady et al., 2021, with the grid's places for a mapped vector).

    Places count from 0 in the picture and again in the words, so that words have the positions that they were trained
    with; token type 1 tells the picture from the words.

    Args:
        vision: an `EfficientNet` of efficientnet-lite-pytorch; its classifier is taken off.
        text: a `BertModel` that was made with `is_decoder=True`; its pooler is taken off.

    Raises:
        ValueError: if the text tower lets words see those that follow, or has no second token type.
    """

    def __init__(self, vision: Any, text: Any):
        super().__init__()
        if not text.config.is_decoder or text.config.type_vocab_size < 2:
            raise ValueError(
                "PrefixWriter: expected a BertModel with is_decoder=True and two token types, found is_decoder="
                f"{text.config.is_decoder} and type_vocab_size={text.config.type_vocab_size}"
            )
        channels = vision._fc.in_features
        vision._fc = nn.Identity()
        text.pooler = None
        self.vision = vision
        self.text = text
        self.grid = nn.Identity()  # as in `DualEncoder`
        self.visual_map = nn.Linear(channels, text.config.hidden_size)

    def look(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> one token a place of the grid, row by row, (B, P, D)."""
        grid = self.grid(self.vision.extract_features(pixel_values))
        return self.visual_map(grid.flatten(2).transpose(1, 2))

    def read(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of picture and words, (B, P + L, D), each from those before it, and which are valid, (B, P + L).

        Raises:
            ValueError: if there are more words, or places of the grid, than the text tower has positions.
        """
        most, found = self.text.config.max_position_embeddings, max(seen.shape[1], input_ids.shape[1])
        if found > most:
            raise ValueError(f"PrefixWriter: picture of {seen.shape[1]} places and text of {input_ids.shape[1]} "
                             f"tokens: the text tower has positions for {most} of each")  # fmt: skip
        words = self.text.embeddings.word_embeddings(input_ids)
        count, length = seen.shape[1], input_ids.shape[1]
        place = torch.cat([torch.arange(n, device=seen.device) for n in (count, length)])[None]
        kind = (torch.arange(count + length, device=seen.device) < count).long().expand(len(words), -1)
        mask = torch.cat([attention_mask.new_ones(len(words), count), attention_mask], dim=1)
        tokens = self.text(
            inputs_embeds=torch.cat([seen.to(words.dtype), words], dim=1), attention_mask=mask, position_ids=place,
            token_type_ids=kind, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return tokens, mask

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens of picture and words, (B, P + L, D)."""
        return self.read(self.look(pixel_values), input_ids, attention_mask)[0]

    def get_input_embeddings(self) -> nn.Embedding:
        """Of words; a task's head over words shares their weights."""
        return self.text.embeddings.word_embeddings

    def set_attn_implementation(self, name: str) -> None:
        """transformers' attention implementation of the text tower (`eager`, `sdpa`)."""
        self.text.set_attn_implementation(name)
