"""ViLT's checkpoints as its authors published them (dandelin/ViLT), for transformers' classes and ours, and its sizes
without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.family import model_class
from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, choose, grid_side, head_count, renamed
from trimtab.registry import unknown

# Task -> class of transformers (or ours), the head in the file, and the same in the class.
_TASKS = {
    "vqa": ("ViltForQuestionAnswering", "vqa_classifier", "classifier"),
    "nlvr2": ("ViltForImagesAndTextClassification", "nlvr2_classifier", "classifier"),
    "irtr": ("ViltForImageAndTextRetrieval", "rank_output", "rank_output"),
    "pretrain": ("ViltForPretraining", "mlm_score", "mlm_score"),
}


class ViltFormat(Format):
    """`vilt_200k_mlm_itm.ckpt` and the files fine-tuned from it."""

    # Heads of other tasks than the one asked for, and an index that transformers no longer saves.
    leftovers = (r"position_ids$", r"^(mlm|itm|mpp)_score\.", r"^rank_output\.", r"_classifier\.")
    fresh = (r"^classifier\.",)

    def recognises(self, keys: Collection[str]) -> bool:
        return any(k.startswith("transformer.blocks.") for k in keys) and any(k.startswith("text_emb") for k in keys)

    def plan(
        self, state: Tensors, extras: dict[str, Any], *, task: str | None = None, answers: int = 3129,
        heads: int | None = None,
    ) -> tuple[type, Any]:  # fmt: skip
        """transformers' class for a task and its config.

        The size of images is no setting: positions are resized to each image's own grid in every forward pass.

        Args:
            task: `pretrain`, `vqa`, `nlvr2` or `irtr`; None takes the task of the file. A head that the file does not
                have is new: that of `irtr` starts from the matching head, the others are random.
            answers: outputs of a new `vqa` head.
            heads: attention heads, which no tensor tells; None takes width / 64.
        """
        import transformers

        if task is None:
            there = [name for name, (_, head, _) in _TASKS.items() if any(k.startswith(head + ".") for k in state)]
            task = there[0] if there else "irtr"
        if task not in _TASKS:
            raise CheckpointError(unknown("task of ViLT", task, _TASKS))
        width = state.size("transformer.patch_embed.proj.weight")
        patch = state.size("transformer.patch_embed.proj.weight", 2)
        words = "text_embeddings.word_embeddings.weight"
        head = f"{_TASKS[task][1]}.3.weight"
        labels = {"vqa": answers, "nlvr2": 2}.get(task, 2) if head not in state else state.size(head)
        config = transformers.ViltConfig(
            vocab_size=state.size(words), hidden_size=width, num_hidden_layers=state.count("transformer.blocks."),
            intermediate_size=state.size("transformer.blocks.0.mlp.fc1.weight"), patch_size=patch,
            max_position_embeddings=state.size("text_embeddings.position_embeddings.weight"),
            type_vocab_size=state.size("text_embeddings.token_type_embeddings.weight"),
            num_attention_heads=head_count(width, heads, "heads"), num_labels=labels,
            image_size=grid_side(state, "transformer.pos_embed", patch, None), num_images=2 if task == "nlvr2" else -1,
            modality_type_vocab_size=max(state.size("token_type_embeddings.weight"), 3 if task == "nlvr2" else 2),
            # The blocks' norms have 1e-6, those of the text embeddings 1e-12; transformers has one value for all.
            layer_norm_eps=1e-6,
            # Keep all patches of the largest image of a batch; the authors' value in evaluation.
            max_image_length=-1,
        )  # fmt: skip
        config.vilt_task = task
        name = _TASKS[task][0]
        return model_class(name), config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        task = config.vilt_task
        _, head, ours = _TASKS[task]
        block, layer = r"transformer\.blocks\.(\d+)\.", r"vilt.encoder.layer.\1."
        attention = layer + "attention."
        rules: list[tuple[str, str | tuple[str, ...]]] = [
            (r"text_embeddings\.(?!position_ids).*", r"vilt.embeddings.\g<0>"),
            (r"transformer\.cls_token", "vilt.embeddings.cls_token"),
            (r"transformer\.pos_embed", "vilt.embeddings.position_embeddings"),
            (r"transformer\.patch_embed\.proj\.(\w+)", r"vilt.embeddings.patch_embeddings.projection.\1"),
            (r"transformer\.norm\.(\w+)", r"vilt.layernorm.\1"),
            (r"pooler\..*", r"vilt.\g<0>"),
            (block + r"attn\.qkv\.(\w+)",
             tuple(rf"{attention}attention.{n}.\2" for n in ("query", "key", "value"))),
            (block + r"attn\.proj\.(\w+)", attention + r"output.dense.\2"),
            (block + r"norm1\.(\w+)", layer + r"layernorm_before.\2"),
            (block + r"norm2\.(\w+)", layer + r"layernorm_after.\2"),
            (block + r"mlp\.fc1\.(\w+)", layer + r"intermediate.dense.\2"),
            (block + r"mlp\.fc2\.(\w+)", layer + r"output.dense.\2"),
        ]  # fmt: skip
        if task == "pretrain":
            rules += [(r"mlm_score\.bias", "mlm_score.decoder.bias"), (r"itm_score\.fc\.(\w+)", r"itm_score.\1")]
        rules.append((rf"{head}\.(.*)", rf"{ours}.\1"))
        yield from renamed(state, rules)
        key = "token_type_embeddings.weight"
        table = state[key]
        if len(table) < config.modality_type_vocab_size:  # the second image of a pair starts as the first
            table = torch.cat([table, table[1:2]])
        yield Item(key, f"vilt.embeddings.{key}", table)
        if task == "irtr" and "rank_output.weight" not in state:
            for part in ("weight", "bias"):  # ranking starts from the matching head's row for "belongs together"
                yield Item(f"itm_score.fc.{part}", f"rank_output.{part}", state[f"itm_score.fc.{part}"][1:])


def pixel_mask(pixel_values: Tensor) -> Tensor:
    """Which pixels are picture and which are padding, (B, 3, H, W) -> (B, H, W), as the authors tell them apart.

    A pixel counts if its three normalised channels do not add up to zero; padding is zeros.
    """
    return (pixel_values.sum(dim=1) != 0).long()


def architecture(task: str = "irtr", answers: int = 3129) -> tuple[type, Any]:
    """ViLT-B/32: 12 blocks on 40 tokens of text and pictures whose shorter side has 384 pixels.

    Args:
        task: `pretrain`, `vqa`, `nlvr2` or `irtr`.
        answers: outputs of the `vqa` head.
    """
    import transformers

    name = choose("task of ViLT", task, _TASKS)[0]
    config = transformers.ViltConfig(
        layer_norm_eps=1e-6, max_image_length=-1, num_labels=answers if task == "vqa" else 2,
        num_images=2 if task == "nlvr2" else -1, modality_type_vocab_size=3 if task == "nlvr2" else 2,
    )  # fmt: skip
    config.vilt_task = task
    return model_class(name), config
