"""MDETR's checkpoint files as its authors published them (ashkamath/mdetr, ResNet-101), and its sizes without
weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from trimtab.backbones.official import ROBERTA_BASE, CheckpointError, Format, Item, Tensors, bert_config, renamed
from trimtab.backbones.reading import unprefixed
from trimtab.backbones.vse.resnet import ResNetSizes


class MdetrFormat(Format):
    """`pretrained_resnet101_checkpoint.pth` and what is fine-tuned from it, for grounding or GQA.

    Not read: the variants with EfficientNet, for segmentation (PhraseCut) and for CLEVR.
    """

    leftovers = (r"\.position_ids$",)

    def recognises(self, keys: Collection[str]) -> bool:
        return (
            "transformer.resizer.fc.weight" in keys
            or "transformer.decoder.layers.0.cross_attn_image.in_proj_bias" in keys
        )

    def plan(self, state: Tensors, extras: dict[str, Any], *, ema: bool = False, heads: int = 8,
             text_heads: int | None = None) -> tuple[type, Any]:  # fmt: skip
        """Sizes from the tensors.

        Args:
            state, extras: of the file.
            ema: take the running average of the weights (`model_ema`), as the authors' `--load` and their evaluation
                of fine-tuned models do; their `torch.hub` models are the weights themselves (`model`).
            heads, text_heads: attention heads of the transformer and, if they are not 64 wide, of RoBERTa.
        """
        from transformers import RobertaConfig

        from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig

        if ema:
            _take_average(state, extras)
        try:
            cnn = ResNetSizes.infer(state, "backbone.0.body.", caffe=False, frozen=True)
        except ValueError as error:
            raise CheckpointError(f"{state.where}: {error} (EfficientNet is not supported)") from error
        align = "contrastive_align_projection_image.weight"
        width = state.size("query_embed.weight", 1)
        if width % heads:
            raise CheckpointError(f"{state.where}: {width} channels are no multiple of {heads} heads: set `heads`")
        text = bert_config(state, "transformer.text_encoder.", text_heads, RobertaConfig, layer_norm_eps=1e-5)
        config = MdetrConfig(
            text.to_dict(), asdict(cnn), width=width, heads=heads, queries=state.size("query_embed.weight"),
            encoder_layers=state.count("transformer.encoder.layers."),
            decoder_layers=state.count("transformer.decoder.layers."),
            feed_forward=state.size("transformer.encoder.layers.0.linear1.weight"),
            classes=state.size("class_embed.weight"), align=state.size(align) if align in state else 0,
            answers=_answers(state),
        )  # fmt: skip
        return Mdetr, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        ours = r"((?:transformer|input_proj|query_embed|class_embed|bbox_embed|qa_embed|answer|contrastive_align)"
        return renamed(state, [
            (r"backbone\.0\.body\.(.+)", r"backbone.\1"),
            (ours + r"(?!.*position_ids$).*)", r"\1"),
        ])  # fmt: skip


def _take_average(state: Tensors, extras: dict[str, Any]) -> None:
    average = extras.get("model_ema")
    if not isinstance(average, dict):
        raise CheckpointError(f"{state.where}: holds no average of its weights ('model_ema'): load it without `ema`")
    state.clear()  # what the average lacks is missing, and is told
    state |= unprefixed({str(k): v for k, v in average.items() if isinstance(v, Tensor)})


def _answers(state: Tensors) -> dict[str, int]:
    """Kinds of answers and their number, in the order of their queries."""
    from trimtab.backbones.mdetr.model import GQA, answer_head

    if "qa_embed.weight" not in state:
        return {}
    kinds = [""] if state.size("qa_embed.weight") == 1 else list(GQA)
    if len(kinds) != state.size("qa_embed.weight"):
        found = state.size("qa_embed.weight")
        raise CheckpointError(f"{state.where}: {found} kinds of answers; only GQA's 6, or 1 for all, are known")
    return {kind: state.size(f"{answer_head(kind)}.weight") for kind in kinds}


def architecture(answers: dict[str, int] | None = None) -> tuple[type, Any]:
    """MDETR: ResNet-101, RoBERTa-base, 6 + 6 layers of width 256, 100 queries.

    Args:
        answers: kinds of answers and their numbers (`GQA` of the model; `{"": 1853}` for one head); None for none.
    """
    from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig

    return Mdetr, MdetrConfig(ROBERTA_BASE, answers=answers)
