"""LoRA finds what gives queries and values by the layers that stand beside each other, or says what it found."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.models.zoo import ZOO
from trimtab import Anatomy, Block, Tap, Tower
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


# Towers whose attention multiplies by itself; they are named, and the rest is tuned by name.
SILENT = {"bridgetower": ["vision"], "bridgetower mlm": ["vision"]}


@pytest.mark.parametrize("name", ZOO)
def test_no_tower_is_left_out_without_a_word(name):
    model = ZOO[name].build()
    anatomy = Anatomy.of(model)
    silent = SILENT.get(name, [])
    for tower in silent:
        with pytest.raises(
            ValueError, match=f"lora: tower '{tower}' has no layer that is known .*linear layers c_fc, "
        ):
            trimtab.tune(ZOO[name].build(), "lora")
    rest = [t.name for t in anatomy.towers if t.name not in silent]
    trimtab.tune(model, "lora", towers=rest)
    wrapped = [p for p, m in model.named_modules() if hasattr(m, "lora_A")]
    for tower in anatomy.towers:
        within = [p for p in wrapped if anatomy.owner(p) == tower]
        assert bool(within) == (tower.name in rest), tower.name
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


def test_torchs_own_attention_is_named():
    model = Blocks(*[lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)] * 2)
    with pytest.raises(
        ValueError, match="linear1, linear2, out_proj; 'blocks.0.self_attn' is an nn.MultiheadAttention"
    ):
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
