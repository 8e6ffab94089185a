"""MDETR (Kamath et al., ICCV 2021): its description and its published checkpoints (ashkamath/mdetr, ResNet-101).

image (B, 3, H, W) -> ResNet, frozen batch norms -> 1x1 convolution -> tokens (B, H W / 32^2, D) --+
text (B, L) -> RoBERTa -> linear, norm -> (B, L, D) -----------------------------------------------+-> encoder
                                                                                                        |
queries (Q + answers, D) -----------------------> decoder, which reads the encoded image and text <-----+
                                                     |
class_embed (which words), bbox_embed (where), contrastive_align_projection_*; answer_*_head of the answers' queries
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones import resnet
from trimtab.backbones.described import bert
from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, own_model, reads, renamed
from trimtab.backbones.resnet import ResNetSizes

_EMBEDDED = "each block is given position or query embeddings token by token"

own_model("Mdetr", "trimtab.backbones.mdetr.model")


@describes("Mdetr")
def describe(model: Any) -> Anatomy:
    text = bert.describe(model.transformer.text_encoder).prefixed("transformer.text_encoder")
    encoder = [_encoder_block(f"transformer.encoder.layers.{i}", model) for i in range(model.config.encoder_layers)]
    decoder = [_decoder_block(f"transformer.decoder.layers.{i}", model) for i in range(model.config.decoder_layers)]
    towers = (
        resnet.tower(model.backbone, "backbone"), *text.towers,
        Tower("encoder", "fusion", tuple(encoder), ("transformer.encoder",), output=Tap(encoder[-1].path),
              mask=Tap("transformer.encoder", "input", "valid"), reads=("vision", "text"), closed=_EMBEDDED),
        Tower("decoder", "fusion", tuple(decoder), ("transformer.decoder",), output=Tap(decoder[-1].path),
              memory="encoder", levels=Tap("transformer.decoder"), closed=_EMBEDDED),
    )  # fmt: skip
    heads = [*text.heads, "transformer.resizer", "input_proj", "query_embed", "class_embed", "bbox_embed"]
    heads += [n for n, _ in model.named_children() if n.startswith(("contrastive", "answer", "qa_embed"))]
    return Anatomy(towers, heads=tuple(heads))


def _encoder_block(path: str, model: Any) -> Block:
    return Block(path, model.config.width, (
        # The third input of the attention is the stream without positions; as in `bert`, what an adapter gives is
        # summed before the norm of the attention and after that of the feed-forward part.
        Sublayer("attention", Tap(f"{path}.self_attn", "input", 2), Tap(f"{path}.self_attn")),
        Sublayer("mlp", Tap(f"{path}.linear1", "input"), Tap(f"{path}.norm2")),
    ), stream="x")  # fmt: skip


def _decoder_block(path: str, model: Any) -> Block:
    return Block(path, model.config.width, (
        Sublayer("attention", Tap(f"{path}.self_attn", "input", 2), Tap(f"{path}.self_attn")),
        Sublayer("cross-attention", Tap(f"{path}.norm1"), Tap(f"{path}.cross_attn_image")),
        Sublayer("mlp", Tap(f"{path}.linear1", "input"), Tap(f"{path}.norm4")),
    ), stream="x")  # fmt: skip


@reads("mdetr", "MDETR")
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
        text = bert.infer(state, "transformer.text_encoder.", text_heads, RobertaConfig, layer_norm_eps=1e-5)
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
    state |= {k: v for k, v in average.items() if isinstance(v, Tensor)}


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
