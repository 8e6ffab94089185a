"""Statistics of inputs are of valid tokens and by samples, wherever a layer stands and whatever shares its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import trimtab
from trimtab import Anatomy
from trimtab.methods.prune.sums import InputSums


def means(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """Mean over samples of the squared inputs, by the path of the weight."""
    anatomy = Anatomy.of(model, batch)
    with InputSums(model, anatomy, anatomy.weights(model)) as sums:
        for own in sums.checked([batch]):
            with torch.no_grad():
                model(**own)
        return {str(weight): parts[0][1] for weight, parts in sums.result().items()}


@pytest.fixture
def opt() -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                       word_embed_proj_dim=16, max_position_embeddings=64)  # fmt: skip
    return OPTForCausalLM(config).eval()


def test_layers_that_are_given_all_tokens_in_one_row_leave_padding_out_and_count_samples(opt):
    ids = torch.randint(3, 40, (4, 5))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padding = torch.zeros(4, 7, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([ids, padding + 1], 1),
        "attention_mask": torch.cat([plain["attention_mask"], padding], 1),
    }
    without, with_padding = means(opt, plain), means(opt, padded)
    for path, mean in without.items():
        torch.testing.assert_close(with_padding[path], mean, rtol=1e-4, atol=1e-6, msg=path)
    # Both read what a norm gave, which has squares of 1 in the mean: five tokens a sample.
    inside = {path.rpartition("layers.0.")[2]: mean.mean() for path, mean in without.items()}
    assert inside["self_attn.q_proj.weight"] == pytest.approx(5, rel=0.05)
    assert inside["fc1.weight"] == pytest.approx(5, rel=0.05)


class Attending(nn.Module):
    """Two blocks of torch's attention that share the weight of the input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttendingBlock() for _ in range(2))
        self.blocks[1].attn.in_proj_weight = self.blocks[0].attn.in_proj_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class AttendingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return 3 * x + self.attn(h, h, h, need_weights=False)[0]


def test_a_tied_projection_of_torchs_attention_is_calibrated_by_all_that_share_it():
    torch.manual_seed(0)
    model, x, seen = Attending().eval(), torch.randn(4, 6, 8), []
    nn.init.normal_(model.blocks[1].norm.weight)  # so that the blocks' inputs differ
    hooks = [b.attn.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in model.blocks]
    model(x)
    [hook.remove() for hook in hooks]
    expected = torch.stack([h.square().sum(dim=(0, 1)) for h in seen]).sum(dim=0) / (2 * len(x))  # of 2 calls a sample
    torch.testing.assert_close(means(model, {"x": x})["blocks.0.attn.in_proj_weight"], expected, rtol=1e-4, atol=1e-5)


def test_chitas_batch_size_does_not_depend_on_the_order_of_a_batch(opt):
    ids = torch.randint(3, 40, (4, 5))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    flag = {"use_cache": torch.tensor(0)}  # a number is no batch
    first, other = ({**flag, **texts}, {**dict(reversed(texts.items())), **flag})
    found = [trimtab.prune(opt, "chita", [0.5], [batch] * 2)[0] for batch in (first, other)]
    for path in found[0]:
        torch.testing.assert_close(found[0].weights[path], found[1].weights[path], msg=path)
