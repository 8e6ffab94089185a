"""From conversations to token ids, and where in them the answer begins.

    prompt:            <|im_start|>User:<image>How many?<end>\\nAssistant:
    prompt + answer:   <|im_start|>User:<image>How many?<end>\\nAssistant: two<end>\\n
    labels:            -100 ...                                   -100 two <end> -100

What the model is asked in training is what it is asked in generation, token for token: a conversation whose prompt's
tokens are not the first of the answered one's is refused. An answer ends with a token at which generation stops; where
the template writes none, the tokenizer's end of sequence is put behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # torch's cross-entropy leaves these labels out

Conversation = str | Sequence[dict[str, Any]]
"""Messages of a transformers chat, whose pictures are entries `{"type": "image"}`; or a prompt as it is."""


class ConversationError(ValueError):
    """A conversation that a folder's processor or template does not take; the message says what to change."""


class Words:
    """The words of a folder's processor.

    Args:
        name: of the folder, for messages.
        processor: transformers' processor.
        ends: ids of the tokens at which the model's generation stops.
    """

    def __init__(self, name: str, processor: Any, ends: Sequence[int]):
        self.name, self.processor, self.tokenizer = name, processor, processor.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise ConversationError(f"{name}: its tokenizer has no `eos_token`, with which an answer would end")
        self.ends = {*ends, self.tokenizer.eos_token_id}

    @property
    def template(self) -> bool:
        """Whether the folder has a chat template."""
        found = self.processor.chat_template
        return bool("default" in found if isinstance(found, dict) else found)

    def prompt(self, conversation: Conversation) -> str:
        """The text of a conversation up to where the model's answer begins.

        Raises:
            ConversationError: if the folder has no chat template and the conversation is messages.
        """
        return conversation if isinstance(conversation, str) else self._rendered(conversation, True)

    def answered(self, conversation: Conversation, prompt: str, answer: str) -> str:
        """The text of a conversation with its answer, up to the end of it.

        Raises:
            ConversationError: if the template writes the answered conversation in other words than the prompt.
        """
        if isinstance(conversation, str):
            text = f"{prompt} {answer}" if prompt and not prompt[-1].isspace() else prompt + answer
        else:
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            text = self._rendered([*conversation, turn], False)
        if not text.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
            raise ConversationError(
                f"{self.name}: its chat template does not begin an answered conversation with the prompt: after "
                f"{prompt[max(0, at - 20) : at]!r} expected {prompt[at : at + 30]!r}, found {text[at : at + 30]!r}. "
                "Give the task a plain `template`, or mend the folder's chat_template.jinja"
            )
        return text

    def _rendered(self, messages: Sequence[dict[str, Any]], ask: bool) -> str:
        if not self.template:
            raise ConversationError(
                f"{self.name}: the folder has no chat template (chat_template.jinja), so that nothing says how a "
                "question is put to the model: give the task a plain `template`, such as "
                "'Question: {question} Answer:' for BLIP-2 or '{images}answer en {question}' for PaliGemma, or put the "
                "model's chat_template.jinja into the folder"
            )
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
        except (TemplateError, TypeError, KeyError) as error:
            raise ConversationError(
                f"{self.name}: its chat template does not take the conversation with the roles "
                f"{[m.get('role') for m in messages]}: {type(error).__name__}: {error}"
            ) from error

    def options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Of the tokenizer: as in `apply_chat_template` no start of sequence is added where prompts have one."""
        start = self.tokenizer.bos_token
        starts = {bool(start) and prompt.startswith(start) for prompt in prompts}
        if len(starts) > 1:
            raise ConversationError(f"{self.name}: some prompts of a batch begin with {start!r} and some do not")
        return {"add_special_tokens": False} if starts == {True} else {}

    def closed(self, prompt: str, text: str, options: dict[str, Any]) -> tuple[str, list[int]]:
        """An answered conversation that ends with an end, and the ids of all that follows the prompt.

        Raises:
            ConversationError: if the prompt's tokens are not the first of the answered conversation's.
        """
        asked, whole = self._ids(prompt, options), self._ids(text, options)
        if not self.ends & set(whole[len(asked) :]):
            text += self.tokenizer.eos_token
            whole = self._ids(text, options)
        if whole[: len(asked)] != asked:
            at = next((i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), len(whole))
            raise ConversationError(
                f"{self.name}: the prompt's tokens are not the first of the answered conversation's: token {at} is "
                f"{self._shown(asked[at : at + 1])} alone and {self._shown(whole[at : at + 1])} with the answer; let "
                "the template end where a word does (with or without a space)"
            )
        return text, whole[len(asked) :]

    def _ids(self, text: str, options: dict[str, Any]) -> list[int]:
        return list(self.tokenizer(text, **options)["input_ids"])

    def _shown(self, ids: list[int]) -> str:
        return repr(self.tokenizer.decode(ids))

    def labels(self, input_ids: Tensor, mask: Tensor, answers: Sequence[list[int]]) -> Tensor:
        """Labels (B, L) of right-padded conversations: the answer's ids up to its first end, else -100.

        Args:
            input_ids: (B, L), of the processor.
            mask: (B, L), 1 = valid.
            answers: of each conversation, the ids of all that follows the prompt.

        Raises:
            ConversationError: if a conversation does not end with its answer's ids.
        """
        out = torch.full_like(input_ids, IGNORED)
        for row, (ids, answer) in enumerate(zip(input_ids, answers, strict=True)):
            where = mask[row].nonzero()[:, 0]
            where = where[len(where) - len(answer) :]
            if ids[where].tolist() != answer:
                found = self._shown(ids[where].tolist())
                raise ConversationError(
                    f"{self.name}: conversation {row} of the batch: its processor writes {found} at the end, expected "
                    f"the answer as the tokenizer writes it, {self._shown(answer)}"
                )
            told = 1 + next(i for i, token in enumerate(answer) if token in self.ends)
            out[row, where[:told]] = ids[where[:told]]
        return out
