"""A chat model for tasks: conversations and pictures in, answers or the loss on them out."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tap
from trimtab.anatomy.lookup import described_by_hand
from trimtab.backbones.base import Backbone, load_pretrained
from trimtab.backbones.chat.batches import Batches
from trimtab.backbones.chat.processor import FILES, load_processor
from trimtab.backbones.chat.words import IGNORED, Conversation, ConversationError, Words
from trimtab.files import replace_folder
from trimtab.sizes import as_usual
from trimtab.storage.checkpoints import new_folder, write_pretrained

COUNTED_PICTURE = 384  # side of the one picture with which costs are counted


class ChatBackbone(Backbone):
    """A model that answers, with its processor.

    Attributes:
        batches: makes batches of conversations, with the folder's own processor.
        writes_apart: whether it is an encoder-decoder: the answer is the decoder's alone.
        takes: names of what its forward pass takes.
    """

    kind = "chat"

    def __init__(self, name: str, model: nn.Module, processor: Any, folder: Path):
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        apart = bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))
        batches = Batches(Words(name, processor, _ends(model)), apart, getattr(text, "max_position_embeddings", None))
        known = described_by_hand(model, {}) is not None  # then no example is prepared, of pictures in many tiles
        anatomy = _at_work(model, Anatomy.of(model, None if known else _seen(batches)))
        super().__init__(name, model, processor.tokenizer, processor.image_processor, text.hidden_size,
                         anatomy=anatomy)  # fmt: skip
        self.batches, self.writes_apart, self.folder = batches, apart, folder
        self.takes = set(inspect.signature(model.forward).parameters)

    @property
    def picture_token(self) -> str | None:
        """What stands for one picture in a plain prompt; None where the processor puts it there by itself."""
        return self.batches.picture_token

    def ask(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """See `Batches.ask`."""
        return self.batches.ask(conversations, pictures)

    def teach(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[Any]],
              answers: Sequence[str]) -> dict[str, Tensor]:  # fmt: skip
        """See `Batches.teach`."""
        return self.batches.teach(conversations, pictures, answers)

    # --- the model ----------------------------------------------------------------------------------------------------

    def told(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, V) of the N tokens that the batch of `teach` has labels for, and these labels (N,)."""
        inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in self.takes else {}
        if self.writes_apart:
            told = labels != IGNORED  # the decoder is given as many tokens: its start, and all but the last
            if "decoder_attention_mask" in self.takes:
                more["decoder_attention_mask"] = told.long()
            return self.model(**inputs, **more, labels=labels).logits[told], labels[told]
        ahead = labels[:, 1:]  # (B, L - 1): what each token is followed by
        told = ahead != IGNORED
        if "logits_to_keep" in self.takes:  # the vocabulary is large, and most of a prompt is pictures
            first = int(told.any(dim=0).nonzero()[0])
            more["logits_to_keep"] = labels.shape[1] - first
            told, ahead = told[:, first:], ahead[:, first:]
        logits = self.model(**inputs, **more).logits[:, :-1]  # (B, kept - 1, V)
        return logits[told], ahead[told]

    def reply(self, batch: dict[str, Tensor], longest: int, shortest: int = 0, beams: int = 1,
                length_penalty: float = 1.0) -> list[str]:  # fmt: skip
        """What the model answers to a batch of `ask`: written greedily or by beam search, without spaces around it.

        Args:
            batch: of `ask`.
            longest: tokens of an answer at most.
            shortest: tokens of an answer at least.
            beams: 1 is greedy.
            length_penalty: above 1 favours longer answers of several beams.
        """
        how = copy.deepcopy(self.model.generation_config)
        how.update(do_sample=False, num_beams=beams, max_new_tokens=longest, min_new_tokens=shortest or None,
                   length_penalty=length_penalty, max_length=None, min_length=0,
                   temperature=1.0, top_p=1.0, top_k=50)  # fmt: skip
        how.pad_token_id = self.tokenizer.pad_token_id if how.pad_token_id is None else how.pad_token_id
        how.eos_token_id = sorted(self.batches.words.ends)
        how.suppress_tokens = sorted({*(how.suppress_tokens or ()), *_pictured(self.model.config)}) or None
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            out = self.model.generate(**inputs, generation_config=how)
        asked = batch["input_ids"]
        if not self.writes_apart and torch.equal(out[:, : asked.shape[1]], asked):
            out = out[:, asked.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    # --- what every backbone does -------------------------------------------------------------------------------------

    def adopt(self, tokenizer: Any) -> None:
        raise ValueError(
            f"{self.name}: a tokenizer of another folder does not fit the processor of a chat model: put its files "
            "into the model's folder in place of its own"
        )

    def prepare(self, pictures: Literal["own", "squash"]) -> None:
        """Pictures are prepared by the folder's processor; ValueError if they are to be squashed."""
        if pictures == "squash":
            raise ValueError(
                f"{self.name}: a chat model's pictures are prepared by its own processor: use pictures: own"
            )

    def limit_text(self, tokens: int) -> None:
        """Refuse conversations of more tokens, pictures among them, and count costs with questions of that length."""
        self.max_text = self.batches.longest = tokens
        self.counted_text = min(tokens, self.counted_text)

    def example(self, batch: int = 1, text_tokens: int | None = None) -> dict[str, Tensor]:
        """Not without a task, which says how a question is put; see `picture` and `counted_text`."""
        raise NotImplementedError(f"{self.name}: a chat model's example is its task's")

    @staticmethod
    def picture() -> Any:
        """The picture with which costs are counted, of 384 x 384."""
        return _picture()

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        """Write a transformers folder: config, weights in `dtype` and the processor's files as they are.

        Raises:
            FileExistsError: if the folder is there.
        """
        with replace_folder(new_folder(folder)) as partial:
            write_pretrained(copy.deepcopy(self.model).to(dtype), partial, sparse)
            self.tokenizer.save_pretrained(partial)
            for name in FILES:
                source = self.folder / name
                if source.is_dir():
                    shutil.copytree(source, partial / name, dirs_exist_ok=True)
                elif source.is_file():
                    shutil.copyfile(source, partial / name)


def _ends(model: Any) -> list[int]:
    """Ids at which generation stops, as the folder says."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _pictured(config: Any) -> set[int]:
    """Ids that stand for pictures and videos, which are no words of an answer."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {i for name in names if isinstance(i := getattr(config, name, None), int)}


def _at_work(model: Any, anatomy: Anatomy) -> Anatomy:
    """The anatomy with masks where generation passes, too: BLIP-2's runs its language model and not the whole."""
    from transformers import GenerationMixin

    inner = getattr(model, "language_model", None)
    if type(model).generate is GenerationMixin.generate or inner is None:
        return anatomy
    if "attention_mask" not in inspect.signature(inner.forward).parameters:
        return anatomy
    outside, within = Tap("", "input", "attention_mask"), Tap("language_model", "input", "attention_mask")
    towers = [
        replace(t, mask=within) if t.mask == outside and t.blocks[0].path.startswith("language_model.") else t
        for t in anatomy.towers
    ]
    return replace(anatomy, towers=tuple(towers))


def _picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((COUNTED_PICTURE, COUNTED_PICTURE)).convert("RGB")


def _seen(batches: Batches) -> dict[str, Tensor] | None:
    """A batch on which an undescribed model's anatomy is seen; None if the processor wants a prompt of its own kind."""
    asked: list[Conversation] = ["What is in the picture?", "Where?"]
    if batches.words.template:
        asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": str(words)}]}]
                 for words in asked]  # fmt: skip
    try:
        with as_usual():  # a processor of pictures computes with numpy
            batch = batches.teach(asked, [[_picture()], [_picture()]], ["a picture", "here"])
    except ConversationError:
        return None
    return {name: value for name, value in batch.items() if name != "labels" or batches.apart}


def load(folder: Path, name: str, pretrained: bool = True) -> ChatBackbone:
    """A transformers folder: config.json, safetensors weights, the processor's and the tokenizer's files.

    Raises:
        ValueError: if transformers has no model of its type that answers, or its processor cannot be made.
        FileNotFoundError: if weights are missing.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no model that reads pictures and words and "
            "writes words (transformers' AutoModelForImageTextToText)"
        )
    model: Any = load_pretrained(kind, folder, pretrained)
    if (folder / "generation_config.json").is_file():  # where answers end, also with random weights
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return ChatBackbone(name, model.eval(), load_processor(folder, config.model_type), folder)
