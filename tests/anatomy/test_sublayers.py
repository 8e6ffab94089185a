"""The parts of blocks that are seen by running them: held against every description, and proved by effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.anatomy.seeing import calls, run
from tests.backbones.test_zoo import ZOO
from tests.models.four import FOUR
from trimtab.anatomy import Anatomy, Block
from trimtab.anatomy.seen.sublayers import SeenBlock, see_sublayers
from trimtab.backbones.examples import EXAMPLES

# What a description says otherwise than what is seen: (model, tower) -> why.
PARTS_DIFFER = {("xvlm-swin", "vision"): "the attention is left out of it, though `drop_path` gives tokens again"}
FACTS_DIFFER = {
    **{(m, f"fusion-{of}"): "attention weights are returned, and the model does without them"
       for m in ("bridgetower", "bridgetower mlm", "grounding-dino") for of in ("text", "image")},
    ("llava", "vision"): "the model finds a hidden state by counting blocks",
    ("four decoder", "vision"): "the model finds a hidden state by counting blocks",
}  # fmt: skip
WRITES_DIFFER = {("blip-nlvr2", "text"): "the first of two maps is written, of which the mean is added"}


def models() -> Iterator[Any]:
    yield from (pytest.param(n, m.model, m.batch, id=n) for n, m in ZOO.items())
    yield from (pytest.param(f"four {f.name}", f.make, f.batch, id=f"four {f.name}") for f in FOUR)
    yield from (pytest.param(n, e.model, e.batch, id=n) for n, e in EXAMPLES.items() if n not in ZOO)


# --- against descriptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "build", "batch"), models())
def test_what_is_described_is_seen(name: str, build: Callable, batch: dict):
    try:
        model = build()
    except ImportError as missing:
        pytest.skip(str(missing))
    anatomy = Anatomy.of(model)
    called = calls(model, [b.path for b in anatomy.blocks()], batch)
    assert called
    for tower in anatomy.towers:
        differs: dict[str, bool] = {"parts": False, "facts": False, "writes": False}
        ran = [b for b in tower.blocks if b.path in called]
        for block in ran:
            seen = see_sublayers(model, block, *called[block.path])
            facts = (block.width, tower.layout, block.keeps_shape, block.returns_tuple or bool(block.also))
            differs["facts"] |= facts != (seen.width, seen.layout, seen.keeps_shape, seen.returns_tuple)
            kinds = [p.kind for p in block.sublayers]
            if kinds != [p.kind for p in seen.sublayers]:
                differs["parts"] = True
                assert set(kinds) < {p.kind for p in seen.sublayers}, seen.notes  # never fewer than described
                continue
            assert seen.complete or tower.layout == "grid", seen.notes
            differs["writes"] |= not same_values(model, block, seen, called[block.path])
        if ran:
            where = (name, tower.name)
            listed = {"parts": where in PARTS_DIFFER, "facts": where in FACTS_DIFFER, "writes": where in WRITES_DIFFER}
            assert differs == listed, where


def same_values(model: nn.Module, block: Block, seen: SeenBlock, called: tuple) -> bool:
    """Whether both descriptions write the same values; they always read the same.

    After the last part a description may also write what the block puts out, behind the sum and its norm (BERT, ViLT):
    what is seen is the value that is added.
    """
    taps = {t for b in (block, seen) for p in b.sublayers for t in (p.read, p.write)}
    out, values = run(model, block.path, called, list(taps))
    same = True
    for described, found in zip(block.sublayers, seen.sublayers, strict=True):
        assert torch.equal(values[described.read], values[found.read]), (described, found)
        last = described is block.sublayers[-1] and torch.equal(values[described.write], out)
        same &= last or torch.equal(values[described.write], values[found.write])
    return same


# --- by effect --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
PICTURE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 40}

# Blocks whose stream is bare between its sums: (model, batch, block, whether all parts read what enters the block).
BARE: dict[str, tuple[Callable, dict, str, bool]] = {
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**SMALL)), TEXT, "layers.0", False),
    "gemma2": (lambda: hf.Gemma2Model(hf.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2)), TEXT, "layers.1",
               False),
    "gpt-j": (lambda: hf.GPTJModel(hf.GPTJConfig(**GPTJ)), TEXT, "h.0", True),
    "cohere": (lambda: hf.CohereModel(hf.CohereConfig(**SMALL)), TEXT, "layers.0", True),
    "mixtral": (lambda: hf.MixtralModel(hf.MixtralConfig(**SMALL, num_local_experts=4, num_key_value_heads=2)), TEXT,
                "layers.0", False),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), PICTURE, "layers.1", False),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), PICTURE, "encoder.layer.0", False),
    "swinv2": (lambda: hf.Swinv2Model(hf.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2],
                                                      num_heads=[2, 2], window_size=4)),
               PICTURE, "encoder.layers.0.blocks.1", False),
    "t5": (lambda: hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                                 vocab_size=40)), TEXT, "encoder.block.1", False),
}  # fmt: skip


def prepared(build: Callable, batch: dict, path: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
    return model.eval(), calls(model, [path], batch)[path]


@pytest.mark.parametrize("name", BARE)
def test_without_its_parts_a_block_hands_its_stream_on(name):
    """What is seen is all that is added: with zeros written there the stream stays; what is written is added to it."""
    build, batch, path, beside = BARE[name]
    model, called = prepared(build, batch, path)
    block = Block(path, 32)
    seen = see_sublayers(model, block, *called)
    assert seen.complete and [p.kind for p in seen.sublayers] == ["attention", "mlp"], seen.notes
    stream = block.stream_of(model.get_submodule(path), *called)
    silent: dict = {p.write: torch.zeros_like for p in seen.sublayers}
    assert torch.equal(run(model, path, called, changes=silent)[0], stream)
    delta = torch.randn_like(stream)
    for part in seen.sublayers:
        out, _ = run(model, path, called, changes={**silent, part.write: lambda value: delta})
        assert torch.equal(out, stream + delta)
    taps = [t for p in seen.sublayers for t in (p.read, p.write)]
    _, values = run(model, path, called, taps)
    for part in seen.sublayers:
        assert torch.equal(values[part.read], stream)
        if not beside:
            stream = stream + values[part.write]


def test_a_post_norm_block_without_its_parts_is_its_norms():
    model, called = prepared(lambda: hf.BertModel(hf.BertConfig(**SMALL)), TEXT, "encoder.layer.0")
    block = Block("encoder.layer.0", 32)
    seen = see_sublayers(model, block, *called)
    assert seen.complete and [p.kind for p in seen.sublayers] == ["attention", "mlp"]
    silent: dict = {p.write: torch.zeros_like for p in seen.sublayers}
    out, values = run(model, block.path, called, [p.read for p in seen.sublayers], silent)
    layer = model.get_submodule(block.path)
    stream = block.stream_of(layer, *called)
    between = layer.attention.output.LayerNorm(stream)
    assert torch.equal(values[seen.sublayers[0].read], stream) and torch.equal(values[seen.sublayers[1].read], between)
    assert torch.equal(out, layer.output.LayerNorm(between))


def test_looking_changes_nothing():
    model, called = prepared(*BARE["llama"][:3])
    given, numbers = [t.clone() for t in called[0]], torch.get_rng_state()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    see_sublayers(model, Block("layers.0", 32), *called)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert given and all(map(torch.equal, given, called[0])) and torch.equal(numbers, torch.get_rng_state())


def test_a_block_with_lora_and_in_half_precision_is_seen_the_same():
    from peft import LoraConfig, get_peft_model

    model, called = prepared(*BARE["llama"][:3])
    plain = see_sublayers(model, Block("layers.0", 32), *called)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj", "down_proj"])).get_base_model().eval()
    assert see_sublayers(wrapped, Block("layers.0", 32), *called) == plain
    build, batch, path, _ = BARE["mixtral"]
    model, called = prepared(lambda: build().to(torch.bfloat16), batch, path)
    seen = see_sublayers(model, Block(path, 32), *called)
    assert [p.kind for p in seen.sublayers] == ["attention", "mlp"] and seen.complete, seen.notes


def test_memory_is_told_by_name_or_by_what_gives_the_values():
    config = hf.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=40,
    )  # fmt: skip
    build = partial(hf.BartModel, config)
    batch = {**TEXT, "decoder_input_ids": IDS}
    model, called = prepared(build, batch, "decoder.layers.0")
    kinds = ["attention", "cross-attention", "mlp"]
    seen = see_sublayers(model, Block("decoder.layers.0", 32), *called)
    assert [p.kind for p in seen.sublayers] == kinds
    assert len(seen.notes) == 1 and "'encoder_hidden_states' is taken for another tower's output" in seen.notes[0]
    by_name = see_sublayers(model, Block("decoder.layers.0", 32), *called, memory=["encoder_hidden_states"])
    assert [p.kind for p in by_name.sublayers] == kinds and by_name.notes == ()
    # Another name says that this one is none: then an attention that mixes nothing stays unknown.
    other = see_sublayers(model, Block("decoder.layers.0", 32), *called, memory=["something"])
    assert [p.kind for p in other.sublayers] == ["attention", "mlp"] and not other.complete
    assert any("no token moved another one" in note for note in other.notes)
