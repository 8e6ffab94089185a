"""What a task may ask of a backbone, whatever its family: pictures in, texts in, features out.

    images(list of pictures) -> pixel_values (B, 3, H, W)    texts(list of strings) -> input_ids, attention_mask (B, L)

    kind        what tasks call
    "dual"      image(...) and text(...), a vector each; frames(...) and compare(...) of videos
    "joint"     pair(...), fused tokens and a vector; pair_of(...) for a text and two pictures
    "pairs"     pair_of(...): a model that reads two pictures at once
    "video"     frames(...), text(...) and compare(...): similarities by a head of the model's own
    "detector"  detect(...): what a text names, as a set of objects
    "vision"    image(...): a vision tower by itself
    "chat"      teach(...) and told(...), ask(...) and reply(...): conversations with pictures, answered in words

`Backbone.model` is the plain (transformers) module that methods see through its `Anatomy`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Anatomy
from trimtab.backbones.pictures import CLIP_MEAN, CLIP_STD, Pictures  # noqa: F401 (families take them from here)
from trimtab.backbones.processed import read_pictures  # noqa: F401
from trimtab.files import replace_folder
from trimtab.storage.checkpoints import load_weights, new_folder, write_pretrained


class Unsupported(NotImplementedError, ValueError):
    """What a backbone has no part for, asked of it: bad input of the one who chose it."""


@dataclass(frozen=True)
class Encoded:
    """Features of a batch.

    Attributes:
        pooled: (B, D), one vector a sample.
        tokens: (B, L, D), or None where a family gives only vectors.
        mask: (B, L), 1 = valid.
        image_tokens: which of the L tokens are image patches, in row-major order and without class tokens.
        grid: rows and columns of those patches; None if they are a square. Patches of a padded batch that are no
            picture are 0 in `mask`.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image_tokens: slice | None = None
    grid: tuple[int, int] | None = None


_CONTRAST = "a pretrained BLIP or X-VLM, or one for retrieval, has them"
_DECODER = "a BLIP or X-VLM with task='vqa' has one"


class Backbone(nn.Module):
    """A pretrained vision-language model and what is needed to feed it.

    Attributes:
        name: registered name or path from which it was loaded.
        model: the plain module; all paths of the anatomy are relative to it.
        anatomy: its description.
        tokenizer: of transformers, or None if the weights came from a file and nobody named one.
        pictures: how pictures are prepared (`pictures.py`).
        side: the side of the square that a picture must be for the model; None if it takes other shapes too.
        processor_files: of a folder whose own processor cuts pictures into tiles, which is not used here: its files by
            name, saved again as they are.
        load_report: what an official checkpoint file gave; None if the weights are no such file's.
        kind: what it can be asked for, see above.
        own_scale: whether the model itself scales what `compare` gives.
        reads_padding: whether it leaves out what is padding, which it tells by its zeros.
        width: width of `Encoded.pooled`.
        token_width: width of `Encoded.tokens`: the same, but where the summary joins two streams.
    """

    kind: Literal["dual", "joint", "pairs", "video", "detector", "vision", "chat"]
    own_scale: ClassVar[bool] = False
    reads_padding: ClassVar[bool] = False

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, pictures: Pictures, width: int, max_text: int = 32,
                 anatomy: Anatomy | None = None):  # fmt: skip
        super().__init__()
        self.name = name
        self.model: Any = model  # Any: torch types what a module holds as Tensor or Module
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.side: int | None = None
        self.processor_files: dict[str, str] = {}
        self.width = self.token_width = width
        self.max_text = max_text
        self.counted_text = 20
        self.anatomy = Anatomy.of(model) if anatomy is None else anatomy
        self.load_report: Any = None

    def adopt(self, tokenizer: Any) -> None:
        """Take a tokenizer that did not come with the weights."""
        self.tokenizer = tokenizer

    def prepare(self, pictures: Literal["own", "squash"]) -> None:
        """Choose how pictures are prepared: as the authors or the folder's image processor do, or whole pictures
        squashed to a square with the same mean and deviation.

        Raises:
            ValueError: if what prepares them gives other sizes than the model was built for, or padding that cannot be
                told from picture.
        """
        if pictures == "squash":
            self.pictures = self.pictures.squashed(self.side)
        elif self.side is not None:
            self.pictures.check_side(self.side, self.name)
        if self.reads_padding:
            self.pictures.check_padding(self.name)

    def images(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """PIL images -> `pixel_values` (B, 3, H, W); where their shapes differ, padded with zeros at the right and the
        bottom (`pixel_mask` tells padding from picture)."""
        return {"pixel_values": self.pictures(pictures)}

    @property
    def pads_to_longest(self) -> bool:
        """Whether texts are padded to the longest of those together, so that padding tells the model nothing."""
        return type(self).texts is Backbone.texts

    def texts(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Strings -> `input_ids` and `attention_mask` (B, L), padded to the longest, cut at `max_text` tokens.

        Raises:
            ValueError: if there is no tokenizer (an official checkpoint file holds none).
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name}: no tokenizer, or no vocabulary (tokenizer.json, vocab.txt, ...): give its "
                             "folder, trimtab.load(..., tokenizer=FOLDER)")  # fmt: skip
        encoded = self.tokenizer(  # behind the words, whatever side a tokenizer pads for generation
            list(sentences), padding=True, padding_side="right", truncation=True, max_length=self.max_text,
            return_tensors="pt",
        )  # fmt: skip
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def image(self, pixel_values: Tensor) -> Encoded:
        raise Unsupported(f"{self.name} is a {self.kind} backbone: it does not encode images alone")

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        raise Unsupported(f"{self.name} is a {self.kind} backbone: it does not encode texts alone")

    def pair(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        encoded = self.fuse(self.look(pixel_values), input_ids, attention_mask)
        shape = self.grid(pixel_values)
        return encoded if shape is None or shape[0] == shape[1] else replace(encoded, grid=shape)

    def grid(self, pixel_values: Tensor) -> tuple[int, int] | None:
        """Rows and columns of the image tokens of such a batch; None if they are always a square, or there are none."""
        return None

    def pair_second(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of the second of two pictures, whose tokens have a type of their own where the authors give them one
        and the model has it (a third row in its table of types)."""
        return self.pair(pixel_values, input_ids, attention_mask)

    def pair_of(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """A text and two pictures (B, 3, H, W) each -> one vector (B, `pair_width`).

        Each picture is fused with the text by itself and the two vectors are joined, as ViLT and METER do for NLVR2.
        """
        words = (input_ids, attention_mask)
        return Encoded(torch.cat([self.pair(first, *words).pooled, self.pair_second(second, *words).pooled], dim=-1))

    @property
    def pair_width(self) -> int:
        """Width of what `pair_of` gives."""
        return 2 * self.width

    def frames(self, pixel_values: Tensor) -> Tensor:
        """A vector a frame, (B, F, 3, H, W) -> (B, F, E)."""
        return self.image(pixel_values.flatten(0, 1)).pooled.unflatten(0, pixel_values.shape[:2])

    def compare(self, text: Tensor, frames: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        """Similarities of all texts with all videos, (T, B): the cosine with the mean of a video's unit frames, times
        exp(`scale`) (CLIP4Clip's meanP, section 3.3).

        Args:
            text: (T, E).
            frames: (B, F, E).
            mask: which frames are there, (B, F).
            scale: a scalar, which a model with `own_scale` does not look at.
        """
        there = mask[..., None].to(frames.dtype)
        video = (F.normalize(frames, dim=-1) * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return scale.exp() * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T

    def own_head(self, task: str) -> nn.Module | None:
        """The model's own head for a task by its registered name, as a module that takes what that task gives its
        head; None if it has none. A task trains a copy, so that its head is what it is for every backbone."""
        return None

    def look(self, pixel_values: Tensor) -> Tensor:
        """What `fuse` and `write` need of the pictures, (B, P, D), computed once whatever is said of them.

        A row of zeros is a place that is padding; `fuse` and `write` leave it out.
        """
        raise Unsupported(f"{self.name} is a {self.kind} backbone: it does not fuse image and text")

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned, (B, P, D)."""
        raise Unsupported(f"{self.name} is a {self.kind} backbone: it does not fuse image and text")

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of words (B, L, D), each from the picture and the words up to itself, to predict the next from.

        Args:
            seen: what `look` returned, (B, P, D).
            input_ids: (B, L).
            attention_mask: (B, L), 1 = valid; padding follows the words.
        """
        raise Unsupported(f"{self.name} is a {self.kind} backbone: it does not write")

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that the text and the picture of a `fuse` belong together, (B,)."""
        raise Unsupported(f"{self.name}: no head for matching")

    def rank(self, encoded: Encoded, similar: Tensor) -> Tensor:
        """By what its authors order pairs of a picture and a text, (B,): here the logit of matching.

        Args:
            encoded: what `fuse` returned.
            similar: cosines of the pairs' vectors (B,), zeros where candidates were not chosen by vectors.
        """
        return self.match(encoded)

    def image_vector(self, seen: Tensor) -> Tensor:
        """Vectors of length 1 in the space shared with texts, (B, E), from what `look` returned."""
        raise Unsupported(f"{self.name}: no vectors of pictures and texts to compare (contrast): {_CONTRAST}")

    def text_vector(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors of length 1 in the space shared with pictures, (B, E)."""
        raise Unsupported(f"{self.name}: no vectors of pictures and texts to compare (contrast): {_CONTRAST}")

    @property
    def temperature(self) -> Tensor:
        """By what cosines of `image_vector` and `text_vector` are divided in the contrastive loss, a scalar."""
        raise Unsupported(f"{self.name}: no temperature of its own: give the task's `temperature` (0.07 is "
                                  "where training of such models starts)")  # fmt: skip

    def answers(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Answers for the decoder of answers: `input_ids` and `attention_mask` (N, A), with their start and end."""
        raise Unsupported(f"{self.name}: no decoder of answers: {_DECODER}")

    def answer_loss(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """How unlikely the decoder finds answers: the loss of an answer's words summed, as in training, (N,).

        Args:
            question: fused questions (N, L, D), `fuse(...).tokens`.
            mask: (N, L).
            answer_ids: (N, A), of `answers`.
            answer_mask: (N, A).
        """
        raise Unsupported(f"{self.name}: no decoder of answers: {_DECODER}")

    def rank_answers(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, k: int) -> Tensor:
        """Which answer of a list the decoder gives to each question, (B,), as its authors rank them.

        Args:
            question: (B, L, D).
            mask: (B, L).
            answer_ids: the list, (N, A).
            answer_mask: (N, A).
            k: so many answers, whose first words are likeliest, are scored whole; at most N.
        """
        raise Unsupported(f"{self.name}: no decoder of answers: {_DECODER}")

    def pretraining_loss(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The loss of the model's own pretraining on pairs of a picture and a text, a scalar (`PretrainingLoss`)."""
        raise Unsupported(f"{self.name}: no pretraining objective: a pretrained BLIP or X-VLM has one")

    @property
    def word_head(self) -> tuple[nn.Linear, nn.LayerNorm, Tensor] | None:
        """The model's own map from features to words: linear map, (GELU,) norm, bias (V,) of the tied decoder."""
        return None

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        if self.tokenizer is not None:
            return len(self.tokenizer)
        config = self.model.config
        return getattr(config, "text_config", config).vocab_size

    def set_attention(self, implementation: str) -> None:
        """transformers' attention implementation (`eager`, `sdpa`); ValueError if the model has no choice."""
        choose = getattr(self.model, "set_attn_implementation", None)
        if choose is None:
            raise ValueError(f"{self.name}: {type(self.model).__name__} does not let its attention be chosen")
        choose(implementation)

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float32, sparse: bool = False) -> None:
        """Write a transformers folder: config, weights in `dtype`, tokenizer, and how pictures are prepared.

        With `sparse` the weights are in the layout of `trimtab.storage.sparse`, which `trimtab.load` reads too.

        Raises:
            FileExistsError: if the folder is there.
            ValueError: if the model is no transformers model.
        """
        folder = new_folder(folder)
        if not hasattr(self.model, "save_pretrained"):
            raise ValueError(f"{self.name}: {type(self.model).__name__} cannot be exported: no transformers model")
        with replace_folder(folder) as partial:
            write_pretrained(copy.deepcopy(self.model).to(dtype), partial, sparse)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            prepared = {"preprocessor_config.json": json.dumps(self.pictures.config(), indent=1) + "\n"}
            for name, text in (self.processor_files or prepared).items():
                (partial / name).write_text(text, encoding="utf-8")

    def fold_projections(self, image: Tensor, text: Tensor, scale: Tensor) -> None:
        """Put linear maps that follow the features into the model; ValueError if it has no place for them."""
        raise ValueError(f"{self.name}: {type(self.model).__name__} has no projections to fold a head into")

    def start_from(self, other: Backbone) -> None:
        """Fill what has the same role with another backbone's weights."""
        raise ValueError(f"a {type(self).__name__} cannot start from {other.name!r}")

    def limit_text(self, tokens: int) -> None:
        """Cut texts at so many tokens, and count costs with texts of that length."""
        self.max_text = self.counted_text = tokens

    def example(self, batch: int = 1, text_tokens: int | None = None) -> dict[str, Tensor]:
        """A batch of random inputs of the usual sizes, to count operations and bytes without data.

        Texts have `text_tokens` tokens; None takes what `limit_text` said, else 20 or the most that the model reads.
        """
        text_tokens = text_tokens or min(self.counted_text, self.max_text)
        generator = torch.Generator().manual_seed(0)
        return {
            "pixel_values": torch.randn(batch, 3, *self.pictures.shape, generator=generator),
            "input_ids": torch.randint(5, self.vocabulary, (batch, text_tokens), generator=generator),
            "attention_mask": torch.ones(batch, text_tokens, dtype=torch.long),
        }


WEIGHTS = Path(__file__).parent / "weights"


def load_pretrained(model_class: Any, folder: Path, pretrained: bool, **options: Any) -> nn.Module:
    """A transformers model from its folder in float32, or with fresh random weights of the same configuration.

    The folder's weights are dense or in the layout of `trimtab.storage.sparse`.

    Raises:
        FileNotFoundError: if the folder, its config or its weights are not there.
        ValueError: if the weights cannot be read (truncated or damaged file), are missing, or have other shapes.
    """
    config = model_class.config_class.from_pretrained(folder)
    if not pretrained:
        return model_class._from_config(config, dtype=torch.float32, **options)
    return load_weights(model_class, folder, config, torch.float32, **options)


def check_sizes(who: str, input_ids: Tensor | None = None, longest: int = 0, pixel_values: Tensor | None = None,
                side: int = 0) -> None:  # fmt: skip
    """Raise a ValueError if texts are longer than a table of positions, or pictures are no squares of `side` pixels.

    For models that fail with an error about shapes, or not at all: transformers' BLIP gives smaller pictures the
    positions of others.
    """
    if input_ids is not None and input_ids.shape[1] > longest:
        raise ValueError(f"text of {input_ids.shape[1]} tokens: {who} has positions for {longest}")
    if pixel_values is not None and tuple(pixel_values.shape[2:]) != (side, side):
        height, width = pixel_values.shape[2:]
        raise ValueError(f"picture of {height} x {width}: {who} was built for {side} x {side} (setting `image_size`)")


def find_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None if there is no vocabulary, of which transformers would make an empty one: what
    came from an official checkpoint file has none."""
    from transformers import AutoTokenizer

    there = any(any(folder.glob(name)) for name in ("tokenizer.json", "vocab.txt", "vocab.json", "*.model"))
    return AutoTokenizer.from_pretrained(folder) if there else None
