"""Weights that are no plain numbers of their own are refused by name, shared ones are said, evidence of all counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import utils

import trimtab
from trimtab import Anatomy, Block, Tap, Tower
from trimtab.anatomy.weights import left_whole
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect

BATCHES = [{"ids": torch.randint(16, (3, 5), generator=torch.Generator().manual_seed(0))}]


class Model(nn.Module):
    """Two blocks of two layers behind an embedding; `grow` widens to the vocabulary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"own": nn.Linear(8, 8, bias=False), "grow": nn.Linear(8, 16, bias=False)}) for _ in range(2)
        )

    def forward(self, ids):
        x, words = self.embed(ids), 0
        for block in self.blocks:
            x = x + block["own"](x)
            words = words + block["grow"](x)
        return {"loss": words.square().mean()}

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", 8) for i in range(2))
        return Anatomy((Tower("text", "text", blocks, ("embed", "blocks"), Tap("blocks.1.own")),))


def prune(model, name="wanda"):
    return trimtab.prune(model, name, 0.5, BATCHES, model.anatomy())


class Called(Exception):
    """The model was called: calibration has begun."""


def uncalled(model):
    def fail(*_):
        raise Called

    model.register_forward_pre_hook(fail)
    return model


# --- computed anew ----------------------------------------------------------------------------------------------------

COMPUTED = {
    "weight norm": (utils.parametrizations.weight_norm, "parametrize.remove_parametrizations(module, 'weight')"),
    "spectral norm": (utils.parametrizations.spectral_norm, "parametrize.remove_parametrizations(module, 'weight')"),
    "orthogonal": (utils.parametrizations.orthogonal, "parametrize.remove_parametrizations(module, 'weight')"),
    "old spectral norm": (utils.spectral_norm, "remove_spectral_norm(module, 'weight')"),
    "old weight norm": (utils.weight_norm, "remove_weight_norm(module, 'weight')"),
    "torch's pruning": (lambda m: utils.prune.l1_unstructured(m, "weight", 0.3), "prune.remove(module, 'weight')"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_anew_is_refused_before_calibration_and_the_way_out_is_one(kind):
    change, way_out = COMPUTED[kind]
    model = Model()
    layer = model.blocks[1]["own"]
    change(layer)
    with pytest.raises(ValueError, match=r"'blocks.1.own.weight' .* computed anew before each pass") as error:
        prune(uncalled(model))
    assert way_out in str(error.value)
    model._forward_pre_hooks.clear()
    exec(str(error.value).split("`")[1], {"torch": torch, "module": layer})
    assert "blocks.1.own.weight" in prune(model).masks


# --- packed and absent ------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A layer as quantised checkpoints have them: numbers packed into integers, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 8, dtype=torch.int32))

    def forward(self, x):
        return x


def integers(model):
    model.blocks[0]["own"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    return "'blocks.0.own.weight' is stored as uint8"


def eight_bits(model):
    model.blocks[0]["own"].weight.data = model.blocks[0]["own"].weight.data.to(torch.float8_e4m3fn)
    return "'blocks.0.own.weight' is stored as float8_e4m3fn"


def buffers(model):
    model.blocks[0]["own"] = Packed()
    return "'blocks.0.own.qweight' is stored as int32"


def torchs_own(model):
    torch.ao.quantization.quantize_dynamic(model.blocks, {nn.Linear}, inplace=True)
    return "'blocks.0.own' is a Linear of packed numbers"


def absent(model):
    model.blocks[0]["own"].to("meta")
    return "'blocks.0.own.weight' .*meta device and has no values"


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("store", [integers, eight_bits, buffers, torchs_own, absent])
@pytest.mark.parametrize("name", ["omp", "wanda"])
def test_packed_and_absent_numbers_are_refused_before_calibration(store, name):
    model = Model()
    with pytest.raises(ValueError, match=store(model)):
        prune(uncalled(model), name)


def test_offloaded_models_are_refused():
    from accelerate import cpu_offload

    model = Model()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'embed.weight' .* meta device and has no values.*without offloading"):
        prune(model)


# --- shared -----------------------------------------------------------------------------------------------------------


def test_a_layer_that_shares_an_embedding_stays_whole_and_is_named():
    model = Model()
    model.blocks[1]["grow"].weight = model.embed.weight
    before = model.embed.weight.clone()
    with pytest.warns(UserWarning, match="128 of layers that share them with embeddings or heads: 'blocks.1.grow.wei"):
        masks = prune(model).masks
    assert list(masks) == ["blocks.0.own.weight", "blocks.0.grow.weight", "blocks.1.own.weight"]
    assert torch.equal(model.embed.weight, before)


def test_two_layers_of_one_weight_are_calibrated_by_the_inputs_of_both():
    model = Model()
    model.blocks[1]["own"].weight = model.blocks[0]["own"].weight
    inputs = []
    for block in model.blocks:
        block["own"].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    calibration = Calibration(model, model, model.anatomy(), lambda: BATCHES)
    weight = model.anatomy().weights(model)[0]
    found = collect(calibration, [weight], {"squares"}, BATCHES)[weight][0].squares
    assert len(inputs) == 2 and weight.path == "blocks.0.own.weight"
    torch.testing.assert_close(found, sum(x.square().sum((0, 1)) for x in inputs) / 6)


# --- evidence ---------------------------------------------------------------------------------------------------------


class Idle(Model):
    """Its second block's `grow` is computed and not used."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["own"](x)
        self.blocks[1]["grow"](x)
        return {"loss": self.blocks[0]["grow"](x).square().mean()}


@pytest.mark.parametrize("allocation", ["global", "uniform", "modality", "ecoflap", "multimodal"])
@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_without_a_gradient_exactly_the_asked_number_goes_and_the_matrix_is_named(allocation, sparsity):
    model = Idle()
    with pytest.warns(UserWarning, match="1 of 4 matrices had no gradient .* first 'blocks.1.grow.weight'"):
        masks = trimtab.prune(
            model, "snip", sparsity, BATCHES, model.anatomy(), allocation=allocation, allow_empty_tower=True
        ).masks
    asked = int(masks.prunable * sparsity)
    slack = 0 if allocation in ("global", "modality") else len(masks)  # counts of each tensor are cut to integers
    assert asked - slack <= masks.prunable - masks.kept <= asked
    grow = masks["blocks.1.grow.weight"]
    sizes = Idle().blocks[1]["grow"].weight.abs()
    assert grow.all() or not grow.any() or sizes[grow].min() >= sizes[~grow].max()


@pytest.mark.parametrize("name", ["snip", "itersnip", "chita", "tamt"])
def test_every_pruner_of_gradients_names_a_matrix_without_one(name):
    model = Idle()
    with pytest.warns(UserWarning, match="1 of 4 matrices had no gradient .* first 'blocks.1.grow.weight'"):
        settings = {"steps": 1} if name == "itersnip" else {}
        trimtab.prune(model, name, 0.3, BATCHES, model.anatomy(), allow_empty_tower=True, **settings)


@pytest.mark.parametrize("name", ["omp", "local-mp", "lamp", "l2", "wanda", "ria", "multiflow", "sparsegpt", "tamt"])
def test_a_model_of_equal_weights_loses_as_many_as_asked(name):
    model = Model()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    masks = prune(model, name).masks
    assert masks.prunable // 2 - len(masks) <= masks.prunable - masks.kept <= masks.prunable // 2
    if name != "l2":  # which divides by norms: the larger matrices have the smaller scores
        assert all(mask.any() and not mask.all() for mask in masks.values())  # in proportion, no matrix is emptied


def test_what_is_never_pruned_is_in_the_table():
    model = Model()
    model.blocks[0].register_parameter("scale", nn.Parameter(torch.ones(8)))
    model.blocks[0].register_parameter("places", nn.Parameter(torch.ones(5, 8)))
    lines = str(trimtab.adapt(model, anatomy=model.anatomy())).splitlines()
    assert "  prunable: 384 numbers in 4 matrices" in lines
    whole = [line.strip() for line in lines if "never pruned" in line]
    assert whole[0] == "never pruned: 128 embeddings: 'embed.weight'"
    assert whole[1].startswith("never pruned: 40 of unknown use") and whole[1].endswith("'blocks.0.places'")
    assert whole[2] == "never pruned: 8 vectors (norms, biases, scales): 'blocks.0.scale'"
    total = sum(kind.numbers for kind in left_whole(model.anatomy(), model))
    assert total + 384 == sum(p.numel() for p in model.parameters())
