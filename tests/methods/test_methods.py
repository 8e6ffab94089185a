"""Every method on every backbone: it trains, is saved, and loads back into a model that answers the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trimtab import backbones
from trimtab.counting import saved_bytes
from trimtab.experiments import assembly, recipe, run, training
from trimtab.experiments import folder as folder_of_runs
from trimtab.methods import METHODS
from trimtab.methods.skip.search.das import Gates
from trimtab.storage.bits import pack, unpack

BACKBONES = {"tiny-clip": "retrieval", "tiny-vilt": "vqa", "tiny-blip": "vqa"}
NAMES = sorted(METHODS)
SETTINGS = {
    "das": {"skip": 2, "search_steps": 6, "turn": 2},
    "random-skip": {"skip": 2},
    "block-influence": {"skip": 2},
    "greedy-skip": {"skip": 2, "search_steps": 2},
    "exhaustive-skip": {"skip": 1, "search_steps": 2},
    "bandit-skip": {"skip": 2, "search_steps": 2, "evaluations": 6},
    "linear-skip": {"skip": 2, "search_steps": 2, "evaluations": 3},
    **{
        name: {"batches": 2, "batch_size": 8}
        for name in ("multiflow", "snip", "wanda", "ria", "sparsegpt", "chita", "tamt")
    },
    **{name: {"batches": 1, "batch_size": 8, "steps": 2} for name in ("itersnip", "chita++")},
}
# A pruner sees matrices and their inputs, whatever the towers are: the third backbone is pruned by two kinds only.
PAIRS = [(n, b) for n in NAMES for b in BACKBONES
         if b != "tiny-blip" or METHODS[n].lever != "prune" or n in ("multiflow", "snip")]  # fmt: skip


def build(tiny_raw, backbone: str, *methods: dict, **training_settings) -> recipe.Recipe:
    return recipe.expand(tiny_raw(backbone, BACKBONES[backbone], list(methods), **training_settings), "test")[0]


def attached(tiny_raw, backbone: str, *methods: dict) -> assembly.Assembly:
    """An assembly with its methods attached, on assumed plans and masks: no data needed."""
    parts = assembly.assemble(build(tiny_raw, backbone, *methods))
    for method in parts.methods:
        method.assume(parts.plain, parts.model.backbone.anatomy)
    parts.attach()
    return parts


# Each on one of the backbones in turn; `tests/test_every_pair.py` saves and loads every method on every family.
IN_TURN = [(n, b) for i, n in enumerate(NAMES) for b in [[b for m, b in PAIRS if m == n][i % 2]]]


@pytest.mark.parametrize(("name", "backbone"), IN_TURN)
def test_trains_saves_and_loads(name, backbone, tiny_raw, tmp_path):
    methods = [{"name": name, **SETTINGS.get(name, {})}]
    if METHODS[name].lever == "prune":
        methods.append({"name": "full"})
    folder = run.run(build(tiny_raw, backbone, *methods), tmp_path / "run", measure_costs=False)
    assert folder_of_runs.is_finished(folder)
    history = json.loads((folder / "metrics.json").read_text())["history"]
    assert history and all(torch.isfinite(torch.tensor(e["loss"])) for e in history)
    again = folder_of_runs.load(folder)
    parts = assembly.assemble(folder_of_runs.load_recipe(folder))
    table = parts.source.load(BACKBONES[backbone], "test")
    metrics, _ = training.evaluate(again, table)
    assert metrics == json.loads((folder / "metrics.json").read_text())["test"]


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_gradients_reach_what_is_trained_and_nothing_else(name, backbone, tiny_raw):
    parts = attached(tiny_raw, backbone, {"name": name, **SETTINGS.get(name, {})})
    model = parts.model.train()
    model(**model.example(4))["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert reached <= trained
    # LoRA's B starts at zero, so that A gets no gradient in the first step; unused parts of a tower get none either.
    silent = {n for n in trained - reached if "lora_A" not in n}
    assert len(silent) <= 0.2 * len(trained), sorted(silent)[:5]
    head = {n for n in trained if n.startswith("head.")}
    assert head
    if METHODS[name].lever == "tune" and name != "linear-probe":
        assert trained - head


@pytest.mark.parametrize("backbone", BACKBONES)
def test_unipt_back_propagates_through_no_block(backbone, tiny_raw):
    def kept(name: str) -> int:
        model = attached(tiny_raw, backbone, {"name": name}).model.train()
        batch = model.example(8)
        return saved_bytes(lambda: model(**batch)["loss"], model)

    unipt, lora, full = kept("unipt"), kept("lora"), kept("full")
    assert unipt <= lora / 3
    assert lora < full


@pytest.mark.parametrize("backbone", BACKBONES)
def test_unipt_leaves_a_frozen_backbone_in_evaluation_mode(backbone, tiny_raw):
    parts = attached(tiny_raw, backbone, {"name": "unipt"})
    parts.model.train()
    blocks = [parts.plain.get_submodule(b.path) for b in parts.model.backbone.anatomy.blocks()]
    assert not any(m.training for b in blocks for m in b.modules())
    assert parts.plain.unipt.training


@pytest.mark.parametrize("sparsity", [0.63, 0.75, 0.9])
@pytest.mark.parametrize("name", ["multiflow", "omp", "random-pruning"])
def test_every_pruned_weight_is_exactly_zero_after_training(name, sparsity, tiny_raw, tmp_path):
    methods = ({"name": name, "sparsity": sparsity, "batches": 1}, {"name": "full"})
    folder = run.run(build(tiny_raw, "tiny-clip", *methods, weight_decay=0.1), tmp_path / "run", measure_costs=False)
    stored = load_file(folder / "weights.safetensors")
    kept = total = 0
    for key, packed in stored.items():
        if not key.startswith("method.0."):
            continue
        weight = stored["learned." + key.removeprefix("method.0.")]
        mask = unpack(packed, weight.shape)
        assert not weight[~mask].any()
        assert weight[mask].count_nonzero() == mask.sum(), "kept weights are trained, none of them lands on zero"
        kept, total = kept + int(mask.sum()), total + mask.numel()
    assert total and abs(1 - kept / total - sparsity) < 0.002


def test_zeros_survive_under_lora(tiny_raw, tmp_path):
    methods = ({"name": "multiflow", "sparsity": 0.75, "batches": 1}, {"name": "lora"})
    folder = run.run(build(tiny_raw, "tiny-vilt", *methods), tmp_path / "run", measure_costs=False)
    model = folder_of_runs.load(folder)
    weight = model.backbone.model.vilt.encoder.layer[0].attention.attention.query.base_layer.weight
    assert 0.3 < float((weight == 0).float().mean()) < 1


@pytest.mark.parametrize("name", ["sparsegpt", "chita"])
def test_weights_that_a_pruner_changed_come_back_where_they_are_not_trained(name, tiny_raw, tmp_path):
    methods = ({"name": name, **SETTINGS[name]}, {"name": "linear-probe"})
    folder = run.run(build(tiny_raw, "tiny-clip", *methods), tmp_path / "run", measure_costs=False)
    stored = load_file(folder / "weights.safetensors")
    values = {k.removeprefix("method.0."): v for k, v in stored.items() if k.endswith(".values")}
    assert values
    model = folder_of_runs.load(folder).backbone.model
    fresh = assembly.assemble(folder_of_runs.load_recipe(folder)).plain
    changed = 0
    for key, kept in values.items():
        path = key.removesuffix(".values")
        weight = model.get_parameter(path)
        mask = unpack(stored[f"method.0.{path}"], weight.shape)
        assert torch.equal(weight[mask], kept) and not weight[~mask].any()
        changed += int((weight[mask] != fresh.get_parameter(path)[mask]).sum())
    assert changed


def test_packed_masks_come_back_and_a_wrong_size_is_refused():
    mask = torch.rand(7, 5) > 0.5
    assert torch.equal(unpack(pack(mask), mask.shape), mask)
    with pytest.raises(ValueError, match="takes 5 bytes, found 4"):
        unpack(pack(mask)[:4], mask.shape)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_skipped_blocks_are_gone(backbone, tiny_raw):
    before = attached(tiny_raw, backbone, {"name": "linear-probe"})
    after = attached(tiny_raw, backbone, {"name": "das", "skip": 3})
    plan = after.methods[0].state["skip"]
    assert len(plan) == 3
    for path in plan:
        gone = {n for n, _ in before.plain.get_submodule(path).named_parameters()}
        assert gone and not gone & {n for n, _ in after.plain.get_submodule(path).named_parameters()}
    assert sum(p.numel() for p in after.plain.parameters()) < sum(p.numel() for p in before.plain.parameters())


def test_trained_parameters_hardly_change_with_the_number_of_skipped_blocks(tiny_raw):
    counts = [
        sum(p.numel() for p in attached(tiny_raw, "tiny-vilt", {"name": "das", "skip": k}).plain.parameters()
            if p.requires_grad) for k in (0, 1, 2, 4)
    ]  # fmt: skip
    assert max(counts) - min(counts) < 0.06 * max(counts)  # an adapter's LayerNorm more or less


@pytest.mark.slow
def test_the_search_raises_the_gates_of_blocks_that_are_not_missed(tiny_raw, monkeypatch):
    """The whole search on a real model, its losses replaced by how many needed blocks a plan would skip."""
    from trimtab.methods.skip.search import das

    needed = {0, 1, 3, 4, 6, 7}

    class Judged(Gates):
        def update(self, subsets, losses):
            assert len(losses) == len(subsets) and all(loss > 0 for loss in losses)
            super().update(subsets, [float(len(needed & set(s))) for s in subsets])

    monkeypatch.setattr(das, "Gates", Judged)
    settings = {"search_steps": 45, "turn": 1, "subsets": 4, "gate_rate": 30.0, "dropout_in_rewards": False}
    r = build(tiny_raw, "tiny-vilt", {"name": "das", "skip": 2, **settings})
    parts = assembly.assemble(r)
    tables = [parts.source.load("vqa", split) for split in ("train", "validation")]
    parts.model.backbone.requires_grad_(False)
    parts.methods[0].prepare(training.TrainingSession(parts.model, *tables, r.training, r.seed, "test"))
    state = parts.methods[0].state
    assert state["skip"] == ["vilt.encoder.layer.2", "vilt.encoder.layer.5"]
    assert len(state["updates"]) == 30, "no update in the first third"


def test_gates_refuse_more_subsets_than_there_are():
    with pytest.raises(ValueError, match="fewer than 5 distinct plans"):
        Gates(4, 1).subsets(5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "das", "skip": 8}, "8 of 8 skippable blocks"),
        ({"name": "das", "towers": ["fusoin"]}, "did you mean 'fusion'"),
        ({"name": "das", "plan": ["vilt.encoder.layer.99"]}, "unknown block"),
        ({"name": "lora", "targets": ["qurey"]}, "did you mean 'query'"),
        ({"name": "unipt", "towers": ["text"]}, "unknown tower 'text'"),
    ],
)
def test_methods_that_do_not_fit_say_why(method, message, tiny_raw, tmp_path):
    with pytest.raises(ValueError, match=message):
        run.run(build(tiny_raw, "tiny-vilt", method), tmp_path / "run", measure_costs=False)


def test_adapters_attach_to_every_kind_of_block():
    for name in BACKBONES:
        anatomy = backbones.load(name, pretrained=False).anatomy
        for tower in anatomy.towers:  # attention and MLP, and cross-attention where a memory is read
            assert all(len(b.sublayers) == (3 if tower.memory else 2) for b in tower.blocks)
