"""Which linear layers of an attention give its queries and its values.

    attention
      q_proj, k_proj, v_proj, o_proj    layers that stand side by side in one module -> q_proj, v_proj
      qkv, proj                         one layer for all three                       -> qkv

A layer's own name says little (`v` may be a gate, `key` a lookup), so that the table below knows whole attentions: the
layers that must stand side by side in one module, and which of them give queries and values. What is not in it is not
guessed at. Layers of one module that share an input and are fused count once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from trimtab.anatomy.structure import module_at, plain_modules
from trimtab.methods.tune.fused import is_fused


class Attention(NamedTuple):
    """The layers by which an attention is known, and those of them that give queries and values."""

    layers: frozenset[str]
    roles: tuple[str, ...]


def _apart(*names: str) -> list[Attention]:
    """Attentions whose layers are called by a pattern with q, k and v in it: "{}_proj"."""
    made = [[name.format(role) for role in "qkv"] for name in names]
    return [Attention(frozenset(layers), (layers[0], layers[2])) for layers in made]


def _named(*names: str) -> list[Attention]:
    made = [[name.format(role) for role in ("query", "key", "value")] for name in names]
    return [Attention(frozenset(layers), (layers[0], layers[2])) for layers in made]


# The first that fits counts; each layer of a module has at most one role.
ATTENTIONS: tuple[Attention, ...] = (
    *_apart("{}_proj", "{}", "{}_lin", "linear_{}", "{}_linear", "to_{}", "{}_head", "W{}", "w{}", "project_{}"),
    *_named("{}", "{}_proj", "projection_{}", "to_{}"),
    # query, key and value in one
    *(Attention(frozenset({n}), (n,)) for n in ("qkv", "qkv_proj", "qkv_linear", "Wqkv", "query_key_value")),
    Attention(frozenset({"att_proj", "out_proj"}), ("att_proj",)),  # Bark
    Attention(frozenset({"q_attn", "c_attn", "c_proj"}), ("q_attn", "c_attn")),  # GPT-2's cross-attention: key, value
    Attention(frozenset({"c_attn", "c_proj"}), ("c_attn",)),  # GPT-2
    # key and value in one
    *(Attention(frozenset({q, kv}), (q, kv)) for q, kv in (("q", "kv"), ("to_q", "to_kv"), ("q_proj", "kv_proj"))),
    # keys and values from a compressed stream (DeepSeek)
    *(Attention(frozenset({q, "kv_b_proj"}), (q, "kv_b_proj")) for q in ("q_proj", "q_b_proj")),
    Attention(frozenset({"q_proj", "k_proj", "o_proj"}), ("q_proj", "k_proj")),  # Gemma 4's keys are its values
    Attention(frozenset({"query_key", "value"}), ("query_key", "value")),  # Reformer
    Attention(frozenset({"sampling_offsets", "value_proj"}), ("value_proj",)),  # deformable: places, not queries
    Attention(
        frozenset({"vision_proj", "text_proj", "values_vision_proj", "values_text_proj"}),
        ("vision_proj", "text_proj", "values_vision_proj", "values_text_proj"),
    ),  # Grounding DINO's fusion, which goes both ways
)


def queries_and_values(linears: Mapping[str, nn.Module], wrapped: Mapping[str, str] | None = None) -> list[str]:
    """The paths of those linear layers that give queries and values of an attention.

    Args:
        linears: linear layers by their plain paths.
        wrapped: path of a layer that stands alone in a module (one that clips what goes in, say) -> path of that
            module, whose name counts where the layer's own tells nothing.

    Returns:
        In the order given; none for layers that stand in no attention of the table.
    """
    found = _in_table({path: path for path in linears})
    outer = {path: name for path, name in (wrapped or {}).items() if path in linears and path not in found}
    found |= _in_table(outer)
    return [path for path in linears if path in found]


def _in_table(names: Mapping[str, str]) -> set[str]:
    """Of layers, each by the path that counts for it, those that give queries and values."""
    beside: dict[str, dict[str, str]] = {}
    for path, name in names.items():
        owner, _, last = name.rpartition(".")
        beside.setdefault(owner, {})[last] = path
    found = set()
    for layers in beside.values():
        if known := next((a for a in ATTENTIONS if a.layers <= layers.keys()), None):
            found |= {layers[role] for role in known.roles}
    return found


def wrappers(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a linear layer -> path of the module around it, of those that are all that the module has of weights."""
    found = {}
    for path, layer in linears.items():
        owner = path.rpartition(".")[0]
        if owner and {id(p) for p in module_at(model, owner).parameters()} == {id(p) for p in layer.parameters()}:
            found[path] = owner
    return found


def silent_attentions(model: nn.Module, within: str) -> list[str]:
    """Paths of torch's attentions at or below a path without a fused weight: they call no layer of their several."""
    return [
        path
        for path, m in plain_modules(model)
        if isinstance(m, nn.MultiheadAttention)
        and not is_fused(m)
        and f"{path}.".startswith(f"{within}." if within else "")
    ]
