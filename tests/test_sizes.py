"""Costs from sizes alone: what a batch holds has values, data and weights need not be there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.models.chats import write_chat
from trimtab.data.formats import gqa, vqav2
from trimtab.experiments import assembly, recipe
from trimtab.experiments import estimate as cost
from trimtab.methods import METHODS
from trimtab.sizes import as_usual, sizes_only
from trimtab.tasks import TASKS

CHOICES = {
    "rows of a mask": lambda x, ids: x[ids > 1],
    "a mask along one axis": lambda x, ids: x[:, ids[0] == 1],
    "masked select": lambda x, ids: x.masked_select((ids > 1)[..., None]),
    "numbers of a mask": lambda x, ids: x[(ids == 3).nonzero(as_tuple=True)],
    "a number": lambda x, ids: x.flatten(0, 1)[: int(ids.max())],
    "repeats": lambda x, ids: x.flatten(0, 1).repeat_interleave(ids.flatten(), dim=0),
    "a list": lambda x, ids: x.flatten(0, 1).split([ids.tolist()[1][1], 1], dim=0)[0],
    "a tensor of tensors": lambda x, ids: x.flatten(0, 1)[: int(torch.tensor([ids.min(), ids.max()])[1])],
    "written into": lambda x, ids: x[torch.zeros(2, 2, dtype=torch.bool).index_put_((ids[:, 0] > 1,), ids[0] > 0)],
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_shapes_that_values_decide_are_those_of_a_real_run(choose):
    def run() -> tuple[int, ...]:
        x = nn.Linear(8, 8)(torch.randn(2, 2, 8))
        out = choose(x, torch.tensor([[1, 1], [4, 3]]))
        out.sum().backward()
        return tuple(out.shape)

    with sizes_only():
        found = run()
    assert found == run()


def test_what_depends_on_a_weight_has_no_value():
    with sizes_only():
        hidden, ids = nn.Linear(8, 1)(torch.randn(4, 8)), torch.tensor([1, 2, 3, 4])
        with pytest.raises(RuntimeError):
            hidden[hidden[:, 0] > 0]
        part = ids[:2]
        assert int(ids.sum()) == 10
        ids[0] = hidden.sum().long()
        for spoilt in (ids, part):  # both share the memory that was written into
            with pytest.raises(RuntimeError):
                int(spoilt.sum())


def test_tensors_as_usual_within():
    with sizes_only():
        with as_usual():
            real = torch.arange(4).numpy().sum()
        assert real == 6 and torch.zeros(3).numel() != 0


# --- data that are not there ------------------------------------------------------------------------------------------


def priced(data, task="vqa"):
    raw = {"backbone": {"name": "tiny-vilt"}, "task": task, "data": data, "methods": ["linear-probe"],
           "training": {"batch_size": 2}}  # fmt: skip
    return recipe.expand(raw, "test")[0]


def test_the_published_number_stands_for_answers_that_are_not_there(tmp_path):
    r = priced({"name": "vqav2", "root": str(tmp_path / "none")})
    found = cost.estimate(r)
    width = 128
    assert found["trainable_params"] == width * 2 * width + 6 * width + (2 * width + 1) * vqav2.VQAv2.sizes["answers"]
    assert vqav2.VQAv2.sizes == {"answers": 3129} and gqa.GQA.sizes == {"answers": 1842}
    assert found["assumes"] == [f"3,129 answers, the published number of data 'vqav2', since '{tmp_path}/none' is not "
                                "there"]  # fmt: skip
    with pytest.raises(recipe.RecipeError, match="there is no such folder"):
        assembly.assemble(r)  # a run reads them


def test_a_folder_that_is_there_is_read(tmp_path):
    with pytest.raises(recipe.RecipeError, match="v2_"):
        cost.estimate(priced({"name": "vqav2", "root": str(tmp_path)}))
    missing = priced({"name": "vqav2", "root": str(tmp_path / "none"), "answer_list": str(tmp_path / "list.json")})
    with pytest.raises(recipe.RecipeError, match=r"list\.json"):
        cost.estimate(missing)
    (tmp_path / "list.json").write_text(json.dumps(["yes", "no"]))
    assert cost.estimate(missing)["assumes"] == []


def test_rows_of_ones_own_need_their_number(tmp_path):
    data = {"name": "files", "train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")}
    with pytest.raises(recipe.RecipeError, match=r"rows\.jsonl: .*how many answers .*data\.count=NUMBER"):
        cost.estimate(priced(data))
    found = cost.estimate(priced({**data, "count": 7}))
    assert "7 answers, as data.count says" in found["assumes"][0]
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "1.png", "question": "a", "answer": "b"}))
    assert cost.estimate(priced({**data, "count": 8}))["assumes"] == []  # the rows are there, and say 1
    with pytest.raises(recipe.RecipeError, match="count: expected at least 1, found 0"):
        cost.estimate(priced({**data, "count": 0}))


# --- weights that are not there ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    folder = write_chat("qwen3_vl", tmp_path_factory.mktemp("chat"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def test_a_chat_model_is_counted_from_its_config(without_weights, monkeypatch):
    found = recipe.read("own/answer", [f"backbone.name={without_weights}", "training.batch_size=3",
                                       "variants=[lora,prune-lora]"])  # fmt: skip
    counted = cost._estimate
    calls = []
    monkeypatch.setattr(cost, "_estimate", lambda r: calls.append(r) or counted(r))
    lora, pruned = (cost.estimate(r) for r in found)
    assert len(calls) == 2  # sizes were enough: no second time on real weights
    assert lora["macs"] > 0 and lora["nonzero_params"] == lora["params"] > pruned["nonzero_params"]
    for r in found:
        with pytest.raises(recipe.RecipeError, match="safetensors"):
            assembly.assemble(r)


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_rows_of_an_example_are_those_of_the_processor(name, tmp_path):
    from trimtab import backbones

    backbone = backbones.load(write_chat(name, tmp_path), kind="chat")
    task = TASKS["answer"]()
    row = {"images": [backbone.picture()], "question": " ".join(["a"] * backbone.counted_text), "answer": "a"}
    whole, grown = task.collate(backbone, [row] * 4, True), task.example(backbone, 4)
    assert whole.keys() == grown.keys() and all(torch.equal(whole[k], grown[k]) for k in whole)


def test_a_large_model_that_looks_at_its_weights_is_refused(tiny_raw, monkeypatch):
    (r,) = recipe.expand(tiny_raw("tiny-vilt", "vqa", ["full"], batch_size=2), "test")

    def looks(self, *_: object) -> torch.Tensor:
        return F.relu(self.head[0].weight[self.head[0].weight > 0]).sum()

    monkeypatch.setattr("trimtab.tasks.vqa.VQA._logits", lambda task, backbone, head, batch: looks(
        type("Both", (), {"head": head})()) * torch.ones(2, len(task.answers)))  # fmt: skip
    monkeypatch.setattr(cost, "MOST_REAL", 10)
    with pytest.raises(recipe.RecipeError, match=r"cannot be counted from sizes alone .* its weights would take"):
        cost.estimate(replace(r, seed=3))


# --- what is shipped --------------------------------------------------------------------------------------------------

# Of each task and kind of head one; `benchmarks/cost.py` counts all variants of all recipes.
SHIPPED = [
    ("pretrain/tiny-vilt", "default"), ("prune/tune_tiny-blip_captioning", "multiflow-0.75"),
    ("published/unipt_clip4clip_msvd", "unipt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), SHIPPED)
def test_a_shipped_recipe_is_counted_from_sizes(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data there
    (r,) = recipe.read(name, [f"variants=['{variant}']", "seeds=[0]", "training.batch_size=2"])
    with sizes_only():
        found = cost._estimate(replace(r, backbone=replace(r.backbone, pretrained=False, start_from=None)))
    assert found["macs"] > 0 and found["training_peak_bytes"] > 4 * found["params"]
    assert found["nonzero_params"] < found["params"] if "multiflow" in variant else True


def test_pruners_that_cost_the_same_are_counted_once(tiny_raw, monkeypatch):
    monkeypatch.setattr(cost, "_COUNTED", {})
    found = []
    for name, sparsity in (("omp", 0.25), ("lamp", 0.75)):
        raw = tiny_raw("tiny-vilt", "vqa", [{"name": name, "sparsity": sparsity}, "full"], batch_size=2)
        found.append(recipe.expand(raw, "test")[0])
    omp, lamp = map(cost.estimate, found)
    assert len(cost._COUNTED) == 1
    monkeypatch.setattr(cost, "_COUNTED", {})
    assert cost.estimate(found[1]) == lamp and omp["nonzero_params"] > lamp["nonzero_params"]  # as if it stood alone
    keys = [METHODS.make("sparsegpt", sparsity=s).costs_as() for s in (0.5, 0.75)]
    assert keys[0] != keys[1] != METHODS.make("omp", sparsity=0.75).costs_as()  # it stores the weights that it keeps
