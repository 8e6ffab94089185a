"""BLIP's checkpoints as its authors published them (salesforce/BLIP), for transformers' classes and ours, and its sizes
without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trimtab.backbones.family import model_class
from trimtab.backbones.official import (
    CheckpointError,
    Format,
    Item,
    Tensors,
    choose,
    grid_side,
    head_count,
    renamed,
    resize_grid,
)
from trimtab.registry import unknown

# Task -> class, and what of the file it takes.
_TASKS = {
    "nlvr2": ("BlipForNlvr2", ("text_encoder", "cls_head")),
    "pretrain": ("BlipPretraining", ("text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head", "temp")),
    "retrieval": ("BlipForImageTextRetrieval", ("text_encoder", "vision_proj", "text_proj", "itm_head")),
    "vqa": ("BlipForVqa", ("text_encoder", "text_decoder")),
    "caption": ("BlipForConditionalGeneration", ("text_decoder",)),
}


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
        return model_class(name), config

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


def _task_of(state: Tensors) -> str:
    """The task of a file, from the parts that it has."""
    have = {k.split(".")[0] for k in state}
    if "cls_head" in have:
        return "nlvr2"
    if "itm_head" in have:
        return "pretrain" if "text_decoder" in have else "retrieval"
    return "vqa" if "text_encoder" in have else "caption"


def architecture(task: str = "pretrain", image_size: int = 224) -> tuple[type, Any]:
    """BLIP base: ViT-B/16 and BERT-base, whose layers all read the picture.

    Args:
        task: `pretrain`, `retrieval`, `caption`, `vqa` or `nlvr2`.
        image_size: pixels of a side: 224 in pretraining, 480 for VQA, else 384.
    """
    import transformers

    name = choose("task of BLIP", task, _TASKS)[0]
    words = 30522 + 2  # [DEC] and [ENC]
    config = transformers.BlipConfig(
        vision_config={"image_size": image_size, "layer_norm_eps": 1e-6},
        text_config={
            "vocab_size": words, "hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-12,
            "bos_token_id": words - 2, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0,
            "label_smoothing": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
        },
        image_text_hidden_size=256,
    )  # fmt: skip
    config.enc_token_id, config.blip_task = words - 1, task
    return model_class(name), config
