"""X-VLM's checkpoint files as its authors published them (zengyan-97/X-VLM), and its sizes without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trimtab.backbones.official import (
    CheckpointError,
    Format,
    Item,
    Tensors,
    bert_config,
    choose,
    grid_side,
    head_count,
    renamed,
    resize_grid,
)

# Rules of the Swin in the file (Microsoft's names) to transformers'.
_BLOCK, _OURS = r"vision_encoder\.layers\.(\d+)\.blocks\.(\d+)\.", r"vision_encoder.encoder.layers.\1.blocks.\2."


_SWIN: list[tuple[str, Any]] = [
    (r"vision_encoder\.patch_embed\.proj\.(\w+)", r"vision_encoder.embeddings.patch_embeddings.projection.\1"),
    (r"vision_encoder\.patch_embed\.norm\.(\w+)", r"vision_encoder.embeddings.norm.\1"),
    (_BLOCK + r"norm1\.(\w+)", _OURS + r"layernorm_before.\3"),
    (_BLOCK + r"norm2\.(\w+)", _OURS + r"layernorm_after.\3"),
    (_BLOCK + r"attn\.qkv\.(\w+)", tuple(_OURS + rf"attention.{x}_proj.\3" for x in "qkv")),
    (_BLOCK + r"attn\.proj\.(\w+)", _OURS + r"attention.o_proj.\3"),
    (_BLOCK + r"attn\.relative_position_bias_table",
     _OURS + "attention.relative_position_bias.relative_position_bias_table"),
    (_BLOCK + r"mlp\.fc([12])\.(\w+)", _OURS + r"mlp.fc\3.\4"),
    (r"vision_encoder\.layers\.(\d+)\.downsample\.(.+)", r"vision_encoder.encoder.layers.\1.downsample.\2"),
    (r"vision_encoder\.norm\.(\w+)", r"vision_encoder.layernorm.\1"),
]  # fmt: skip


_VIT: list[tuple[str, Any]] = [
    (r"vision_encoder\.class_embedding", "vision_encoder.embeddings.class_embedding"),
    (r"vision_encoder\.patch_embed\.weight", "vision_encoder.embeddings.patch_embedding.weight"),
    (r"vision_encoder\.pos_embed\.weight", "vision_encoder.embeddings.position_embedding.weight"),
    (r"(vision_encoder\.(?:pre_layrnorm|encoder|post_layernorm)\..+)", r"\1"),
]


# What each task has beside images and text: the sign of it in a fine-tuned file.
_HEADS = r"((?:vision_proj|text_proj|itm_head|bbox_head|cls_head)\..+|temp)"


class XvlmFormat(Format):
    """`4m_base_model_state_step_199999.th` and the like, and what is fine-tuned from them.

    A pretrained file starts any task as the authors' loaders do, with `task`; a fine-tuned one says its task itself.
    """

    leftovers = (
        r"\.position_ids$", r"\.relative_position_index$", r"\.attn_mask$", r"\.cls\.predictions\.decoder\.",
        # What a task of a pretrained file drops.
        r"^(vision_proj|text_proj|itm_head|bbox_head|text_encoder\.cls)\.", r"^temp$",
        r"^text_encoder\..*\.crossattention\.self\.(key|value)\.",  # of NLVR2's second image: those of the first
    )  # fmt: skip
    fresh = (r"^cls_head\.", r"^text_decoder\..*\.crossattention\.self\.(key|value)\.")

    def may_lack(self, state: Tensors, config: Any) -> tuple[str, ...]:
        """A decoder's maps are new where those of a pretrained file are for image tokens of another width."""
        new = task_of(state) != config.task and config.vision_width != config.text_config.hidden_size
        return self.fresh if new else self.fresh[:1]

    def recognises(self, keys: Collection[str]) -> bool:
        vision = "vision_encoder.layers.0.blocks.0.norm1.weight", "vision_encoder.pre_layrnorm.weight"
        return any(key in keys for key in vision)

    def plan(self, state: Tensors, extras: dict[str, Any], *, task: str | None = None, image_size: int | None = None,
             text_heads: int | None = None, vision_heads: int | None = None,
             local_layers: int = 4) -> tuple[type, Any]:  # fmt: skip
        """Sizes from the tensors.

        Args:
            state, extras: of the file.
            task: `pretrain`, `retrieval`, `grounding`, `nlvr2`, `vqa` or `caption`; None for the file's own.
            image_size: pixels of a side; the tables of positions are resized. None for the file's own.
            text_heads, vision_heads: attention heads, if they are not 64 wide.
            local_layers: last blocks of a CLIP tower that see regions apart.
        """
        from trimtab.backbones.xvlm.model import TASKS, Xvlm, XvlmConfig
        from trimtab.registry import unknown

        there = task_of(state)
        task = task or there
        if task not in TASKS:
            raise CheckpointError(unknown("task of an X-VLM", task, TASKS))
        if task != there and there != "pretrain":
            raise CheckpointError(f"{state.where}: is fine-tuned for {there}; load a pretrained file for {task}")
        text = _prefix(state)
        words = bert_config(state, text, text_heads)
        seeing = [int(k.removeprefix(f"{text}encoder.layer.").split(".")[0]) for k in state if _sees(k, text)]
        fusion = min(seeing, default=words.num_hidden_layers)
        decoder = words.num_hidden_layers - fusion
        if task == "vqa" and there == "vqa":
            decoder = state.count("text_decoder.bert.encoder.layer.")
        if task == "nlvr2" and there != "nlvr2":
            words.num_hidden_layers = fusion + 2 * decoder
        swin = "vision_encoder.layers.0.blocks.0.norm1.weight" in state
        vision = _swin(state, image_size) if swin else _vit(state, image_size, vision_heads)
        config = XvlmConfig(
            words.to_dict(), vision, fusion_layer=fusion, task=task, decoder_layers=decoder,
            embed=state.size("vision_proj.weight") if "vision_proj.weight" in state else 256,
            local_layers=min(local_layers, 0 if swin else vision["num_hidden_layers"]),
        )  # fmt: skip
        return Xvlm, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        from trimtab.backbones.xvlm.model import TASKS

        swin = config.vision_config.model_type == "swin"
        for item in renamed(state, _SWIN if swin else _VIT):
            yield item._replace(tensor=_resized(item, config))
        wanted = set(TASKS[config.task])
        if "contrast" in wanted:
            wanted |= {"vision_proj", "text_proj", "temp"}
        for item in renamed(state, [(_HEADS, r"\1")]):
            if item.key.split(".")[0] in wanted:
                yield item
        yield from _words(state, config)


def task_of(state: Tensors) -> str:
    """The task for which a file was trained, from the parts that it has."""
    if any(k.startswith("text_decoder.") for k in state):
        return "vqa" if any(k.startswith("text_encoder.") for k in state) else "caption"
    if any(k.startswith("text_encoder.cls.") for k in state):
        return "pretrain"
    if "cls_head.0.weight" in state:
        return "nlvr2"
    return "retrieval" if "itm_head.0.weight" in state else "grounding"


def _prefix(state: Tensors) -> str:
    """What stands before `embeddings.` in the file: fine-tuned text encoders have lost the `bert.`."""
    names = ("text_encoder.bert.", "text_encoder.", "text_decoder.bert.")
    return next((n for n in names if f"{n}embeddings.word_embeddings.weight" in state), names[0])


def _sees(key: str, text: str) -> bool:
    return key.startswith(f"{text}encoder.layer.") and key.endswith("crossattention.self.query.weight")


def _swin(state: Tensors, image_size: int | None) -> dict[str, Any]:
    stages = state.count("vision_encoder.layers.")
    block = "vision_encoder.layers.{}.blocks.0.attn.relative_position_bias_table"
    table = state.size(block.format(0))
    window = (round(table**0.5) + 1) // 2
    if (2 * window - 1) ** 2 != table:
        raise CheckpointError(f"{state.where}: '{block.format(0)}' has {table} rows, of no square window")
    # All published sizes end in one window of the whole image: 7 at 224 pixels, 12 at 384, 15 at 480.
    patch = state.size("vision_encoder.patch_embed.proj.weight", 3)
    step = patch * 2 ** (stages - 1)
    if image_size is not None and (image_size < step or image_size % step):
        raise CheckpointError(f"image_size {image_size} is no multiple of {step} pixels, the last patches of this Swin")
    window = image_size // step if image_size else window
    width = state.size("vision_encoder.patch_embed.proj.weight")
    return {
        "model_type": "swin", "image_size": window * step, "patch_size": patch, "embed_dim": width,
        "depths": [state.count(f"vision_encoder.layers.{s}.blocks.") for s in range(stages)],
        "num_heads": [state.size(block.format(s), 1) for s in range(stages)], "window_size": window,
        "hidden_size": width * 2 ** (stages - 1), "drop_path_rate": 0.1, "layer_norm_eps": 1e-5,
    }  # fmt: skip


def _vit(state: Tensors, image_size: int | None, heads: int | None) -> dict[str, Any]:
    width, patch = state.size("vision_encoder.class_embedding"), state.size("vision_encoder.patch_embed.weight", 3)
    return {
        "model_type": "clip_vision_model", "hidden_size": width, "patch_size": patch, "hidden_act": "quick_gelu",
        "image_size": grid_side(state, "vision_encoder.pos_embed.weight", patch, image_size),
        "num_hidden_layers": state.count("vision_encoder.encoder.layers."),
        "num_attention_heads": head_count(width, heads, "vision_heads"), "layer_norm_eps": 1e-5,
        "intermediate_size": state.size("vision_encoder.encoder.layers.0.mlp.fc1.weight"),
    }  # fmt: skip


def _resized(item: Item, config: Any) -> Any:
    from trimtab.backbones.xvlm.vision import resize_bias

    vision = config.vision_config
    if item.key.endswith("relative_position_bias_table"):
        return resize_bias(item.tensor, vision.window_size)
    if item.key.endswith("pos_embed.weight"):
        return resize_grid(item.tensor, vision.image_size // vision.patch_size)
    return item.tensor


def _words(state: Tensors, config: Any) -> Iterator[Item]:
    """The tensors of BERT where the task has them; from a pretrained file, as the authors' loaders put them."""
    there = task_of(state)
    for item in renamed(state, [(r"((?:text_encoder|text_decoder)\..+)", r"\1")]):
        part, rest = item.key.split(".", 1)
        if rest.endswith("position_ids") or ".predictions.decoder." in rest:  # the decoder is the word embeddings
            continue
        rest = rest if rest.startswith(("bert.", "cls.")) else f"bert.{rest}"
        for name in _places(part, rest, there == config.task, config):
            yield item._replace(name=name)


def _places(part: str, rest: str, own: bool, config: Any) -> list[str]:
    """Names that a tensor of BERT has in the model, none if the task has no place for it.

    Args:
        part: `text_encoder` or `text_decoder`.
        rest: its name in there.
        own: whether the file was trained for the task, else it is a pretrained one.
        config: of the model.
    """
    task, split = config.task, config.fusion_layer
    layer = int(rest.split(".")[3]) if rest.startswith("bert.encoder.layer.") else -1
    inside, late = rest.split(".", 4)[-1], layer - split  # late: which of the fusing layers, negative for others
    maps = inside.startswith(("crossattention.self.key", "crossattention.self.value"))
    if own:  # NLVR2's files have the maps of the first image a second time
        return [] if task == "nlvr2" and late >= 0 and late % 2 and maps else [f"{part}.{rest}"]
    if task == "caption":  # the decoder is the whole BERT
        return [f"text_decoder.{rest}"]
    if task == "nlvr2" and late >= 0:  # every fusing layer is there twice, once an image; the maps are shared
        turns = (0,) if maps else (0, 1)
        return [f"text_encoder.bert.encoder.layer.{split + 2 * late + turn}.{inside}" for turn in turns]
    encoder = [] if rest.startswith("cls.") else [f"text_encoder.{rest}"]
    if task == "vqa" and layer < 0:  # the decoder has embeddings of its own, and the word head
        return [*encoder, f"text_decoder.{rest}"]
    # A decoder's memory is as wide as the text; maps of image tokens of another width are new there.
    if task == "vqa" and late >= 0 and (not maps or config.vision_width == config.text_config.hidden_size):
        return [*encoder, f"text_decoder.bert.encoder.layer.{late}.{inside}"]
    return encoder


def architecture(vision: str = "swin", task: str = "retrieval", image_size: int | None = None) -> tuple[type, Any]:
    """X-VLM: Swin-B or CLIP ViT-B/16, and BERT-base whose upper six layers read the picture.

    Args:
        vision: `swin`, as released, or `clip`, as MULTIFLOW prunes it.
        task: `pretrain`, `retrieval`, `grounding`, `nlvr2`, `vqa` or `caption`.
        image_size: pixels of a side; None for 224 in pretraining, 480 for VQA with Swin, else 384.
    """
    from trimtab.backbones.xvlm.model import Xvlm, XvlmConfig

    size = image_size or {"pretrain": 224, "vqa": 480}.get(task, 384)
    swin = {"model_type": "swin", "image_size": size, "embed_dim": 128, "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32], "window_size": size // 32, "hidden_size": 1024}  # fmt: skip
    clip = {"model_type": "clip_vision_model", "image_size": size, "patch_size": 16, "hidden_size": 768}
    tower = choose("vision tower of X-VLM", vision, {"swin": swin, "clip": clip})
    text = {"num_hidden_layers": 18} if task == "nlvr2" else {}  # a layer for either picture, six times
    return Xvlm, XvlmConfig(text, tower, task=task, local_layers=4 if vision == "clip" else 0)
