"""Masks that were found before keep what the settings say, on the model that they are for; what is saved is checked."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import trimtab
from trimtab.storage import sparse


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=layers, n_head=2, vocab_size=40, n_positions=16)).eval()


@pytest.fixture
def masks() -> trimtab.Masks:
    return trimtab.prune(gpt2(), "omp", [0.5])[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pattern": "2:4"}, "pattern '2:4': masks do not have it"), ({"allocation": "global"}, "allocation: masks have"),
     ({"floor": 0.1}, "floor: masks have"), ({"sparsity": 0.6}, "the settings say 0.6")],
    ids=["pattern", "allocation", "floor", "sparsity"],
)  # fmt: skip
def test_given_masks_that_are_not_what_the_settings_say_are_refused(settings, message, masks):
    with pytest.raises(ValueError, match=message):
        trimtab.adapt(gpt2()).prune("omp", masks=masks, **settings)


def test_given_masks_of_a_pattern_are_taken_as_such():
    found = trimtab.adapt(gpt2()).prune("omp", pattern="2:4").masks
    again = trimtab.adapt(gpt2()).prune("omp", pattern="2:4", masks=found).masks
    assert all(torch.equal(again[path], found[path]) for path in found)


def test_a_prunable_weight_without_a_mask_is_warned_of(masks):
    with pytest.warns(UserWarning, match="4 of 12 prunable weights have no mask and stay as they are"):
        trimtab.adapt(gpt2(3)).prune("omp", masks=masks)


@pytest.mark.parametrize("pruner", ["omp", "local-mp", "modality-mp", "l2"])
def test_equal_scores_of_weights_that_are_stored_in_out(pruner):
    model = gpt2().to(torch.bfloat16)  # few numbers, so that many are equal
    trimtab.adapt(model).prune(pruner, sparsity=0.5)
    pruned = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    assert sum(int((p == 0).sum()) for p in pruned) == pytest.approx(0.5 * sum(p.numel() for p in pruned), rel=0.01)


def test_scores_of_two_precisions_are_compared():
    model = gpt2()
    model.transformer.h[0].double()
    found = trimtab.prune(model, "omp", [0.5])[0]
    assert found.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_floor_of_all_that_is_kept_gives_every_tensor_the_same():
    found = trimtab.prune(gpt2(), "omp", [0.63], allocation="global", floor=0.37)[0]
    assert all(bits.kept / bits.shape.numel() == pytest.approx(0.37, abs=0.005) for bits in found.bits.values())


@pytest.mark.parametrize("as_file", [True, False])
def test_masks_with_new_values_go_onto_the_weights_that_they_were_made_of(as_file, tmp_path):
    words = torch.arange(24).reshape(2, 12)
    batches = [{"input_ids": words, "attention_mask": torch.ones_like(words)}]
    fit = trimtab.adapt(gpt2())
    fit.prune("sparsegpt", sparsity=0.5, batches=batches)
    if as_file:
        fit.masks.save(tmp_path / "masks")
    else:
        fit.save(tmp_path / "masks")
    again = trimtab.adapt(gpt2())
    again.prune("sparsegpt", masks=tmp_path / "masks")
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), fit.model.parameters(), strict=True))
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    before = other.transformer.h[0].mlp.c_fc.weight.clone()
    with pytest.raises(
        ValueError, match="sparsegpt made of other weights than those of this model, first '.*h.1.mlp.c_fc.weight'"
    ):
        trimtab.adapt(other).prune("sparsegpt", masks=tmp_path / "masks")
    assert torch.equal(other.transformer.h[0].mlp.c_fc.weight, before)
    trimtab.adapt(gpt2().bfloat16()).prune("sparsegpt", masks=tmp_path / "masks")  # the same checkpoint, rounded


# --- saved ------------------------------------------------------------------------------------------------------------


def test_weights_held_under_another_name_are_checked_for_zeros(tmp_path):
    fit = trimtab.adapt(gpt2()).prune("omp", sparsity=0.5).tune("full")
    with torch.no_grad():
        fit.model.transformer.h[0].mlp.c_fc.weight.fill_(1)  # a loop that does not keep the zeros
    fit.add("second")
    fit.masks.enforce(fit.model)
    with pytest.raises(ValueError, match="have regained non-zeros, first 'transformer.h.0.mlp.c_fc.weight'"):
        fit.save(tmp_path / "saved", name="default")
    assert not (tmp_path / "saved").exists()


def test_numbers_that_only_changed_places_are_saved(tmp_path):
    fit = trimtab.adapt(gpt2()).prune("omp", sparsity=0.5)
    with torch.no_grad():
        fit.model.transformer.wpe.weight.copy_(fit.model.transformer.wpe.weight.flip(0))
    ids = torch.randint(40, (2, 5))
    fit.save(tmp_path / "saved")
    again = trimtab.adapt(gpt2(), tmp_path / "saved")
    assert torch.equal(again.model(ids).logits, fit.model(ids).logits)


def test_a_mapping_that_makes_its_tensors_when_it_is_looked_at_is_stored_whole(tmp_path):
    class Made(Mapping):
        def __getitem__(self, name):
            return torch.full((64, 64), float(name[1:]))

        def __iter__(self):
            return (f"w{i}" for i in range(6))

        def __len__(self):
            return 6

    sparse.save_file(Made(), tmp_path)
    stored = sparse.load_file(tmp_path)
    assert [stored[f"w{i}"].unique().tolist() for i in range(6)] == [[float(i)] for i in range(6)]


def test_types_that_the_sparse_layout_would_lose_are_refused(tmp_path):
    config = MixtralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, num_local_experts=2, vocab_size=40)  # fmt: skip
    model = MixtralForCausalLM(config)
    trimtab.save_pretrained(model, tmp_path / "one", sparse=True)
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(ValueError, match="has weights of several types"):
        trimtab.save_pretrained(model, tmp_path / "two", sparse=True)
    assert not (tmp_path / "two").exists()
