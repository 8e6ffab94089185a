"""The skip lever itself: blocks of two streams, adapters and heads, and the counts that were published."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltModel,
)

import trimtab
from tests.comparisons.skip import fusion_block
from tests.methods.skipping import vilt
from trimtab import Anatomy
from trimtab.anatomy import Block, Sublayer, Tap, Tower
from trimtab.counting import count_macs
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run
from trimtab.methods import METHODS
from trimtab.methods.skip.adapters import RoutedAdapter, add_adapters
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.skipped import Skipped


def test_every_search_is_registered_under_its_name():
    names = {"das", "random-skip", "greedy-skip", "exhaustive-skip", "block-influence", "bandit-skip", "linear-skip"}
    assert {n for n, m in METHODS.items() if m.lever == "skip"} == names


def test_without_a_plan_nothing_is_attached():
    model = vilt()
    with pytest.raises(ValueError, match=r"das: there is no plan yet: call `prepare\(session\)`"):
        DAS().attach(model, Anatomy.of(model))


@pytest.mark.parametrize(("form", "trains"), [("none", False), ("parallel", True)])
def test_heads_train_beside_adapters_only(form, trains):
    model = vilt().requires_grad_(False)
    anatomy = Anatomy.of(model)
    method = DAS(plan=("encoder.layer.1",), adapters=form)
    method.attach(model, anatomy)
    assert any(p.requires_grad for p in model.pooler.parameters()) == trains
    assert any(p.requires_grad for p in model.parameters()) == (method.trains == "added") == trains


# --- blocks with two streams, routing ---------------------------------------------------------------------------------


class Paired(nn.Module):
    """A layer that takes and returns two streams, each with a part of its own (as LXMERT's)."""

    def __init__(self, width: int):
        super().__init__()
        self.text_norm, self.text = nn.LayerNorm(width), nn.Linear(width, width)
        self.image_norm, self.image = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, text, text_mask, image, image_mask=None):
        mixed = image.mean(1, keepdim=True)
        return text + self.text(self.text_norm(text)) + mixed, image + self.image(self.image_norm(image))


class PairedModel(nn.Module):
    def __init__(self, width: int = 16, count: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Paired(width) for _ in range(count))

    def forward(self, text, image):
        for layer in self.layers:
            text, image = layer(text, None, image)
        return text, image


def paired_anatomy(width: int = 16, count: int = 3) -> Anatomy:
    blocks = []
    for i in range(count):
        path = f"layers.{i}"
        parts = tuple(
            Sublayer("mlp", Tap(f"{path}.{n}_norm", "input"), Tap(f"{path}.{n}"), stream=s)
            for s, n in enumerate(("text", "image"))
        )
        blocks.append(Block(path, width, parts, stream="text", also=("image",)))
    return Anatomy((Tower("fusion", "fusion", tuple(blocks), ("layers",), Tap(f"layers.{count - 1}")),))


def test_a_block_of_two_streams_is_skipped_in_both():
    model, text, image = PairedModel(), torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    anatomy = paired_anatomy()
    without = DAS(plan=("layers.1",), adapters="none")
    without.assume(model, anatomy)
    without.attach(model, anatomy)
    first = PairedModel().layers[0](text, None, image)
    wanted = PairedModel().layers[2](first[0], None, first[1])
    assert all(map(torch.equal, model(text, image), wanted)), "both streams went on as they were"

    model = PairedModel()
    method = DAS(plan=("layers.1",))
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    out = model(text, image)
    assert out[0].shape == text.shape and out[1].shape == image.shape
    (out[0].sum() + out[1].sum()).backward()
    skipped = model.layers[1]
    assert skipped.adapter.down.weight.grad.abs().sum() > 0 and skipped.others[0].down.weight.grad.abs().sum() > 0
    widths = [a.down.out_features for a in (skipped.adapter, skipped.others[0], model.layers[0].das_0)]
    assert widths == [2, 2, 2], "one part a stream, so each skip adapter is as wide as one"


def test_text_and_image_layers_that_read_each_other_are_skipped_one_by_one():
    """METER's layout: a text layer takes (text, image) and returns (text,); the image layer the other way round."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, hidden_states, other, mask=None):
            return (hidden_states + self.out(self.norm(hidden_states)) + other.mean(1, keepdim=True),)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.text, self.image = (nn.ModuleList(Cross() for _ in range(2)) for _ in range(2))

        def forward(self, text, image):
            for t, i in zip(self.text, self.image, strict=True):
                text, image = t(text, image)[0], i(image, text)[0]
            return text, image

    def tower(name, memory):
        blocks = tuple(
            Block(f"{name}.{i}", 16, (Sublayer("mlp", Tap(f"{name}.{i}.norm", "input"), Tap(f"{name}.{i}.out")),),
                  returns_tuple=True) for i in range(2)
        )  # fmt: skip
        return Tower(name, "fusion", blocks, (name,), Tap(f"{name}.1"), memory=memory)

    model, x, y = Model(), torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    anatomy = Anatomy((tower("text", "image"), tower("image", "text")))
    method = DAS(plan=("text.0", "image.1"), adapters="none")
    method.assume(model, anatomy)
    assert len(method.state["candidates"]) == 4 and method.state["candidates"][0] == "text.0"
    method.attach(model, anatomy)
    whole = Model()
    image = whole.image[0](y, x)[0]
    text = whole.text[1](x, image)[0]
    assert all(map(torch.equal, model(x, y), (text, image)))


def test_routing_is_decided_by_the_first_token_and_remembered():
    torch.manual_seed(0)
    adapter = RoutedAdapter(8, 4).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8)
    whole = adapter(x)
    adapter.begin = False
    torch.testing.assert_close(adapter(x[:, 3:4]), whole[:, 3:4])
    adapter.begin = True
    assert not torch.allclose(adapter(x[:, 3:4]), whole[:, 3:4])


BLOOM = BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)


@pytest.mark.parametrize("make", [lambda: BloomForCausalLM(BLOOM), lambda: T5ForConditionalGeneration(T5)])
def test_routing_lies_in_the_cache_where_blocks_get_no_positions(make):
    """Words are those that a model without a cache writes, in beams too, and the model can be copied after a step."""
    torch.manual_seed(0)
    model = make()
    fit = trimtab.adapt(model)
    fit.skip("random-skip", plan=[fit.anatomy.towers[-1].blocks[1].path], adapters="routed")
    for name, parameter in model.named_parameters():
        if "expert" in name or "route" in name:
            nn.init.normal_(parameter)
    words = torch.randint(3, 60, (2, 7))
    given = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    model.train()(**given, labels=words).loss.backward()
    model = copy.deepcopy(model).eval()
    for beams in (1, 3):
        how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
        with_cache, without = (model.generate(**given, **how, use_cache=cache) for cache in (True, False))
        assert torch.equal(with_cache, without)
    with pytest.raises(ValueError, match="routed adapters: .*Block gets no `position_ids`"):
        model.generate(**given, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


# --- published counts -------------------------------------------------------------------------------------------------


def adapters_without_norms(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".norm." not in n)


@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_vilt_has_as_many_adapter_parameters_as_published_whatever_is_skipped(k):
    """3.56M of ViLT-B/32 (12 blocks, 768 wide), LayerNorms not counted; with them 3.597M to 3.587M."""
    with torch.device("meta"):
        model = ViltModel(ViltConfig(), add_pooling_layer=False).requires_grad_(False)
        method = DAS(skip=k)
        anatomy = Anatomy.of(model)
        method.assume(model, anatomy)
        method.attach(model, anatomy)
    assert adapters_without_norms(model) == pytest.approx(3.56e6, abs=0.005e6)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted - adapters_without_norms(model) == (24 - k) * 2 * 768


@pytest.mark.parametrize(("k", "net"), [(0, 0.853), (1, -0.942), (2, -2.737)])
def test_vilt_saves_as_many_macs_as_published(k, net):
    """241 tokens: adapters cost +0.85 G, one skipped block nets -0.94 G, each further one -1.795 G more."""
    with torch.device("meta"):
        x = torch.randn(1, 241, 768)

        def macs(skip):
            model = ViltModel(ViltConfig(), add_pooling_layer=False).eval()
            if skip is not None:
                method, anatomy = DAS(skip=skip), Anatomy.of(model)
                method.assume(model, anatomy)
                method.attach(model, anatomy)
            return count_macs(lambda: model.encoder(x))

        assert (macs(k) - macs(None)) / 1e9 == pytest.approx(net, abs=0.001)


def test_meter_saves_as_many_macs_as_published():
    """577 image and 40 text tokens: 2 text and 2 image fusion layers skipped, adapters kept, net -11.18 G, which of the
    93.12 G that METER takes is -12.0 %, the abstract's -11.97 %."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(is_decoder=True, add_cross_attention=True)  # 768 wide, 12 heads
    net = 0
    with torch.device("meta"):
        text, image = torch.randn(1, 40, 768), torch.randn(1, 577, 768)
        for x, other in ((text, image), (image, text)):
            for kind in ("kept", "skipped"):
                model = nn.Module()
                model.layer = BertLayer(config, layer_idx=0).eval()
                block = fusion_block("layer", 768)
                dense = count_macs(lambda m=model, x=x, o=other: m.layer(x, encoder_hidden_states=o))
                if kind == "kept":
                    add_adapters(model, block, 96)
                else:
                    model.layer = Skipped(model, block, 96)
                after = count_macs(lambda m=model, x=x, o=other: m.layer(x, encoder_hidden_states=o))
                net += (after - dense) * (4 if kind == "kept" else 2)
    assert net / 1e9 == pytest.approx(-11.18, abs=0.01)
    assert 100 * net / 93.12e9 == pytest.approx(-11.97, abs=0.1)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_without_adapters_is_exported_as_an_ordinary_shorter_model(tiny_raw, tmp_path):
    from trimtab import load

    methods = [{"name": "block-influence", "skip": 3, "adapters": "none"}, "full"]
    r = recipe.expand(tiny_raw("tiny-vilt", "vqa", methods), "test")[0]
    folder = run.run(r, tmp_path / "run", measure_costs=False)
    assert not (folder / "search").exists()
    again = load(folder_of_runs.export(folder, tmp_path / "out"))
    assert again.model.config.num_hidden_layers == 5 and len(again.model.vilt.encoder.layer) == 5
    trained = folder_of_runs.load(folder).eval()
    batch = {k: v for k, v in trained.example(2).items() if k != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again.eval().pair(**batch).tokens, trained.backbone.pair(**batch).tokens)


@pytest.mark.parametrize("adapters", ["none", "parallel"])
def test_torchs_random_state_is_as_before(adapters):
    model = trimtab.load("tiny-vilt").model
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    trimtab.adapt(model).skip("das", plan=["vilt.encoder.layer.3"], adapters=adapters)
    assert torch.equal(torch.rand(1), expected)
