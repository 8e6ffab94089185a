"""What a model is called with, for watching: what kind each input is, and the same batch with one place hidden."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trimtab.anatomy.calls import signature
from trimtab.anatomy.parts import Modality
from trimtab.anatomy.seen.record import Example, is_binary, rows_of
from trimtab.anatomy.structure import AnatomyError
from trimtab.randomness import drawn_aside

# transformers' names of arguments, which its processors and models agree on: what they bring.
_KINDS: dict[str, Modality] = {
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "pixel_values_images", "flattened_patches", "visual_feats",
                     "visual_embeds", "images", "high_res_pixel_values", "image_pixel_values", "image_features",
                     "conditional_pixel_values", "query_pixel_values"), "vision"),
    **dict.fromkeys(("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds"), "text"),
    **dict.fromkeys(("input_features", "input_values", "audio_input_features", "audio_values"), "audio"),
}  # fmt: skip
# Those that say something about the others, and bring nothing themselves.
_BESIDE = ("mask", "position", "type_ids", "grid", "size", "_ids_", "cache", "labels", "bool_", "return_", "use_")


def kind_of(key: str, value: Any) -> Modality | None:
    """What an input brings: pictures, words or sound; None if it only says something about another.

    By transformers' names; of an input of another name by its tensor: four axes or more are pictures, integers are
    words.
    """
    if key in _KINDS:
        return _KINDS[key]
    tensor = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(tensor, Tensor) or any(word in key for word in _BESIDE) or is_binary(tensor):
        return None
    if tensor.is_floating_point():
        return "vision" if tensor.ndim > 3 else None
    return "text" if tensor.ndim == 2 else None


def ready(model: nn.Module, example: Example) -> dict[str, Any]:
    """A batch for watching: no key-value cache, and a mask of ones where the model takes a mask that is not given.

    Raises:
        AnatomyError: if the example is no dictionary, or holds no tensor.
    """
    if not hasattr(example, "items") or not hasattr(example, "keys"):
        raise AnatomyError(
            f"example: expected a dict of the model's keyword arguments, such as {{'input_ids': ..., 'pixel_values': "
            f"...}}, found {type(example).__name__}"
        )
    found = dict(example.items())
    if not any(isinstance(v, Tensor) for v in tree_leaves(found)):
        raise AnatomyError(f"example: holds no tensor (keys: {', '.join(found) or 'none'})")
    if empty := [k for k, v in found.items() if isinstance(v, Tensor) and v.ndim and not len(v)]:
        raise AnatomyError(f"example: {empty[0]!r} {tuple(found[empty[0]].shape)} has no row; give two rows or more")
    found = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in found.items()}
    known = signature(model)
    for words in ("input_ids", "decoder_input_ids"):
        mask = words.replace("input_ids", "attention_mask")
        if isinstance(found.get(words), Tensor) and mask in known.named and found.get(mask) is None:
            found[mask] = torch.ones_like(found[words])
    if "use_cache" in known.named or (known.open and hasattr(model, "generate")):
        found.setdefault("use_cache", False)
    return found


Place = Literal["middle", "first", "last"]


@dataclass
class Hidden:
    """An example with one place of each row hidden by its masks.

    Attributes:
        hidden: the masks are 0 at that place.
        changed: the same with something else at the hidden place; words and pictures one after the other, since what
            is hidden in a picture may still stand among the words.
        masks: key of an input that may be a mask -> keys of what it hides.
    """

    hidden: dict[str, Any]
    changed: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example, where: Place = "middle", words: bool = False) -> Hidden:
        """With a place hidden; of words alone, if the model cannot do with a hole in a picture or in sound."""
        rows = rows_of(example)
        hidden = {k: v.clone() if isinstance(v, Tensor) else copy.copy(v) for k, v in example.items()}
        found = [k for k, v in example.items() if is_binary(v) and len(v) == rows and (bool(v.any()) or v.ndim == 2)]
        others: dict[bool, dict[str, Any]] = {}
        masks: dict[str, list[str]] = {}
        sure = [k for k in found if _is_of(k, example)] or found  # kinds of tokens are 0 and 1 too
        for key in [k for k in found if k in sure or "mask" in k]:
            if key not in sure or (words and (_words_of(example[key], example) is None or "pixel" in key)):
                masks[key] = []
                continue
            new = _hide(key, hidden, example, where)
            masks[key] = list(new)
            for name, value in new.items():
                others.setdefault(value.is_floating_point(), {})[name] = value
        return cls(hidden, [{**hidden, **new} for new in others.values()], masks)

    def alters(self, changed: dict[str, Any], mask: str) -> bool:
        """Whether what a mask hides is another in a relative."""
        return any(changed[key] is not self.hidden[key] for key in self.masks[mask])


def _is_of(key: str, example: Example) -> bool:
    """Whether a mask has the name that transformers gives the mask of words or of pixels."""
    words = key.replace("attention_mask", "input_ids")
    patches = any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim > 2 and v.shape[:2] == example[key].shape
                  for v in example.values())  # fmt: skip
    return (words != key and words in example) or patches or key in ("pixel_mask", "pixel_attention_mask")


def _words_of(mask: Tensor, example: Example) -> str | None:
    """Key of the words that a mask has a number for."""
    return next((k for k, v in example.items() if kind_of(k, v) == "text" and isinstance(v, Tensor)
                 and v.shape[:2] == mask.shape and not v.is_floating_point()), None)  # fmt: skip


def _hide(key: str, hidden: dict[str, Any], example: Example, where: Place) -> dict[str, Any]:
    """Set one place of a mask to 0 in every row, in place; returns inputs that differ there. Of a mask that is 0 all
    over, where 1 may be padding, one place is set to 1."""
    mask = hidden[key]
    empty = not bool(mask.any())
    if mask.ndim > 2:  # of pictures: the lower right quarter
        high, wide = mask.shape[-2] // 2, mask.shape[-1] // 2
        mask[..., high:, wide:] = 0
        changed = {}
        for other, value in example.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-2:] == mask.shape[-2:]:
                changed[other] = value.clone()
                changed[other][..., high:, wide:] = value[..., high:, wide:].flip(-1) + 0.5
        return changed
    words = _words_of(mask, example)
    spelt = None if words is None else example[words].flatten(2)[..., 0] if example[words].ndim > 2 else example[words]
    patches = [k for k, v in example.items() if isinstance(v, Tensor) and v.is_floating_point()
               and v.ndim > 2 and v.shape[:2] == mask.shape]  # fmt: skip
    changed = {k: example[k].clone() for k in (patches if words is None else [words])}
    seen = [list(range(mask.shape[1])) if empty else own.nonzero().flatten().tolist() for own in mask]
    for row, place in _chosen(seen, spelt, where).items():
        places = seen[row]
        mask[row, place] = int(empty)
        for name, new in changed.items():
            if name != words:  # another patch: what stands in one may also say where it is
                new[row, place] = example[name][row, places[0] if place != places[0] else places[-1]]
                continue
            if others := [p for p in places if (new[row, p] != new[row, place]).all()]:
                new[row, place] = example[name][row, _middle(others, spelt, row)]
            else:
                elsewhere = example[name][example[name] != new[row, place]]
                new[row, place] = elsewhere[0] if len(elsewhere) else new[row, place]
    return changed


def _chosen(seen: list[list[int]], words: Tensor | None, where: Place) -> dict[int, int]:
    """Of each row with three places or more the one to hide; the same in every second row where that can be, so that
    there are rows that are alike."""
    ends = {"middle": slice(1, -1), "first": slice(1), "last": slice(-1, None)}[where]
    rare = {row: _rare(places[ends], words, row) for row, places in enumerate(seen) if len(places) > 2}
    chosen: dict[int, int] = {}
    for start in (0, 1) if words is not None else ():
        rows = [row for row in rare if row % 2 == start]
        shared = sorted(set.intersection(*(set(rare[row]) for row in rows))) if rows else []
        chosen |= {row: shared[len(shared) // 2] for row in rows if shared}
    return {row: chosen.get(row, places[len(places) // 2]) for row, places in rare.items()}


def _middle(places: list[int], words: Tensor | None, row: int) -> int:
    rare = _rare(places, words, row)
    return rare[len(rare) // 2]


def _rare(places: list[int], words: Tensor | None, row: int) -> list[int]:
    """The places whose word is rarest: placeholders of pictures stand in crowds."""
    if words is None:
        return places
    counts = {p: int((words == words[row, p]).sum()) for p in places}
    return [p for p in places if counts[p] == min(counts.values())]


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, as it was afterwards; random numbers go on as if nothing had happened.

    What modules note of a pass as attributes (the last states, how often they ran) is as before, too.
    """
    noted = [(m, _copied(vars(m)), {k: _copied(v) for k, v in _own(m).items()}) for m in model.modules()]
    training = [m for m in model.modules() if m.training]
    kept = [(m, k, b, b.detach().clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    fast = torch.backends.mha.get_fastpath_enabled()  # torch's fused encoder layers go around the modules in them
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with drawn_aside(seed=0), torch.inference_mode(False):
            for module in training:
                module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for owner, name, buffer, before in kept:  # counters, memories
                owner._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)
        for module, values, copies in noted:
            with torch.no_grad():
                _put_back(module, values, copies)
        for module in training:
            module.training = True


_TORCHS = {*vars(nn.Module()), "training"}  # parameters, buffers, children, hooks


def _own(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _TORCHS}


def _copied(value: Any) -> Any:
    """What a pass may write into, copied; anything else as it is."""
    if isinstance(value, Tensor):
        return None if value.is_meta else value.detach().clone()
    return copy.copy(value) if type(value) in (list, dict, set) else value


def _put_back(module: nn.Module, values: dict[str, Any], copies: dict[str, Any]) -> None:
    """Give a module the attributes that it had, and those that can be written into what they held."""
    own = vars(module)
    for key in _own(module).keys() - values.keys():
        del own[key]
    for key, before in copies.items():
        value = own[key] = values[key]
        if isinstance(value, Tensor):
            if before is not None and not torch.equal(value, before):
                value.copy_(before)
        elif type(value) is list:
            value[:] = before
        elif type(value) in (dict, set):
            value.clear()
            value.update(before)


def made_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Inputs made from the configuration of a transformers model: words, pictures, or both side by side.

    None where the configuration does not tell all: of models that want placeholders of pictures among the words, flat
    patches, sound; of modules without a configuration, or without values (meta and fake tensors).
    """
    config = getattr(model, "config", None)
    first = next(model.parameters(), None)
    if config is None or not hasattr(config, "to_dict") or type(first) is not nn.Parameter or first.is_meta:
        return None
    known = signature(model)
    wanted = [k for k in known.named if k not in known.defaults]  # what it cannot do without
    if "input_ids" not in known.named and "pixel_values" not in known.named:
        return None
    if any(
        hasattr(config, k) for k in ("image_token_id", "image_token_index", "audio_config", "vision_start_token_id")
    ):
        return None
    draw = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {}
    if "input_ids" in known.named:
        text = config.get_text_config()
        named = (getattr(text, k, None) for k in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"))
        special = {i for ids in named for i in (ids if isinstance(ids, (list, tuple)) else [ids])}
        words = [i for i in range(min(int(getattr(text, "vocab_size", 0) or 0), 1000)) if i not in special]
        if len(words) < 20:
            return None
        made["input_ids"] = torch.tensor(words)[torch.randperm(len(words), generator=draw)[:20]].view(2, 10)
        made["attention_mask"] = torch.ones(2, 10, dtype=torch.long)
        made["attention_mask"][1, 8:] = 0
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = made["input_ids"][:, :8].flip(1).clone()
    if "pixel_values" in known.named:
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None) or 64, getattr(vision, "num_channels", 3)
        high, wide = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if not isinstance(high, int) or not isinstance(wide, int):
            return None if "pixel_values" in wanted or not made else made
        made["pixel_values"] = torch.randn(2, channels, high, wide, generator=draw).to(first.dtype)
    return {k: v.to(first.device) for k, v in made.items()}
