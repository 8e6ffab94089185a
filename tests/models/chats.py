"""Tiny folders of today's chat models: random weights, a tokenizer, an image processor and a chat template.

folder = write_chat("smolvlm", tmp_path)      # as its authors publish it, small
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers as hf
from PIL import Image

from tests.models.shrink import build, tiny_config

SPECIAL = ["<pad>", "<s>", "</s>", "<end>", "<image>", "<video>", "<fake_token_around_image>", "<global-img>",
           "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>", "<boi>", "<eoi>"]  # fmt: skip
CORPUS = ["what is in the picture ? Question : Answer : user assistant", "a red dog and two blue cats", "yes no",
          "Context : Options : (A) (B) (C) The answer is the letter"] * 3  # fmt: skip

# A template as most are: roles, pictures where they stand among the words, an end of every turn.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'image' %}PICTURE"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


class Chat(NamedTuple):
    """How a family's tiny folder is made.

    Attributes:
        model: its class.
        processor: the class of its processor.
        images: makes its image processor.
        changes: fields of its config beside the tiny ones, from a token's id.
        options: of the processor.
        picture: what the template writes for a picture; None if the family has no template.
        prompt: what a plain template of the family is, where there is no chat template.
    """

    model: str
    processor: str
    images: Callable[[], Any]
    changes: Callable[[Callable[[str], int]], dict[str, Any]]
    options: dict[str, Any] = {}
    picture: str | None = "<image>"
    prompt: str | None = None


def _square(name: str, side: int = 16, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(hf, name)(size={"height": side, "width": side}, **more)

    return make


def _tiles() -> Any:
    return hf.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _idefics() -> Any:
    return hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _patches() -> Any:
    return hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=400)


def _seen(**names: str) -> Callable[[Callable[[str], int]], dict[str, Any]]:
    return lambda token: {field: token(word) for field, word in names.items()}


_QWEN = _seen(image_token_id="<image>", video_token_id="<video>", vision_start_token_id="<boi>",
              vision_end_token_id="<eoi>")  # fmt: skip
_CLIP = _square("CLIPImageProcessorPil", do_center_crop=False)
_LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
CHATS: dict[str, Chat] = {
    "smolvlm": Chat("SmolVLMForConditionalGeneration", "SmolVLMProcessor", _tiles, _seen(image_token_id="<image>"),
                    {"image_seq_len": 4}),
    "idefics3": Chat("Idefics3ForConditionalGeneration", "Idefics3Processor", _idefics,
                     _seen(image_token_id="<image>"), {"image_seq_len": 4}),
    "qwen2_5_vl": Chat("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", _patches, _QWEN, {},
                       "<boi><image><eoi>"),
    "qwen3_vl": Chat("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", _patches, _QWEN, {}, "<boi><image><eoi>"),
    "llava": Chat("LlavaForConditionalGeneration", "LlavaProcessor", _CLIP,
                  _seen(image_token_index="<image>"), _LLAVA, "<image>\n"),
    "internvl": Chat("InternVLForConditionalGeneration", "InternVLProcessor", _square("GotOcr2ImageProcessorPil"),
                     _seen(image_token_id="<image>"), {"image_seq_length": 4}, "<image>\n"),
    "gemma3": Chat("Gemma3ForConditionalGeneration", "Gemma3Processor", _square("Gemma3ImageProcessorPil"),
                   _seen(image_token_index="<image>", boi_token_index="<boi>", eoi_token_index="<eoi>"),
                   {"image_seq_length": 4}, "<boi>"),
    "paligemma": Chat("PaliGemmaForConditionalGeneration", "PaliGemmaProcessor", _square("SiglipImageProcessorPil"),
                      _seen(image_token_index="<image>"), {}, None, "{images}answer en {question}"),
    "blip-2": Chat("Blip2ForConditionalGeneration", "Blip2Processor", _square("BlipImageProcessorPil"),
                   _seen(image_token_index="<image>"), {"num_query_tokens": 4}, None, "Question: {question} Answer:"),
    "florence2": Chat("Florence2ForConditionalGeneration", "Florence2Processor", _CLIP,
                      _seen(image_token_id="<image>"), {}, None, "{question}"),
}  # fmt: skip


def tokenizer(named: bool = True) -> Any:
    """Byte pairs of a few sentences, with the special tokens that the families need; `named`: it says which is what."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    plain.train_from_iterator(CORPUS, trainer)
    names = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>",
             "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
             "end_of_utterance_token": "<end>", "start_image_token": "<boi>", "end_image_token": "<eoi>",
             "context_image_token": "<image>"}  # fmt: skip
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=names if named else {},
    )


def write_chat(name: str, folder: Path, template: bool = True) -> Path:
    """Write a family's tiny folder; without `template` it has no chat template even if the family has one."""
    chat = CHATS[name]
    words = tokenizer(named=name != "blip-2")  # whose processor makes a token of its own of the name
    config = tiny_config(name)
    text = config.get_text_config()
    for part in (config, text):
        for field, value in (("vocab_size", len(words) + 3), ("max_position_embeddings", 512)):
            if getattr(part, field, None) is not None:
                setattr(part, field, value)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for field, value in (ends | chat.changes(words.convert_tokens_to_ids)).items():
        for part in (config, text):
            if hasattr(part, field):
                setattr(part, field, value)
    if name == "qwen2_5_vl":
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [2, 1, 1]}
    images = chat.images()
    if name in ("paligemma", "florence2"):
        images.image_seq_length = 16 if name == "paligemma" else 17
    model = build(chat.model, config)
    # Most end an answer with the end of a turn; LLaVA's template as in its folder writes no end at all.
    stops = [2] if name in ("llava", "paligemma", "blip-2", "florence2") else [2, words.convert_tokens_to_ids("<end>")]
    model.generation_config.update(**{**ends, "eos_token_id": stops}, do_sample=False)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    shown = TEMPLATE.replace("PICTURE", chat.picture or "").replace("<end>\n", "\n" if name == "llava" else "<end>\n")
    if template and chat.picture is not None:
        (folder / "chat_template.jinja").write_text(shown)
    content = images.to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(content, default=str))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": chat.processor, **chat.options}))
    return folder


def picture(width: int = 20, height: int = 12, colour: str = "red") -> Image.Image:
    """A picture with a blue quarter, so that no two places look alike."""
    out = Image.new("RGB", (width, height), colour)
    out.paste("blue", (0, 0, width // 2, height // 2))
    return out
