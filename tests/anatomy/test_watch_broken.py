"""Models that nobody described and that are made to mislead: what is seen of them is held against what methods do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import trimtab
from trimtab.anatomy import Anatomy, AnatomyError, read
from trimtab.anatomy.parts import from_plain, to_plain

D = 16
IDS = torch.tensor([[5, 6, 7, 8, 9, 4, 3, 2], [9, 8, 7, 3, 6, 1, 1, 1]])  # 1 is padding
LEFT = torch.tensor([[5, 6, 7, 8, 9, 4, 3, 2], [1, 1, 1, 9, 8, 7, 3, 6]])
PADDED = IDS == 1
LATER = torch.ones(8, 8, dtype=torch.bool).triu(1)


def added(hidden: Tensor) -> Tensor:
    """To scores: what is True is not seen."""
    return torch.zeros(hidden.shape).masked_fill(hidden, -1e9)


class Block(nn.Module):
    """Attention with whatever is added to its scores, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        scores = (self.query(y) @ self.key(y).transpose(-1, -2))[:, None] / math.sqrt(D)  # of one head, (B, 1, L, L)
        scores = scores if bias is None else scores + bias
        x = x + self.out(scores.softmax(-1).squeeze(1) @ self.value(y))
        return x + self.down(self.up(self.norm2(x)).relu())


class Turned(Block):
    """Its stream is (L, B, D)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x.transpose(0, 1), bias).transpose(0, 1)


class InDict(Block):
    """Its stream is in a dictionary."""

    def forward(self, given: dict) -> dict:  # type: ignore[override]
        return {**given, "x": super().forward(given["x"])}


class Base(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, D), nn.Parameter(torch.randn(8, D) * 0.1)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 12)

    def enter(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places[: ids.shape[1]]

    def run(self, x: Any, *given: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *given)
        return self.head(self.norm(x))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.enter(input_ids))


class OtherSense(Base):
    """True is padding."""

    def forward(self, input_ids: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(self.enter(input_ids), added(padding.bool())[:, None, None])


class Added(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(self.enter(input_ids), attention_mask[:, None, None])


class Lengths(Base):
    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(self.enter(input_ids), added(torch.arange(8) >= lengths[:, None])[:, None, None])


class FromIds(Base):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.enter(input_ids), added(input_ids == 1)[:, None, None])


class Causal(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(self.enter(input_ids), added(LATER) + added(attention_mask == 0)[:, None, None])


class Fixed(Base):
    """What is seen stands in a buffer, (L, L)."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.register_buffer("hidden", added(hidden))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.enter(input_ids), self.hidden)


class Swapped(Base):
    """(L, B, D), with 4 rows of 8 tokens, or 8 of 8, as if 8 were the samples."""

    def __init__(self) -> None:
        super().__init__(Turned)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.enter(input_ids).transpose(0, 1)).transpose(0, 1)


SIDES = ("unipt", "lst", "side-tuning", "sherl")
OWN = {"lst": {"initialise": "random"}}


def tuned(model: nn.Module, batch: dict, method: str) -> nn.Module:
    """The model with a method of which nothing is 0."""
    fit = trimtab.adapt(model, example=batch)
    fit.tune(method, **OWN.get(method, {}))
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.eval()


def differ(model: nn.Module, batch: dict, where: Tensor) -> Tensor:
    """How much each token's result moves if other words stand at some places, (B, L)."""
    other = {**batch, "input_ids": torch.where(where, (batch["input_ids"] + 5) % 12, batch["input_ids"])}
    with torch.no_grad():
        return (model(**batch) - model(**other)).abs().amax(-1)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SIDES, "deep-prompt", "adapter"])
@pytest.mark.parametrize("shown", [PADDED, torch.zeros_like(PADDED)], ids=["padded", "not padded"])
def test_a_mask_of_the_other_sense(method, shown):
    model = tuned(OtherSense(), {"input_ids": IDS, "padding": shown}, method)
    moved = differ(model, {"input_ids": IDS, "padding": PADDED}, PADDED)
    assert float(moved[~PADDED].max()) < 1e-5


def test_the_sense_of_a_mask_is_kept_and_read():
    batch = {"input_ids": IDS, "padding": PADDED}
    found = Anatomy.of(model := OtherSense(), batch)
    assert found.towers[0].mask.padding and from_plain(Anatomy, to_plain(found)) == found
    seen: list[Tensor] = []
    read(model, found.towers[0].mask, seen.append)
    model(**batch)
    assert torch.equal(seen[0], ~PADDED)


def test_padding_of_torchs_own_encoder_and_of_a_decoder_that_reads_it():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(12, D), nn.Linear(D, 12)
            self.pair = nn.Transformer(D, 2, 2, 2, 32, dropout=0.0, batch_first=True)

        def forward(self, input_ids, decoder_input_ids, padding):
            later = nn.Transformer.generate_square_subsequent_mask(8)
            x, y = self.words(input_ids), self.words(decoder_input_ids)
            hidden = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
            return self.head(self.pair(x, y, tgt_mask=later, **hidden))

    batch = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1), "padding": PADDED}
    encoder, decoder = Anatomy.of(Pair(), batch).towers
    assert encoder.mask.padding and not encoder.causal and decoder.causal and decoder.mask is None
    assert float(differ(tuned(Pair(), batch, "unipt"), batch, PADDED).max()) < 1e-5


def test_longformers_blocks_are_given_a_mask_of_the_other_sense():
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = hf.LongformerModel(hf.LongformerConfig(**small, num_attention_heads=4, attention_window=[4, 4])).eval()
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    batch = {"input_ids": torch.arange(24).view(2, 12) + 5, "attention_mask": mask}
    (tower,) = Anatomy.of(model, batch).towers
    seen: list[Tensor] = []
    read(model, tower.mask, seen.append)
    model(**batch)
    assert torch.equal(seen[0].bool(), mask.bool())


HIDES = {
    "added to scores": (Added, {"attention_mask": added(PADDED)}, "no other token sees token 5 of row 1"),
    "added to scores, none padded": (
        Added,
        {"attention_mask": torch.zeros(2, 8)},
        r"attention_mask \(2, 8\).*may hide",
    ),
    "lengths": (Lengths, {"lengths": torch.tensor([8, 5])}, "no other token sees token 5 of row 1"),
    "lengths, none padded": (Lengths, {"lengths": torch.tensor([8, 8])}, r"lengths \(2,\).*may hide tokens"),
    "made of the words": (FromIds, {}, "no other token sees token 5 of row 1, and no input .* is a mask"),
}


@pytest.mark.parametrize("name", list(HIDES))
def test_padding_that_no_mask_tells_is_said(name):
    model, given, why = HIDES[name]
    found = Anatomy.of(model(), {"input_ids": IDS, **given})
    with pytest.raises(AnatomyError, match=f"unipt: `mask` of tower 'text' is unknown: {why}"):
        tuned(model(), {"input_ids": IDS, **given}, "unipt")
    assert found.towers[0].mask is None and not found.towers[0].knows("mask")


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SIDES, "adapter"])
def test_left_padding_leaves_a_causal_tower_causal(method):
    batch = {"input_ids": LEFT, "attention_mask": (LEFT != 1).long()}
    model = tuned(Causal(), batch, method)
    assert trimtab.adapt(Causal(), example=batch).anatomy.towers[0].causal
    after = torch.arange(8).expand(2, 8) > 5
    valid = (LEFT != 1) & ~after
    assert float(differ(model, batch, after)[valid].max()) < 1e-5
    assert float(differ(model, batch, LEFT == 1)[LEFT != 1].max()) < 1e-5


def seen_by(*groups: range) -> Tensor:
    """Tokens of a group see each other."""
    hidden = torch.ones(8, 8, dtype=torch.bool)
    for group in groups:
        hidden[group.start : group.stop, group.start : group.stop] = False
    return hidden


FAR = (torch.arange(8)[:, None] - torch.arange(8)).abs() > 1
APART = {
    "two texts in a row": (seen_by(range(4), range(4, 8)), "there are groups in a row"),
    "two causal texts in a row": (seen_by(range(4), range(4, 8)) | LATER, "no other token sees token 3 of row 0"),
    "words in order, then a picture": (LATER & seen_by(range(4, 8)), "token 0 does not see token 1, which sees it"),
    "backwards": (LATER.T, "token 0"),
}


@pytest.mark.parametrize("name", list(APART))
def test_tokens_that_are_kept_apart_otherwise_are_said(name):
    hidden, why = APART[name]
    for method in (*SIDES, "shallow-prompt"):
        with pytest.raises(AnatomyError, match=f"`(causal|mask)` of tower 'text' is unknown: .*{why}"):
            tuned(Fixed(hidden), {"input_ids": IDS}, method)
    tuned(Fixed(hidden), {"input_ids": IDS}, "adapter")


KNOWN = {
    "causal": (LATER, True),
    "a prefix that sees all of itself": (LATER & seen_by(range(4)), True),
    "a window": (FAR, False),
    "a causal window": (FAR | LATER, True),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_order_that_a_side_network_can_keep(name):
    hidden, causal = KNOWN[name]
    (tower,) = Anatomy.of(Fixed(hidden), {"input_ids": IDS}).towers
    assert tower.causal is causal and not tower.unknown and tower.mask is None
    model, after = tuned(Fixed(hidden), {"input_ids": IDS}, "unipt"), torch.arange(8).expand(2, 8) > 5
    moved = float(differ(model, {"input_ids": IDS}, after)[~after].max())
    assert moved < 1e-5 if causal else moved > 1e-3


def test_prompts_beside_a_square_of_what_each_token_sees_are_refused():
    model = tuned(Fixed(LATER), {"input_ids": IDS}, "deep-prompt")
    with pytest.raises(ValueError, match=r"'bias' \(8, 8\), which says of each token what it sees"):
        model(IDS)


# --- axes, numbers, states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 5, 8])
def test_a_first_axis_that_is_not_of_samples_is_said(rows):
    batch = {"input_ids": torch.arange(rows * 8).view(rows, 8) % 12}
    for method in SIDES:
        why = "`samples` of tower 'text' is unknown.*as many tokens" if rows == 8 else "does not begin with the samples"
        with pytest.raises(ValueError, match=why):
            tuned(Swapped(), batch, method)


def test_an_example_of_no_numbers_is_said():
    class Pictures(Base):
        def forward(self, inputs_embeds: Tensor) -> Tensor:  # type: ignore[override]
            return self.run(inputs_embeds)

    found = Anatomy.of(Pictures(), {"inputs_embeds": torch.full((2, 8, D), float("nan"))})
    assert "no number" in dict(found.towers[0].unknown)["causal"]


def test_buffers_are_left_as_they_were():
    class Counts(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("mean", torch.zeros(D))

        def forward(self, input_ids: Tensor) -> Tensor:
            self.calls += 1  # in place
            self.mean = self.mean + 1  # another tensor
            return super().forward(input_ids)

    model = Counts()
    mean = model.mean
    Anatomy.of(model, {"input_ids": IDS})
    assert float(model.calls) == 0 and model.mean is mean and not bool(mean.any())


def test_a_stream_inside_a_dictionary_is_said_and_pruned():
    class Held(Base):
        def __init__(self) -> None:
            super().__init__(InDict)

        def forward(self, input_ids: Tensor) -> Tensor:
            given = {"x": self.enter(input_ids)}
            for layer in self.layers:
                given = layer(given)
            return self.head(given["x"])

    model, batch = Held(), {"input_ids": IDS}
    fit = trimtab.adapt(model, example=batch)
    assert [b.knows("blocks") for b in fit.anatomy.blocks()] == [False] * 3
    fit.prune("multiflow", 0.5, batches=[batch])
    assert abs(fit.sparsity - 0.5) < 0.01
    with pytest.raises(AnatomyError, match=r"`blocks` of block 'layers\.0' is unknown: its stream is"):
        trimtab.adapt(Held(), example=batch).tune("unipt")


@pytest.mark.parametrize("nested", [{"inputs": {"ids": IDS}}, {"inputs": [IDS]}], ids=["dict", "list"])
def test_tensors_inside_of_inputs(nested):
    class Nested(Base):
        def forward(self, inputs: Any) -> Tensor:  # type: ignore[override]
            return super().forward(inputs["ids"] if isinstance(inputs, dict) else inputs[0])

    found = Anatomy.of(Nested(), nested)
    assert [len(t.blocks) for t in found.towers] == [3] and not found.towers[0].causal


def test_in_inference_mode():
    model = Base()
    with torch.inference_mode():
        found = Anatomy.of(model, {"input_ids": IDS.clone()})
    assert not found.unknown() and found == Anatomy.of(model, {"input_ids": IDS})
