"""Masks of some tokens beside others, and masks of pairs: seen where who sees whom shows them, else refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.anatomy.test_watch_broken import IDS, Block, D, added
from trimtab.anatomy import Anatomy, AnatomyError, Tap
from trimtab.anatomy.parts import from_plain, to_plain

WORDS = IDS.shape[1]
BATCH = {
    "input_ids": IDS,
    "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "attention_mask": (IDS != 1).long(),
}


class Beside(nn.Module):
    """Four tokens of a picture stand before, after or among the words, of which alone the mask tells.

    Args:
        place: of the picture's tokens.
        order: who sees whom among those that are not hidden: "all", "causal", "odd" (all but the first, who does not
            see the second) or "deaf" (the mask hides nothing).
        kind: of what the blocks are given: scores to be "added", or "bools", which may be "turned": True is not seen.
    """

    def __init__(self, place: str, order: str, kind: str = "added"):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.patches = nn.Embedding(10, D), nn.Conv2d(3, D, 4, 4)
        self.layers = nn.ModuleList(Seeing() for _ in range(2))
        self.head = nn.Linear(D, 3)
        self.place, self.order, self.kind = place, order, kind

    def row(self, words: Tensor, picture: Tensor) -> Tensor:
        first = {"before": 0, "after": WORDS, "among": 3}[self.place]
        return torch.cat([words[:, :first], picture, words[:, first:]], 1)

    def forward(self, input_ids, pixel_values, attention_mask):
        picture = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = self.row(self.words(input_ids), picture)
        seen = self.row(attention_mask.bool(), torch.ones(picture.shape[:2], dtype=torch.bool))
        if self.order == "deaf":
            seen = seen | True
        pairs = seen[:, None, None].expand(-1, 1, x.shape[1], -1).clone()
        if self.order == "causal":
            pairs &= torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.order == "odd":
            pairs[:, :, 0, 1] = False
        for layer in self.layers:
            layer.turned = self.kind == "turned"
            x = layer(x, added(~pairs) if self.kind == "added" else pairs != layer.turned)
        return {"logits": self.head(x), "loss": self.head(x)[:, :, 0].square().mean()}


class Seeing(Block):
    """Takes truth values as well; `turned`: True is not seen."""

    turned = False

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        truth = bias is not None and bias.dtype is torch.bool
        return super().forward(x, added(bias != (not self.turned)) if truth else bias)


TOLD = {
    "words after pictures": ("before", "causal", "added", Tap("", "input", "attention_mask", rest="before")),
    "words before pictures": ("after", "causal", "bools", Tap("", "input", "attention_mask", rest="after")),
    "pairs of scores": ("among", "all", "added", Tap("layers.0", "input", "bias", pairs=True)),
    "pairs of truth values": ("after", "all", "bools", Tap("layers.0", "input", "bias", pairs=True)),
}


def elsewhere(batch: dict) -> dict:
    """The same with other words in padding."""
    hidden = batch["attention_mask"] == 0
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 7)}


def logits(model: nn.Module, batch: dict) -> Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


@pytest.mark.parametrize("name", TOLD)
def test_a_mask_that_is_shorter_or_of_pairs_is_seen_and_used(name):
    place, order, kind, tap = TOLD[name]
    model = Beside(place, order, kind).eval()
    (tower,) = Anatomy.of(model, BATCH).towers
    assert tower.mask == tap and tower.knows("mask", "causal") and tower.causal is (order == "causal")
    assert from_plain(type(tower), to_plain(tower)) == tower
    found = []
    for batch in (BATCH, elsewhere(BATCH)):
        pruned = copy.deepcopy(model)
        fit = trimtab.adapt(pruned, example=BATCH)
        fit.prune("multiflow", sparsity=0.5, batches=[batch])
        found.append(dict(fit.masks))
    assert all(torch.equal(mask, found[1][path]) for path, mask in found[0].items())
    fit = trimtab.adapt(model, example=BATCH)
    fit.tune("unipt")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    valid = model.row(BATCH["attention_mask"].bool(), torch.ones(2, 4, dtype=torch.bool))
    one, other = (logits(model, b)[valid] for b in (BATCH, elsewhere(BATCH)))
    assert torch.allclose(one, other, atol=1e-5)


UNTOLD = {
    "among words, in order": ("among", "causal", "no argument around its blocks has one number a token"),
    "pairs of which one is another": ("among", "odd", "no argument around its blocks has one number a token"),
    "pairs the other way round": ("among", "all", "a mask of pairs, and who sees whom does not show what it hides"),
    "a mask that nobody heeds": ("before", "deaf", "but what stands there is still seen by others"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_a_mask_that_does_not_show_stays_unknown_and_is_refused(name):
    place, order, why = UNTOLD[name]
    model = Beside(place, order, "turned" if name.endswith("round") else "added").eval()
    (tower,) = Anatomy.of(model, BATCH).towers
    assert tower.mask is None and why in dict(tower.unknown)["mask"]
    with pytest.raises(ValueError, match="'attention_mask' hides tokens, and which of tower 'fusion' these are is un"):
        trimtab.adapt(copy.deepcopy(model), example=BATCH).prune("multiflow", sparsity=0.5, batches=[BATCH])
    with pytest.raises(AnatomyError, match="unipt: `mask` of tower 'fusion' is unknown"):
        trimtab.adapt(model, example=BATCH).tune("unipt")


def test_pairs_that_become_others_later_are_refused():
    """What was the same for all tokens when the model was watched is looked at in every pass."""
    model = Beside("among", "all").eval()
    fit = trimtab.adapt(model, example=BATCH)
    fit.tune("unipt")
    logits(model, BATCH)
    model.order = "odd"
    with pytest.raises(AnatomyError, match="'layers.0': expected at 'bias' a mask of pairs .* for every token that"):
        logits(model, BATCH)


def test_without_a_mask_of_pairs_all_tokens_are_valid():
    """A model may give no mask where nothing is hidden."""
    model = Beside("among", "all").eval()
    anatomy = Anatomy.of(model, BATCH)
    assert not anatomy.towers[0].mask_required
    for layer in model.layers:  # as transformers does it
        layer.register_forward_pre_hook(lambda m, args: (args[0], None))
    everywhere = {**BATCH, "attention_mask": torch.ones_like(IDS)}
    fit = trimtab.adapt(model, anatomy=anatomy)
    fit.prune("multiflow", sparsity=0.5, batches=[everywhere])
    assert 0.49 < fit.masks.sparsity < 0.51


class Hearing(nn.Module):
    """Sound of an even length alone, beside words; each goes through blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.frames = nn.Embedding(10, D), nn.Linear(5, D)
        self.ears, self.eyes = (nn.ModuleList(Seeing() for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(D, 3)

    def forward(self, input_ids, attention_mask, input_features, input_features_mask):
        if bool((input_features_mask.sum(1) % 2).any()):
            raise ValueError("frames and words do not match")
        x, y = self.words(input_ids), self.frames(input_features)
        for layer in self.ears:
            y = layer(y, input_features_mask.bool()[:, None, None].expand(-1, 1, y.shape[1], -1))
        for layer in self.eyes:
            x = layer(x, attention_mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1))
        return {"logits": self.head(x) + self.head(y.mean(1, keepdim=True))}


def test_where_a_mask_cannot_be_hidden_in_only_its_own_padding_is_refused():
    sound = torch.randn(2, 6, 5)
    whole = {"input_ids": IDS, "attention_mask": (IDS != 1).long(), "input_features": sound,
             "input_features_mask": torch.ones(2, 6, dtype=torch.long)}  # fmt: skip
    model = Hearing().eval()
    audio, text = Anatomy.of(model, whole).towers
    assert (audio.mask, audio.may_hide) == (None, ("input_features_mask",))
    assert "could not be seen" in dict(audio.unknown)["mask"]
    assert text.mask == Tap("", "input", "attention_mask") and not text.unknown and text.may_hide is None
    assert from_plain(type(audio), to_plain(audio)) == audio
    fit = trimtab.adapt(copy.deepcopy(model), example=whole)
    fit.prune("multiflow", sparsity=0.5, batches=[whole])
    assert 0.45 < fit.masks.sparsity < 0.55
    short = {**whole, "input_features_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with pytest.raises(ValueError, match="'input_features_mask' hides tokens, and which of tower 'audio' these are is"):
        trimtab.adapt(model, example=whole).prune("multiflow", sparsity=0.5, batches=[short])
