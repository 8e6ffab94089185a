"""Writing texts word by word: transformers' own generation on any backbone that can `write`.

    seen (B, P, D), ids so far (N, L) --backbone.write--> features (N, L, D) --head--> the next word, (N, V)

Greedy and beam search, length limits and the ban on repeated n-grams are transformers'. There is no cache of keys and
values: every step reads the words so far again, whatever methods have changed in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


@dataclass(frozen=True)
class Limits:
    """How texts are written.

    Attributes:
        longest: tokens at most, start and prompt counted.
        shortest: tokens at least, counted likewise.
        beams: of beam search; 1 writes greedily.
        no_repeat: no run of so many tokens occurs twice; 0 allows all.
        length_penalty: power of the length by which a beam's log-probability is divided.
    """

    longest: int
    shortest: int = 0
    beams: int = 1
    no_repeat: int = 0
    length_penalty: float = 1.0


class Writer(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A backbone and a head over its words as transformers' generation wants a language model."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    backbone: Any
    words: Any
    embeddings: Any

    def __init__(self, backbone: Any, head: nn.Module, embeddings: Tensor):
        super().__init__(PretrainedConfig())
        # No parts of this module: it is thrown away, and they stay where they are.
        self.__dict__.update(backbone=backbone, words=head, embeddings=embeddings)

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, seen: Any = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "seen": seen}

    def forward(self, input_ids: Tensor, seen: Tensor, **_: Any) -> CausalLMOutput:
        """Logits of the word that follows, (N, 1, V)."""
        last = self.backbone.write(seen, input_ids, torch.ones_like(input_ids))[:, -1:]
        return CausalLMOutput(logits=self.words(last, self.embeddings))


def write(backbone: Any, head: nn.Module, seen: Tensor, start: Tensor, limits: Limits) -> Tensor:
    """Texts that follow `start`, padded: (B, at most `limits.longest`).

    Args:
        backbone: writes, and has a tokenizer.
        head: from features and word embeddings to logits (`Words`).
        seen: what `backbone.look` gave of the pictures, (B, P, D).
        start: (B, S), the token that starts a text and the prompt.
        limits: how.

    Raises:
        ValueError: if the start leaves no room.
    """
    if start.shape[1] >= limits.longest:
        raise ValueError(f"the start of a text with its prompt has {start.shape[1]} tokens, which leaves no room: a "
                         f"text may have {limits.longest}")  # fmt: skip
    tokenizer = backbone.tokenizer
    config = GenerationConfig(
        max_length=limits.longest, min_length=limits.shortest, num_beams=limits.beams, do_sample=False,
        no_repeat_ngram_size=limits.no_repeat, length_penalty=limits.length_penalty, use_cache=False,
        eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    writer = Writer(backbone, head, backbone.model.get_input_embeddings().weight).eval()
    return writer.generate(start, seen=seen, generation_config=config)
