"""Batches of conversations with pictures, made by a folder's own processor.

to answer:   [pad pad prompt]            padded on the left: every answer goes on where its prompt ends
to learn:    [prompt answer end pad]     labels: -100 but for the answer and its end
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.chat.words import IGNORED, Conversation, ConversationError, Words


class Batches:
    """Makes batches.

    Args:
        words: of the folder's processor.
        apart: whether the model is an encoder-decoder: the answer is the decoder's alone.
        positions: how many tokens the model has positions for; None if it does not say.

    Attributes:
        longest: tokens of a conversation at most, beside that; None for no other limit.
    """

    def __init__(self, words: Words, apart: bool, positions: int | None):
        self.words, self.apart, self.positions = words, apart, positions
        self.longest: int | None = None

    @property
    def picture_token(self) -> str | None:
        """What stands for one picture in a plain prompt; None where the processor puts it there by itself."""
        token = getattr(self.words.processor, "image_token", None)
        return token if isinstance(token, str) else None

    def ask(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """A batch to answer: padded on the left, so that every answer goes on where its prompt ends.

        Args:
            conversations: up to where the model is to answer.
            pictures: PIL images of each, in the order of their places.

        Returns:
            `input_ids` and `attention_mask` (B, L), and what the processor makes of the pictures; tensors of pictures
            may be of all pictures of the batch together.

        Raises:
            ConversationError: if the folder's template or processor does not take them.
        """
        words = self.words
        prompts = [words.prompt(c) for c in conversations]
        self._check_pictures(conversations, prompts, pictures)
        side = None if self.apart else "left"
        return self._processed(prompts, pictures, words.options(prompts), side)

    def teach(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[Any]],
              answers: Sequence[str]) -> dict[str, Tensor]:  # fmt: skip
        """As `ask`, with an answer each: `labels` are its tokens and the end, -100 elsewhere; padded on the right.

        The labels (B, L) of an encoder-decoder are those of its decoder, (B, T).
        """
        words = self.words
        prompts = [words.prompt(c) for c in conversations]
        self._check_pictures(conversations, prompts, pictures)
        options = words.options(prompts)
        if self.apart:
            return {**self._processed(prompts, pictures, options, None), "labels": self._written(answers)}
        if "suffix" in inspect.signature(words.processor.__call__).parameters:  # PaliGemma's joins the two itself
            return self._processed(prompts, pictures, options, "right", suffix=list(answers))
        whole = [words.answered(c, p, a) for c, p, a in zip(conversations, prompts, answers, strict=True)]
        closed = [words.closed(p, text, options) for p, text in zip(prompts, whole, strict=True)]
        batch = self._processed([text for text, _ in closed], pictures, options, "right")
        labels = words.labels(batch["input_ids"], batch["attention_mask"], [ids for _, ids in closed])
        return {**batch, "labels": labels}

    def _processed(self, texts: Sequence[str], pictures: Sequence[Sequence[Any]], options: dict[str, Any],
                   side: str | None, **more: Any) -> dict[str, Tensor]:  # fmt: skip
        """What the processor makes of texts; `input_ids` come first."""
        name, processor = self.words.name, self.words.processor
        nested = [[self._readable(p) for p in row] for row in pictures] if any(pictures) else None
        if side is not None:
            options = {**options, "padding_side": side}
        try:
            found = processor(text=list(texts), images=nested, padding=True, return_tensors="pt", **options, **more)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ConversationError(
                f"{name}: its {type(processor).__name__} does not take texts with {[len(p) for p in pictures]} pictures"
                f": {type(error).__name__}: {error}; the first text is {texts[0][:200]!r}"
            ) from error
        batch = {"input_ids": found["input_ids"], **{k: v for k, v in found.items() if isinstance(v, Tensor)}}
        if not more:
            batch.pop("labels", None)  # of PaliGemma's processor, which has none to give
        length = batch["attention_mask"].sum(dim=1)
        limit = min(filter(None, (self.positions, self.longest)), default=None)
        if limit is not None and int(length.max()) > limit:
            row = int(length.argmax())
            raise ConversationError(
                f"{name}: conversation {row} of the batch has {int(length.max())} tokens with its pictures, "
                f"the limit is {limit}: shorten it, or let the folder's image processor make fewer tokens of a picture"
                " (a conversation is not cut, for that would cut pictures)"
            )
        return batch

    def _readable(self, picture: Any) -> Any:
        """A picture as the processor takes it: those that do not turn modes into RGB themselves get RGB."""
        own = getattr(self.words.processor.image_processor, "do_convert_rgb", False)
        return picture if own or picture.mode == "RGB" else picture.convert("RGB")

    def _check_pictures(self, conversations: Sequence[Conversation], prompts: Sequence[str],
                        pictures: Sequence[Sequence[Any]]) -> None:  # fmt: skip
        """Raise a ConversationError unless each prompt has a place for each of its pictures. Processors count over a
        whole batch: a row's second picture would be taken for the next row's first."""
        token = self.picture_token
        for row, (asked, prompt, given) in enumerate(zip(conversations, prompts, pictures, strict=True)):
            places = prompt.count(token) if token else 0
            if not places and isinstance(asked, str):
                places = 1  # the processor puts one before the words
            if places != len(given):
                what = f"{token!r} {places} times" if token else "place for one picture"
                raise ConversationError(
                    f"{self.words.name}: conversation {row} of the batch has {len(given)} pictures, and its prompt has "
                    f"{what}: {prompt[:200]!r}. A plain `template` names the places with {{images}}; the words of a "
                    "conversation may not hold that token"
                )

    def _written(self, answers: Sequence[str]) -> Tensor:
        """Labels (B, T) of an encoder-decoder: the answers as its tokenizer writes targets, with an end."""
        tokenizer = self.words.tokenizer
        end = tokenizer.eos_token_id
        rows = [list(ids) for ids in tokenizer(text_target=list(answers))["input_ids"]]
        rows = [ids if ids and ids[-1] == end else [*ids, end] for ids in rows]
        longest = max(map(len, rows))
        return torch.tensor([ids + [IGNORED] * (longest - len(ids)) for ids in rows])
