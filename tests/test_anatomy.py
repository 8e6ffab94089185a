from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SwinConfig,
    SwinModel,
    UMT5Config,
    UMT5Model,
    ViltConfig,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)
from transformers.modeling_outputs import BaseModelOutput

from trimtab.anatomy import (
    Anatomy,
    AnatomyError,
    Block,
    Tap,
    Tower,
    argument,
    describes,
    lookup,
    pick,
    put,
    read,
    rewrite,
)
from trimtab.anatomy.lookup import discover

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


def test_describes_registers_a_class_and_its_children(monkeypatch):
    monkeypatch.setattr(lookup, "_DESCRIPTIONS", dict(lookup._DESCRIPTIONS))

    class Homemade(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList(Layer(8) for _ in range(2))

    class Child(Homemade):
        pass

    @describes("Homemade")
    def describe(model):
        blocks = tuple(Block(f"stack.{i}", 8) for i in range(2))
        return Anatomy((Tower("words", "text", blocks, ("stack",), Tap("stack.1")),))

    for model in (Homemade(), Child()):
        found = Anatomy.of(model)
        assert [t.name for t in found.towers] == ["words"] and found.source == "registered for Homemade"


# --- discovery --------------------------------------------------------------------------------------------------------


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


def test_a_model_without_blocks_says_what_to_do():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(AnatomyError, match=r"Sequential has no list of repeated blocks.*describes\('Sequential'\)"):
        Anatomy.of(model)


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


def test_a_list_that_is_no_stack_can_be_ignored():
    model = TwoStacks()
    found = Anatomy.of(model)
    alone = replace(found, towers=found.towers[:1])
    with pytest.raises(AnatomyError, match=r"misses text_layers\.0, text_layers\.1"):
        alone.check(model)
    replace(alone, ignored=("text_layers",)).check(model)
    replace(alone, heads=("text_layers",)).check(model)


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


# --- taps -------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


ONE, TWO, NEW = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ((ONE, TWO), 1),
        ([ONE, TWO], 1),
        ({"first": ONE, "second": TWO}, "second"),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=TWO), "hidden_states"),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=TWO), 1),
        (Pair(ONE, TWO), 1),
        (Pair(ONE, TWO), "second"),
    ],
)
def test_pick_and_put_reach_one_element_of_an_output(value, key):
    assert pick(value, key) is TWO
    out = put(value, key, NEW)
    assert type(out) is type(value)
    assert pick(out, key) is NEW and pick(out, "first" if value.__class__ is dict else 0) is ONE


def test_an_output_that_is_one_tensor_ignores_the_key():
    assert pick(ONE, 3) is ONE and put(ONE, 3, NEW) is NEW


def test_arguments_by_place_and_by_keyword():
    assert argument(Tap("m", "input", 1), (ONE, TWO), {}) is TWO
    assert argument(Tap("m", "input"), (), {"hidden_states": ONE}) is ONE  # position 0, passed as a keyword
    assert argument(Tap("m", "input", "mask"), (ONE,), {"mask": TWO}) is TWO
    assert argument(Tap("m", "input", "mask"), (ONE,), {}) is None
    with pytest.raises(AnatomyError, match="'m' was called with 1 inputs, the tap asks for number 2"):
        argument(Tap("m", "input", 2), (ONE,), {})


def test_read_sees_inputs_and_goes_away():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    seen: list[torch.Tensor] = []
    handles = [read(model, Tap("1", side), seen.append) for side in ("input", "output")]
    out = model(torch.ones(1, 2))
    assert torch.equal(seen[0], model[0](torch.ones(1, 2))) and torch.equal(seen[1], out)
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 2))
    assert len(seen) == 2


def test_inputs_cannot_be_rewritten():
    with pytest.raises(AnatomyError, match="only outputs can be rewritten, the tap at '0' is an input"):
        rewrite(nn.Sequential(nn.Linear(2, 2)), Tap("0", "input"), lambda x: x)
