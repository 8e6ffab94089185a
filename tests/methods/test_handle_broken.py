"""What users do to an adapted model between its levers, and arguments that contradict each other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.models.four import DECODER, DUAL, SINGLE, Tiny
from trimtab.anatomy import AnatomyError
from trimtab.methods.saved import FitError

BLOCK = "vilt.encoder.layer.1"


def step(fit: trimtab.Adapted, batch: dict, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(list(fit.parameters()), 1e-2, weight_decay=0.1)
    fit.keep(optimizer)
    for _ in range(steps):
        fit.with_task.train()
        optimizer.zero_grad()
        fit.with_task(**batch)["loss"].backward()
        optimizer.step()
    fit.with_task.eval()


def result(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch)["logits"]


def reloaded(fit: trimtab.Adapted, tiny: Tiny, folder) -> trimtab.Adapted:
    """The model saved and loaded on a new base, which must compute the same."""
    again = trimtab.adapt(tiny.make(), fit.save(folder))
    assert torch.equal(result(again.model, tiny.batch), result(fit.model, tiny.batch))
    return again


# --- what was trained is saved, also when it is frozen ----------------------------------------------------------------


@pytest.mark.parametrize(("tune", "heads"), [("lora", True), ("bitfit", False), ("full", False)])
def test_what_was_frozen_after_training_is_saved(tune, heads, tmp_path):
    fit = trimtab.adapt(SINGLE.make()).tune(tune, heads=heads)
    step(fit, SINGLE.batch)
    fit.model.requires_grad_(False)  # as one does before inference
    again = reloaded(fit, SINGLE, tmp_path / "a")
    assert not list(again.parameters())
    again.model.requires_grad_(False)
    reloaded(again, SINGLE, tmp_path / "b")  # what was loaded is not lost by the next save


def test_a_pruned_model_that_was_trained_and_then_tuned_beside_keeps_both(tmp_path):
    fit = trimtab.adapt(SINGLE.make()).prune("omp", 0.5)
    step(fit, SINGLE.batch)
    fit.tune("lora")
    step(fit, SINGLE.batch)
    again = reloaded(fit, SINGLE, tmp_path / "fit")
    assert again.masks.revived(again.model) == []
    trained = {n for n, p in fit.model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == trained
    assert all("lora" in n for n in trained)


def test_what_nothing_has_changed_is_not_saved(tmp_path):
    folder = trimtab.adapt(SINGLE.make()).prune("omp", 0.5).save(tmp_path / "pruned")
    fit = trimtab.adapt(SINGLE.make(), folder).tune("lora")
    assert all("lora" in name for name in fit.tensors())
    fit.model.to(torch.bfloat16)  # a cast changes no value that a cast of the base does not
    assert all("lora" in name for name in fit.tensors())


def test_a_frozen_weight_that_was_changed_by_hand_is_saved(tmp_path):
    fit = trimtab.adapt(SINGLE.make()).tune("lora")
    fit.model.classifier[0].weight.data.add_(1)
    reloaded(fit, SINGLE, tmp_path / "fit")


def test_adapters_trained_after_the_search_stay_as_they_are_under_a_side_network(tmp_path):
    data = {"train": [SINGLE.batch] * 2, "validation": [SINGLE.batch], "steps": 4, "turn": 1}
    fit = trimtab.adapt(SINGLE.make()).skip("das", skip=1, **data)
    step(fit, SINGLE.batch)
    before = {n: p.detach().clone() for n, p in fit.model.named_parameters() if p.requires_grad}
    before = {n: p for n, p in before.items() if not n.startswith("classifier")}
    fit.save(tmp_path / "skipped")
    for one in (fit, trimtab.adapt(SINGLE.make(), tmp_path / "skipped")):  # here, and in another process
        one.tune("unipt")
        now = dict(one.model.named_parameters())
        assert before.keys() <= now.keys()
        assert all(torch.equal(now[n], p) for n, p in before.items())
    reloaded(fit, SINGLE, tmp_path / "fit")


class Headed(nn.Module):
    """A task around a model, with running statistics."""

    def __init__(self, model: nn.Module):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.norm, self.head = model, nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, labels, **inputs):
        logits = self.head(self.norm(self.inner(**inputs).logits))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_counting_costs_moves_no_running_statistics_and_a_frozen_head_is_saved(tmp_path):
    model = SINGLE.make()
    around = Headed(model)
    fit = trimtab.adapt(model, with_task=around).tune("lora")
    step(fit, SINGLE.batch)
    before = result(around, SINGLE.batch)
    fit.cost(SINGLE.batch)
    assert torch.equal(result(around, SINGLE.batch), before)
    around.requires_grad_(False)
    folder = fit.save(tmp_path / "fit")
    base = SINGLE.make()
    again = Headed(base)
    trimtab.adapt(base, folder, with_task=again)
    assert torch.equal(result(again, SINGLE.batch), before)


def test_frozen_results_can_be_switched(tmp_path):
    fit = trimtab.adapt(SINGLE.make()).tune("lora", name="a", heads=True)
    step(fit, SINGLE.batch)
    first = result(fit.model, SINGLE.batch)
    fit.add("b")
    step(fit, SINGLE.batch)
    fit.model.requires_grad_(False)
    fit.switch("a")
    assert torch.equal(result(fit.model, SINGLE.batch), first)


# --- facts that a model does not state --------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 30, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize("tune", ["unipt", "lst", "sherl", "side-tuning"])
def test_a_side_network_beside_a_discovered_decoder_sees_no_later_token(tune):
    fit = trimtab.adapt(gpt2()).tune(tune, **({"initialise": "random"} if tune == "lst" else {}))
    with torch.no_grad():
        for parameter in fit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    words = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = result(fit.model, {"input_ids": words})[:, :-1]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("tune", "settings"), [("side-tuning", {}), ("deep-prompt", {"prompts": 2})])
def test_a_cache_that_is_given_by_position_is_noticed(tune, settings):
    fit = trimtab.adapt(gpt2()).tune(tune, **settings)
    words, how = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert fit.model.generate(words, **how).shape == (1, 6)  # it goes without one by itself
    with pytest.raises(ValueError, match="cache.*use_cache=False"):
        fit.model.generate(words, use_cache=True, **how)


class Narrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.back = nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32)

    def forward(self, hidden):
        return hidden + self.back(self.norm(self.wide(hidden)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Narrowing() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"loss": x.mean(), "logits": x}


@pytest.mark.parametrize(("tune", "settings"), [("unipt", {}), ("deep-prompt", {"prompts": 2})])
def test_a_width_that_is_described_wrongly_is_named(tune, settings):
    batch = {"x": torch.randn(2, 4, 32)}
    (tower,) = trimtab.Anatomy.of(Net(), batch).towers
    wrong = trimtab.Anatomy((replace(tower, blocks=tuple(replace(b, width=48) for b in tower.blocks), unknown=()),))
    fit = trimtab.adapt(Net(), anatomy=wrong).tune(tune, **settings)
    with pytest.raises(ValueError, match=r"'blocks.0' takes in \(2, 4, 32\), expected the width 48"):
        fit.cost({"x": torch.randn(2, 4, 32)})


def test_a_dual_encoder_beside_side_networks_can_be_cast():
    fit = trimtab.adapt(DUAL.make()).tune("unipt")
    fit.model.to(torch.bfloat16)
    batch = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in DUAL.batch.items()}
    assert torch.isfinite(fit.model(**batch).loss)


def test_lora_is_not_put_over_a_layer_that_peft_has_wrapped():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(SINGLE.make(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="is wrapped by PEFT already: merge that first"):
        trimtab.adapt(model).tune("lora")


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    masks = trimtab.adapt(SINGLE.make()).prune("omp", 0.5).masks
    with pytest.raises(ValueError, match="have the sparsity 0.5000, the settings say 0.9"):
        trimtab.adapt(SINGLE.make()).prune("omp", 0.9, masks=masks)
    assert trimtab.adapt(SINGLE.make()).prune("omp", masks=masks).sparsity == masks.sparsity
    with pytest.raises(ValueError, match="masks: expected a `Masks`, a file of them or a folder, found dict"):
        trimtab.adapt(SINGLE.make()).prune("omp", masks={"a": torch.ones(1)})
    with pytest.raises(ValueError, match="skip and budget say twice what is skipped"):
        trimtab.adapt(SINGLE.make()).skip("das", skip=1, budget="25% macs")
    plan = trimtab.adapt(SINGLE.make()).skip("das", plan=[BLOCK], adapters="none").plan
    plan.save(str(tmp_path / "plan.json"))  # a path as a string
    with pytest.raises(ValueError, match="skip and plan say twice"):
        trimtab.adapt(SINGLE.make()).skip("das", skip=2, plan=tmp_path / "plan.json")


def test_heads_are_checked_before_anything_is_attached():
    fit = trimtab.adapt(SINGLE.make())
    with pytest.raises(ValueError, match="did you mean 'classifier'"):
        fit.tune("lora", heads=["clasifier"])
    assert list(fit) == []
    fit.tune("lora", heads="classifier")
    with pytest.raises(ValueError, match="stands in the tower 'fusion', through which none passes"):
        trimtab.adapt(SINGLE.make()).tune("unipt", heads=[BLOCK])


def test_a_head_of_a_model_in_training_drops_what_it_drops():
    model = SINGLE.make()
    model.classifier = nn.Sequential(nn.Dropout(0.5), model.classifier)
    fit = trimtab.adapt(model.train()).tune("lora", heads=["classifier"])
    assert fit.model.classifier.training and fit.model.classifier[0].training


def test_a_description_that_does_not_fit_is_refused():
    model = SINGLE.make()
    good = trimtab.Anatomy.of(model)
    given = replace(good, source="given")
    for wrong, message in (
        (replace(given, heads=("clasifier",)), "heads name 'clasifier'.* did you mean 'classifier'"),
        (replace(given, towers=(replace(given.towers[0], scope=("vilt.encodr",)),)), "outside the scope of its tower"),
        (replace(given, towers=(replace(given.towers[0], scope=(*given.towers[0].scope, "vilt.embedings")),)),
         "scope of tower 'fusion' name 'vilt.embedings'"),
    ):  # fmt: skip
        with pytest.raises(AnatomyError, match=message):
            trimtab.adapt(model, anatomy=wrong)
    assert trimtab.adapt(model, anatomy=given).anatomy == good


def test_a_model_of_which_a_part_is_adapted_is_refused():
    model = SINGLE.make()
    trimtab.adapt(model.vilt).tune("bitfit")
    with pytest.raises(ValueError, match=r"'vilt' of this .* is adapted already \(bitfit\)"):
        trimtab.adapt(model)


def test_what_is_no_model_with_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found str: load it first"):
        trimtab.adapt("a/model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        trimtab.adapt(DECODER.make().to("meta"))
    with pytest.raises(ValueError, match="does not hold the plain model"):
        trimtab.adapt(SINGLE.make(), with_task=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing is attached"):
        trimtab.adapt(SINGLE.make()).save(tmp_path / "nothing")


def test_a_folder_that_was_changed_is_named(tmp_path):
    folder = trimtab.adapt(SINGLE.make()).tune("bitfit").save(tmp_path / "fit")
    whole = json.loads((folder / "fit.json").read_text())

    def changed(**more) -> None:
        (folder / "fit.json").write_text(json.dumps({**whole, **more}))

    changed(methods=[{"name": "bitfit"}])
    with pytest.raises(FitError, match="lacks 'lever'"):
        trimtab.adapt(SINGLE.make(), folder)
    changed(methods="bitfit")
    with pytest.raises(FitError, match="lacks 'name'"):
        trimtab.adapt(SINGLE.make(), folder)
    changed(base={"model": "Other"})
    with pytest.raises(FitError, match="base lacks 'precision'"):
        trimtab.adapt(SINGLE.make(), folder)
    changed()
    other = SINGLE.make()
    other.more = nn.Linear(2, 2)
    with pytest.raises(FitError, match="parameters, this one has"):  # not: in another precision
        trimtab.adapt(other, folder)


def test_the_zeros_are_kept_through_accelerates_optimiser():
    accelerate = pytest.importorskip("accelerate")
    fit = trimtab.adapt(SINGLE.make()).prune("omp", 0.5)
    optimizer = torch.optim.AdamW(list(fit.parameters()), 1e-2, weight_decay=0.1)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(fit.model, optimizer)
    fit.keep(optimizer)
    model(**SINGLE.batch).loss.backward()
    optimizer.step()
    assert fit.masks.revived(fit.model) == []


class Paired(nn.Module):
    """A block that returns a tuple, as some of transformers' do."""

    def __init__(self):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + self.map(self.norm(hidden)), None


class PairedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Paired() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)[0]  # of a lone tensor this would be the first sample
        return {"loss": x.mean(), "logits": x}


@pytest.mark.parametrize("search", [False, True])
def test_a_block_that_returns_a_tuple_is_not_skipped_as_one_that_does_not(search):
    batch = {"x": torch.randn(2, 4, 16)}
    (tower,) = trimtab.Anatomy.of(PairedNet(), batch).towers
    wrong = tuple(replace(b, returns_tuple=False, also=()) for b in tower.blocks)
    fit = trimtab.adapt(PairedNet(), anatomy=trimtab.Anatomy((replace(tower, blocks=wrong),)))
    with pytest.raises(ValueError, match=r"returns a tuple.*set `returns_tuple=True`"):
        if search:
            fit.skip("block-influence", skip=1, adapters="none", train=[batch], validation=[batch])
        else:
            fit.skip("das", plan=["blocks.1"], adapters="none")
            fit.model(**batch)


def test_weights_that_were_held_before_pruning_have_its_zeros(tmp_path):
    fit = trimtab.adapt(SINGLE.make())
    fit.tune("full")
    fit.add("b")
    fit.prune("omp", sparsity=0.5)
    fit.switch("default")
    assert not fit.masks.revived(fit.model)
    fit.save(tmp_path / "fit")


def test_a_loop_that_trains_around_a_pruned_model_has_nothing_to_keep():
    inner = SINGLE.make()
    outer = torch.nn.ModuleDict({"inner": inner, "head": torch.nn.Linear(4, 2)})
    fit = trimtab.adapt(inner, with_task=outer)
    fit.prune("omp", sparsity=0.5)
    fit.tune("linear-probe")
    assert fit.keep(torch.optim.AdamW(outer["head"].parameters())) == []
