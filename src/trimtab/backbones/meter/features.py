"""METER: its description, its published checkpoints (zdou0830/METER, CLIP ViT-B/16 and RoBERTa), its backbone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.clip import features as clip
from trimtab.backbones.described import bert
from trimtab.backbones.official import (
    CheckpointError,
    Format,
    Item,
    Tensors,
    grid_side,
    head_count,
    own_model,
    reads,
    renamed,
    resize_grid,
)  # fmt: skip
from trimtab.registry import unknown

own_model("MeterModel", "trimtab.backbones.meter.model")

# Task -> where its head stands in file and model, and the parameter whose rows are its outputs.
_HEADS = {
    "mlm": ("mlm_score", "decoder.weight"), "itm": ("itm_score", "fc.weight"), "vqa": ("vqa_classifier", "3.weight"),
    "nlvr2": ("nlvr2_classifier", "3.weight"), "snli": ("snli_classifier", "3.weight"),
    "irtr": ("rank_output", "weight"),
}  # fmt: skip


@describes("MeterModel")
def describe(model: Any) -> Anatomy:
    vision = Tower("vision", "vision", clip.tower_blocks(model.vision, "vision"), ("vision",),
                   output=Tap("vision.post_layernorm"))  # fmt: skip
    (text,) = bert.describe(model.text_transformer).prefixed("text_transformer").towers
    text = replace(text, mask=Tap("", "input", "attention_mask"))  # RoBERTa itself is given one ready for attention
    streams = [_stream(model, name, other) for name, other in (("text", "image"), ("image", "text"))]
    # Of what is in no tower, DAS trains these and leaves the two linear transforms frozen.
    heads = ["token_type_embeddings", "cross_modal_text_pooler", "cross_modal_image_pooler"]
    heads += [head for task, (head, _) in _HEADS.items() if task in model.config.tasks]
    return Anatomy((vision, text, *streams), heads=tuple(heads))


def _stream(model: Any, name: str, other: str) -> Tower:
    prefix = f"cross_modal_{name}_layers"
    blocks = []
    for i in range(len(getattr(model, prefix))):
        path = f"{prefix}.{i}"
        # Post-norm, as in `bert`: DAS sums its adapters before the norm of either attention and after that of the MLP.
        blocks.append(Block(path, model.config.cross_config.hidden_size, (
            Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
            Sublayer("cross-attention", Tap(f"{path}.crossattention", "input"),
                     Tap(f"{path}.crossattention.output.dense")),
            Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
        )))  # fmt: skip
    return Tower(
        f"fusion_{name}", "fusion", tuple(blocks), (prefix,), output=Tap(blocks[-1].path),
        mask=Tap("", "input", "attention_mask") if name == "text" else None,
        pooled=Tap(f"cross_modal_{name}_pooler"), memory=f"fusion_{other}",
        reads=("text" if name == "text" else "vision",),
        closed="its blocks hand what they put out to the other stream too",
    )  # fmt: skip


@reads("meter", "METER")
class MeterFormat(Format):
    """`meter_clip16_*_roberta_*.ckpt`, from pretraining or fine-tuned for any task."""

    # What is left of CLIP's text tower, RoBERTa's pooler, and an index that transformers no longer saves: all unused.
    leftovers = (r"^vit_model\.(positional_embedding|ln_final\.)", r"^text_transformer\.pooler\.", r"position_ids$")
    fresh = tuple(rf"^{head}\." for head, _ in _HEADS.values())

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
        heads = [head for task, (head, _) in _HEADS.items() if task in config.tasks]
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

    def backbone(self, name: str, model: Any, tokenizer: Any) -> MeterBackbone:
        return MeterBackbone(name, model, tokenizer)


def _outputs(state: Tensors, tasks: Any, answers: int, words: int) -> dict[str, int]:
    """Task -> outputs of its head: of the file, or for a new head as the task has them."""
    there = {t: state.size(f"{head}.{part}") for t, (head, part) in _HEADS.items() if f"{head}.{part}" in state}
    new = {"mlm": words, "itm": 2, "vqa": answers, "nlvr2": 2, "snli": 3, "irtr": 1}
    for task in tasks or ():
        if task not in new:
            raise CheckpointError(unknown("task of METER", task, new))
    return there if tasks is None else {t: there.get(t, new[t]) for t in tasks}


class MeterBackbone(Backbone):
    """A METER: texts and pictures to both streams, text first."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        # The authors resize the shorter side and cut out the middle; here pictures are resized to a square whole.
        pictures = Pictures(model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        longest = model.config.text_config.max_position_embeddings - model.config.text_config.pad_token_id - 1
        width = 2 * model.config.cross_config.hidden_size
        super().__init__(name, model, tokenizer, pictures, width, min(longest, 50))
        self.token_width = width // 2

    def look(self, pixel_values: Tensor) -> Tensor:
        """What of the pictures does not depend on the text, (B, 1+P, V)."""
        return self.model.look(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned."""
        out = self.model(seen=seen, input_ids=input_ids, attention_mask=attention_mask)
        tokens = torch.cat([out.text, out.image], dim=1)  # (B, L + 1 + P, H)
        mask = torch.cat([attention_mask, attention_mask.new_ones(out.image.shape[:2])], dim=1)
        return Encoded(out.pooled, tokens, mask, slice(input_ids.shape[1] + 1, tokens.shape[1]))

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,): of ranking if there is such a head, else of matching.

        Raises:
            ValueError: if the model has neither head.
        """
        tasks = self.model.config.tasks
        if "irtr" in tasks:
            return self.model.rank_output(encoded.pooled).squeeze(-1)
        if "itm" in tasks:
            logits = self.model.itm_score(encoded.pooled)
            return logits[:, 1] - logits[:, 0]
        raise ValueError(f"{self.name}: no head for matching: load it with tasks=('itm',) or ('irtr',)")


def load(folder: Path, name: str, pretrained: bool = True) -> MeterBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.meter.model import MeterModel

    return MeterBackbone(name, load_pretrained(MeterModel, folder, pretrained), find_tokenizer(folder))
