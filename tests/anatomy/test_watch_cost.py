"""What watching costs, in multiply-adds; and that a product taken from before is the one that would be made."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.anatomy import Anatomy
from trimtab.anatomy.seen import memo, probe
from trimtab.anatomy.seen.memo import Memo
from trimtab.anatomy.seen.watch import watch

SIZE = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 12}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_key_value_heads=1, vocab_size=60)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZE, vocab_size=60)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZE, image_size=16, patch_size=4)),
}


def products(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def example(name: str, rows: int, tokens: int) -> dict:
    """Each row is padded otherwise."""
    draw = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}
    words = torch.randint(5, 60, (rows, tokens), generator=draw)
    return {"input_ids": words, "attention_mask": (torch.arange(tokens) < tokens - torch.arange(rows)[:, None]).long()}


@pytest.mark.parametrize(("name", "rows", "tokens"), [
    ("llama", 2, 8), ("llama", 2, 32), ("llama", 4, 32), ("bert", 2, 8), ("bert", 4, 32), ("vit", 2, 17),
])  # fmt: skip
def test_watching_costs_at_most_three_passes(name, rows, tokens):
    model, batch = MODELS[name]().eval(), example(name, rows, tokens)
    with torch.no_grad():
        one = products(lambda: model(**batch))
    found: list[Anatomy] = []
    whole = products(lambda: found.append(watch(model, batch)))
    assert not found[0].towers[0].unknown and found[0].towers[0].blocks[0].sublayers
    assert one < whole <= 3 * one, f"{whole / one:.2f} passes"


def test_the_same_is_seen_without_a_memory(monkeypatch):
    """Of a block that is computed anew each time, and whose tokens are followed to its end."""
    torch.manual_seed(0)
    model, batch = MODELS["llama"]().eval(), example("llama", 3, 9)
    few: list[Anatomy] = []
    short = products(lambda: few.append(watch(model, batch)))
    monkeypatch.setattr(memo, "_PRODUCTS", set())
    monkeypatch.setattr(probe, "until", lambda *_: None)
    full: list[Anatomy] = []
    long = products(lambda: full.append(watch(model, batch)))
    assert few == full and [t.unknown for t in few[0].towers] == [t.unknown for t in full[0].towers]
    assert short < long


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), nn.Buffer(torch.ones(8, 8))

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return x @ x.mT @ (x @ self.scale)


def test_a_memory_gives_what_would_be_computed():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)
    memory = Memo(block)

    def run(given: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, memory:
            out = block(given)
        with torch.no_grad():
            torch.testing.assert_close(out, block(given))
        return out, counter.get_total_flops()

    first, all_of_it = run(x)
    first.zero_()  # what was given out is no part of the memory
    assert run(x)[1] == 0
    other = x.clone()
    other[1, 3] += 1
    assert 0 < run(other)[1] < all_of_it
    assert run(x.flip(1))[1] > run(other)[1]
    run(x[:1])  # of other shapes
    run(x.double().float() + 1)
    with torch.no_grad():
        block.up.weight.mul_(2)  # another weight, at the same place
    assert run(x)[1] > 0
    block.scale = torch.zeros(8, 8)
    run(x)
    block.down = nn.Linear(16, 8)
    run(x)


def test_a_memory_that_is_full_computes(monkeypatch):
    monkeypatch.setattr(memo, "LIMIT", 0)
    block, x = Block(), torch.randn(2, 5, 8)
    memory = Memo(block)
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, memory:
            block(x)
        assert counter.get_total_flops() > 0


def test_what_is_cached_in_inference_mode_or_half_precision_is_right():
    torch.manual_seed(0)
    block, x = Block().to(torch.bfloat16), torch.randn(2, 5, 8, dtype=torch.bfloat16)
    memory = Memo(block)
    with torch.inference_mode():
        for _ in range(2):
            with memory:
                out = block(x)
            assert torch.equal(out, block(x))
