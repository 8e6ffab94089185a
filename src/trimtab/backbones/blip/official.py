"""BLIP's checkpoints as its authors published them (salesforce/BLIP), for transformers' classes and ours."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    Backbone,
    Encoded,
    Pictures,
    check_sizes,
    find_tokenizer,
    load_pretrained,
)
from trimtab.backbones.blip import features as blip
from trimtab.backbones.blip.features import vision_block
from trimtab.backbones.official import (
    CheckpointError,
    Format,
    Item,
    Tensors,
    grid_side,
    head_count,
    own_class,
    own_model,
    reads,
    renamed,
    resize_grid,
)
from trimtab.backbones.pretraining import blip_loss
from trimtab.registry import unknown

own_model("BlipPretraining", "trimtab.backbones.blip.model")
own_model("BlipForNlvr2", "trimtab.backbones.blip.model")
own_model("BlipForVqa", "trimtab.backbones.blip.model")

# Task -> class, and what of the file it takes.
_TASKS = {
    "nlvr2": ("BlipForNlvr2", ("text_encoder", "cls_head")),
    "pretrain": ("BlipPretraining", ("text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head", "temp")),
    "retrieval": ("BlipForImageTextRetrieval", ("text_encoder", "vision_proj", "text_proj", "itm_head")),
    "vqa": ("BlipForVqa", ("text_encoder", "text_decoder")),
    "caption": ("BlipForConditionalGeneration", ("text_decoder",)),
}
CLASSES = tuple(name for name, _ in _TASKS.values())


@describes("BlipPretraining", "BlipForNlvr2")
def describe(model: Any) -> Anatomy:
    """Vision; and text, to which MULTIFLOW counts encoder and decoder together.

    The shared parts of the decoder are the encoder's own modules, so that its blocks are described without adapters:
    what is done to the encoder is done there too.
    """
    vision = tuple(vision_block(f"vision_model.encoder.layers.{i}", layer.embed_dim)
                   for i, layer in enumerate(model.vision_model.encoder.layers))  # fmt: skip
    # Not the norm behind it: BLIP calls that on the tokens and once more on the first of them.
    towers = [Tower("vision", "vision", vision, ("vision_model",), output=Tap(vision[-1].path))]
    for name, path in (("text", "text_encoder"), ("decoder", "text_decoder.bert")):
        if name == "decoder" and not hasattr(model, "text_decoder"):
            continue
        layers = model.get_submodule(path).encoder.layer
        width = model.config.text_config.hidden_size
        twin = hasattr(layers[0].crossattention, "self0")
        blocks = tuple(
            _text_block(f"{path}.encoder.layer.{i}", width, twin, name == "text") for i in range(len(layers))
        )
        scope = (f"{path}.embeddings", f"{path}.encoder")
        towers.append(Tower(name, "text", blocks, scope, output=Tap(blocks[-1].path), memory="vision",
                            mask=Tap(path, "input", "attention_mask"), causal=name == "decoder"))  # fmt: skip
    heads = ("vision_proj", "text_proj", "itm_head", "text_decoder.cls", "cls_head")
    return Anatomy(tuple(towers), heads=tuple(h for h in heads if hasattr(model, h.split(".")[0])))


def _text_block(path: str, width: int, twin: bool, own: bool) -> Block:
    cross = f"{path}.crossattention"
    # With two pictures the value before the norm is the sum of two maps: an adapter is added to the first of them.
    write = Tap(f"{cross}.output.dense0") if twin else Tap(f"{cross}.output.dense")
    parts = (
        Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
        Sublayer("cross-attention", Tap(cross, "input"), write),
        Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
    )
    return Block(path, width, parts if own else parts[:1])


@reads("blip", "BLIP")
class BlipFormat(Format):
    """`model_base*.pth` and `model_large*.pth`, from pretraining or fine-tuned."""

    # Momentum copies and queues of pretraining, the index that transformers does not save, parts of other tasks.
    leftovers = (r"_m\.", r"_queue$|^queue_ptr$|^ptr_queue$|^idx_queue$", r"position_ids$",
                 r"^(text_encoder|text_decoder|vision_proj|text_proj|itm_head|cls_head)\.", r"^temp$")  # fmt: skip
    fresh = (r"^cls_head\.", r"\.merge_layer\.")

    def recognises(self, keys: Collection[str]) -> bool:
        vision = any(k.startswith("visual_encoder.blocks.") for k in keys)
        return vision and any(k.startswith(("text_encoder.encoder.", "text_decoder.bert.")) for k in keys)

    def plan(
        self, state: Tensors, extras: dict[str, Any], *, task: str | None = None, image_size: int | None = None,
        vision_heads: int | None = None, text_heads: int | None = None, sep_token_id: int = 102,
    ) -> tuple[type, Any]:  # fmt: skip
        """The class of a task and its config.

        Args:
            task: `pretrain`, `retrieval`, `caption`, `vqa` or `nlvr2`; None takes that of the file. From the pretrained
                file each can be had; what it does not have (`nlvr2` alone) is random.
            image_size: pixels of a side; None as in the file. The table of positions is resized.
            vision_heads, text_heads: attention heads, which no tensor tells; None takes width / 64.
            sep_token_id: id that ends a text, for generation.
        """
        import transformers

        found = task or _task_of(state)
        if found not in _TASKS:
            raise CheckpointError(unknown("task of BLIP", found, _TASKS))
        patch_key, vision = "visual_encoder.patch_embed.proj.weight", "visual_encoder.blocks."
        width, patch = state.size(patch_key), state.size(patch_key, 2)
        text = "text_encoder." if "text_encoder" in _TASKS[found][1] else "text_decoder.bert."
        words, hidden = (state.size(f"{text}embeddings.word_embeddings.weight", dim) for dim in (0, 1))
        config = transformers.BlipConfig(
            vision_config={
                "hidden_size": width, "num_hidden_layers": state.count(vision), "patch_size": patch,
                "intermediate_size": state.size(f"{vision}0.mlp.fc1.weight"), "layer_norm_eps": 1e-6,
                "num_attention_heads": head_count(width, vision_heads, "vision_heads"),
                "image_size": grid_side(state, "visual_encoder.pos_embed", patch, image_size),
            },
            text_config={
                "hidden_size": hidden, "vocab_size": words, "num_hidden_layers": state.count(f"{text}encoder.layer."),
                "intermediate_size": state.size(f"{text}encoder.layer.0.intermediate.dense.weight"),
                "max_position_embeddings": state.size(f"{text}embeddings.position_embeddings.weight"),
                "num_attention_heads": head_count(hidden, text_heads, "text_heads"), "layer_norm_eps": 1e-12,
                # The authors put [DEC] and [ENC] behind BERT's words.
                "bos_token_id": words - 2, "eos_token_id": sep_token_id, "sep_token_id": sep_token_id,
                "pad_token_id": 0, "label_smoothing": 0.1, "attention_probs_dropout_prob": 0.1,
                "hidden_dropout_prob": 0.1,
            },
            image_text_hidden_size=state.size("vision_proj.weight") if "vision_proj.weight" in state else 256,
        )  # fmt: skip
        config.enc_token_id, config.blip_task = words - 1, found
        name = _TASKS[found][0]
        return own_class(name) or getattr(transformers, name), config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        block, layer = r"visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
        parts = "|".join(_TASKS[config.blip_task][1])
        rules: list[tuple[str, str | tuple[str, ...]]] = [
            (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
            (r"visual_encoder\.patch_embed\.proj\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
            (r"visual_encoder\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
            (block + r"attn\.qkv\.(\w+)", layer + r"self_attn.qkv.\2"),
            (block + r"attn\.proj\.(\w+)", layer + r"self_attn.projection.\2"),
            (block + r"norm([12])\.(\w+)", layer + r"layer_norm\2.\3"),
            (block + r"mlp\.(fc[12])\.(\w+)", layer + r"mlp.\2.\3"),
        ]
        if config.blip_task == "nlvr2":
            rules.append((r"text_encoder\..*crossattention\.(self|output\.dense)\..*", ()))  # see below
        rules.append((rf"(?:{parts})(?!.*position_ids)(?:\..*)?", r"\g<0>"))
        yield from renamed(state, rules)
        key, vision = "visual_encoder.pos_embed", config.vision_config
        table = resize_grid(state[key][0], vision.image_size // vision.patch_size)
        yield Item(key, "vision_model.embeddings.position_embedding", table[None])
        if config.blip_task == "nlvr2":  # from pretraining, both pictures start with the weights for the one
            for old, new in (("self", "self{}"), ("output.dense", "output.dense{}")):
                for key in (k for k in state if k.startswith("text_encoder.") and f".crossattention.{old}." in k):
                    for i in (0, 1):
                        name = key.replace(f".crossattention.{old}.", f".crossattention.{new.format(i)}.")
                        if name not in state:
                            yield Item(key, name, state[key])

    def backbone(self, name: str, model: Any, tokenizer: Any) -> Backbone:
        if type(model).__name__ == "BlipForConditionalGeneration":
            pictures = Pictures(model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
            return blip.BlipBackbone(name, model, tokenizer, pictures)
        return BlipOfficialBackbone(name, model, tokenizer)


def _task_of(state: Tensors) -> str:
    """The task of a file, from the parts that it has."""
    have = {k.split(".")[0] for k in state}
    if "cls_head" in have:
        return "nlvr2"
    if "itm_head" in have:
        return "pretrain" if "text_decoder" in have else "retrieval"
    return "vqa" if "text_encoder" in have else "caption"


def rank_answers(model: Any, questions: Tensor, mask: Tensor, answers: Tensor, answer_mask: Tensor, k: int) -> Tensor:
    """Which of a list of answers a `BlipForVqa` gives, as the authors rank them.

    The k likeliest by their first word are scored as a whole: by the sum of their words' losses, with the label
    smoothing of training.

    Args:
        questions: states of the questions after reading the pictures, (Q, L, D).
        mask: (Q, L).
        answers: ids of the answers, (A, M), that start with [DEC].
        answer_mask: (A, M).
        k: at most A.

    Returns:
        (Q,), rows of `answers`.
    """
    start = answers[:1, :1].expand(len(questions), 1)
    first = model.text_decoder(input_ids=start, encoder_hidden_states=questions, encoder_attention_mask=mask)
    likely = first.logits[:, 0].softmax(dim=-1)[:, answers[:, 1]]  # (Q, A)
    top = likely.topk(k, dim=1).indices  # (Q, k)
    ids, atts = answers[top.flatten()], answer_mask[top.flatten()]  # (Q * k, M)
    loss = model.text_decoder(
        input_ids=ids, attention_mask=atts, labels=ids.masked_fill(atts == 0, -100), reduction="none",
        encoder_hidden_states=questions.repeat_interleave(k, 0), encoder_attention_mask=mask.repeat_interleave(k, 0),
    ).loss  # fmt: skip
    best = loss.view(len(questions), k).argmin(dim=1)
    return top[torch.arange(len(top)), best]


class BlipOfficialBackbone(Backbone):
    """A BLIP that understands: its text encoder reads the picture, and its matching head judges. The pretrained has a
    decoder that reads pictures too, and writes."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        if not hasattr(model, "text_encoder") or type(model).__name__ == "BlipForNlvr2":
            raise ValueError(f"{name}: {type(model).__name__} has no encoder of one picture and a text for our tasks; "
                             "load it with `trimtab.backbones.load_official`, or with task='retrieval'")  # fmt: skip
        text, vision = model.config.text_config, model.config.vision_config
        blip.add_words(tokenizer, model)
        super().__init__(name, model, tokenizer, Pictures(vision.image_size, CLIP_MEAN, CLIP_STD), text.hidden_size,
                         min(text.max_position_embeddings, 35))  # fmt: skip

    def look(self, pixel_values: Tensor) -> Tensor:
        """The vision tower alone, (B, 1+P, D); ValueError if the picture is of another size than the model's."""
        check_sizes("BLIP", pixel_values=pixel_values, side=self.model.config.vision_config.image_size)
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned; ValueError if the text is longer than the table of positions."""
        check_sizes("BLIP", input_ids, self.model.config.text_config.max_position_embeddings)
        # What reads a picture starts with [ENC] instead of [CLS].
        ids = input_ids.clone()
        ids[:, 0] = self.model.config.enc_token_id
        tokens = self.model.text_encoder(
            input_ids=ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return Encoded(tokens[:, 0], tokens, attention_mask)

    def adopt(self, tokenizer: Any) -> None:
        blip.add_words(tokenizer, self.model)
        super().adopt(tokenizer)

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Words of the pretrained model's decoder; the decoder of one for VQA reads questions, and others have none."""
        if type(self.model).__name__ != "BlipPretraining":
            raise NotImplementedError(f"{self.name}: {type(self.model).__name__} has no decoder that reads pictures: "
                                      "task='caption' or task='pretrain' has")  # fmt: skip
        check_sizes("BLIP", input_ids, self.model.config.text_config.max_position_embeddings)
        return blip.write(self.model, seen, input_ids, attention_mask)

    def pretraining_loss(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Contrast, matching and captions on a batch of pairs; NotImplementedError for what is fine-tuned."""
        if type(self.model).__name__ != "BlipPretraining":
            return super().pretraining_loss(pixel_values, input_ids, attention_mask)
        return blip_loss(self.model, pixel_values, input_ids, attention_mask)

    @property
    def word_head(self) -> tuple[nn.Linear, nn.LayerNorm, Tensor] | None:
        return blip.word_head(self.model) if type(self.model).__name__ == "BlipPretraining" else None

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "itm_head"):
            raise ValueError(f"{self.name}: {type(self.model).__name__} has no head for matching: task='retrieval' has")
        no, yes = self.model.itm_head(encoded.pooled).unbind(dim=-1)
        return yes - no


def load(folder: Path, name: str, pretrained: bool = True) -> BlipOfficialBackbone:
    """A folder of one of `CLASSES`, with a tokenizer if there is one in it."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = own_class(architecture) or getattr(transformers, architecture)
    return BlipOfficialBackbone(name, load_pretrained(model_class, folder, pretrained), find_tokenizer(folder))
