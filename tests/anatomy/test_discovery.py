"""Discovery: what repeated blocks tell of a model that nobody described."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import SwinConfig, SwinModel, UMT5Config, UMT5Model

from trimtab.anatomy import Anatomy, AnatomyError, Tap, read
from trimtab.anatomy.lookup import discover

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = (IDS > 0).long()


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class TwoStacks(nn.Module):
    """Repeated layers under telling names, a head, and lists that are no stacks."""

    def __init__(self):
        super().__init__()
        self.image_layers = nn.ModuleList(Layer(8) for _ in range(3))
        self.text_layers = nn.ModuleList(Layer(12) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def test_discovery_finds_repeated_layers():
    model = TwoStacks()
    found = Anatomy.of(model)
    assert {t.name: (t.modality, t.layout, len(t.blocks)) for t in found.towers} == {
        "image_layers": ("vision", "tokens", 3), "text_layers": ("text", "tokens", 2),
    }  # fmt: skip
    assert [b.width for b in found.blocks()] == [8, 8, 8, 12, 12]
    assert found.tower("text_layers").output == Tap("text_layers.1")
    assert "discovered" in found.source and "check" in found.source
    assert {w.modality for w in found.weights(model)} == {"vision", "text"} and len(found.weights(model)) == 10
    assert found.modality("head.0.weight") is None


@pytest.mark.parametrize(
    ("name", "modality"),
    [("vision_tower", "vision"), ("bert", "text"), ("decoder", "text"), ("cross", "fusion"), ("stages", "vision")],
)
def test_discovery_guesses_the_modality_from_the_path(name, modality):
    model = nn.Module()
    model.add_module(name, nn.ModuleList(Layer(8) for _ in range(2)))
    assert [t.modality for t in Anatomy.of(model).towers] == [modality]


def test_discovery_of_a_convolutional_stack():
    class Stage(nn.Module):
        def __init__(self, i: int, o: int):
            super().__init__()
            self.conv = nn.Conv2d(i, o, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    model = nn.Sequential(Stage(3, 8), Stage(8, 16))
    (tower,) = Anatomy.of(model).towers
    assert tower.layout == "grid" and [b.width for b in tower.blocks] == [8, 16]
    assert not any(b.keeps_shape for b in tower.blocks)  # widths differ: no block can be skipped


def test_discovery_in_umt5():
    small = {"num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    model = UMT5Model(UMT5Config(**small)).eval()
    found = Anatomy.of(model)
    assert [b.path for b in found.blocks()] == [f"{t}.block.{i}" for t in ("encoder", "decoder") for i in range(2)]
    assert {b.width for b in found.blocks()} == {16} and all(b.keeps_shape for b in found.blocks())
    shapes = []
    for tower in found.towers:
        read(model, tower.output, lambda x: shapes.append(tuple(x.shape)))
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :3])
    assert shapes == [(2, 5, 16), (2, 3, 16)]


def test_discovery_in_swin():
    small = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    model = SwinModel(SwinConfig(**small))
    (tower,) = discover(model).towers
    assert tower.modality == "vision" and [b.path for b in tower.blocks] == ["encoder.layers.0", "encoder.layers.1"]
    assert not any(b.keeps_shape for b in tower.blocks)


def test_a_list_that_is_no_stack_can_be_ignored():
    model = TwoStacks()
    found = Anatomy.of(model)
    alone = replace(found, towers=found.towers[:1])
    with pytest.raises(AnatomyError, match=r"misses text_layers\.0, text_layers\.1"):
        alone.check(model)
    replace(alone, ignored=("text_layers",)).check(model)
    replace(alone, heads=("text_layers",)).check(model)


def test_a_model_without_blocks_says_what_to_do():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(AnatomyError, match=r"Sequential has no list of repeated blocks.*describes\('Sequential'\)"):
        Anatomy.of(model)


SIZE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "pad_token_id": 0}
UNDESCRIBED = {  # name: (model, width of its blocks)
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4,
                                                      bos_token_id=0, eos_token_id=1)), 32),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**SIZE)), 32),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, eos_token_id=1)), 32),
    # norms of queries, as wide as a head; norms without weights; norms that are no modules of torch
    "gemma3": (lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=4)), 32),
    "diffllama": (lambda: hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**GROUPED)), 32),
    "olmo": (lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**GROUPED, eos_token_id=1)), 32),
    "olmo2": (lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED, eos_token_id=1)), 32),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNDESCRIBED))
def test_widths_are_those_that_blocks_put_out(name):
    build, width = UNDESCRIBED[name]
    model = build().eval()
    found = discover(model)
    (tower,) = found.towers
    assert {b.width for b in tower.blocks} == {width} and all(b.keeps_shape for b in tower.blocks)
    seen = []
    read(model, tower.output, lambda x: seen.append(x.shape))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    assert seen == [(1, 6, width)]


def test_norms_of_queries_directly_in_a_block_are_passed_over():
    class Parallel(Layer):
        def __init__(self):
            super().__init__(8)
            own, self.norm = self.norm, None
            self.q_norm, self.k_norm, self.norm_in = nn.LayerNorm(2), nn.LayerNorm(2), own

    model = nn.Module()
    model.text_layers = nn.ModuleList(Parallel() for _ in range(2))
    assert [b.width for b in discover(model).blocks()] == [8, 8]


def test_a_stage_that_ends_wider_does_not_keep_its_shape():
    class Stage(nn.Module):
        def __init__(self, i: int, o: int):
            super().__init__()
            self.first, self.last = nn.Linear(i, i), nn.Linear(i, o)

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(4, 8), Stage(8, 8)])  # both put out 8
    assert [(b.width, b.keeps_shape) for b in discover(model).blocks()] == [(8, False)] * 2


def test_names_of_discovered_towers_can_hold_modules():
    model = nn.Module()
    model.a, model.a_b = nn.Module(), nn.Module()
    model.a.b_c, model.a_b.c = (nn.ModuleList(Layer(8) for _ in range(2)) for _ in range(2))
    model.values = nn.ModuleList(Layer(8) for _ in range(2))  # a method of nn.ModuleDict has this name
    found = Anatomy.of(model)
    names = [t.name for t in found.towers]
    assert names == ["a_b_c", "a_b_c_2", "values_2"]
    assert list(nn.ModuleDict({name: nn.Linear(1, 1) for name in names})) == names
    assert [t.scope for t in found.towers] == [("a.b_c",), ("a_b.c",), ("values",)]
