"""UniPT's rivals: what each changes in the model, what it keeps for backward, where it does not apply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.anatomy import Anatomy, Block, Tap, Tower
from trimtab.counting import saved_bytes
from trimtab.methods import METHODS
from trimtab.methods.tune.blocks import attend, visible
from trimtab.methods.tune.ladder import Ladder, linears
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.prompt import widened
from trimtab.methods.tune.sherl import MultiTier

IN_BLOCKS = ("adapter", "parallel-adapter", "scaled-parallel-adapter", "shallow-prompt", "deep-prompt")
BESIDE = ("side-tuning", "lst", "sherl")


def bert(layers: int = 3):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel(BertConfig(vocab_size=40, **sizes, **drop), add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def words(length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < torch.tensor([[length], [4]])).long()}


def with_method(name: str, model=None, **settings):
    model = bert() if model is None else model
    torch.manual_seed(1)
    METHODS[name](**settings).attach(model, Anatomy.of(model))
    return model


def kept(name: str, **settings) -> int:
    model = with_method(name, **settings)
    return saved_bytes(lambda: model(**words()).last_hidden_state.sum(), model)


def grid() -> tuple[nn.Module, Anatomy]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    blocks = (Block("0", 4, keeps_shape=False), Block("1", 4, keeps_shape=False))
    return model, Anatomy((Tower("vision", "vision", blocks, ("0", "1"), output=Tap("1"), layout="grid"),))


@pytest.mark.parametrize("name", [*IN_BLOCKS, *BESIDE, "bitfit", "norm-tuning"])
def test_says_that_it_does_not_apply_to_a_grid(name):
    model, anatomy = grid()
    with pytest.raises(ValueError, match=f"^{name}.*tower 'vision'"):
        METHODS[name]().attach(model, anatomy)


@pytest.mark.parametrize("name", [*IN_BLOCKS, *BESIDE, "partial", "bitfit", "norm-tuning"])
def test_wrong_towers_and_padding_change_nothing_else(name):
    model = bert()
    with pytest.raises(ValueError, match="unknown tower 'vision'"):
        METHODS[name](towers=("vision",)).attach(model, Anatomy.of(model))
    # Padding tokens change nothing about the others.
    model = with_method(name)
    inputs = words()
    out = model(**inputs).last_hidden_state
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 5, inputs["input_ids"])
    again = model(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    assert out.shape == (2, 7, 32) and torch.allclose(out[seen], again[seen], atol=1e-5)


def test_what_is_kept_for_backward_ranks_the_methods():
    """Beside the model little is kept, in its last part more, everywhere in it most."""
    unipt, side, ladder, sherl = (
        kept("unipt", reduction=8),
        kept("side-tuning"),
        kept("lst"),
        kept("sherl", reduction=8),
    )
    partial, adapter = kept("partial", blocks=1), kept("adapter")
    full = bert().requires_grad_(True)
    everything = saved_bytes(lambda: full(**words()).last_hidden_state.sum(), full)
    assert max(unipt, side, sherl, partial) < adapter < everything
    assert ladder < everything and unipt < sherl


def test_partial_trains_the_last_blocks_alone():
    model = with_method("partial", blocks=2)
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1", "2"} and all(p.requires_grad for p in model.encoder.layer[1].parameters())
    with pytest.raises(ValueError, match="blocks is 4, but tower 'text' has 3"):
        with_method("partial", blocks=4)


def test_bitfit_and_norm_tuning_train_what_their_names_say():
    bias = {n for n, p in with_method("bitfit").named_parameters() if p.requires_grad}
    assert bias and all(n.endswith("bias") for n in bias)
    norms = {n for n, p in with_method("norm-tuning").named_parameters() if p.requires_grad}
    assert norms and all("LayerNorm" in n for n in norms)


def test_statistics_of_a_batch_norm_stay_as_they_were():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 3)))
    blocks = (Block("0", 4, keeps_shape=False), Block("1", 4, keeps_shape=False))
    tower = Tower("vision", "vision", blocks, ("0", "1"), output=Tap("1"), layout="grid")
    METHODS["norm-tuning"]().attach(model.requires_grad_(False), Anatomy((tower,)))
    model.train()
    model(torch.randn(4, 3, 8, 8) + 5).sum().backward()
    assert not model[0][1].running_mean.any() and model[0][1].weight.grad is not None


def test_adapters_stand_where_they_should():
    counts = {"houlsby": 6, "pfeiffer": 3}
    for placement, count in counts.items():
        model = with_method("adapter", placement=placement)
        assert len([n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1].startswith("adapter_")]) == count
    plain = bert()(**words()).last_hidden_state
    for name in ("adapter", "parallel-adapter", "scaled-parallel-adapter"):
        model = with_method(name)
        assert not torch.allclose(model(**words()).last_hidden_state, plain)
        for path, parameter in model.named_parameters():
            if ".up." in path:
                nn.init.zeros_(parameter)
        assert torch.allclose(model(**words()).last_hidden_state, plain, atol=1e-6), (
            "without adapters the model is itself"
        )


def test_a_scaled_adapter_is_a_parallel_one_times_its_scale():
    one, four = with_method("parallel-adapter", parts="mlp"), with_method("scaled-parallel-adapter")
    state = {k.replace("parallel_adapter", "scaled_parallel_adapter"): v for k, v in one.state_dict().items()}
    four.load_state_dict(state)
    for name, parameter in one.named_parameters():
        if "parallel_adapter" in name and ".up." in name:
            parameter.data.mul_(4)
    assert torch.allclose(one(**words()).last_hidden_state, four(**words()).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("name", ["shallow-prompt", "deep-prompt"])
def test_prompts_are_what_tokens_in_front_would_be(name):
    """With one block: the same as the model on longer embeddings, first tokens taken off."""
    model = with_method(name, bert(1), prompts=3)
    prompts = getattr(model, name.replace("-", "_"))["text"].values
    out = model(**words()).last_hidden_state
    plain = bert(1)
    stream = plain.embeddings(words()["input_ids"])
    longer = torch.cat([prompts[0].expand(2, -1, -1), stream], dim=1)
    mask = torch.cat([torch.ones(2, 3), words()["attention_mask"]], dim=1)
    bias = torch.where(mask == 0, torch.finfo(torch.float32).min, 0.0)[:, None, None]
    wanted = plain.encoder.layer[0](longer, bias)
    wanted = (wanted[0] if isinstance(wanted, tuple) else wanted)[:, 3:]
    assert torch.allclose(out, wanted, atol=1e-5)


def test_deep_prompts_are_fresh_in_every_block():
    model = with_method("deep-prompt")
    assert model.deep_prompt["text"].values.shape == (3, 8, 32)
    model(**words()).last_hidden_state.square().sum().backward()
    assert all(g.abs().sum() > 0 for g in model.deep_prompt["text"].values.grad)


def test_masks_are_widened_by_their_kind():
    additive = torch.tensor([[0.0, -9.0], [0.0, 0.0]])[None, None]
    assert widened(additive, 1, 2)[0, 0].tolist() == [[0, 0, -9], [0, 0, -9], [0, 0, 0]]
    keys = torch.tensor([[[[True, False]]]])
    assert widened(keys, 2, 2).tolist() == [[[[True, True, True, False]]]]
    assert widened(torch.tensor([[1, 0]]), 1, 2).tolist() == [[1, 1, 0]]
    assert widened(torch.zeros(2, 3), 1, 2).shape == (2, 3)
    assert widened(torch.zeros(1, 1, 2, 2), 1, 2, "encoder_attention_mask").shape == (1, 1, 3, 2)  # another's tokens
    turned = torch.tensor([0.9, 0.6, 0.3])[:, None].expand(1, 3, 4)
    assert widened((turned, turned), 1, 3)[0][0, :, 0].tolist() == pytest.approx([0.9, 0.9, 0.6, 0.3])
    both = widened((turned, turned), 1, 3, first=torch.tensor([0, 2]))[1][
        ..., 0
    ]  # the second row is padded on the left
    assert both.tolist() == [pytest.approx([0.9, 0.9, 0.6, 0.3]), pytest.approx([0.3, 0.9, 0.6, 0.3])]
    places = widened(torch.tensor([[0, 1], [7, 0]]), 2, 2, "position_ids", first=torch.tensor([0, 1]))
    assert places.tolist() == [[0, 0, 0, 1], [0, 0, 7, 0]]


def test_a_ladder_starts_as_the_tower_cut_to_its_width():
    model = with_method("lst", reduction=1)
    side, own = model.lst["text"].blocks[1], linears(model, Anatomy.of(bert()).towers[0].blocks[1])
    assert torch.equal(side.query.weight, own["query"].weight) and torch.equal(side.out.bias, own["out"].bias)
    narrow = with_method("lst", reduction=4).lst["text"]
    chosen = narrow.down[0].weight.argmax(dim=1)
    assert torch.equal(narrow.down[0].weight, torch.eye(32)[chosen])
    rows = narrow.blocks[0].value.weight
    full = linears(model, Anatomy.of(bert()).towers[0].blocks[0])["value"].weight[:, chosen]
    assert all((full == row).all(dim=1).any() for row in rows), "every row is a row of the tower's"


def test_a_ladder_that_cannot_be_pruned_says_so():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    blocks = tuple(Block(f"layers.{i}", 8) for i in range(2))
    anatomy = Anatomy((Tower("text", "text", blocks, ("layers",), output=Tap("layers.1")),))
    with pytest.raises(ValueError, match=r"block 'layers.0' has 0 linear layers that could be its query.*random"):
        METHODS["lst"](initialise="pruned").attach(model, anatomy)
    METHODS["lst"](initialise="random").attach(model, anatomy)
    assert isinstance(model.lst["text"], Ladder)


def test_sherl_merges_by_similarity_and_feeds_the_last_block():
    torch.manual_seed(0)
    side = MultiTier(8, 3, 2)
    same = torch.randn(1, 2, 8)
    other = torch.randn(1, 2, 8)
    with torch.no_grad():
        side.attention.weight.zero_()
        for down in side.down[1:]:
            down.load_state_dict(side.down[0].state_dict())
        # Equal scores: two shallow maps that are the same share their weight, each gets half.
        z = side.down[0](same)
        merged = side.up(torch.relu(z + side.down[0](other)))
        seen = Seen([same, same, other], None, other)
        assert torch.allclose(side(seen), merged, atol=1e-4)
        side.gate.fill_(0.05)
        assert torch.allclose(side(seen), merged + torch.tanh(torch.tensor(0.5)) * other, atol=1e-4)
    model = with_method("sherl")
    fed = []
    model.encoder.layer[2].register_forward_pre_hook(lambda m, args: fed.append(args[0]))
    model(**words())
    assert fed[0].requires_grad
    with pytest.raises(ValueError, match="has 1 block"):
        with_method("sherl", bert(1))


def test_side_tuning_blends_with_the_frozen_tower():
    model = with_method("side-tuning")
    plain = bert()(**words()).last_hidden_state
    with torch.no_grad():
        model.side_tuning["text"].alpha.fill_(100)
    assert torch.allclose(model(**words()).last_hidden_state, plain, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_side_blocks_attend_in_bfloat16_as_torchs_fused_kernel_does(causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 7, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    mask = (torch.arange(7)[None] < torch.tensor([[7], [4], [0]])).long()
    seen = visible(torch.zeros(3, 7, 16), mask, causal)
    whole = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out, wanted = attend(q, k, v, seen), attend(*whole, seen)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), wanted, atol=2e-2)
    out.float().pow(2).sum().backward()
    wanted.pow(2).sum().backward()
    for half, single in zip((q, k, v), whole, strict=True):
        assert torch.allclose(half.grad.float(), single.grad, atol=8e-2)
