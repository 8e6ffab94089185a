"""Policies: the first pattern decides, everything is covered, nothing is idle, and a run keeps what they came to."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trimtab.experiments import assembly, recipe, run, training
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.policy import Rule, apply


def assembled(tiny_raw, *methods, backbone="tiny-clip", task="retrieval", policy=()):
    raw = {**tiny_raw(backbone, task, list(methods)), "policy": list(policy)}
    parts = assembly.assemble(recipe.expand(raw, "test")[0])
    parts.attach()
    return parts


def trained(parts) -> set[str]:
    return {n for n, p in parts.model.named_parameters() if p.requires_grad}


def test_the_first_pattern_decides_for_each_tower(tiny_raw):
    policy = [{"match": "@vision", "do": "frozen"}, {"match": "*.text_model.*.bias", "do": "train", "rate": 0.5}, "*"]
    names = trained(assembled(tiny_raw, "lora", policy=policy))
    assert not any("vision_model" in n for n in names)
    assert any(n.endswith("fc1.bias") and "text_model" in n for n in names)
    assert any("text_model" in n and "lora_A" in n for n in names), "left to the method"
    assert any(n.startswith("head.") for n in names)


def test_a_tower_owns_its_side_network(tiny_raw):
    names = trained(assembled(tiny_raw, "unipt", policy=[{"match": "@text", "do": "frozen"}, "*"]))
    assert any(".unipt.vision." in n for n in names) and not any(".unipt.text." in n for n in names)


def test_heads_of_the_backbone_can_be_named(tiny_raw):
    policy = [{"match": "@heads", "do": "train"}, "*"]
    assert "backbone.model.visual_projection.weight" in trained(assembled(tiny_raw, "lora", policy=policy))


def test_what_no_loss_reaches_is_not_called_trained(tiny_raw):
    """UniPT takes the place of CLIP's projections: they are frozen, counted as such and named."""
    parts = assembled(tiny_raw, "unipt", policy=[{"match": "@heads", "do": "train"}, "*"])
    assert not any("visual_projection" in n for n in trained(parts))
    assert parts.resolved.rows[0].trained == sum(p.numel() for n, p in parts.model.named_parameters()
                                                 if n in parts.resolved.names[0] and p.requires_grad)  # fmt: skip
    assert "backbone.model.visual_projection.weight" in parts.resolved.idle
    assert "get no gradient and stay frozen: backbone.model." in parts.resolved.table()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([{"match": "backbone.*"}], r"no pattern covers 'head\..*nearest pattern: 'backbone"),
        ([{"match": "backbone.model.vision_modell.*"}, "*"],
         r"'backbone.model.vision_modell.\*' matches no parameter: nearest names: 'backbone.model.vision_model"),
        (["*", {"match": "head.*", "do": "train"}], "earlier patterns take all"),
        ([{"match": "@vison"}, "*"], "unknown tower '@vison': did you mean '@vision'"),
        ([{"match": "*", "do": "freeze"}], r"policy.0: .*do"),
        ([{"match": "*", "rates": 2}], "unknown key 'rates': did you mean 'rate'"),
        ([{"do": "train"}], "expected a mapping with a 'match'"),
        ([{"match": "*", "rate": -1}], "rate must be at least 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(policy, message, tiny_raw):
    with pytest.raises(recipe.RecipeError, match=message):
        assembled(tiny_raw, "unipt", policy=policy)


def test_rates_reach_the_optimiser(tiny_raw):
    policy = [{"match": "@vision", "rate": 0.25}, {"match": "head.*", "do": "train", "rate": 2.0}, "*"]
    parts = assembled(tiny_raw, "unipt", policy=policy)
    spec = recipe.TrainingSpec(learning_rate=1e-3, head_multiplier=3.0)
    trainer = training._Trainer.__new__(training._Trainer)
    trainer.spec, trainer.rates, trainer.model, trainer.optimizer = spec, parts.resolved.rates, parts.model, None
    trainer.create_optimizer()
    names = {id(p): n for n, p in parts.model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert rates.keys() == trained(parts)
    for name, rate in rates.items():
        factor = 6.0 if name.startswith("head.") else 0.25 if ".unipt.vision." in name else 1.0
        assert rate == pytest.approx(1e-3 * factor), name


def test_a_run_prints_and_keeps_the_table_and_comes_back(tiny_raw, tmp_path, capsys):
    raw = tiny_raw("tiny-clip", "retrieval", ["unipt"])
    raw["policy"] = [{"match": "@text", "do": "frozen"}, {"match": "*.norm*", "do": "frozen"}, "*"]
    with pytest.raises(recipe.RecipeError, match=r"'\*.norm\*' matches no parameter"):
        run.run(recipe.expand(raw, "test")[0], tmp_path / "wrong")
    raw["policy"][1:2] = []
    r = recipe.expand(raw, "test")[0]
    folder = run.run(r, tmp_path / "run", measure_costs=False)
    table = json.loads((folder / "policy.json").read_text())
    assert [row["match"] for row in table] == ["@text", "*"] and table[0]["trained"] == 0 < table[1]["trained"]
    printed = capsys.readouterr().out
    assert "what is trained" in printed and "@text" in printed
    stored = [name for name in load_file(folder / "weights.safetensors") if "unipt.text." in name]
    assert stored and all(name.startswith("kept.") for name in stored), "frozen as they were drawn, and kept as such"
    assert folder_of_runs.is_finished(folder, r)
    parts = folder_of_runs.load_assembly(folder)
    assert not any(".unipt.text." in n for n in trained(parts))


def test_works_on_a_plain_model():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    from trimtab.anatomy import Anatomy, Block, Tap, Tower

    anatomy = Anatomy((Tower("a", "text", (Block("a", 2),), ("a",), output=Tap("a")),), heads=("b",))
    resolved = apply([Rule("@a", "frozen"), Rule("@heads", "train", 2.0)], model, anatomy)
    assert resolved.rates["b.bias"] == 2.0 and not model["a"].weight.requires_grad
    assert resolved.table().splitlines()[1].split() == ["@a", "frozen", "1", "2", "6", "0", "a.weight"]
