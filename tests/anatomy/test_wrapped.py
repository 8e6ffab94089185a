"""Models that carry more than their own modules, and models that are wrapped."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError, read
from trimtab.anatomy.structure import (
    added_by,
    mark_added,
    mark_wraps,
    module_at,
    plain_module,
    plain_parameters,
    repeated,
    unwrapped,
)

SIZE = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, pad_token_id=0))


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZE))


def vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**SIZE, image_size=16, patch_size=8))


LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.mark.parametrize("build", [llama, roberta, vit])  # described, discovered, described
def test_a_model_with_lora_has_the_anatomy_that_it_had(build):
    model = build()
    before, weights = Anatomy.of(model), Anatomy.of(model).weights(model)
    rows, plain = before.rows(model), list(plain_parameters(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    assert Anatomy.of(model) == before and before.weights(model) == weights
    assert before.rows(model) == rows and list(plain_parameters(model)) == plain
    assert all("lora" not in w.path and w.of(model).ndim == 2 for w in weights)
    assert unwrapped(wrapped) is model

    found = Anatomy.of(wrapped)
    assert [len(t.blocks) for t in found.towers] == [len(t.blocks) for t in before.towers]
    inside = [w.of(wrapped) for w in found.weights(wrapped)]
    assert all(a is w.of(model) for a, w in zip(inside, weights, strict=True))
    assert all(module_at(wrapped, b.path) for b in found.blocks())


def test_a_tap_reads_what_the_wrapper_puts_out():
    model = llama().eval()
    found, ids = Anatomy.of(model), torch.tensor([[3, 4, 5]])
    part = found.towers[0].blocks[0].sublayers[1]
    tap = type(part.write)(part.write.path + ".down_proj")
    peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False))
    seen: list[torch.Tensor] = []
    read(model, tap, seen.append)
    read(model, part.write, seen.append)  # the MLP, which ends with it
    model(input_ids=ids)
    assert torch.equal(seen[0], seen[1])
    base = plain_module(model, tap.path)
    assert type(base) is nn.Linear and module_at(model, tap.path) is not base


def test_a_copy_that_peft_trains_in_a_tower_is_refused_by_pruning_only():
    model = roberta()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "intermediate"])
    )
    found = Anatomy.of(wrapped)
    with pytest.raises(AnatomyError, match=r"PEFT trains a copy of '.*layer.0.intermediate' .`modules_to_save`"):
        found.weights(wrapped)
    assert not any("modules_to_save" in path or "original" in path for path in plain_parameters(model))
    heads_only = peft.get_peft_model(
        roberta(), peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )
    assert len(Anatomy.of(heads_only).weights(heads_only)) == 3 * 6


class Side(nn.Module):
    """What a method might add: repeated layers of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16)) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor, **rest: object) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("build", [llama, roberta, vit])
def test_added_modules_are_no_part_of_the_description(build):
    model = build()
    before, weights = Anatomy.of(model), Anatomy.of(model).weights(model)
    model.side = mark_added(Side(), "lst")
    block = model.get_submodule(before.towers[0].blocks[0].path)
    block.adapter = mark_added(nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 16)), "das")
    assert Anatomy.of(model) == before and before.weights(model) == weights
    assert sum(r["params"] for r in before.rows(model)) == sum(
        p.numel() for n, p in model.named_parameters() if "side" not in n and "adapter" not in n
    )
    assert all("side" not in path for path, _ in repeated(model))
    twin = copy.deepcopy(model)
    assert added_by(twin.side) == "lst" and Anatomy.of(twin) == before


@pytest.mark.parametrize("build", [llama, roberta, vit])
def test_what_stands_in_place_of_a_block_is_no_block(build):
    model = build()
    before = Anatomy.of(model)
    paths = [b.path for b in before.blocks()]
    parent, _, name = paths[1].rpartition(".")
    setattr(model.get_submodule(parent), name, mark_added(Side(), "das"))
    assert [b.path for b in Anatomy.of(model).blocks()] == [paths[0], paths[2]]


def test_a_marked_wrapper_keeps_the_plain_paths():
    class Switch(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block, self.replacement = block, nn.Linear(16, 16)

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)

    model = roberta()
    before, plain = Anatomy.of(model), list(plain_parameters(model))
    for block in before.blocks():
        parent, _, name = block.path.rpartition(".")
        inside = model.get_submodule(block.path)
        setattr(model.get_submodule(parent), name, mark_wraps(Switch(inside), "block"))
    assert Anatomy.of(model) == before and list(plain_parameters(model)) == plain
    stream, mask = torch.ones(1), torch.zeros(1)
    switch = module_at(model, block.path)
    assert block.stream_of(switch, (), {"attention_mask": mask, "hidden_states": stream}) is stream


# --- wrappers ---------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("wrap", "name", "way_out"),
    [
        (torch.compile, "OptimizedModule", "`model._orig_mod`"),
        (nn.DataParallel, "DataParallel", "DistributedDataParallel"),
        (type("DistributedDataParallel", (Wrapper,), {"__module__": "torch.nn.parallel.distributed"}),
         "DistributedDataParallel", "`model.module`"),
        (type("FullyShardedDataParallel", (Wrapper,), {"__module__": "torch.distributed.fsdp"}),
         "FullyShardedDataParallel", "`model.module`"),
    ],
)  # fmt: skip
def test_a_wrapped_model_is_refused_with_the_way_out(wrap, name, way_out):
    wrapped = wrap(llama())
    for ask in (Anatomy.of, unwrapped):
        with pytest.raises(AnatomyError) as error:
            ask(wrapped)
        assert f"wrapped in {name}" in str(error.value) and way_out in str(error.value)


def test_what_is_no_wrapper_passes():
    from accelerate import Accelerator

    model = llama()
    assert unwrapped(model) is model
    model.compile()
    assert unwrapped(model) is model and Anatomy.of(model).towers
    prepared = Accelerator(cpu=True).prepare(model)
    assert unwrapped(prepared) is prepared and Anatomy.of(prepared).towers
