"""What no gradient reaches is not called trained; a plan that cuts a tower off, and modes in a pass."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

import trimtab
from tests.models.census import OverTime, limit
from tests.models.inputs import inputs
from tests.models.shrink import build, tiny_config
from trimtab.anatomy import Anatomy
from trimtab.methods.base import METHODS
from trimtab.methods.session import BatchSession
from trimtab.methods.stack import Stack


class Attention(nn.Module):
    """One with a part that only says which tokens are seen; `mute` makes nothing of what it computes."""

    def __init__(self, mute: bool):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.choice = nn.Linear(16, 1)
        self.mute, self.chooses = mute, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.choice(x).squeeze(-1).topk(3).indices  # (B, 3)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        hidden = torch.full_like(scores, -1e4).scatter(2, seen[:, None].expand(-1, x.shape[1], -1), 0.0)
        out = (scores + hidden if self.chooses else scores).softmax(-1) @ self.value(x)
        return torch.zeros_like(out) if self.mute else out


class Block(nn.Module):
    def __init__(self, mute: bool, bias: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16, bias=False), Attention(mute)
        self.up, self.down = nn.Linear(16, 32, bias=bias), nn.Linear(32, 16, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(self.up(x).relu())


class Inner(nn.Module):
    def __init__(self, mute: bool, bias: bool):
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Block(mute, bias) for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class Model(nn.Module):
    """It counts on being in the mode of the model inside."""

    def __init__(self, mute: bool = False, bias: bool = True):
        super().__init__()
        self.inner, self.head = Inner(mute, bias), nn.Linear(16, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self.training == self.inner.training
        if (input_ids < 0).any():
            raise IndexError("no such word")
        return self.head(self.inner(input_ids))


BATCH = {"input_ids": torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))}


def made(**how: bool) -> Model:
    torch.manual_seed(0)
    return Model(**how).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_weights_without_a_gradient_are_seen() -> None:
    severed = Anatomy.of(made(), BATCH).severed
    assert severed == tuple(f"inner.blocks.{i}.attention.choice" for i in range(3))
    mute = Anatomy.of(made(mute=True), BATCH).severed
    assert {p.rpartition(".")[2] for p in mute} == {"norm", "query", "key", "value", "choice"}


@pytest.mark.parametrize("method", ["bitfit", "norm-tuning", "lora"])
def test_all_that_is_trained_gets_a_gradient(method: str) -> None:
    model = made()
    trimtab.adapt(model, example=BATCH).tune(method)
    model.train()
    model(**BATCH).square().sum().backward()
    assert trained(model) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained(model) and not any("choice" in name for name in trained(model))


def test_biases_that_only_decide_which_tokens_are_seen_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no bias, but for those .*'inner.blocks.0.attention.choice.bias'"):
        trimtab.adapt(made(bias=False), example=BATCH).tune("bitfit")


def test_an_attention_of_which_nothing_is_read_gets_no_update() -> None:
    with pytest.raises(ValueError, match=r"no gradient goes back to 'inner.blocks.0.attention.query'"):
        trimtab.adapt(made(mute=True), example=BATCH).tune("lora")


def test_what_was_seen_is_kept_in_a_folder(tmp_path) -> None:
    fit = trimtab.adapt(made(), example=BATCH).tune("bitfit")
    fit.save(tmp_path / "fit")
    again = made()
    fit = trimtab.adapt(again, tmp_path / "fit")
    assert fit.anatomy.severed and not any("choice" in name for name in trained(again))


# --- a tower of which the number of tokens changes -------------------------------------------------------------------


class Merging(Model):
    """Two tokens become one before the last block; the width stays."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.inner.words(input_ids)
        for i, block in enumerate(self.inner.blocks):
            x = block(x.unflatten(1, (-1, 2)).mean(2) if i == 2 else x)
        return self.head(x)


def merging() -> Merging:
    torch.manual_seed(0)
    model = Merging().eval()
    for block in model.inner.blocks:
        block.attention.chooses = False
    return model


def test_unipt_reads_the_last_map_of_each_number_of_tokens() -> None:
    model = merging()
    fit = trimtab.adapt(model, example=BATCH)
    assert [b.begins for b in fit.anatomy.blocks()] == [False, False, True]
    fit.tune("unipt")
    model.train()
    model(**BATCH).square().sum().backward()
    assert trained(model) == {n for n, p in model.named_parameters() if p.grad is not None}


def test_what_reads_one_number_of_tokens_refuses_before_it_changes_the_model() -> None:
    model = merging()
    fit = trimtab.adapt(model, example=BATCH)
    with pytest.raises(ValueError, match=r"number of tokens of tower 'text' changes before 'inner.blocks.2'"):
        fit.tune("lst")
    assert not fit.methods and not any("lst" in name for name, _ in model.named_modules())


def test_adapters_refuse_before_they_change_the_model() -> None:
    model = merging()
    seen = Anatomy.of(model, BATCH)
    blocks = (*seen.towers[0].blocks[:-1], replace(seen.towers[0].blocks[-1], sublayers=()))
    fit = trimtab.adapt(model, anatomy=replace(seen, towers=(replace(seen.towers[0], blocks=blocks),)))
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no described part") as told:
        fit.tune("adapter")
    assert "changed in part" not in str(told.value) and [name for name, _ in model.named_modules()] == before
    trimtab.adapt(merging(), example=BATCH).tune("adapter")


# --- a second stream that nobody reads at the end ---------------------------------------------------------------------


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(mute=False), nn.Linear(16, 16)
        self.norm, self.other_norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.first.chooses = False

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.first(self.norm(x) + y), y + self.second(self.other_norm(y))


class Pair(nn.Module):
    """The second stream moves the first in every later block; what the last block makes of it is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others = nn.Embedding(40, 16), nn.Embedding(40, 16)
        self.blocks, self.head = nn.ModuleList(TwoStreams() for _ in range(3)), nn.Linear(16, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x, y = self.words(input_ids), self.others(input_ids)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(x)


def test_parts_of_a_stream_that_is_dropped_get_no_adapter() -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    fit = trimtab.adapt(model, example=BATCH)
    assert [[p.stream for p in b.sublayers] for b in fit.anatomy.blocks()] == [[0, 1], [0, 1], [0]]
    fit.tune("adapter", placement="houlsby")
    model.train()
    model(**BATCH).square().sum().backward()
    assert trained(model) == {n for n, p in model.named_parameters() if p.grad is not None}


# --- a plan that cuts a tower off -------------------------------------------------------------------------------------


def pyramid(*depths: int):
    """PVT: its last stage has a class token, which alone is read; the stages before have none."""
    config = tiny_config("pvt")
    config.depths, config.num_encoder_blocks = list(depths), 4
    config.hidden_sizes, config.image_size = [8, 8, 16, 16], 32
    config.num_attention_heads, config.mlp_ratios, config.sequence_reduction_ratios = [1] * 4, [1] * 4, [1] * 4
    model = build("PvtForImageClassification", config)
    return model, inputs(model)


def test_a_plan_that_leaves_nothing_of_a_tower_in_the_output_is_refused() -> None:
    model, batch = pyramid(1, 1, 1, 1)
    fit = trimtab.adapt(model, example=batch)
    with pytest.raises(
        ValueError, match=r"depends on tower 'pvt_encoder', and without pvt.encoder.block.3.0 no longer"
    ):
        fit.skip(plan=["pvt.encoder.block.3.0"])
    model, batch = pyramid(1, 1, 1, 2)
    fit = trimtab.adapt(model, example=batch).skip(plan=["pvt.encoder.block.3.0"])
    assert fit.plan is not None and fit.plan.skipped == ["pvt.encoder.block.3.0"]


def test_a_plan_that_a_recipe_attaches_is_refused_too() -> None:
    """Recipes pull methods in a session of theirs, without an example."""
    model, batch = pyramid(1, 1, 1, 1)
    fit = trimtab.adapt(model, anatomy=Anatomy.of(model, batch))
    method = METHODS.make("das", plan=("pvt.encoder.block.3.0",), adapters="none")
    with pytest.raises(ValueError, match=r"depends on tower 'pvt_encoder', and without pvt.encoder.block.3.0"):
        fit.pull(method, BatchSession(model, fit.anatomy, [batch], None))


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitfit", "partial", "full"])
def test_a_pass_of_a_model_that_trains_is_in_the_mode_of_its_parts(method: str) -> None:
    model = made()
    trimtab.adapt(model, example=BATCH).tune(method)
    for copied in (model, copy.deepcopy(model)):
        assert copied.train().training
        copied(**BATCH).sum().backward()
        assert copied.training, "it says so between passes"
        with pytest.raises(IndexError):
            copied(-BATCH["input_ids"])
        assert copied.training, "a pass that failed changes nothing"
        copied.eval()(**BATCH)
        assert not copied.training


def test_a_plain_copy_has_no_hooks() -> None:
    fit = trimtab.adapt(made(), example=BATCH).tune("bitfit")
    assert isinstance(fit, Stack) and fit.model.train()._forward_hooks
    plain = fit.folded()
    assert not plain._forward_hooks and not plain._forward_pre_hooks and not plain._forward_hooks_always_called


def test_a_time_limit_is_no_error_of_the_model() -> None:
    with pytest.raises(OverTime), limit(9):
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception:  # as code does that takes what an example raises for an error of the model
            pytest.fail("the limit was caught")
