"""METER's checkpoint files as its authors published them (zdou0830/METER, CLIP ViT-B/16 and RoBERTa), and its sizes
without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from trimtab.backbones.meter.describe import HEADS
from trimtab.backbones.official import (
    ROBERTA_BASE,
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


class MeterFormat(Format):
    """`meter_clip16_*_roberta_*.ckpt`, from pretraining or fine-tuned for any task."""

    # What is left of CLIP's text tower, RoBERTa's pooler, and an index that transformers no longer saves: all unused.
    leftovers = (r"^vit_model\.(positional_embedding|ln_final\.)", r"^text_transformer\.pooler\.", r"position_ids$")
    fresh = tuple(rf"^{head}\." for head, _ in HEADS.values())

    def recognises(self, keys: Collection[str]) -> bool:
        return any(k.startswith(("cross_modal_text_layers.", "cross_modal_image_layers.")) for k in keys)

    def plan(
        self, state: Tensors, extras: dict[str, Any], *, image_size: int | None = None, tasks: Any = None,
        answers: int = 3129, vision_heads: int | None = None, text_heads: int | None = None,
        fusion_heads: int | None = None,
    ) -> tuple[type, Any]:  # fmt: skip
        """METER's class and config.

        Args:
            image_size: pixels of a side; None as in the file. The table of positions is resized.
            tasks: heads to have, among `meter_model.TASKS`; None for those in the file. One that the file does not
                have is new: `irtr` starts from the matching head, the others are random.
            answers: outputs of a new `vqa` head.
            vision_heads, text_heads, fusion_heads: attention heads, which no tensor tells; None takes width / 64.
        """
        from transformers import BertConfig, CLIPVisionConfig, RobertaConfig

        from trimtab.backbones.meter.model import MeterConfig, MeterModel

        visual, text, fusion = "vit_model.visual.", "text_transformer.", "cross_modal_text_layers."
        width, patch = state.size(f"{visual}conv1.weight", 0), state.size(f"{visual}conv1.weight", 2)
        vision = CLIPVisionConfig(
            hidden_size=width, patch_size=patch, hidden_act="quick_gelu", layer_norm_eps=1e-5,
            # The authors' `Transformer` builds one block less than CLIP has: what is in the file is what is used.
            num_hidden_layers=state.count(f"{visual}transformer.resblocks."),
            intermediate_size=state.size(f"{visual}transformer.resblocks.0.mlp.c_fc.weight"),
            num_attention_heads=head_count(width, vision_heads, "vision_heads"),
            image_size=grid_side(state, f"{visual}positional_embedding", patch, image_size),
        )  # fmt: skip
        width = state.size(f"{text}embeddings.word_embeddings.weight", 1)
        words = RobertaConfig(
            hidden_size=width, vocab_size=state.size(f"{text}embeddings.word_embeddings.weight"),
            num_hidden_layers=state.count(f"{text}encoder.layer."), type_vocab_size=1, layer_norm_eps=1e-5,
            num_attention_heads=head_count(width, text_heads, "text_heads"),
            intermediate_size=state.size(f"{text}encoder.layer.0.intermediate.dense.weight"),
            max_position_embeddings=state.size(f"{text}embeddings.position_embeddings.weight"),
        )  # fmt: skip
        width = state.size("token_type_embeddings.weight", 1)
        both = BertConfig(
            hidden_size=width, num_hidden_layers=state.count(fusion), layer_norm_eps=1e-12,
            num_attention_heads=head_count(width, fusion_heads, "fusion_heads"), is_decoder=True,
            intermediate_size=state.size(f"{fusion}0.intermediate.dense.weight"), add_cross_attention=True,
        )  # fmt: skip
        outputs = _outputs(state, tasks, answers, words.vocab_size)
        types = max(state.size("token_type_embeddings.weight"), 3 if "nlvr2" in outputs else 2)
        return MeterModel, MeterConfig(vision_config=vision, text_config=words, cross_config=both, tasks=outputs,
                                       token_types=types)  # fmt: skip

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        heads = [head for task, (head, _) in HEADS.items() if task in config.tasks]
        block, ours = r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.", r"vision.encoder.layers.\1."
        yield from renamed(state, [
            (r"vit_model\.visual\.class_embedding", "vision.embeddings.class_embedding"),
            (r"vit_model\.visual\.conv1\.weight", "vision.embeddings.patch_embedding.weight"),
            (r"vit_model\.visual\.ln_pre\.(\w+)", r"vision.pre_layrnorm.\1"),
            (r"vit_model\.visual\.ln_post\.(\w+)", r"vision.post_layernorm.\1"),
            (block + r"attn\.in_proj_(\w+)", tuple(ours + rf"self_attn.{n}_proj.\2" for n in "qkv")),
            (block + r"attn\.out_proj\.(\w+)", ours + r"self_attn.out_proj.\2"),
            (block + r"ln_([12])\.(\w+)", ours + r"layer_norm\2.\3"),
            (block + r"mlp\.c_fc\.(\w+)", ours + r"mlp.fc1.\2"),
            (block + r"mlp\.c_proj\.(\w+)", ours + r"mlp.fc2.\2"),
            (r"text_transformer\.(?!pooler|embeddings\.position_ids).*", r"\g<0>"),
            (r"cross_modal_.*", r"\g<0>"),
            (rf"(?:{'|'.join(heads or ['no head'])})\..*", r"\g<0>"),
        ])  # fmt: skip
        key = "vit_model.visual.positional_embedding"
        side = config.vision_config.image_size // config.vision_config.patch_size
        yield Item(key, "vision.embeddings.position_embedding.weight", resize_grid(state[key], side))
        key = "token_type_embeddings.weight"
        table = state[key]
        if len(table) < config.token_types:  # the second image of a pair starts as the first, as the authors have it
            table = torch.cat([table, table[1:2]])
        yield Item(key, key, table)
        if "irtr" in config.tasks and "rank_output.weight" not in state:
            for part in ("weight", "bias"):  # ranking starts from the matching head's row for "belongs together"
                yield Item(f"itm_score.fc.{part}", f"rank_output.{part}", state[f"itm_score.fc.{part}"][1:])


def _outputs(state: Tensors, tasks: Any, answers: int, words: int) -> dict[str, int]:
    """Task -> outputs of its head: of the file, or for a new head as the task has them."""
    there = {t: state.size(f"{head}.{part}") for t, (head, part) in HEADS.items() if f"{head}.{part}" in state}
    new = {"mlm": words, "itm": 2, "vqa": answers, "nlvr2": 2, "snli": 3, "irtr": 1}
    for task in tasks or ():
        if task not in new:
            raise CheckpointError(unknown("task of METER", task, new))
    return there if tasks is None else {t: there.get(t, new[t]) for t in tasks}


def architecture(tasks: Sequence[str] = ("mlm", "itm"), image_size: int = 288, answers: int = 3129) -> tuple[type, Any]:
    """METER: CLIP ViT-B/16 (11 blocks), RoBERTa-base, two streams of 6 layers.

    Args:
        tasks: heads, among `trimtab.backbones.meter.model.TASKS`.
        image_size: pixels of a side: 288 in pretraining, 384 for retrieval, 576 for VQA.
        answers: outputs of the `vqa` head.
    """
    from transformers import BertConfig, CLIPVisionConfig, RobertaConfig

    from trimtab.backbones.meter.model import MeterConfig, MeterModel

    outputs = {"mlm": 50265, "itm": 2, "vqa": answers, "nlvr2": 2, "snli": 3, "irtr": 1}
    for task in tasks:
        choose("task of METER", task, outputs)
    vision = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, num_attention_heads=12,
                              patch_size=16, image_size=image_size, hidden_act="quick_gelu")  # fmt: skip
    cross = BertConfig(num_hidden_layers=6, is_decoder=True, add_cross_attention=True)
    return MeterModel, MeterConfig(
        vision_config=vision, text_config=RobertaConfig(**ROBERTA_BASE), cross_config=cross,
        tasks={task: outputs[task] for task in tasks}, token_types=3 if "nlvr2" in tasks else 2,
    )  # fmt: skip
