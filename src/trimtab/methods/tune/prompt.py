"""Prompt tuning of token towers, visual, text or fused (VPT: Jia et al., ECCV 2022; text: Lester et al., EMNLP 2021).

    shallow   p_0 x  -> block 1 -> y_0 y -> block 2 -> ...          P prompts before the tokens that enter the tower
    deep      p_0 x  -> block 1 -> (y_0 dropped) p_1 y -> block 2   fresh prompts before every block

The prompts stand before the tokens, where causal towers see them too, and are taken off after the last block, so that
what the tower hands on has its usual length and positions. Attention masks that a block is given are widened; prompts
are seen by every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Tap, Tower, parameter_names, rewrite
from trimtab.methods.base import METHODS, Method
from trimtab.methods.tune.beside import holds_tokens, token_width


@dataclass(frozen=True)
class PromptSettings:
    """Settings of prompts."""

    prompts: int = 8
    """How many prompts stand before the tokens."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"prompts must be at least 1, found {self.prompts}")


class _Prompts(Method):
    """Prompts as parameters `model.<method>.<tower>`, (blocks with prompts, P, D)."""

    lever = "tune"
    trains = "added"
    changes = "inside"
    keeps = "its prompts are set before the tokens by hooks, which a folder does not hold"
    Settings = PromptSettings
    deep: bool

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        device = next(model.parameters()).device
        made = nn.ParameterDict()
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            tower = anatomy.tower(name)
            width = token_width(self.name, tower)
            if tower.closed:
                raise ValueError(
                    f"{self.name}: no prompts fit before the tokens of tower {name!r}: {tower.closed}; name other "
                    "towers in `towers`"
                )
            blocks = len(tower.blocks) if self.deep else 1
            values = torch.empty(blocks, self.settings.prompts, width, device=device)
            nn.init.uniform_(values, -((6 / width) ** 0.5), (6 / width) ** 0.5)
            made[name] = nn.Parameter(values)  # not what `uniform_` returns: nothing, where weights are not drawn
            self._hook(model, tower, made[name])
        model.add_module(self.name.replace("-", "_"), made)
        return anatomy

    def _hook(self, model: nn.Module, tower: Tower, prompts: nn.Parameter) -> None:
        count = prompts.shape[1]
        for i, block in enumerate(tower.blocks):
            enter = _Enter(block, prompts, i, deep=self.deep)
            model.get_submodule(block.path).register_forward_pre_hook(enter, with_kwargs=True)
        rewrite(model, Tap(tower.blocks[-1].path), lambda out: out[:, count:])


class _Enter:
    """Changes what a block is called with: prompts before the stream, masks as wide as it."""

    def __init__(self, block: Block, prompts: nn.Parameter, index: int, deep: bool):
        self.block, self.prompts, self.index, self.deep = block, prompts, index, deep
        self.names: list[str] | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = self.block.stream in kwargs
        stream = kwargs[self.block.stream] if named else args[0]
        count = self.prompts.shape[1]
        if self.index == 0 and holds_tokens(kwargs):
            raise ValueError(
                f"block '{self.block.path}' was called with a key-value cache that holds tokens already: prompts would "
                "be set before each new token; generate with use_cache=False"
            )
        if self.index == 0 or self.deep:
            tokens = stream if self.index == 0 else stream[:, count:]
            new = self.prompts[self.index].to(stream.dtype).expand(len(stream), -1, -1)
            stream = torch.cat([new, tokens], dim=1)
        length = stream.shape[1] - count
        if self.names is None:
            self.names = parameter_names(module)
        names = [*self.names, *[""] * len(args)]
        args = tuple(a if i == 0 and not named else _widened(a, count, length, names[i]) for i, a in enumerate(args))
        kwargs = {k: v if k == self.block.stream else _widened(v, count, length, k) for k, v in kwargs.items()}
        if named:
            return args, {**kwargs, self.block.stream: stream}
        return (stream, *args[1:]), kwargs


def _widened(value: Any, count: int, length: int, name: str = "") -> Any:
    """What a block is given of each token, with `count` more in front.

    That is an attention mask of (B, L), (B, 1, 1, L) or (B, 1, L, L), or one of (B, 1, L, M) for another tower's M
    tokens (its name begins with `encoder`); or the cosines and sines of rotary positions, (..., L, d) each: prompts are
    not turned.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) for v in value):
        cos, sin = value
        if cos.shape != sin.shape or cos.shape[-2] != length:
            return value
        front = cos[..., :1, :].expand(*cos.shape[:-2], count, -1)
        return torch.cat([torch.ones_like(front), cos], dim=-2), torch.cat([torch.zeros_like(front), sin], dim=-2)
    if not isinstance(value, Tensor) or value.ndim not in (2, 4):
        return value
    if value.shape[-1] == length and not name.startswith("encoder"):
        # A key counts if it is True, or a 1 in a mask of (B, L), or nothing is added to its score in a wider one.
        seen = value.new_zeros if value.ndim == 4 and value.is_floating_point() else value.new_ones
        value = torch.cat([seen(*value.shape[:-1], count), value], dim=-1)
    if value.ndim == 4 and value.shape[-2] == length > 1:
        value = torch.cat([value[..., :1, :].expand(-1, -1, count, -1), value], dim=-2)  # they see what the first sees
    return value


@METHODS.register("shallow-prompt")
class ShallowPrompt(_Prompts):
    """Prompts before the tokens that enter the first block."""

    name = "shallow-prompt"
    deep = False


@METHODS.register("deep-prompt")
class DeepPrompt(_Prompts):
    """Prompts of its own before every block."""

    name = "deep-prompt"
    deep = True
