"""Watching: what a model that nobody described shows of itself when it runs."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.models.four import FOUR
from trimtab.anatomy import Anatomy, AnatomyError, Tap, read
from trimtab.anatomy.parts import from_plain, to_plain
from trimtab.anatomy.seen.watch import watch

IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [9, 8, 7, 3, 0, 0]])
MASK = (IDS > 0).long()
WORDS = {"input_ids": IDS, "attention_mask": MASK}


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Mixing(Layer):
    """Tokens see each other: all of them, or those before them; `seen` says which may be looked at."""

    def __init__(self, width: int, causal: bool):
        super().__init__(width)
        self.values, self.causal = nn.Linear(width, width), causal

    def forward(self, seen, x):  # the stream comes second
        weights = torch.ones(x.shape[1], x.shape[1])
        weights = weights if seen is None else weights * seen[:, None].float()
        weights = weights.tril() if self.causal else weights
        return super().forward(x + weights @ self.values(x) / x.shape[1])


class TwoStacks(nn.Module):
    """Names that tell the wrong story: pictures go through `text_layers`; lists that are no stacks; a head."""

    def __init__(self, causal: bool = False):
        super().__init__()
        self.words, self.patches = nn.Embedding(10, 12), nn.Conv2d(3, 8, 4, 4)
        self.text_layers = nn.ModuleList(Layer(8) for _ in range(3))
        self.image_layers = nn.ModuleList(Mixing(12, causal) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, words, pictures, valid=None):
        y = self.words(words)
        for layer in self.image_layers:
            y = layer(valid, x=y)
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        for layer in self.text_layers:
            x = layer(x)
        return self.head(torch.cat([self.norm(x).mean(1), y.mean(1)], 1))


BOTH = {"words": IDS, "pictures": torch.randn(2, 3, 8, 8), "valid": MASK}


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_seen_and_not_what_is_named(causal):
    model = TwoStacks(causal)
    found = Anatomy.of(model, BOTH)
    text, vision = found.towers
    assert (text.name, text.modality, text.blocks[0].path) == ("text", "text", "image_layers.0")
    assert (vision.name, vision.modality, vision.blocks[0].path) == ("vision", "vision", "text_layers.0")
    assert [b.width for b in found.blocks()] == [12, 12, 8, 8, 8]
    assert text.causal is causal and "no tokens were seen to mix" in dict(vision.unknown)["causal"]
    assert [fact for b in text.blocks for fact, _ in b.unknown] == ["other sublayers"] * 2 and not text.unknown
    assert text.mask == Tap("", "input", "valid") and vision.mask is None
    assert [b.stream for b in text.blocks] == ["x", "x"]
    assert text.scope == ("words", "image_layers") and vision.scope == ("patches", "text_layers", "norm")
    assert vision.output == Tap("norm") and found.heads == ("norms", "head")
    assert [[p.kind for p in b.sublayers] for b in text.blocks] == [["mlp"]] * 2  # no module puts out what is mixed
    assert [[p.kind for p in b.sublayers] for b in vision.blocks] == [["mlp"]] * 3
    assert {w.modality for w in found.weights(model)} == {"vision", "text"}


def test_watching_leaves_the_model_as_it_was():
    model = TwoStacks().train()
    model.head.eval()
    before, hooks = copy.deepcopy(model.state_dict()), []
    model.norm.register_forward_hook(lambda *_: hooks.append(1))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    watch(model, BOTH)
    assert torch.equal(torch.rand(1), expected) and 1 <= len(hooks) <= 3  # three passes at most
    assert model.training and model.norm.training and not model.head.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    assert all(p.grad is None for p in model.parameters())


# name: (model, its inputs, {tower: (modality, blocks, width, causal, what it reads in its stream, beside it)})
SIZE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "pad_token_id": 0}
DECODERS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, eos_token_id=1)),
    # norms of queries, as wide as a head; norms without weights; norms that are no modules of torch
    "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4)),
    "diffllama": lambda: hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**GROUPED)),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**GROUPED, eos_token_id=1)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
}


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_decoder_is_seen_without_an_example(name):
    model = DECODERS[name]().eval()
    found = Anatomy.of(model)
    (tower,) = found.towers
    assert (tower.name, tower.modality, tower.causal) == ("text", "text", True) and not found.unknown()
    assert {(b.width, b.keeps_shape, len(b.sublayers)) for b in tower.blocks} == {(32, True, 2)}
    assert tower.mask == Tap("", "input", "attention_mask")
    seen = []
    read(model, tower.output, lambda x: seen.append(x.shape))
    with torch.no_grad():
        model(**WORDS)
    assert seen == [(2, 6, 32)]


def test_an_encoder_and_its_decoder():
    small = {"num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    model = hf.UMT5Model(hf.UMT5Config(**small, decoder_start_token_id=0)).eval()
    encoder, decoder = Anatomy.of(model, {**WORDS, "decoder_input_ids": IDS[:, :5]}).towers
    assert (encoder.name, decoder.name, decoder.memory) == ("encoder", "decoder", "encoder")
    assert not encoder.causal and decoder.causal
    assert encoder.mask.key == "attention_mask" and decoder.mask.key == "decoder_attention_mask"
    assert [p.kind for p in decoder.blocks[0].sublayers] == ["attention", "cross-attention", "mlp"]


def test_stages_are_one_tower_of_their_blocks():
    small = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    model = hf.Swinv2Model(hf.Swinv2Config(**small))
    (tower,) = Anatomy.of(model).towers
    assert [b.path for b in tower.blocks] == [
        "encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0", "encoder.layers.1.blocks.1",
    ]  # fmt: skip
    assert [b.width for b in tower.blocks] == [8, 16, 16] and not tower.causal and "after" in tower.closed


def test_convolutions_are_a_grid():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    (tower,) = Anatomy.of(hf.ResNetModel(config)).towers
    assert tower.layout == "grid" and [b.width for b in tower.blocks] == [8, 8, 16, 16]
    assert [b.keeps_shape for b in tower.blocks] == [True, True, False, True]


def test_a_shared_block_is_said():
    config = hf.AlbertConfig(**SIZE, embedding_size=16)
    (tower,) = Anatomy.of(hf.AlbertModel(config)).towers
    assert "runs several times in one pass" in dict(tower.unknown)["blocks"]
    with pytest.raises(AnatomyError, match="`blocks` of tower 'text' is unknown"):
        trimtab.tune(hf.AlbertModel(config), "unipt")


# --- held against what was described by hand --------------------------------------------------------------------------

# What is described otherwise, and why. "modality": the language model that reads pictures among its words is described
# as text, since its weights are a language model's; what it depends on is both.
DIFFERENT = {
    "single stream": {"output", "pooled"},
    "dual encoder": {"output", "pooled", "pooled_token"},
    # The first blocks of paired towers read what is no block of the other.
    "fusion": {"sources"},
    # A block that the model finds by its number is described as one that cannot be skipped; in its place an adapter can
    # stand.
    "decoder": {"modality", "keeps_shape"},
}


@pytest.mark.parametrize("tiny", FOUR, ids=lambda t: t.name)
def test_descriptions_agree_with_what_is_seen(tiny):
    model = tiny.make()
    described = Anatomy.of(model)
    seen = watch(model, tiny.batch)
    assert not seen.unknown()
    assert [[b.path for b in t.blocks] for t in seen.towers] == [[b.path for b in t.blocks] for t in described.towers]
    names = {t.name: o.name for t, o in zip(described.towers, seen.towers, strict=True)}
    for theirs, own in zip(described.towers, seen.towers, strict=True):
        for what in {"layout", "causal", "starts_blank", "modality"} - DIFFERENT[tiny.name]:
            assert getattr(theirs, what) == getattr(own, what), what
        assert {names[n] for n in theirs.sources} == own.sources or "sources" in DIFFERENT[tiny.name]
        assert (theirs.mask is None) == (own.mask is None)
        for a, b in zip(theirs.blocks, own.blocks, strict=True):
            assert (a.width, a.returns_tuple) == (b.width, b.returns_tuple)
            assert a.keeps_shape == b.keeps_shape or "keeps_shape" in DIFFERENT[tiny.name]
            assert [p.kind for p in a.sublayers] == [p.kind for p in b.sublayers]


# --- what is not known is said ----------------------------------------------------------------------------------------


def test_lists_of_blocks_alone_tell_nothing_else():
    model = TwoStacks()
    found = Anatomy.of(model)
    assert [t.name for t in found.towers] == ["text_layers", "image_layers"]
    assert "not seen at work" in found.source
    for method in ("unipt", "lst", "deep-prompt", "adapter"):
        with pytest.raises(AnatomyError, match=r"`blocks` of tower 'text_layers' is unknown.*example=batch"):
            trimtab.tune(TwoStacks(), method)
    with pytest.raises(ValueError, match="example=batch"):
        trimtab.adapt(TwoStacks()).skip("random-skip", skip=1, adapters="none")


def test_levers_on_a_model_that_was_seen(tmp_path):
    model, base = TwoStacks(), None
    base = copy.deepcopy(model)
    fit = trimtab.adapt(model, example=BOTH)
    fit.prune("multiflow", 0.5, batches=[BOTH])
    fit.skip("das", plan=["text_layers.1"])
    fit.tune("lora", targets=("values", "up"))
    expected = model.eval()(**BOTH)
    folder = fit.save(tmp_path / "fit")
    again = trimtab.adapt(base, folder)  # what was seen is kept in the folder
    assert again.anatomy == fit.anatomy and torch.equal(base.eval()(**BOTH), expected)


def test_the_first_batch_serves_as_the_example():
    fit = trimtab.adapt(TwoStacks())
    fit.prune("multiflow", 0.5, batches=iter([BOTH, BOTH]))
    assert "seen on an example" in fit.anatomy.source and abs(fit.sparsity - 0.5) < 0.01


def test_an_anatomy_as_json():
    found = Anatomy.of(TwoStacks(), BOTH)
    assert from_plain(Anatomy, to_plain(found)) == found


DAMAGED = {
    "towers[0].causal: expected bool, found 'no'": lambda seen: seen["towers"][0].update(causal="no"),
    "towers[0].blocks[1].width: expected int, found None": lambda seen: seen["towers"][0]["blocks"][1].update(
        width=None
    ),
    "towers[0].modality: expected 'vision' or 'text'": lambda seen: seen["towers"][0].update(modality="words"),
    "towers[0].scope: expected list, found 'words'": lambda seen: seen["towers"][0].update(scope="words"),
    "towers[0].output: expected an object of Tap's fields": lambda seen: seen["towers"][0].update(output=[1]),
    "towers[0].color: Tower has no such field": lambda seen: seen["towers"][0].update(color=1),
    "towers[0].scope is missing": lambda seen: seen["towers"][0].pop("scope"),
}


@pytest.mark.parametrize("why", list(DAMAGED))
def test_a_damaged_anatomy_in_a_folder_names_its_field(why, tmp_path):
    model = TwoStacks()
    base = copy.deepcopy(model)
    fit = trimtab.adapt(model, example=BOTH)
    fit.tune("bitfit")
    file = fit.save(tmp_path / "fit") / "fit.json"
    written = json.loads(file.read_text())
    DAMAGED[why](written["base"]["seen"])
    file.write_text(json.dumps(written))
    with pytest.raises(trimtab.FitError, match=rf"fit.json: base.seen is no anatomy \({re.escape(why)}"):
        trimtab.adapt(base, file.parent)


BAD = {
    "no dict": (lambda b: [b], "example: expected a dict of the model's keyword arguments.*found list"),
    "a key is missing": (lambda b: {"words": b["words"]}, "does not run on the example.*missing.*pictures"),
    "no tensor": (lambda b: {"words": 1}, "holds no tensor"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_example_is_named(name):
    change, message = BAD[name]
    with pytest.raises(AnatomyError, match=message):
        Anatomy.of(TwoStacks(), change(BOTH))


def test_a_short_example_does_not_tell_causality():
    encoder, decoder = watch(
        hf.T5Model(hf.T5Config(num_layers=2, d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=30)),
        {**WORDS, "decoder_input_ids": IDS[:, :3]},
    ).towers
    assert encoder.knows("causal") and "has 3 tokens" in dict(decoder.unknown)["causal"]


def test_one_row_does_not_tell_the_samples():
    found = Anatomy.of(TwoStacks(), {k: v[:1] for k, v in BOTH.items()})
    assert all("one row" in dict(t.unknown)["samples"] for t in found.towers)


def test_a_tower_that_does_not_run_is_said():
    model = hf.CLIPModel(hf.CLIPConfig(text_config=SIZE, vision_config={**SIZE, "image_size": 32, "patch_size": 16}))

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = TwoStacks()

        def forward(self, words):
            return self.both.image_layers[0](None, self.both.words(words))

    (tower,) = (found := Anatomy.of(Half(), {"words": IDS})).towers
    assert tower.modality == "text" and found.idle == ("both.text_layers",)
    assert any("'both.text_layers': they did not run" in sentence for sentence in found.unknown())
    assert len(Anatomy.of(model).towers) == 2


class Restless(TwoStacks):
    """It draws numbers at every call, or keeps what it saw."""

    def __init__(self, keeps: bool):
        super().__init__()
        self.keeps, self.calls = keeps, 0
        layer = self.text_layers[0]
        plain = layer.forward

        def forward(x):
            self.calls += 1
            return plain(x) + (self.calls if self.keeps else torch.rand(1))

        layer.forward = forward


@pytest.mark.parametrize("keeps", [True, False])
def test_a_model_that_computes_differently_twice_is_said(keeps):
    found = Anatomy.of(Restless(keeps), BOTH)
    assert "computes differently when it is run again" in dict(found.tower("vision").unknown)["causal"]


def test_a_list_that_is_no_stack_can_be_ignored():
    model = TwoStacks()
    found = Anatomy.of(model, BOTH)
    alone = replace(found, towers=found.towers[:1])
    with pytest.raises(AnatomyError, match=r"misses text_layers\.0, text_layers\.1"):
        alone.check(model)
    replace(alone, ignored=("text_layers",)).check(model)


def test_a_model_without_blocks_says_what_to_do():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(AnatomyError, match=r"Sequential has no list of repeated blocks.*describes\('Sequential'\)"):
        Anatomy.of(model)


def test_names_of_towers_can_hold_modules():
    model = nn.Module()
    model.a, model.a_b = nn.Module(), nn.Module()
    model.a.b_c, model.a_b.c = (nn.ModuleList(Layer(8) for _ in range(2)) for _ in range(2))
    model.values = nn.ModuleList(Layer(8) for _ in range(2))  # a method of nn.ModuleDict has this name
    names = [t.name for t in Anatomy.of(model).towers]
    assert names == ["a_b_c", "a_b_c_2", "values_2"]
    assert list(nn.ModuleDict({name: nn.Linear(1, 1) for name in names})) == names


def test_a_tower_to_which_no_gradient_goes_back_is_said():
    class Counted(TwoStacks):
        """Of the pictures only the number of the brightest patch goes on."""

        def forward(self, words, pictures, valid=None):
            x = self.patches(pictures).flatten(2).transpose(1, 2)
            for layer in self.text_layers:
                x = layer(x)
            y = self.words(words) + x.mean(2).argmax(1)[:, None, None]
            for layer in self.image_layers:
                y = layer(valid, x=y)
            return y

    fit = trimtab.adapt(Counted(), example=BOTH)
    assert "indices or truth values alone" in dict(fit.anatomy.tower("vision").unknown)["gradient"]
    assert fit.anatomy.towers[-1].knows("gradient")
    with pytest.raises(AnatomyError, match="`gradient` of tower 'vision' is unknown"):
        fit.tune("adapter")
