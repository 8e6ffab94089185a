"""CLIP4Clip's checkpoint files as its authors' training writes them, and its sizes without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, head_count, renamed


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


def architecture(patch: int = 32, head: str = "meanP", cross_layers: int = 4, depth: int = 1) -> tuple[type, Any]:
    """CLIP4Clip: CLIP ViT-B/32 or B/16 at 224 pixels, and a head over frames.

    Args:
        patch: pixels of a patch's side.
        head: one of `trimtab.backbones.clip4clip.model.HEADS`.
        cross_layers: blocks of the heads that are transformers.
        depth: frames that a patch sees, 1 or 3.
    """
    from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig

    layers = cross_layers if head in ("seqTransf", "tightTransf") else 0
    # 2 is transformers' sign for "read the text at its largest id", as CLIP does.
    clip = {"vision_config": {"patch_size": patch}, "text_config": {"bos_token_id": None, "eos_token_id": 2}}
    cross = {"hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 77, "bos_token_id": None,
             "num_hidden_layers": layers, "layer_norm_eps": 1e-12}  # fmt: skip
    return Clip4Clip, Clip4ClipConfig(clip, cross, head, depth)
