"""Experts of a mixture in one parameter, and bare parameters, are pruned as the same matrices in layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab
from trimtab import Anatomy, Block, Tap, Tower
from trimtab.anatomy.weights import left_whole
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect
from trimtab.methods.prune.masks import Masks

EXPERTS, WIDTH, INNER = 4, 8, 12


class Together(nn.Module):
    """Experts in one parameter, multiplied in one of several ways; each token goes to one expert, or to none."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        turned = way in ("matmul", "bmm", "baddbmm")
        first, second = (INNER, WIDTH), (WIDTH, INNER)
        self.first = nn.Parameter(torch.randn(EXPERTS, *(first[::-1] if turned else first)) / 3)
        self.second = nn.Parameter(torch.randn(EXPERTS, *(second[::-1] if turned else second)) / 3)

    def forward(self, x):
        if self.way in ("bmm", "baddbmm", "einsum"):
            each = torch.stack([x * chosen(x, i) for i in range(EXPERTS)])  # (E, n, D), zeros for others' tokens
            return self.all(self.all(each, self.first).relu(), self.second).sum(0)
        out = torch.zeros_like(x)
        pairs = zip(self.first, self.second, strict=True)
        for i, (first, second) in enumerate(pairs if self.way == "iterated" else self.pairs()):
            rows = chosen(x, i)[:, 0].nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, self.one(self.one(x[rows], first).relu(), second))
        return out

    def pairs(self):
        return [(self.first[i], self.second[torch.tensor(i)]) for i in range(EXPERTS)]

    def one(self, x, w):
        return x @ w if self.way == "matmul" else (w @ x.T).T if self.way == "left" else F.linear(x, w)

    def all(self, x, w):
        if self.way == "einsum":
            return torch.einsum("eni, eoi -> eno", x, w)
        return torch.bmm(x, w) if self.way == "bmm" else torch.baddbmm(torch.zeros(()), x, w)


def chosen(x, expert):
    return ((x[:, :1] * 1000).long() % (EXPERTS + 1) == expert).to(x.dtype)


class Apart(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, together: Together):
        super().__init__()
        turned = together.way in ("matmul", "bmm", "baddbmm")
        self.whole = together.way in ("bmm", "baddbmm", "einsum")
        self.first, self.second = (
            nn.ModuleList(linear(w.T if turned else w) for w in stack) for stack in (together.first, together.second)
        )

    def forward(self, x):
        out = torch.zeros_like(x)
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            here = chosen(x, i)
            rows = slice(None) if self.whole else here[:, 0].nonzero()[:, 0]
            part = second(first((x * here)[rows]).relu())
            out = out + (part if self.whole else torch.zeros_like(x).index_add(0, rows, part))
        return out


def linear(weight) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight)
    return made


class Mixture(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), make()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()}

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", WIDTH) for i in range(2))
        return Anatomy((Tower("text", "text", blocks, ("blocks",), Tap("blocks.1")),))


def both(way: str) -> tuple[Mixture, Mixture]:
    torch.manual_seed(0)
    together = Mixture(lambda: Together(way))
    made = iter([Apart(block[1]) for block in together.blocks])
    apart = Mixture(lambda: next(made))
    for a, b in zip(apart.blocks, together.blocks, strict=True):
        a[0].load_state_dict(b[0].state_dict())
    return together.eval(), apart.eval()


BATCHES = [{"x": torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(3)]
WAYS = ["linear", "matmul", "left", "iterated", "bmm", "baddbmm", "einsum"]
PRUNERS = ["multiflow", "wanda", "ria", "sparsegpt", "snip", "itersnip", "chita", "omp", "lamp", "l2"]


def pruned(model, name, **settings):
    settings = {"steps": 2, **settings} if name == "itersnip" else settings
    return trimtab.prune(model, name, settings.pop("sparsity", 0.5), BATCHES, model.anatomy(), **settings)


# The ways differ in what is seen of the inputs alone: two pruners that read these see them all.
CASES = [(n, w) for n in PRUNERS for w in (WAYS if n in ("multiflow", "sparsegpt") else ("linear", "matmul", "bmm"))]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_experts_in_one_parameter_are_pruned_as_the_same_linear_layers(name, way):
    together, apart = both(way)
    torch.testing.assert_close(together(**BATCHES[0]), apart(**BATCHES[0]))
    one, other = pruned(together, name).masks, pruned(apart, name).masks
    assert one.sparsity == other.sparsity and 0.45 < one.sparsity < 0.55
    for block in range(2):
        assert torch.equal(one[f"blocks.{block}.0.weight"], other[f"blocks.{block}.0.weight"])
        for part in ("first", "second"):
            masks, stack = one[f"blocks.{block}.1.{part}"], getattr(together.blocks[block][1], part)
            assert masks.shape == stack.shape and not stack[~masks].any()
            for i in range(EXPERTS):
                turned = way in ("matmul", "bmm", "baddbmm")
                own = masks[i].T if turned else masks[i]
                path = f"blocks.{block}.1.{part}.{i}.weight"
                assert torch.equal(own, other[path]), (path, way)
                values = stack[i].T if turned else stack[i]
                torch.testing.assert_close(values, apart.get_parameter(path), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("way", ["linear", "matmul"])
def test_patterns_lie_along_the_inputs_of_each_expert(name, way):
    together, apart = both(way)
    one = pruned(together, name, sparsity=None, pattern="2:4").masks["blocks.0.1.first"]
    other = pruned(apart, name, sparsity=None, pattern="2:4").masks
    for i in range(EXPERTS):
        own = one[i].T if way == "matmul" else one[i]
        assert (own.reshape(INNER, -1, 4).sum(-1) == 2).all()
        assert torch.equal(own, other[f"blocks.0.1.first.{i}.weight"])


def test_masks_of_experts_are_saved_and_found_again(tmp_path):
    together, _ = both("bmm")
    masks = pruned(together, "multiflow").masks
    masks.save(tmp_path / "m.safetensors")
    again = Masks.read(tmp_path / "m.safetensors", together)
    assert all(torch.equal(m, again[p]) for p, m in masks.items())


def test_an_expert_without_tokens_is_named_and_keeps_its_largest_weights():
    together, _ = both("linear")
    for block in together.blocks:
        block[1].pairs = lambda block=block[1]: [(block.first[i], block.second[i]) for i in range(EXPERTS - 1)]
    with pytest.warns(UserWarning, match=r"4 of 18 matrices had no input .* first 'blocks.0.1.first\[3\]'"):
        masks = pruned(together, "wanda", per_output=False).masks["blocks.0.1.first"][3]
    sizes = both("linear")[0].blocks[0][1].first[3].abs()
    assert masks.sum() == masks.numel() // 2 and sizes[masks].min() >= sizes[~masks].max()


@pytest.mark.parametrize("name", ["multiflow", "wanda", "sparsegpt"])
def test_an_expert_that_is_called_with_no_token_loses_no_more_than_the_others(name, monkeypatch):
    _, apart = both("linear")
    monkeypatch.setitem(globals(), "chosen", lambda x, i, own=chosen: own(x, i) * (i != 3))
    with pytest.warns(
        UserWarning, match=r"(2 of 9|4 of 18) matrices had no input .* first 'blocks...1.first.3.weight'"
    ):
        masks = pruned(apart, name).masks
    total = sum(m.numel() for m in masks.values())
    assert abs(sum(int(m.sum()) for m in masks.values()) - total / 2) <= len(masks)
    assert all(m.any() for m in masks.values()) and all(p.isfinite().all() for p in apart.parameters())


class Bare(nn.Module):
    """A block with a matrix of its own, a table that is looked up, and latents that are added."""

    def __init__(self, turned: bool = False, also: str = ""):
        super().__init__()
        self.turned, self.also = turned, also
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.table, self.added = nn.Parameter(torch.randn(5, WIDTH)), nn.Parameter(torch.randn(1, WIDTH))
        self.decay = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x @ self.matrix if self.turned else F.linear(x, self.matrix)
        y = y + x @ self.matrix.exp() if self.also == "exp" else y
        y = y + self.table[torch.arange(len(x)) % 5] + self.added
        return self.linear(y) + (x * -self.decay.exp()[0])


def bare_model(**kinds) -> Mixture:
    torch.manual_seed(0)
    return Mixture(lambda: Bare(**kinds)).eval()


@pytest.mark.parametrize("turned", [True, False])
def test_a_bare_matrix_is_pruned_and_tables_positions_and_decays_are_not(turned):
    model = bare_model(turned=turned)
    masks = pruned(model, "wanda").masks
    parts = ("0.weight", "1.matrix", "1.linear.weight")
    assert list(masks) == [f"blocks.{i}.{n}" for i in range(2) for n in parts]
    calibration = Calibration(bare := bare_model(turned=turned), bare, bare.anatomy(), lambda: BATCHES)
    (weight, *_) = calibration.seen(bare.anatomy().weights(bare))
    assert (weight.path, weight.transposed, weight.expert) == ("blocks.0.1.matrix", turned, None)
    inputs = []
    bare.blocks[0][0].register_forward_hook(lambda m, args, out: inputs.append(out))
    found = collect(calibration, [weight], {"squares"}, BATCHES)[weight][0].squares
    torch.testing.assert_close(found, sum(x.square().sum(0) for x in inputs) / sum(map(len, inputs)))


@pytest.mark.parametrize("name", ["omp", "wanda"])
def test_what_is_multiplied_by_and_used_otherwise_too_stays_whole_and_is_said(name):
    model = bare_model(also="exp")
    with pytest.warns(UserWarning, match=rf"{name}: 58% of the weights .* the first is 'blocks.0.1.matrix'"):
        masks = pruned(model, name).masks
    assert "blocks.0.1.matrix" not in masks and "blocks.0.1.linear.weight" in masks


def test_without_data_nothing_is_guessed_and_the_way_out_is_said():
    model = both("linear")[0]
    with pytest.warns(UserWarning, match=r"omp: 92% .* 'blocks.0.1.first'.* found where `batches` are given"):
        assert list(trimtab.prune(model, "omp", 0.5, anatomy=model.anatomy()).masks) == [
            "blocks.0.0.weight",
            "blocks.1.0.weight",
        ]


def test_an_iterator_of_batches_is_looked_at_and_not_used_up():
    whole, given = both("linear")[0], both("linear")[0]
    wanted = pruned(whole, "multiflow").masks
    found = trimtab.prune(given, "multiflow", 0.5, iter(BATCHES), given.anatomy()).masks
    assert all(torch.equal(m, found[p]) for p, m in wanted.items())


# --- transformers' mixtures -------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def mixtral():
    from transformers import MixtralConfig, MixtralModel

    return MixtralModel(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen3_vl_moe():
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as m

    config = m.Qwen3VLMoeTextConfig(**SIZES, head_dim=8, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2,
                                    decoder_sparse_step=1,
                                    rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1],
                                                     "rope_theta": 1e4})  # fmt: skip
    return m.Qwen3VLMoeTextModel(config)


def glm4v_moe():
    from transformers.models.glm4v_moe import modeling_glm4v_moe as m

    config = m.Glm4vMoeTextConfig(**SIZES, head_dim=8, moe_intermediate_size=12, n_routed_experts=4, n_shared_experts=1,
                                  num_experts_per_tok=2, first_k_dense_replace=0, n_group=1, topk_group=1,
                                  rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1],
                                                   "rope_theta": 1e4, "partial_rotary_factor": 1.0})  # fmt: skip
    return m.Glm4vMoeTextModel(config)


def aria():
    from transformers import AriaTextConfig, AriaTextModel

    return AriaTextModel(AriaTextConfig(**SIZES, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1))


def llama4():
    from transformers import Llama4TextConfig, Llama4TextModel

    return Llama4TextModel(Llama4TextConfig(**SIZES, intermediate_size_mlp=24, head_dim=4, num_local_experts=4,
                                            num_experts_per_tok=1, interleave_moe_layer_step=1,
                                            attention_chunk_size=16))  # fmt: skip


class Separate(nn.Module):
    """What stands in the place of a mixture's experts: the same as linear layers, called token by token."""

    def __init__(self, experts: nn.Module, turned: bool):
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            nn.ModuleList(linear(w.T if turned else w) for w in stack)
            for stack in (experts.gate_up_proj, experts.down_proj)
        )
        self.act = getattr(experts, "act_fn", None)

    def one(self, i, x):
        gate, up = self.gate_up_proj[i](x).chunk(2, dim=-1)
        return self.down_proj[i](up * self.act(gate))

    def forward(self, hidden, chosen=None, shares=None):
        if chosen is None:  # Llama 4: every expert is given all tokens, those of others as zeros
            return torch.cat(
                [self.one(i, x) for i, x in enumerate(hidden.view(len(self.down_proj), -1, SIZES["hidden_size"]))]
            )
        out = torch.zeros_like(hidden)
        for i in range(len(self.down_proj)):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, self.one(i, hidden[rows]) * shares[rows, place, None])
        return out


@pytest.mark.parametrize("name", ["multiflow", "sparsegpt"])
@pytest.mark.parametrize("make", [mixtral, qwen3_vl_moe, glm4v_moe, aria, llama4])
def test_mixtures_of_transformers_are_calibrated_by_the_tokens_of_each_expert(make, name):
    def made():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim == 3:
                nn.init.normal_(parameter, std=0.1)
        return model

    batches = [
        {"input_ids": torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"]), "use_cache": False} for b in batches]
    together, apart = made(), made()
    turned = make in (aria, llama4)
    paths = [
        p
        for p, m in together.named_modules()
        if hasattr(m, "gate_up_proj") and m.gate_up_proj.__class__ is nn.Parameter
    ]
    assert len(paths) == 2
    for path in paths:
        owner, _, last = path.rpartition(".")
        setattr(apart.get_submodule(owner), last, Separate(apart.get_submodule(path), turned))
    with torch.no_grad():
        torch.testing.assert_close(together(**batches[0])[0], apart(**batches[0])[0])
    # Layers of their own are given the whole parameter's shapes only; routers that are bare parameters are in both.
    one = trimtab.prune(together, name, 0.5, batches, allocation="uniform").masks
    other = trimtab.prune(apart, name, 0.5, batches, allocation="uniform").masks
    assert one.prunable == other.prunable
    for path in paths:
        for part in ("gate_up_proj", "down_proj"):
            for i in range(4):
                own = one[f"{path}.{part}"][i]
                wrong = ((own.T if turned else own) != other[f"{path}.{part}.{i}.weight"]).sum()
                assert wrong <= 0.002 * own.numel(), (path, part, i, int(wrong))  # products round differently


def test_the_model_computes_with_its_own_implementation_again():
    model = mixtral().eval()
    before = model.config._experts_implementation
    ids = torch.randint(3, 50, (4, 20))
    trimtab.prune(model, "wanda", 0.5, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert model.config._experts_implementation == before != "eager"


def test_everything_that_is_not_pruned_is_counted_by_what_it_is():
    model = mixtral()
    anatomy = Anatomy.of(model)
    weights = anatomy.weights(model)
    kinds = {w.what.split(" (")[0]: w.numbers for w in left_whole(anatomy, model)}
    pruned = {w.path: w.of(model).numel() for w in weights}
    assert sum(kinds.values()) + sum(pruned.values()) == sum(p.numel() for p in model.parameters())
    assert kinds["embeddings"] == 50 * 16 and kinds["of unknown use"] == 2 * 4 * 16  # the routers
    assert kinds["vectors"] + kinds.get("outside the towers", 0) == 5 * 16
