"""Registered descriptions: what they say holds in the model, and a wrong one is named."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ViltConfig,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from trimtab.anatomy import (
    Anatomy,
    AnatomyError,
    Block,
    Sublayer,
    Tap,
    Tower,
    pick,
    read,
    rewrite,
)
from trimtab.anatomy.parts import every_tap

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLIP_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
PICTURE = {"image_size": 16, "patch_size": 8}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = (IDS > 0).long()
MODELS = {
    "ViltModel": (ViltModel, ViltConfig(**SMALL, **PICTURE, vocab_size=30)),
    "ViltForQuestionAnswering": (ViltForQuestionAnswering, ViltConfig(**SMALL, **PICTURE, vocab_size=30)),
    "ViltForMaskedLM": (ViltForMaskedLM, ViltConfig(**SMALL, **PICTURE, vocab_size=30)),
    "CLIPModel": (
        CLIPModel,
        CLIPConfig(
            text_config={**SMALL, "vocab_size": 30, "max_position_embeddings": 12, **CLIP_TOKENS},
            vision_config={**SMALL, "hidden_size": 24, "num_hidden_layers": 3, **PICTURE},
            projection_dim=8,
        ),
    ),
    "BertModel": (BertModel, BertConfig(**SMALL, vocab_size=30)),
    "BertForSequenceClassification": (BertForSequenceClassification, BertConfig(**SMALL, vocab_size=30)),
}
EXPECTED = {  # tower: (modality, width, blocks), and the heads
    "ViltModel": ({"fusion": ("fusion", 16, 2)}, {"pooler"}),
    "ViltForQuestionAnswering": ({"fusion": ("fusion", 16, 2)}, {"vilt.pooler", "classifier"}),
    "ViltForMaskedLM": ({"fusion": ("fusion", 16, 2)}, {"vilt.pooler", "mlm_score"}),
    "CLIPModel": ({"vision": ("vision", 24, 3), "text": ("text", 16, 2)}, {"visual_projection", "text_projection"}),
    "BertModel": ({"text": ("text", 16, 2)}, {"pooler"}),
    "BertForSequenceClassification": ({"text": ("text", 16, 2)}, {"bert.pooler", "dropout", "classifier"}),
}
LENGTHS = {"vision": 1 + 4, "text": 5, "fusion": 5 + 1 + 4}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    return model_class(config).eval()


def forward(model: nn.Module) -> torch.Tensor:
    """One pass of two samples; everything that the model returns, in one vector."""
    torch.manual_seed(1)  # transformers' ViLT draws an order of the patches
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if not isinstance(model, (BertModel, BertForSequenceClassification)):
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        out = model(**inputs)
    return torch.cat([v.flatten() for v in out.to_tuple() if isinstance(v, torch.Tensor)])


@pytest.fixture(params=list(MODELS))
def described(request) -> tuple[str, nn.Module, Anatomy]:
    model = build(request.param)
    return request.param, model, Anatomy.of(model)


# --- registered descriptions ------------------------------------------------------------------------------------------


def test_registered_towers_and_heads(described):
    name, _, found = described
    towers, heads = EXPECTED[name]
    assert {t.name: (t.modality, t.blocks[0].width, len(t.blocks)) for t in found.towers} == towers
    assert set(found.heads) == heads
    assert "registered" in found.source


def test_taps_see_the_stream(described):
    """Every sublayer reads and writes (B, L, width), and so do the tower's output, mask and summary."""
    _, model, found = described
    seen: dict[Tap, torch.Tensor] = {}

    def watch(tap: Tap) -> None:
        read(model, tap, lambda value: seen.__setitem__(tap, value))

    for tower in found.towers:
        for tap in (tower.output, tower.mask, tower.pooled):
            if tap is not None:
                watch(tap)
        for block in tower.blocks:
            watch(Tap(block.path, "input"))
            for part in block.sublayers:
                watch(part.read)
                watch(part.write)
    forward(model)
    for tower in found.towers:
        shape = (2, LENGTHS[tower.modality], tower.blocks[0].width)
        assert seen[tower.output].shape == shape
        if tower.mask is not None:
            assert seen[tower.mask].shape == shape[:2]
            assert (seen[tower.mask] != 0).sum(dim=1).tolist() == [shape[1], shape[1] - 2]
        if tower.pooled is not None:
            assert seen[tower.pooled].ndim == 2 and len(seen[tower.pooled]) == 2
        for block in tower.blocks:
            assert [part.kind for part in block.sublayers] == ["attention", "mlp"]
            for part in block.sublayers:
                assert seen[part.read].shape == seen[part.write].shape == shape, part
            # What enters the first part is the stream that enters the block, before any norm.
            assert torch.equal(seen[block.sublayers[0].read], seen[Tap(block.path, "input")])


def test_blocks_return_what_is_described(described):
    _, model, found = described
    outputs = {}
    for block in found.blocks():
        module = model.get_submodule(block.path)
        module.register_forward_hook(lambda m, args, out, path=block.path: outputs.__setitem__(path, out))
    forward(model)
    for block in found.blocks():
        assert isinstance(outputs[block.path], tuple) == block.returns_tuple
        assert pick(outputs[block.path], 0).shape[-1] == block.width


def test_adding_zero_changes_nothing_and_adding_one_does(described):
    _, model, found = described
    plain = forward(model)
    assert torch.equal(forward(model), plain)
    for block in found.blocks():
        for part in block.sublayers:
            handle = rewrite(model, part.write, lambda x: x + torch.zeros_like(x))
            assert torch.equal(forward(model), plain), part.write
            handle.remove()
            handle = rewrite(model, part.write, lambda x: x + torch.arange(x.shape[-1]) / 8)
            assert not torch.allclose(forward(model), plain, atol=1e-4), part.write
            handle.remove()
    assert torch.equal(forward(model), plain)


def test_what_is_added_to_the_last_part_comes_out_of_the_block(described):
    """The last write point is summed into the stream and nothing follows it in the block."""
    _, model, found = described
    for block in found.blocks():
        outs = []
        seen = read(model, Tap(block.path), lambda x, outs=outs: outs.append(x.clone()))
        forward(model)
        handle = rewrite(model, block.sublayers[-1].write, lambda x: x + 0.5)
        forward(model)
        assert torch.allclose(outs[1] - outs[0], torch.full_like(outs[0], 0.5), atol=1e-5), block.path
        handle.remove()
        seen.remove()


def test_prunable_weights_are_the_towers_matrices(described):
    _, model, found = described
    weights = found.weights(model)
    blocks = [b.path for b in found.blocks()]
    assert len(weights) == 6 * len(blocks)  # four of attention, two of the feed-forward part
    for weight in weights:
        assert weight.path == f"{weight.module}.{weight.parameter}" and weight.parameter == "weight"
        assert any(weight.module.startswith(b + ".") for b in blocks)
        assert model.get_parameter(weight.path).ndim == 2
        assert not any(weight.module.startswith(h) for h in found.heads)
    assert [w.path for w in weights] == [n for n, _ in model.named_parameters() if n in {w.path for w in weights}]


def test_rows_add_up(described):
    _, model, found = described
    rows = found.rows(model)
    total = sum(p.numel() for p in model.parameters())
    assert [r["tower"] for r in rows] == [*(t.name for t in found.towers), "heads and rest"]
    assert sum(r["params"] for r in rows) == total and sum(r["share"] for r in rows) == pytest.approx(1)
    assert all(r["params"] > 0 for r in rows)
    prunable = sum(model.get_parameter(w.path).numel() for w in found.weights(model))
    assert sum(r["prunable"] for r in rows) == prunable


@pytest.mark.parametrize(
    ("name", "path", "modality"),
    [
        ("CLIPModel", "vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("CLIPModel", "vision_model.embeddings.class_embedding", "vision"),
        ("CLIPModel", "text_model.embeddings.token_embedding.weight", "text"),
        ("CLIPModel", "visual_projection.weight", None),
        ("CLIPModel", "logit_scale", None),
        ("ViltForMaskedLM", "vilt.encoder.layer.1.output.dense.bias", "fusion"),
        ("ViltForMaskedLM", "vilt.pooler.dense.weight", None),
        ("ViltForMaskedLM", "mlm_score.transform.dense.weight", None),
        ("BertModel", "encoder.layer.0.attention.self.query.weight", "text"),
        ("BertModel", "encoders.layer.0", None),  # a prefix of whole names, not of letters
    ],
)
def test_modality_of_parameters(name, path, modality):
    assert Anatomy.of(build(name)).modality(path) == modality


def test_blocks_and_towers_by_name():
    found = Anatomy.of(build("CLIPModel"))
    paths = [b.path for b in found.blocks()]
    assert paths == [f"vision_model.encoder.layers.{i}" for i in range(3)] + [
        f"text_model.encoder.layers.{i}" for i in range(2)
    ]
    assert [b.path for b in found.blocks("text")] == paths[3:]
    assert found.tower("text").causal and not found.tower("vision").causal
    with pytest.raises(ValueError, match="unknown tower 'visoin': did you mean 'vision'"):
        list(found.blocks("visoin"))


def test_a_prefix_goes_before_every_path():
    """Whatever fields a description has: a tower is made with a tap in each field that can hold one."""
    taps = [f.name for f in fields(Tower) if "Tap" in f.type]
    part = Sublayer("mlp", Tap("b.in", "input"), Tap("b.out"))
    tower = Tower("t", "text", (Block("b", 8, (part,)),), ("b", "c"), **{n: Tap(n) for n in taps})
    own = Anatomy((tower,), heads=("h",), ignored=("i",))
    found = own.prefixed("x.y")
    before, after = ([tap.path for tap, _ in every_tap(a)] for a in (own, found))
    assert len(after) == len(taps) + 2 and after == [f"x.y.{path}" for path in before]
    assert found.towers[0].blocks[0].path == "x.y.b" and found.towers[0].scope == ("x.y.b", "x.y.c")
    assert (found.heads, found.ignored) == (("x.y.h",), ("x.y.i",))
    whole = Anatomy((replace(tower, mask=Tap("", "input")),)).prefixed("x")
    assert whole.towers[0].mask.path == "x"  # the model itself


# --- prunable weights of hand-made modules ----------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self, shared: nn.Linear):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.shared = shared
        self.conv = nn.Conv1d(8, 8, 3)


def test_weights_count_tied_ones_once_and_fused_projections_too():
    model = nn.Module()
    shared = nn.Linear(8, 8)
    model.text_layers = nn.ModuleList(Attending(shared) for _ in range(2))
    model.text_layers.append(nn.Module())
    model.text_layers[2].classifier = nn.Linear(8, 2)
    blocks = tuple(Block(f"text_layers.{i}", 8) for i in range(2))
    tower = Tower("text", "text", blocks, ("text_layers",), Tap("text_layers.1"))
    found = Anatomy((tower,), heads=("text_layers.2",)).weights(model)
    assert [w.path.removeprefix("text_layers.") for w in found] == [
        "0.attention.in_proj_weight",
        "0.attention.out_proj.weight",
        "0.shared.weight",
        "1.attention.in_proj_weight",
        "1.attention.out_proj.weight",
    ]
    assert {w.modality for w in found} == {"text"}


# --- descriptions that do not fit -------------------------------------------------------------------------------------


def changed(found: Anatomy, **of_tower) -> Anatomy:
    return replace(found, towers=(replace(found.towers[0], **of_tower), *found.towers[1:]))


def test_a_missed_block_is_named():
    model = build("CLIPModel")
    found = Anatomy.of(model)
    with pytest.raises(AnatomyError) as error:
        changed(found, blocks=found.towers[0].blocks[:-1]).check(model)
    message = str(error.value)
    assert "'vision_model.encoder.layers' holds 3 repeated blocks" in message
    assert "misses vision_model.encoder.layers.2:" in message and "`ignored`" in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blocks": (Block("encoder.layers.0", 16),)}, "block of tower 'text'"),
        ({"output": Tap("encoder.layers.0")}, "`output` of tower 'text'"),
        ({"mask": Tap("encoder.layers.0", "input")}, "`mask` of tower 'text'"),
        ({"pooled": Tap("encoder.layers.0")}, "`pooled` of tower 'text'"),
    ],
)
def test_a_wrong_path_is_named_with_the_nearest(change, what):
    model = build("BertModel")
    with pytest.raises(AnatomyError) as error:
        changed(Anatomy.of(model), **change).check(model)
    assert what in str(error.value) and "'encoder.layers.0'" in str(error.value)
    assert "did you mean 'encoder.layer.0'" in str(error.value)


def test_a_wrong_sublayer_path_is_named():
    model = build("BertModel")
    found = Anatomy.of(model)
    first, *rest = found.towers[0].blocks
    bad = replace(first, sublayers=(replace(first.sublayers[1], write=Tap("encoder.layer.0.outputs")),))
    with pytest.raises(
        AnatomyError, match=r"`write` of mlp in block 'encoder\.layer\.0'.*'encoder\.layer\.0\.outputs'"
    ):
        changed(found, blocks=(bad, *rest)).check(model)
