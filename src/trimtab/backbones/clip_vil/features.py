"""CLIP-ViL: its description, its published checkpoints (clip-vil/CLIP-ViL, pretraining and VQA), its backbone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes
from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.described import bert
from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, head_count, own_model, reads, renamed
from trimtab.registry import unknown

own_model("ClipVilModel", "trimtab.backbones.clip_vil.model")


@describes("ClipVilModel")
def describe(model: Any) -> Anatomy:
    blocks = []
    for stage in range(1, 5):
        for i, block in enumerate(getattr(model.vision, f"layer{stage}")):
            keeps = block.downsample is None
            blocks.append(Block(f"vision.layer{stage}.{i}", block.conv3.out_channels, keeps_shape=keeps, stream="x"))
    vision = Tower("vision", "vision", tuple(blocks), ("vision",), output=Tap("vision"), layout="grid")
    (text,) = bert.describe(model.bert).prefixed("bert").towers
    joint = Tower("fusion", "fusion", text.blocks, text.scope, output=text.output, mask=Tap("valid"),
                  pooled=Tap("pooler"), reads=("vision",))  # fmt: skip
    heads = ("pooler", "cls", "answer_head", "logit_fc")
    return Anatomy((vision, joint), heads=tuple(h for h in heads if hasattr(model, h)))


@reads("clip_vil", "CLIP-ViL")
class ClipVilFormat(Format):
    """`Epoch11_LXRT.pth` (pretrained) and `BEST_LXRT.pth` (VQA)."""

    # The rest of CLIP (its text tower and attention pooling), boxes that grids do not have, a second name of the word
    # embeddings, and heads of the task that was not asked for.
    leftovers = (r"\.visual_model\.(?!visual\.)", r"\.visual\.attnpool\.", r"num_batches_tracked$", r"\.box_",
                 r"^cls\.|^answer_head\.|^logit_fc\.")  # fmt: skip
    fresh = (r"^logit_fc\.",)

    def recognises(self, keys: Collection[str]) -> bool:
        return any("bert.encoder.visual_model." in k or "bert.encoder.visn_fc." in k for k in keys)

    def plan(
        self, state: Tensors, extras: dict[str, Any], *, task: str | None = None, answers: int = 3129,
        heads: int | None = None,
    ) -> tuple[type, Any]:  # fmt: skip
        """CLIP-ViL's class and config. Pictures may have any size that the tables of positions reach.

        Args:
            task: `pretrain` or `vqa`; None takes that of the file. A head for VQA that the file does not have is new:
                the authors' way to start it from pretraining's answers needs their list of answers.
            answers: outputs of a new head for VQA.
            heads: attention heads, which no tensor tells; None takes width / 64.
        """
        from transformers import BertConfig

        from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel

        found = task or ("vqa" if "logit_fc.3.weight" in state else "pretrain")
        if found not in ("pretrain", "vqa"):
            raise CheckpointError(unknown("task of CLIP-ViL", found, ("pretrain", "vqa")))
        root = _root(state)
        embeddings, layers = f"{root}embeddings.", f"{root}encoder.layer."
        words, width = (state.size(f"{embeddings}word_embeddings.weight", dim) for dim in (0, 1))
        text = BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=state.count(layers),
            num_attention_heads=head_count(width, heads, "heads"),
            intermediate_size=state.size(f"{layers}0.intermediate.dense.weight"), layer_norm_eps=1e-12,
            max_position_embeddings=state.size(f"{embeddings}position_embeddings.weight"),
            type_vocab_size=state.size(f"{embeddings}token_type_embeddings.weight"),
        )  # fmt: skip
        visual = f"{root}encoder.visual_model.visual."
        config = ClipVilConfig(
            text_config=text, vision_width=state.size(f"{visual}conv3.weight"),
            vision_layers=[state.count(f"{visual}layer{i}.") for i in range(1, 5)],
            positions=state.size(f"{root}encoder.visual_pos.x_position_embedding.weight"),
            pretraining_answers=state.size("answer_head.logit_fc.3.weight") if found == "pretrain" else 0,
            answers=0 if found == "pretrain" else _answers(state, answers),
        )  # fmt: skip
        return ClipVilModel, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        root = _root(state).replace(".", r"\.")
        rules: list[tuple[str, str | tuple[str, ...]]] = [
            (rf"{root}(embeddings\..*)", r"bert.\1"), (rf"{root}(encoder\.layer\..*)", r"bert.\1"),
            (rf"{root}encoder\.visual_model\.visual\.((?:conv|bn|layer).*)", r"vision.\1"),
            (rf"{root}encoder\.visual_pos\.([xy]_position_embedding\.weight)", r"\1"),
            (rf"{root}encoder\.visn_fc\.(visn_fc|visn_layer_norm)\.(\w+)", r"\1.\2"),
            (rf"{root}(pooler\.dense\.\w+)", r"\1"),
        ]  # fmt: skip
        if config.pretraining_answers:
            rules += [
                (r"cls\.predictions\.(bias|transform\..*)", r"cls.\1"), (r"cls\.(seq_relationship\..*)", r"cls.\1"),
                (r"answer_head\.logit_fc\.(.*)", r"answer_head.\1"),
            ]  # fmt: skip
        if config.answers:
            rules.append((r"logit_fc\..*", r"\g<0>"))
        yield from renamed(state, rules)

    def backbone(self, name: str, model: Any, tokenizer: Any) -> ClipVilBackbone:
        return ClipVilBackbone(name, model, tokenizer)


def _root(state: Tensors) -> str:
    """Where BERT stands: fine-tuned files hold it inside an encoder."""
    return "lxrt_encoder.model.bert." if any(k.startswith("lxrt_encoder.") for k in state) else "bert."


def _answers(state: Tensors, new: int) -> int:
    return state.size("logit_fc.3.weight") if "logit_fc.3.weight" in state else new


class ClipVilBackbone(Backbone):
    """A CLIP-ViL: text and places of the picture in one sequence, text first."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        text = model.config.text_config
        # The authors keep the shape, shorter side 384, and pad to 384 x 640; here pictures become a square of 384.
        side = min(384, 32 * model.config.positions)
        super().__init__(name, model, tokenizer, Pictures(side, CLIP_MEAN, CLIP_STD), text.hidden_size,
                         min(text.max_position_embeddings, 20))  # fmt: skip

    def look(self, pixel_values: Tensor) -> Tensor:
        """Embedded places of the pictures, (B, h*w, D)."""
        return self.model.look(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned."""
        out = self.model(seen=seen, input_ids=input_ids, attention_mask=attention_mask)
        tokens = torch.cat([out.text, out.image], dim=1)  # (B, L + h*w, D)
        mask = torch.cat([attention_mask, attention_mask.new_ones(out.image.shape[:2])], dim=1)
        return Encoded(out.pooled, tokens, mask, slice(input_ids.shape[1], tokens.shape[1]))

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "cls"):
            raise ValueError(f"{self.name}: no head for matching: load the pretrained file")
        apart, together = self.model.cls.seq_relationship(encoded.pooled).unbind(dim=-1)
        return together - apart


def load(folder: Path, name: str, pretrained: bool = True) -> ClipVilBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.clip_vil.model import ClipVilModel

    return ClipVilBackbone(name, load_pretrained(ClipVilModel, folder, pretrained), find_tokenizer(folder))
