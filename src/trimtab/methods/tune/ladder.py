"""LST, Ladder Side-Tuning (Sung et al., NeurIPS 2022): a narrow transformer beside the frozen tower, a rung a block.

    h_0 --block--> h_1 --block--> ... h_N            frozen, no graph kept
     |              |                  |
    Down_0         Down_1            Down_N          Linear(D, d)
     |              |                  |
     s --SideBlock--+--SideBlock ...   |  s <- SideBlock_i(g_i s + (1 - g_i) Down_i(h_i)),  g_i = sigmoid(a_i / 0.1)
                                       LN - Up       -> what the tower hands on

Structural initialisation: each side block starts as its block with the least important channels cut out. Importance is
the L1 norm of a channel's weights (the published code also offers Fisher information). Side blocks are pre-norm
whatever the tower is, and the maps down start as the choice of the kept channels: both are ours.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Tower
from trimtab.anatomy.structure import plain_modules
from trimtab.methods.base import METHODS
from trimtab.methods.tune.beside import Beside, Stand, token_width
from trimtab.methods.tune.blocks import SideBlock, visible
from trimtab.methods.tune.listener import Seen
from trimtab.settings import within


@dataclass(frozen=True)
class LSTSettings:
    """Settings of LST."""

    reduction: int = 4
    """Width of the side network = width of the tower / reduction (published: 4 to 8)."""
    initialise: Literal["auto", "pruned", "random"] = "auto"
    """`pruned`: from the tower's own blocks, cut to the side's width (published); `random`: torch's defaults; `auto`:
    pruned, and random with a warning beside a tower whose layers cannot be cut (fused projections, grouped heads)."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), reduction="[1, inf)")


class Ladder(nn.Module):
    """N side blocks on N + 1 hidden maps (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, blocks: int, reduction: int, causal: bool, hidden: int | None = None,
                 temperature: float = 0.1):  # fmt: skip
        super().__init__()
        d = width // reduction
        self.causal, self.temperature = causal, temperature
        self.down: Any = nn.ModuleList(nn.Linear(width, d) for _ in range(blocks + 1))
        self.blocks: Any = nn.ModuleList(SideBlock(d, hidden) for _ in range(blocks))
        self.gates = nn.Parameter(torch.zeros(blocks))
        self.norm, self.up = nn.LayerNorm(d), nn.Linear(d, width)

    def forward(self, seen: Seen) -> Tensor:
        keys = visible(seen.maps[0], seen.mask, self.causal)
        state, *rungs = (down(h.to(down.weight.dtype)) for down, h in zip(self.down, seen.maps, strict=True))
        for block, rung, gate in zip(self.blocks, rungs, (self.gates / self.temperature).sigmoid(), strict=True):
            state = block(gate * state + (1 - gate) * rung, keys)
        return self.up(self.norm(state))


@METHODS.register("lst")
class LST(Beside):
    """A narrow transformer that climbs beside the frozen tower."""

    Settings = LSTSettings

    def stand(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> Stand:
        return Stand(self._ladder(model, tower), range(len(tower.blocks) + 1), tower.output)

    def _ladder(self, model: nn.Module, tower: Tower) -> Ladder:
        s = self.settings
        width, count = token_width(self.name, tower), len(tower.blocks)
        if s.initialise != "random":
            try:
                hidden = linears(model, tower.blocks[0])["fc1"].out_features // s.reduction
                ladder = Ladder(width, count, s.reduction, tower.causal, hidden)
                start_from_blocks(ladder, model, tower)
                return ladder
            except ValueError as error:
                if s.initialise == "pruned":
                    raise
                why = str(error).removeprefix("lst: ").removesuffix(": set initialise: random")
                warnings.warn(f"lst: tower {tower.name!r} gets a random start and no pruned one: {why}", stacklevel=2)
        return Ladder(width, count, s.reduction, tower.causal)


# --- structural initialisation ----------------------------------------------------------------------------------------

# Ends of the paths of a block's linear layers, by what they do.
_ROLES = {
    "query": r"(^|\.)(query|q_proj|q)$", "key": r"(^|\.)(key|k_proj|k)$", "value": r"(^|\.)(value|v_proj|v)$",
    "out": r"(attention\.output\.dense|out_proj|o_proj|\.o|attn\.proj)$",
    "fc1": r"(^|\.)(fc1|intermediate\.dense|wi|linear1|up_proj)$",
    "fc2": r"(^|\.)(fc2|(?<!attention\.)output\.dense|wo|linear2|down_proj)$",
}  # fmt: skip


def linears(model: nn.Module, block: Block) -> dict[str, nn.Linear]:
    """A block's linear layers by role; ValueError that names the block if one is not found once."""
    found: dict[str, nn.Linear] = {}
    # A ladder's block attends to itself alone: it has no place for cross-attention.
    inside = plain_modules(model.get_submodule(block.path))
    names = {n: m for n, m in inside if isinstance(m, nn.Linear) and not re.search("cross|EncDec|encoder_attn", n)}
    for role, pattern in _ROLES.items():
        matching = [m for n, m in names.items() if re.search(pattern, n)]
        if len(matching) != 1:
            raise ValueError(
                f"lst: block '{block.path}' has {len(matching)} linear layers that could be its {role}, expected one "
                f"(it has {', '.join(names) or 'none'}): set initialise: random"
            )
        found[role] = matching[0]
    return found


@torch.no_grad()
def start_from_blocks(ladder: Ladder, model: nn.Module, tower: Tower) -> None:
    """Fill the side blocks with the tower's weights of the most important channels.

    The channels of the stream are the same in all blocks, chosen by all weights that read or write them; those inside
    attention and the feed-forward part are chosen block by block, queries with keys and values with the output.
    """
    parts = [linears(model, block) for block in tower.blocks]
    d = ladder.up.in_features
    stream: Any = sum(
        p[r].weight.abs().sum(dim=0 if r in ("query", "key", "value", "fc1") else 1) for p in parts for r in _ROLES
    )
    channels = _largest(stream, d)
    for side, own in zip(ladder.blocks, parts, strict=True):
        weight = {role: linear.weight.float() for role, linear in own.items()}
        if len({len(weight[role]) for role in ("query", "key", "value")}) > 1:
            raise ValueError(
                "lst: the side blocks have a key and a value for each query, but tower "
                f"{tower.name!r} shares them between queries (grouped heads): set initialise: random"
            )
        matched = _largest(weight["query"].abs().sum(dim=1) + weight["key"].abs().sum(dim=1), d)
        carried = _largest(weight["value"].abs().sum(dim=1) + weight["out"].abs().sum(dim=0), d)
        hidden = _largest(weight["fc1"].abs().sum(dim=1) + weight["fc2"].abs().sum(dim=0), side.fc1.out_features)
        rows = {"query": matched, "key": matched, "value": carried, "out": channels, "fc1": hidden, "fc2": channels}
        columns = {"out": carried, "fc2": hidden}
        for role, linear in own.items():
            target = getattr(side, role)
            target.weight.copy_(weight[role][rows[role]][:, columns.get(role, channels)])
            target.bias.copy_(linear.bias[rows[role]]) if linear.bias is not None else target.bias.zero_()
    for down in ladder.down:
        down.weight.copy_(torch.eye(down.in_features, device=down.weight.device)[channels.to(down.weight.device)])
        down.bias.zero_()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the largest scores, in ascending order."""
    if len(scores) < count:
        raise ValueError(f"lst: a layer has {len(scores)} channels, the side block needs {count}: raise `reduction`")
    return scores.topk(count).indices.sort().values
