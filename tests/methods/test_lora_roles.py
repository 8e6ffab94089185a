"""LoRA finds what gives queries and values by the layers that stand beside each other, or says what it found."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.models.zoo import ZOO
from trimtab import Anatomy, Block, Tap, Tower
from trimtab.methods import METHODS
from trimtab.methods.tune.roles import ATTENTIONS, queries_and_values

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
DEEP = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 60}

# a model -> the layers of each of its attentions that get an update
FAMILIES = {
    "phi3": (lambda: hf.Phi3Model(hf.Phi3Config(**WIDE, num_key_value_heads=2, pad_token_id=0)), {"qkv_proj"}),
    "gpt2": (lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)), {"c_attn"}),
    "gpt2 that reads": (
        lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)),
        {"c_attn", "q_attn"},
    ),
    "bloom": (lambda: hf.BloomModel(hf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4)),
              {"query_key_value"}),
    "mpt": (lambda: hf.MptModel(hf.MptConfig(**DEEP)), {"Wqkv"}),
    "modernbert": (lambda: hf.ModernBertModel(hf.ModernBertConfig(**WIDE, pad_token_id=0)), {"Wqkv"}),
    "distilbert": (lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4,
                                                                  hidden_dim=64)), {"q_lin", "v_lin"}),
    "deberta": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**WIDE)), {"query_proj", "value_proj"}),
    "deepseek": (lambda: hf.DeepseekV2Model(hf.DeepseekV2Config(
        **WIDE, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2, head_dim=8)), {"q_b_proj", "kv_b_proj"}),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2],
                                                num_heads=[2, 2], window_size=4)), {"q_proj", "v_proj"}),
    "blip": (lambda: hf.BlipVisionModel(hf.BlipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                            num_attention_heads=4, image_size=16, patch_size=8)),
             {"qkv"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_of_every_tower_gets_updates(name):
    make, layers = FAMILIES[name]
    model = make()
    anatomy = Anatomy.of(model)
    blocks = [b.path for b in anatomy.blocks()]
    trimtab.tune(model, "lora")
    wrapped = [p for p, m in model.named_modules() if hasattr(m, "lora_A")]
    assert {p.rpartition(".")[2] for p in wrapped} == layers
    for block in blocks:
        assert {p.rpartition(".")[2] for p in wrapped if p.startswith(block + ".")} == layers, block


@pytest.mark.parametrize("name", ZOO)
def test_no_tower_is_left_out_without_a_word(name):
    model = ZOO[name].build()
    anatomy = Anatomy.of(model)
    trimtab.tune(model, "lora")
    wrapped = [p for p, m in model.named_modules() if hasattr(m, "lora_A")]
    for tower in anatomy.towers:
        within = [p for p in wrapped if anatomy.owner(p) == tower]
        assert within, tower.name
        assert len({p for b in tower.blocks for p in within if p.startswith(b.path + ".")}) == len(within)


class Blocks(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", 8) for i in range(len(self.blocks)))
        return Anatomy((Tower("text", "text", blocks, ("blocks",), Tap("blocks.0")),))


def named(*names):
    return lambda: nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


@pytest.mark.parametrize(
    "names", [("v", "gate"), ("query", "other"), ("value_proj", "up"), ("fc1", "fc2"), ("q_proj",)]
)
def test_a_name_alone_says_nothing(names):
    model = Blocks(named(*names), named(*names))
    listed = ", ".join(sorted(names))
    with pytest.raises(ValueError, match=rf"tower 'text' has no layer that is known .* linear layers {listed}\): name"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())
    trimtab.tune(model, "lora", anatomy=model.anatomy(), targets=names[:1])
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == 2


class Clipped(nn.Module):
    """A layer alone in a module; with `beside`, not alone."""

    def __init__(self, beside: bool = False):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8)) if beside else None

    def forward(self, x):
        return self.linear(x.clamp(-1, 1))


def test_of_a_layer_alone_in_a_module_the_name_of_that_counts():
    def attention(beside=False):
        return lambda: nn.ModuleDict({f"{role}_proj": Clipped(beside) for role in "qkv"})

    model = Blocks(attention(), named("qkv"))
    trimtab.tune(model, "lora", anatomy=model.anatomy())
    wrapped = [p for p, m in model.named_modules() if hasattr(m, "lora_A")]
    assert wrapped == ["blocks.0.q_proj.linear", "blocks.0.v_proj.linear", "blocks.1.qkv"]
    model = Blocks(attention(True), attention(True))
    with pytest.raises(ValueError, match=r"no layer that is known .* the linear layers linear\)"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())
    model = Blocks(*[lambda: nn.ModuleDict({"gate": Clipped(), "up": Clipped()})] * 2)
    with pytest.raises(ValueError, match=r"no layer that is known .* the linear layers linear\)"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())


def test_layers_outside_of_the_blocks_are_no_attention_of_theirs():
    model = Blocks(named("q", "k", "v"), named("qkv"))
    model.pool = named("q_proj", "k_proj", "v_proj")()
    anatomy = model.anatomy()
    tower = Tower("text", "text", anatomy.towers[0].blocks, ("blocks", "pool"), Tap("blocks.0"))
    trimtab.tune(model, "lora", anatomy=Anatomy((tower,)))
    wrapped = [p for p, m in model.named_modules() if hasattr(m, "lora_A")]
    assert wrapped == ["blocks.0.q", "blocks.0.v", "blocks.1.qkv"]


class Words(nn.Module):
    """A tower of torch's own layers, which in evaluation compute all at once where no hook is set."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids, attention_mask):
        out = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return out * attention_mask[..., None]

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"encoder.layers.{i}", 8) for i in range(2))
        return Anatomy((Tower("text", "text", blocks, ("embed", "encoder"), Tap("encoder.layers.1")),))


def words(**settings):
    """(model with LoRA, its handle, a batch, the plain model)."""
    torch.manual_seed(0)
    plain = Words().eval()
    model = copy.deepcopy(plain)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    fit = trimtab.adapt(model, anatomy=model.anatomy())
    fit.tune("lora", **settings)
    return model.eval(), fit, {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": mask}, plain


def test_torchs_own_attention_gets_an_update_of_its_fused_weight(tmp_path):
    model, fit, batch, plain = words()
    assert {n.rpartition(".lora")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        f"encoder.layers.{i}.self_attn" for i in range(2)
    }
    with torch.no_grad():
        before = plain(**batch)
        torch.testing.assert_close(model(**batch), before)
    model.train()(**batch).square().sum().backward()
    assert all(p.grad is not None for p in fit.parameters()) and any(bool(p.grad.any()) for p in fit.parameters())
    for p in fit.parameters():
        p.data.normal_()
    with torch.no_grad():
        after = model.eval()(**batch)  # where torch's fused operation would read the plain weight
        assert not torch.allclose(after, before, atol=1e-2)
        folded = fit.folded()
        torch.testing.assert_close(folded(**batch), after, atol=1e-4, rtol=1e-4)
        assert list(folded.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(
        model(**batch).detach(), after, atol=1e-4, rtol=1e-4
    )  # with gradients no fused operation is taken
    fit.save(tmp_path / "fit")
    again = copy.deepcopy(plain)
    trimtab.adapt(again, tmp_path / "fit", anatomy=again.anatomy())
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch), after)


def test_an_attention_with_an_update_is_called_as_before():
    torch.manual_seed(0)
    model = Blocks(*[lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})] * 2)
    plain, x = copy.deepcopy(model.blocks[0]["attn"]), torch.randn(5, 2, 8)
    trimtab.tune(model, "lora", anatomy=model.anatomy())
    wrapped = model.blocks[0]["attn"]
    expected = plain(x, x, x)[0]
    torch.testing.assert_close(wrapped(x, x, x, need_weights=False)[0], expected)
    torch.testing.assert_close(wrapped(query=x, key=x, value=x)[0], expected)
    with pytest.raises(TypeError, match="value"):
        wrapped(x, x)


def test_the_update_of_a_fused_weight_keeps_its_zeros():
    torch.manual_seed(0)
    model = Words().eval()
    fit = trimtab.adapt(model, anatomy=model.anatomy())
    fit.prune("omp", sparsity=0.5)
    zeros = [layer.self_attn.in_proj_weight == 0 for layer in model.encoder.layers]
    assert all(bool(z.any()) for z in zeros)
    fit.tune("lora")
    for p in fit.parameters():
        p.data.normal_()
    batch = {"input_ids": torch.randint(0, 20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    folded = fit.folded()
    for layer, zero in zip(folded.encoder.layers, zeros, strict=True):
        assert torch.equal(layer.self_attn.in_proj_weight == 0, zero)
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch), model(**batch), atol=1e-4, rtol=1e-4)


def test_an_attention_that_cannot_have_an_update_is_named():
    with pytest.raises(ValueError, match="self_attn' is an nn.MultiheadAttention.* set dropout to 0"):
        words(dropout=0.1)
    model = Blocks(*[lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4, vdim=4)})] * 2)
    with pytest.raises(ValueError, match="'blocks.0.attn' is an nn.MultiheadAttention with weights of their own for"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())


def test_of_an_attention_the_query_and_value_are_chosen_and_nothing_else():
    for attention in ATTENTIONS:
        layers = {f"block.attention.{name}": nn.Linear(2, 2) for name in sorted(attention.layers)}
        found = {p.rpartition(".")[2] for p in queries_and_values({**layers, "block.mlp.up": nn.Linear(2, 2)})}
        assert found and found <= attention.layers


def test_what_cannot_be_merged_or_computed_is_refused():
    model = Blocks(named("q", "k", "v"), named("q", "k", "v"))
    nn.utils.parametrizations.weight_norm(model.blocks[1]["v"])
    with pytest.raises(ValueError, match=r"'blocks.1.v' \(ParametrizedLinear\) is computed anew .*remove_parametri"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())
    model = Blocks(named("q", "k", "v"), named("q", "k", "v"))
    model.blocks[0]["q"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'blocks.0.q' is stored as int8 .*quantised.* PEFT knows"):
        trimtab.tune(model, "lora", anatomy=model.anatomy())


class SharedQueries(nn.Module):
    """Words and pictures, whose attentions share the layers of their queries."""

    class Block(nn.Module):
        def __init__(self, query: nn.Module | None = None):
            super().__init__()
            self.q_proj = query or nn.Linear(8, 8)
            self.k_proj, self.v_proj, self.up = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = x + (self.q_proj(x) @ self.k_proj(x).mT).softmax(-1) @ self.v_proj(x)
            return x + self.up(x).relu()

    def __init__(self):
        super().__init__()
        self.words, self.patches = nn.Embedding(12, 8), nn.Linear(12, 8)
        self.texts = nn.ModuleList(self.Block() for _ in range(2))
        self.pictures = nn.ModuleList(self.Block(block.q_proj) for block in self.texts)

    def forward(self, words, pixels):
        x, y = self.words(words), self.patches(pixels)
        for text, picture in zip(self.texts, self.pictures, strict=True):
            x, y = text(x), picture(y)
        return x.mean(1) + y.mean(1)


def shared_queries() -> tuple[nn.Module, Anatomy]:
    torch.manual_seed(0)
    towers = (("text", "words", "texts"), ("vision", "patches", "pictures"))
    return SharedQueries().eval(), Anatomy(tuple(
        Tower(name, name, tuple(Block(f"{at}.{i}", 8, stream="x") for i in range(2)), (enters, at), Tap(f"{at}.1"))
        for name, enters, at in towers
    ))  # fmt: skip


def test_a_layer_that_towers_share_gets_one_update(tmp_path):
    model, anatomy = shared_queries()
    batch = {"words": torch.arange(6).view(2, 3), "pixels": torch.randn(2, 4, 12)}
    fit = trimtab.adapt(model, anatomy=anatomy)
    fit.tune("lora")
    wrapped = {p for p, m in model.named_modules() if hasattr(m, "lora_A")}
    apart = {f"{at}.{i}.v_proj" for at in ("texts", "pictures") for i in range(2)}
    assert wrapped == {"texts.0.q_proj", "texts.1.q_proj"} | apart
    assert all(model.pictures[i].q_proj is model.texts[i].q_proj for i in range(2))
    for p in fit.parameters():
        p.data.normal_()
    fit.save(tmp_path / "fit")
    again, _ = shared_queries()
    trimtab.adapt(again, tmp_path / "fit", anatomy=anatomy)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch), model.eval()(**batch))
        assert torch.allclose(fit.folded()(**batch), model(**batch), atol=1e-5)
        assert not torch.allclose(shared_queries()[0](**batch), model(**batch), atol=1e-2)


def test_a_shared_layer_is_not_tuned_for_one_tower_alone():
    model, anatomy = shared_queries()
    fit = trimtab.adapt(model, anatomy=anatomy)
    with pytest.raises(ValueError, match=r"'texts.0.q_proj' is a layer of tower 'text' too.*towers \['vision', 'text'"):
        fit.tune("lora", towers=("vision",))
    fit.tune("lora", towers=("vision",), targets=("v_proj",))
    assert {p for p, m in model.named_modules() if hasattr(m, "lora_A")} == {"pictures.0.v_proj", "pictures.1.v_proj"}


# --- targets ----------------------------------------------------------------------------------------------------------


def wrapped_by(model: nn.Module) -> set[str]:
    return {p for p, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_takes_every_linear_layer_of_the_blocks(name):
    model = FAMILIES[name][0]()
    blocks = [b.path + "." for b in Anatomy.of(model).blocks()]
    every = {p for p, m in model.named_modules()
             if p.startswith(tuple(blocks)) and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")}  # fmt: skip
    trimtab.tune(model, "lora", targets="all-linear")
    assert wrapped_by(model) == every != set()


def test_all_linear_of_torchs_attention_is_its_fused_weight_and_what_it_calls():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Blocks(lambda: copy.deepcopy(block), lambda: copy.deepcopy(block))
    trimtab.tune(model, "lora", anatomy=model.anatomy(), targets="all-linear")
    assert wrapped_by(model) == {f"blocks.{i}.{m}" for i in range(2) for m in ("self_attn", "linear1", "linear2")}
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_linear_of_blocks_without_one_is_refused():
    model = Blocks(lambda: nn.Conv1d(8, 8, 1), lambda: nn.Conv1d(8, 8, 1))
    with pytest.raises(ValueError, match="blocks of tower 'text' have no linear layer that could get an update"):
        trimtab.tune(model, "lora", anatomy=model.anatomy(), targets="all-linear")


@pytest.mark.parametrize("targets", [("q_proj", "v_prj"), ("v_prj",)])
def test_a_target_that_no_layer_has_is_refused(targets):
    model = Blocks(named("q_proj", "v_proj"), named("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="unknown target 'v_prj'.*did you mean 'v_proj'"):
        trimtab.tune(model, "lora", anatomy=model.anatomy(), targets=targets)
    assert not wrapped_by(model)


def test_targets_are_all_linear_or_names():
    assert METHODS.make("lora", targets="all-linear").settings.targets == "all-linear"
    assert METHODS.make("lora", targets=["q_proj"]).settings.targets == ("q_proj",)
    with pytest.raises(ValueError, match="targets"):
        METHODS.make("lora", targets="all-lineer")


def test_a_tower_whose_paths_are_the_ends_of_anothers_is_tuned_alone():
    model = Blocks(named("q_proj", "k_proj", "v_proj"))
    model.inner = Blocks(named("q_proj", "k_proj", "v_proj"))
    towers = [Tower(name, name, (Block(f"{at}.0", 8),), (at,), Tap(f"{at}.0"))
              for name, at in (("text", "blocks"), ("vision", "inner.blocks"))]  # fmt: skip
    trimtab.tune(model, "lora", anatomy=Anatomy(tuple(towers)), towers=("text",))
    assert wrapped_by(model) == {"blocks.0.q_proj", "blocks.0.v_proj"}


def test_layers_beside_experts_are_not_taken_for_them():
    """PEFT knows these names from when the experts were layers, too, and would change the experts of every block."""
    config = hf.DeepseekV2Config(**WIDE, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
                                 qk_nope_head_dim=8, v_head_dim=8, head_dim=8, first_k_dense_replace=1,
                                 n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
    model = hf.DeepseekV2Model(config)
    trimtab.tune(model, "lora", targets=("gate_proj", "up_proj"))
    every = {p for p, _ in model.named_modules() if p.endswith(("gate_proj", "up_proj"))}
    assert wrapped_by(model) == every and len(every) == 4  # of the first block, and shared by all tokens in the second
    model(torch.arange(6)[None]).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layer", ["x_proj", "dt_proj", "out_proj"])
def test_a_layer_whose_weight_a_mixer_reads_gets_no_update(layer):
    model = hf.MambaModel(hf.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=f"'layers.0.mixer.{layer}' belongs to a MambaMixer, which reads its weight"):
        trimtab.tune(model, "lora", targets=(layer,))
    trimtab.tune(model, "lora", targets="all-linear")
    assert {p.rpartition(".")[2] for p in wrapped_by(model)} == {"in_proj"}
