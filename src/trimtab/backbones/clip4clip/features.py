"""CLIP4Clip (Luo et al., Neurocomputing 2022): CLIP on the frames of a video, and four ways to compare it with a text.

video (B, F, 3, H, W) -> CLIP's vision tower, frame by frame -> (B, F, E) --+
text (B, L) -> CLIP's text tower -> (B, E) ---------------------------------+-> head -> similarities (texts, videos)

meanP        mean over frames
seqLSTM      an LSTM over frames, with a shortcut, then the mean
seqTransf    a transformer over frames, with a shortcut, then the mean
tightTransf  a transformer over [text; frames] of every pair, one logit a pair
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.clip import features as clip
from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, head_count, own_model, reads, renamed

own_model("Clip4Clip", "trimtab.backbones.clip4clip.model")


@describes("Clip4Clip")
def describe(model: Any) -> Anatomy:
    anatomy = clip.describe(model.clip).prefixed("clip")
    towers, heads = anatomy.towers, anatomy.heads
    if model.config.head == "seqTransf":
        towers += (_tower("frames", "vision", model.transformerClip, "transformerClip", ("vision",)),)
        heads += ("frame_position_embeddings",)
    if model.config.head == "tightTransf":
        towers += (_tower("cross", "fusion", model.cross.transformer, "cross.transformer", ("vision", "text")),)
        heads += ("cross.embeddings", "cross.pooler", "similarity_dense")
    if model.config.head == "seqLSTM":
        heads += ("frame_position_embeddings", "lstm_visual")
    return replace(anatomy, towers=towers, heads=heads)


def _tower(name: str, modality: Any, encoder: Any, path: str, reads: tuple[str, ...]) -> Tower:
    blocks = []
    for i, layer in enumerate(encoder.layers):
        at = f"{path}.layers.{i}"
        blocks.append(Block(at, layer.embed_dim, (
            Sublayer("attention", Tap(f"{at}.layer_norm1", "input"), Tap(f"{at}.self_attn")),
            Sublayer("mlp", Tap(f"{at}.layer_norm2", "input"), Tap(f"{at}.mlp")),
        )))  # fmt: skip
    return Tower(name, modality, tuple(blocks), (path,), output=Tap(blocks[-1].path), reads=reads)


def block_rules(old: str, new: str) -> list[tuple[str, Any]]:
    """Rules for `renamed`: the blocks of OpenAI's CLIP under the pattern `old` to transformers' under `new`."""
    at, to = old + r"\.resblocks\.(\d+)\.", new + r".layers.\1."
    parts = tuple(rf"{to}self_attn.{x}_proj.\2" for x in "qkv")
    names = {r"attn\.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             r"mlp\.c_fc": "mlp.fc1", r"mlp\.c_proj": "mlp.fc2"}  # fmt: skip
    return [(rf"{at}attn\.in_proj_(weight|bias)", parts)] + [
        (rf"{at}{a}\.(weight|bias)", rf"{to}{b}.\2") for a, b in names.items()
    ]


_VISION, _TEXT = "clip.vision_model.", "clip.text_model."
_RULES = [
    (r"clip\.visual\.class_embedding", _VISION + "embeddings.class_embedding"),
    (r"clip\.visual\.positional_embedding", _VISION + "embeddings.position_embedding.weight"),
    (r"clip\.visual\.ln_pre\.(\w+)", _VISION + r"pre_layrnorm.\1"),
    (r"clip\.visual\.ln_post\.(\w+)", _VISION + r"post_layernorm.\1"),
    (r"clip\.visual\.proj", "clip.visual_projection.weight"),
    *block_rules(r"clip\.visual\.transformer", _VISION + "encoder"),
    (r"clip\.positional_embedding", _TEXT + "embeddings.position_embedding.weight"),
    (r"clip\.token_embedding\.weight", _TEXT + "embeddings.token_embedding.weight"),
    (r"clip\.ln_final\.(\w+)", _TEXT + r"final_layer_norm.\1"),
    (r"clip\.text_projection", "clip.text_projection.weight"),
    *block_rules(r"clip\.transformer", _TEXT + "encoder"),
    (r"clip\.logit_scale", "clip.logit_scale"),
    *block_rules("transformerClip", "transformerClip"),
    *block_rules(r"cross\.transformer", "cross.transformer"),
    (r"((?:frame_position_embeddings|lstm_visual|cross\.embeddings|cross\.pooler|similarity_dense)\..+)", r"\1"),
]
_PATCHES = _VISION + "embeddings.patch_embedding.weight"


@reads("clip4clip", "CLIP4Clip")
class Clip4ClipFormat(Format):
    """`pytorch_model.bin.N` of `main_task_retrieval.py`: bare tensors, CLIP's matrices in half precision."""

    leftovers = (r"^clip\.visual\.conv1\.",)  # stays in the file where `conv2` looks at three frames
    fresh = (r"^lstm_visual\.", r"^cross\.pooler\.", r"^similarity_dense\.")

    def recognises(self, keys: Collection[str]) -> bool:
        return "clip.visual.proj" in keys and "clip.text_projection" in keys

    def plan(self, state: Tensors, extras: dict[str, Any], *, head: str | None = None, cross_layers: int = 4,
             depth: int | None = None, vision_heads: int | None = None, text_heads: int | None = None,
             cross_heads: int | None = None) -> tuple[type, Any]:  # fmt: skip
        """Sizes from the tensors.

        Args:
            state, extras: of the file.
            head: another head than the file's: it starts as published, from the first blocks of CLIP's text tower.
            cross_layers: blocks of such a head.
            depth: 3 for patches over three frames, which start as the file's own on the middle frame.
            vision_heads, text_heads, cross_heads: attention heads, if they are not 64 wide.
        """
        from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig

        there = _head_of(state)
        head = head or there
        if there not in ("meanP", head):
            raise CheckpointError(f"{state.where}: its head is {there}, which does not become {head}")
        layers = {"seqTransf": "transformerClip.resblocks.", "tightTransf": "cross.transformer.resblocks."}.get(head)
        blocks = state.count(layers) if layers and head == there else cross_layers if layers else 0
        vision, text = state.size("clip.visual.conv1.weight"), state.size("clip.ln_final.weight")
        patch, rows = state.size("clip.visual.conv1.weight", 3), state.size("clip.visual.positional_embedding")
        context, embed = state.size("clip.positional_embedding"), state.size("clip.visual.proj", 1)
        if blocks > state.count("clip.transformer.resblocks."):
            raise CheckpointError(f"{state.where}: {blocks} cross layers, more than CLIP's text tower has")
        config = Clip4ClipConfig(
            clip_config={
                "projection_dim": embed,
                "vision_config": _sizes(
                    state, "clip.visual.transformer.resblocks.", vision, vision_heads, "vision_heads"
                )
                | {"image_size": round((rows - 1) ** 0.5) * patch, "patch_size": patch, "projection_dim": embed},
                "text_config": _sizes(state, "clip.transformer.resblocks.", text, text_heads, "text_heads") | {
                    "vocab_size": state.size("clip.token_embedding.weight"), "max_position_embeddings": context,
                    "projection_dim": embed,
                    # 2 is transformers' sign for "read the text at its largest id", as CLIP does.
                    "bos_token_id": None, "eos_token_id": 2,
                },
            },
            # Norms outside CLIP are written anew in the authors' code, with another epsilon.
            cross_config=_sizes(state, "clip.transformer.resblocks.", embed,
                                text_heads if head == "seqTransf" else cross_heads, "cross_heads")
            | {"num_hidden_layers": blocks, "max_position_embeddings": context, "layer_norm_eps": 1e-12,
               "bos_token_id": None},
            head=head, depth=depth or (state.size("clip.visual.conv2.weight", 2) if _deep(state) else 1),
        )  # fmt: skip
        return Clip4Clip, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        for item in renamed(state, _RULES):
            flip = item.key in ("clip.visual.proj", "clip.text_projection")  # kept as (in, out)
            yield item._replace(tensor=item.tensor.T.contiguous()) if flip else item
        yield _patches(state, config.depth)
        if config.head != _head_of(state):
            yield from _start(state, config)

    def backbone(self, name: str, model: Any, tokenizer: Any) -> Clip4ClipBackbone:
        return Clip4ClipBackbone(name, model, tokenizer)


def _deep(state: Tensors) -> bool:
    return "clip.visual.conv2.weight" in state


def _head_of(state: Tensors) -> str:
    for prefix, head in (("lstm_visual.", "seqLSTM"), ("transformerClip.", "seqTransf"), ("cross.", "tightTransf")):
        if any(key.startswith(prefix) for key in state):
            return head
    return "meanP"


def _sizes(state: Tensors, blocks: str, width: int, heads: int | None, setting: str) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": state.count(blocks),
        "num_attention_heads": head_count(width, heads, setting), "hidden_act": "quick_gelu",
    }  # fmt: skip


def _patches(state: Tensors, depth: int) -> Item:
    """The patch embedding; over several frames it starts as CLIP's on the middle one and zero elsewhere."""
    if depth > 1 and _deep(state):
        return Item("clip.visual.conv2.weight", _PATCHES, state["clip.visual.conv2.weight"])
    flat = state["clip.visual.conv1.weight"]
    if depth == 1:
        return Item("clip.visual.conv1.weight", _PATCHES, flat)
    deep = flat.new_zeros(*flat.shape[:2], depth, *flat.shape[2:])
    deep[:, :, (depth - 1) // 2] = flat
    return Item("clip.visual.conv1.weight", _PATCHES, deep)


def _start(state: Tensors, config: Any) -> Iterator[Item]:
    """A new head starts from CLIP's text tower: its table of positions and its first blocks."""
    table = "cross.embeddings.position_embeddings" if config.head == "tightTransf" else "frame_position_embeddings"
    yield Item("clip.positional_embedding", f"{table}.weight", state["clip.positional_embedding"])
    to = {"tightTransf": "cross.transformer", "seqTransf": "transformerClip"}.get(config.head)
    for item in renamed(state, block_rules(r"clip\.transformer", to)) if to else ():
        if int(item.key.split(".")[3]) < config.cross_config.num_hidden_layers:
            yield item


class Clip4ClipBackbone(Backbone):
    """A CLIP4Clip for tasks of pictures: each is a video of one frame, which takes a head without a sense of time."""

    kind = "dual"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        config = model.config
        if config.head != "meanP" or config.depth > 1:
            raise ValueError(
                f"{name}: a CLIP4Clip with head {config.head!r} over {config.depth} frames is for videos, of which we "
                "have no tasks yet; `trimtab.backbones.load_official` gives the plain model"
            )
        vision, text = config.clip_config.vision_config, config.clip_config.text_config
        super().__init__(name, model, tokenizer, Pictures(vision.image_size, CLIP_MEAN, CLIP_STD),
                         config.clip_config.projection_dim, min(text.max_position_embeddings, 32))  # fmt: skip

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self.model.encode_video(pixel_values[:, None])[:, 0])

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self.model.encode_text(input_ids, attention_mask))

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.model.config.clip_config.text_config.vocab_size

    @property
    def logit_scale(self) -> Tensor:
        """Natural logarithm of the factor by which cosines are multiplied, a scalar parameter."""
        return self.model.clip.logit_scale


def load(folder: Path, name: str, pretrained: bool = True) -> Clip4ClipBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.clip4clip.model import Clip4Clip

    return Clip4ClipBackbone(name, load_pretrained(Clip4Clip, folder, pretrained), find_tokenizer(folder))
