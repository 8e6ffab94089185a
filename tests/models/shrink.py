"""Tiny configurations of any family of transformers: every field of the default one is made small, by rules.

    config = tiny_config("qwen2_vl")         # a few layers, 16 to 64 wide, a vocabulary of 128
    model = build("Qwen2VLForConditionalGeneration", config)

Fields that were equal stay equal (a projection as wide as the text model, say), which keeps most of what fits together.
What the rules get wrong for a family stands in `tests.models.exceptions`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.models.exceptions import DEFAULTS, SETTINGS

LAYERS, VOCABULARY, HEADS, HEAD, PATCH, PICTURE, POSITIONS = 3, 128, 4, 8, 4, 16, 128
WIDTHS = (32, 48, 64, 40, 56, 80, 72)  # of towers, the largest first: 4 heads of an even width each

# The first pattern that is found in a field's name says what the number is.
KINDS: list[tuple[str, str]] = [
    ("keep", r"^(chunk_size_feed_forward|pretraining_tp|model_parallel_size|seed|num_channels|audio_channels"
             r"|num_return|decoder_sparse_step|scale_factor|merge_factor|subsampling_factor|type_vocab_size"
             r"|sampling_rate|hidden_expansion|num_labels|\w+_tokenizer_chunk_size)$"),
    ("token", r"(token|start|end|begin|image_patch|nothink|think_bos|think_eos|codec_pad|codec_bos|im_newline)"
              r"_(id|index|ids)$|^forced_eos_token_id$"),
    ("layers", r"^(num_hidden_layers|n_layers?|num_layers|depth|layers|(en|de)coder_layers|num_decoder_layers"
               r"|num_blocks|resampler_depth|\w+_num_hidden_layers|decoder_num_layers|num_(spatial|temporal|auxiliary|global)_layers"
               r"|num_timestamp_prediction_layers|aligner_num_add_layers|max_window_layers|n_layer)$"),
    ("indices", r"(indexes|indices|_idxs|layer_ids|target_layers|attention_layers|extract_layers|moe_layers"
                r"|mlp_only_layers)$"),
    ("layer", r"^(vision_feature_layer|feature_layer|insert_layer_id|accept_hidden_layer|spatial_vision_layer"
              r"|first_k_dense_replace|vision_feature_select_layer)$"),
    ("text_width", r"^(out_hidden_size|text_hidden_size|adapter_out_dim|projector_output_dim|image_text_hidden_size)$"),
    ("heads", r"(attention_heads|^num_heads|_num_heads|_n_heads|linear_num_(key|value)_heads|resampler_heads"
              r"|^n_head)$"),
    ("kv_heads", r"(key_value_heads|kv_heads)$"),
    ("head", r"(head_dim|dim_head|^d_kv)$"),
    ("experts", r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$"),
    ("few", r"^(num_experts_per_tok|moe_topk|moe_k|n_shared_experts|moe_num_shared_experts|moe_top_k)$"),
    ("one", r"^(n_group|topk_group|num_nextn_predict_layers|num_residual_layers|merger_times)$"),
    ("vocabulary", r"(vocab_size|vocab_size_per_layer_input|^vocab_offset|num_embeddings|codebook_size)$"),
    ("positions", r"(max_position_embeddings|max_2d_position_embeddings|^seq_len|original_max_position\w+)$"),
    ("patch", r"^patch_size$"),
    ("picture", r"^(image_size|img_size|input_size|max_image_size|resolution)$"),
    ("queries", r"(num_query_tokens|n_latents|num_latents|num_queries|latent_query_num)$"),
    ("window", r"(sliding_window|sliding_window_size|attention_chunk_size|local_attention)$"),
    ("rank", r"(lora_rank|lowrank|laurel_rank|_rank)$"),
    ("mel", r"(num_mel_bins|mel_dim|n_mel_bins|input_feat_size|feature_size)$"),
    ("inner", r"(intermediate_size|intermediate_size_mlp|ffn_dim|mlp_dim|^d_ff|dim_feedforward|expert_dim)$"),
    ("width", r"(hidden_size|hidden_dim|d_model|embed_dim|_dim|hidden|_size|output_channels|_channels|query_dim|_width"
              r"|pos_feats)$"),
]  # fmt: skip
# What a number of a kind is at most.
SMALL = {"heads": HEADS, "head": HEAD, "experts": 4, "few": 2, "one": 1, "vocabulary": VOCABULARY,
         "positions": POSITIONS, "patch": PATCH, "picture": PICTURE, "queries": 4, "window": 8, "rank": 8, "mel": 16,
         "inner": 40}  # fmt: skip
# Fields of models whose stages halve the picture, which needs to be larger then.
STAGES, STAGED_PICTURE = ("depths", "hidden_sizes", "strides", "neck_hidden_sizes", "num_windows", "mlp_ratio_list"), 64
_DROPS = re.compile(r"layerdrop|layer_drop|drop_path|depth_dropout")
_SAVED = {"_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type",
          "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"}  # fmt: skip


def kind_of(name: str) -> str:
    """What the number in a field is, by the field's name; "other" if no rule knows it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and all that it holds."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


class Shrinker:
    """Makes one family's configuration small; what must stay equal across its parts is decided once."""

    def __init__(self, config: PreTrainedConfig):
        parts = list(configs(config))
        widths = [v for c in parts for n in ("hidden_size", "d_model", "hidden_dim", "n_embd")
                  if isinstance(v := found(c, n), int) and v > 0]  # fmt: skip
        ordered = sorted(set(widths), reverse=True)
        self.widths = {w: WIDTHS[i % len(WIDTHS)] for i, w in enumerate(ordered)}
        text = getattr(config.get_text_config(), "hidden_size", 0)
        self.text_width = self.widths.get(text, WIDTHS[0])
        tokens = sorted({v for c in parts for n, v in self._fields(c) if kind_of(n) == "token" for v in _ints(v)})
        large = [v for v in tokens if v > 9]
        self.tokens = {v: VOCABULARY - len(large) + i for i, v in enumerate(large)}

    @staticmethod
    def _fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
        """What a configuration takes; what it works out for itself is left to it."""
        known = getattr(type(config), "__dataclass_fields__", {}).keys()
        for name, value in vars(config).items():
            if not name.startswith("_") and name not in _SAVED and (name in known or not known):
                yield name, value

    def shrink(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The small configuration's fields; those that are configurations themselves as such dictionaries."""
        depth = _depth(config)
        few = _few(config)
        out: dict[str, Any] = {}
        for name, value in self._fields(config):
            if isinstance(value, PreTrainedConfig):
                out[name] = self.shrink(value)
            elif name in ("out_features", "_out_features", "stage_names") or name.startswith("ignore_keys"):
                continue
            elif _DROPS.search(name):
                out[name] = 0.0 if isinstance(value, float) else value
            else:
                out[name] = self.value(name, value, config, depth, few)
        if getattr(config, "model_type", ""):
            out["model_type"] = config.model_type
        return merged(out, SETTINGS.get(config.model_type, {}))

    def value(self, name: str, value: Any, config: PreTrainedConfig, depth: int, few: int) -> Any:
        """The small value of one field."""
        if isinstance(value, (list, tuple)):
            return self.sequence(name, value, depth, few)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return self.number(name, value, config, depth, few)

    def number(self, name: str, value: int, config: PreTrainedConfig, depth: int, few: int) -> int:
        """The small value of a field that is a whole number."""
        kind = kind_of(name)
        heads = found(config, "num_attention_heads") or found(config, "num_heads") or value
        if kind == "token":
            return self.tokens.get(value, value)
        if kind == "layer":
            return _scaled(value, depth, few)
        if kind == "text_width":
            return self.text_width
        if kind == "width":
            return self.widths.get(value, min(value, max(16, WIDTHS[0])))
        if kind == "kv_heads":  # fewer than heads where they were
            return min(value, HEADS if value == heads else HEADS // 2)
        if name == "head_dim" and found(config, "hidden_size") == value * heads:
            return self.widths[found(config, "hidden_size")] // HEADS
        if kind == "picture" and any(found(config, n) is not None for n in STAGES):
            return min(value, STAGED_PICTURE)
        return min(value, few if kind == "layers" else SMALL.get(kind, value))

    def sequence(self, name: str, value: Any, depth: int, few: int) -> Any:
        kind, of = kind_of(name), type(value)
        if kind == "indices":
            return of(sorted({_scaled(v, depth, few) for v in value})) if value and _ints(value) else value
        nested = bool(value) and isinstance(value[0], (list, tuple))
        if depth and len(value) == depth and not nested and name not in ("depths", "hidden_sizes", "sr_ratios"):
            return of(_per_layer(list(value), few))
        if kind == "layer":
            return of(_scaled(v, depth, few) for v in value)
        if kind == "token":
            return of(self.tokens.get(v, v) for v in value)
        if kind in ("patch", "picture") and all(isinstance(v, int) for v in value):
            return of(min(v, PATCH if kind == "patch" else PICTURE) for v in value)
        if name == "depths":
            return of(1 for _ in value)
        return value


def merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields with changes in them; dictionaries within are merged, too."""
    out = dict(fields)
    for name, value in changes.items():
        out[name] = merged(out[name], value) if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out


def found(config: PreTrainedConfig, name: str) -> Any:
    """A field of a configuration; None if it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _ints(value: Any) -> list[int]:
    found = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in found if isinstance(v, int) and not isinstance(v, bool)]


def _depth(config: PreTrainedConfig) -> int:
    """How many layers a configuration asks for."""
    for name in ("num_hidden_layers", "depth", "num_layers", "n_layer", "layers", "n_layers", "encoder_layers"):
        if isinstance(value := found(config, name), int) and not isinstance(value, bool):
            return value
    inner = [_depth(c) for c in vars(config).values() if isinstance(c, PreTrainedConfig)]
    return max(inner, default=0)


def _few(config: PreTrainedConfig) -> int:
    """How many layers stay: one more where layers are of several kinds."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    depth = _depth(config)
    return min(depth, max(LAYERS, len(set(kinds)) + 1 if len(set(kinds)) > 1 else LAYERS)) if depth else LAYERS


def _scaled(index: int, depth: int, few: int) -> int:
    """The number of a layer among fewer; negative ones count from the end."""
    if index < 0 or not depth:
        return max(index, -few)
    return min(few - (index < depth), round(index * few / depth))


def _per_layer(values: list, few: int) -> list:
    """One entry a layer, every kind of entry among them."""
    out = values[:few]
    try:
        missing = [v for v in dict.fromkeys(values) if v not in out]
    except TypeError:
        return out
    for i, value in enumerate(reversed(missing[: few - 1])):
        out[few - 1 - i] = value
    return out


def tiny_config(family: str) -> PreTrainedConfig:
    """The small configuration of a family of transformers (`model_type`).

    Raises:
        Exception: whatever the family's configuration class raises, if no exception of ours helps it.
    """
    kind = CONFIG_MAPPING[family]
    default = kind(**DEFAULTS.get(family, {}))
    fields = Shrinker(default).shrink(default)
    return kind.from_dict(fields)


def build(name: str, config: PreTrainedConfig, seed: int = 0) -> Any:
    """A model of a class of transformers, with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    kind: Callable = getattr(transformers, name)
    model = kind(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # biases and small initial weights would make ties
        if p.is_floating_point():
            p.data = p.data + torch.randn(p.shape, generator=generator) * 0.05
    return model
