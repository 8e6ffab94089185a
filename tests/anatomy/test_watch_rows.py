"""Watching on few rows: it tells what all rows tell, and is not done where rows are not alike or see each other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.anatomy.test_watch_broken import LATER, Base, Block, Causal, Fixed, FromIds, Lengths, OtherSense, seen_by
from trimtab.anatomy import Anatomy
from trimtab.anatomy.seen import rows as looks

IDS = torch.tensor([[5, 6, 7, 8, 9, 4, 3, 2], [9, 8, 7, 3, 6, 4, 5, 2], [2, 8, 7, 3, 9, 4, 5, 6],
                    [9, 8, 7, 3, 6, 1, 1, 1], [4, 6, 5, 8, 9, 2, 3, 7], [4, 3, 5, 8, 9, 2, 6, 7]])  # fmt: skip
PADDED = IDS == 1  # of the fourth row, which is neither the first nor the last


class Zeroed(Base):
    """Tokens that hold nothing are not seen."""

    class Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.zeros(x.shape[:2]).masked_fill((x == 0).all(-1), -1e9)
            return super().forward(x, hidden[:, None, None]) * (hidden == 0)[..., None]

    def __init__(self) -> None:
        super().__init__(self.Block)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.enter(input_ids) * (input_ids != 1)[..., None])


ALIKE: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "a mask": (Causal, {"attention_mask": (~PADDED).long()}),
    "a mask of the other sense": (OtherSense, {"padding": PADDED}),
    "lengths": (Lengths, {"lengths": torch.tensor([8, 8, 8, 5, 8, 8])}),
    "the words themselves": (FromIds, {}),
    "nothing in the stream": (Zeroed, {}),
    "groups": (lambda: Fixed(seen_by(range(4), range(4, 8))), {}),
    "in order": (lambda: Fixed(LATER), {}),
}


def rows_run(model: nn.Module, of: nn.ModuleList, batch: dict) -> tuple[Anatomy, int]:
    """What is seen of a copy, and on how many rows its blocks ran for that."""
    places = [name for name, m in model.named_modules() if any(m is block for block in of)]
    model, count = copy.deepcopy(model), 0

    def add(module: nn.Module, args: tuple, out: object) -> None:
        nonlocal count
        count += len(args[0])

    for name in places:
        model.get_submodule(name).register_forward_hook(add)
    return Anatomy.of(model, batch), count


@pytest.mark.parametrize("name", list(ALIKE))
def test_few_rows_tell_what_all_rows_tell(name, monkeypatch):
    build, given = ALIKE[name]
    torch.manual_seed(0)
    model, batch = build(), {"input_ids": IDS, **given}
    found, few = rows_run(model, model.layers, batch)
    monkeypatch.setattr(looks.Rows, "_few", lambda *_: None)
    monkeypatch.setattr(looks, "_two", lambda *_: [])
    whole, every = rows_run(model, model.layers, batch)
    assert found == whole and found.towers[0].unknown == whole.towers[0].unknown
    assert few < 0.7 * every, f"{few} of {every} rows"


class Across(nn.Module):
    """A block whose rows see each other in some way."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.norm, self.up, self.down = way, nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.way(x)
        return x + self.down(self.up(self.norm(x)).relu())


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "their mean": lambda x: x.mean(0, keepdim=True),
    "those before": lambda x: x.cumsum(0) - x,
    "the next": lambda x: x.roll(1, 0),
    "in pairs": lambda x: x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1),
    "the first alone": lambda x: x[:1] * torch.ones(len(x))[:, None, None],
}


@pytest.mark.parametrize("way", list(WAYS))
def test_rows_that_see_each_other_are_said(way):
    torch.manual_seed(0)
    found = Anatomy.of(Base(lambda: Across(WAYS[way])), {"input_ids": IDS})
    assert "moves when one of another sample is changed" in dict(found.towers[0].unknown).get("samples", "")
