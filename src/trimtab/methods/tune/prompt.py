"""Prompt tuning of token towers, visual, text or fused (VPT: Jia et al., ECCV 2022; text: Lester et al., EMNLP 2021).

    shallow   p_0 x  -> block 1 -> y_0 y -> block 2 -> ...          P prompts before the tokens that enter the tower
    deep      p_0 x  -> block 1 -> (y_0 dropped) p_1 y -> block 2   fresh prompts before every block

The prompts stand before the tokens, where causal towers see them too, and are taken off after the last block, so that
what the tower hands on has its usual length and positions. Attention masks that a block is given are widened; prompts
are seen by every token. In a causal tower a prompt sees the prompts up to itself, with a mask and without one. Rotary
positions of prompts are that of a row's first valid token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trimtab.anatomy import Anatomy, AnatomyError, Block, Tap, Tower, arguments, parameter_names, pre_hook, rewrite
from trimtab.anatomy.calls import signature
from trimtab.methods.base import METHODS, Method
from trimtab.methods.tune.beside import keep_modules, token_width, without_cache
from trimtab.methods.tune.listener import check_blocks, holds_tokens
from trimtab.settings import within


@dataclass(frozen=True)
class PromptSettings:
    """Settings of prompts."""

    prompts: int = 8
    """How many prompts stand before the tokens."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), prompts="[1, inf)")


class _Prompts(Method):
    """Prompts as parameters `model.<method>.<tower>.values`, (blocks with prompts, P, D)."""

    lever = "tune"
    trains = "added"
    changes = "inside"
    keeps = "its prompts are set before the tokens by hooks, which a folder does not hold"
    Settings = PromptSettings
    deep: bool

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        device = next(model.parameters()).device
        names = self.settings.towers or [t.name for t in anatomy.towers]
        made = {name: self._prompts(anatomy.tower(name), device) for name in names}
        keep_modules(model, self.name, dict(made))
        for name, prompts in made.items():
            self._hook(model, anatomy.tower(name), prompts)
        without_cache(model, [anatomy.tower(name) for name in made])
        return anatomy

    def _prompts(self, tower: Tower, device: torch.device) -> Prompts:
        tower.need(self.name, "blocks", "layout", "samples", "mask", "causal", "gradient")
        width = token_width(self.name, tower)
        if tower.closed:
            raise ValueError(
                f"{self.name}: no prompts fit before the tokens of tower {tower.name!r}: {tower.closed}; name other "
                "towers in `towers`"
            )
        return Prompts(len(tower.blocks) if self.deep else 1, self.settings.prompts, width, device)

    def _hook(self, model: nn.Module, tower: Tower, prompts: Prompts) -> None:
        check_blocks(self.name, model, tower)
        for i, block in enumerate(tower.blocks):
            enter = _Enter(self.name, block, prompts, i, tower.causal)
            pre_hook(model, block.path, enter)
        rewrite(model, Tap(tower.blocks[-1].path), prompts.taken_off)
        ends = _Ends(self.name, tower, prompts)
        model.register_forward_pre_hook(ends.begin)
        model.register_forward_hook(ends.check)


class Prompts(nn.Module):
    """The prompts of a tower: `values`, (1, P, D), or (N, P, D) with fresh ones for each of N blocks."""

    def __init__(self, blocks: int, count: int, width: int, device: torch.device):
        super().__init__()
        self.values = nn.Parameter(torch.empty(blocks, count, width, device=device))
        nn.init.uniform_(self.values, -((6 / width) ** 0.5), (6 / width) ** 0.5)
        self.stand = False  # whether they stand before the tokens: from the first block until after the last

    @property
    def count(self) -> int:
        return self.values.shape[1]

    def taken_off(self, tokens: Tensor) -> Tensor:
        """(B, P + L, D) -> (B, L, D), after the last block."""
        if self.stand:  # compiled code, which sets nothing, has nothing to watch
            self.stand = False
        return self.without(tokens)

    def without(self, tokens: Tensor) -> Tensor:
        """(B, P + L, D) -> (B, L, D)."""
        return tokens[:, self.count :]


class _Ends:
    """Sees that a pass goes through the first and the last block, where prompts are set and taken off."""

    def __init__(self, method: str, tower: Tower, prompts: Prompts):
        self.method, self.tower, self.prompts = method, tower, prompts

    def begin(self, module: nn.Module, args: tuple) -> None:
        if self.prompts.stand:  # a pass before ended in an exception
            self.prompts.stand = False

    def check(self, module: nn.Module, args: tuple, out: Any) -> None:
        if self.prompts.stand and not torch.compiler.is_compiling():
            raise AnatomyError(
                f"{self.method}: block '{self.tower.blocks[-1].path}' did not run, after which the prompts of tower "
                f"{self.tower.name!r} are taken off: the model goes around it; use a method without prompts"
            )


_TORCHS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class _Enter:
    """Changes what a block is called with: prompts before the stream, masks as wide as it.

    An object and no closure, so that it is copied with the model and holds the copy's prompts.
    """

    def __init__(self, method: str, block: Block, prompts: Prompts, index: int, causal: bool):
        self.method, self.block, self.prompts, self.index, self.causal = method, block, prompts, index, causal

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.index == 0 and holds_tokens(args, kwargs):
            raise ValueError(
                f"block '{self.block.path}' was called with a key-value cache that holds tokens already: prompts would "
                "be set before each new token; generate with use_cache=False"
            )
        given = self.block.stream_of(module, args, kwargs)
        if isinstance(module, _TORCHS):
            self._check_torchs(module, args, kwargs)
        if given.shape[-1] != self.prompts.values[0].shape[-1]:
            raise ValueError(
                f"block '{self.block.path}' takes in {tuple(given.shape)}, expected the width {self.block.width}, as "
                "its tower is described: correct the `width` of its blocks in the anatomy"
            )
        stream, count = given, self.prompts.count
        self._note_place()
        if self.index < len(self.prompts.values):
            tokens = stream if self.index == 0 else self.prompts.without(stream)
            new = self.prompts.values[self.index].to(stream.dtype).expand(len(stream), -1, -1)
            stream = torch.cat([new, tokens], dim=1)
        length = stream.shape[1] - count
        names = [*parameter_names(module), *[""] * len(args)]
        first = first_valid([*zip(names, args, strict=False), *kwargs.items()], length)
        compiled = torch.compiler.is_compiling()
        if first is not None and not compiled and "position_bias" in signature(module).named:
            raise ValueError(
                f"{self.method}: block '{self.block.path}' counts distances between tokens, and a row is padded on the "
                "left, between its tokens and the prompts: pad it on the right"
            )
        args = tuple(self._widened(a, given, length, name, first) for a, name in zip(args, names, strict=False))
        kwargs = {k: self._widened(v, given, length, k, first) for k, v in kwargs.items()}
        return self.block.with_stream(module, args, kwargs, stream)

    def _note_place(self) -> None:
        """Note that prompts stand before the tokens, or see it: a block is computed again, out of order, in a backward
        pass with gradient checkpointing."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        if self.index == 0:
            self.prompts.stand = True
        elif not self.prompts.stand:
            raise AnatomyError(
                f"{self.method}: block '{self.block.path}' ran, and the first of its tower did not, before which "
                "prompts are set: the model goes around it; use a method without prompts"
            )

    def _check_torchs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raise a ValueError for what cannot be widened around one of torch's own layers."""
        where = f"{self.method}: block '{self.block.path}' ({type(module).__name__})"
        if not module.self_attn.batch_first:  # type: ignore[union-attr]
            raise ValueError(f"{where} takes tokens as (L, B, D), expected (B, L, D): make it with batch_first=True")
        known = arguments(module, args, kwargs)
        for name in ("src_mask", "tgt_mask", "is_causal", "tgt_is_causal"):
            if known.get(name) is not None and known[name] is not False:
                raise ValueError(
                    f"{where} is given `{name}`, which says what tokens see by their places, and prompts have none: "
                    "use a method without prompts"
                )

    def _widened(self, value: Any, stream: Tensor, length: int, name: str, first: Tensor | None) -> Any:
        if type(value).__name__ == "BlockMask":
            raise ValueError(
                f"{self.method}: block '{self.block.path}' is given its mask as flex attention's BlockMask, which "
                "cannot be widened for prompts: load the model with attn_implementation='sdpa'"
            )
        own = name.endswith("key_padding_mask") and not name.startswith("memory")
        if own and isinstance(value, Tensor) and value.shape[-1] == length:
            # torch's attention is told what is hidden, by True or by what is added to scores: prompts are not
            return torch.cat([value.new_zeros(*value.shape[:-1], self.prompts.count), value], dim=-1)
        shape = tuple(value.shape) if isinstance(value, Tensor) and value is not stream else ()
        if len(shape) == 3 and shape[-1] == length and shape[1] in (1, length) and value.shape != stream.shape:
            raise ValueError(
                f"{self.method}: block '{self.block.path}' is given a bias of each token's distance (ALiBi), "
                f"{name or 'unnamed'!r} {shape}, in which prompts have no place: tune the tower with lora, adapters or "
                "unipt"
            )
        if shape == (length, length) and length > 1 and (len(stream) != length or value.is_floating_point()):
            raise ValueError(
                f"{self.method}: block '{self.block.path}' is given {name or 'unnamed'!r} {shape}, which says of each "
                "token what it sees, and prompts have no place in it: give it as (B, 1, L, L), or tune the tower with "
                "lora, adapters or unipt"
            )
        return value if value is stream else widened(value, self.prompts.count, length, name, self.causal, first)


def first_valid(given: Sequence[tuple[str, Any]], length: int) -> Tensor | None:
    """Where the tokens of each row begin, (B,), by the masks among what a block is called with, by name; None if no row
    is padded on the left."""
    for name, value in given:
        if not isinstance(value, Tensor) or not _is_mask(value, length, name):
            continue
        seen = value > torch.finfo(value.dtype).min / 2 if value.is_floating_point() else value != 0
        first = (seen if value.ndim == 2 else seen.flatten(1, 2).any(dim=1)).int().argmax(dim=1)
        if torch.compiler.is_compiling():  # whether any is not 0 is not known there, nor needed
            return first
        if not isinstance(first, FakeTensor) and bool(first.any()):
            return first
    return None


def _is_mask(value: Tensor, length: int, name: str) -> bool:
    """Whether a value says which of a tower's own tokens are seen."""
    named = name.startswith("encoder") or name == "position_ids" or name.endswith("key_padding_mask")
    return value.ndim in (2, 4) and value.shape[-1] == length and not named


def _turned(value: Tensor, count: int, first: Tensor | None) -> Tensor:
    """What places tokens, (..., B or 1, L, d), with `count` more in front, placed like the first valid one."""
    if first is None:
        front = value[..., :1, :]
    else:
        value = value.expand(*value.shape[:-3], len(first), *value.shape[-2:])
        front = value.gather(-2, first.view(-1, 1, 1).expand(*value.shape[:-2], 1, value.shape[-1]))
    return torch.cat([front.expand(*value.shape[:-2], count, -1), value], dim=-2)


def widened(value: Any, count: int, length: int, name: str = "", causal: bool = False,
            first: Tensor | None = None) -> Any:  # fmt: skip
    """What a block is given of each token, with `count` more in front.

    That is an attention mask of (B, L), (B, 1, 1, L) or (B, 1, L, L), or one of (B, 1, L, M) for another tower's M
    tokens (its name begins with `encoder`); or the cosines and sines of rotary positions, (..., B, L, d) or (L, d)
    each, or `position_ids`, (B, L): prompts have the position of the first valid token, `first` (B,), so that how far
    they are from a row's tokens does not depend on its padding. Every token sees all prompts. A prompt sees what the
    first token sees, and with `causal` the prompts up to itself and no token, as where a causal tower is given no mask.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value):
        cos, sin = value
        if cos.shape != sin.shape or cos.shape[-2] != length:
            return value
        first = first if cos.ndim > 2 else None
        return _turned(cos, count, first), _turned(sin, count, first)
    if isinstance(value, Tensor) and name == "position_ids" and value.shape[1:] == (length,):
        return _turned(value[..., None], count, first)[..., 0]
    if not isinstance(value, Tensor) or value.ndim not in (2, 4):
        return value
    own = _is_mask(value, length, name)
    added = value.ndim == 4 and value.is_floating_point()  # to scores: 0 is seen; else True or 1 is
    if own:
        seen = value.new_zeros if added else value.new_ones
        value = torch.cat([seen(*value.shape[:-1], count), value], dim=-1)
    if value.ndim == 4 and value.shape[-2] == length and (length > 1 or (own and causal)):
        front = value[..., :1, :].expand(-1, -1, count, -1)
        if own and causal:
            later = torch.ones(count, value.shape[-1], dtype=torch.bool, device=value.device).triu(1)
            front = front.clone()  # of the first token's row nothing is left but the prompts, which it sees
            front[..., later] = torch.finfo(value.dtype).min if added else 0
        value = torch.cat([front, value], dim=-2)
    return value


@METHODS.register("shallow-prompt")
class ShallowPrompt(_Prompts):
    """Prompts before the tokens that enter the first block."""

    deep = False


@METHODS.register("deep-prompt")
class DeepPrompt(_Prompts):
    """Prompts of its own before every block."""

    deep = True
