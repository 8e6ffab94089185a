"""Every described family: what its anatomy says, what pruning takes of it, and which tokens its statistics count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab
from tests.models.modern import MODERN
from tests.models.zoo import MASK, Member
from tests.models.zoo import ZOO as OLDER
from trimtab import UniPT
from trimtab.anatomy import Anatomy, Tap, pick, read, rewrite
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect

ZOO = OLDER | MODERN
NAMES = list(ZOO)


def forward(model: nn.Module, member: Member) -> torch.Tensor:
    """Everything that the model returns, in one vector."""
    torch.manual_seed(1)  # transformers' ViLT draws an order of the patches
    with torch.no_grad():
        out = model(**member.batch).to_tuple()
    return torch.cat([v.flatten() for v in out if isinstance(v, torch.Tensor)])


@pytest.fixture(params=NAMES)
def member(request) -> Member:
    return ZOO[request.param]


def test_towers_and_prunable_weights_are_counted_exactly(member):
    model = member.model()
    anatomy = Anatomy.of(model)
    assert "registered" in anatomy.source
    weights = anatomy.weights(model)
    found = {
        t.name: (t.modality, len(t.blocks),
                 sum(model.get_parameter(w.path).numel() for w in weights if anatomy.owner(w.path) is t))
        for t in anatomy.towers
    }  # fmt: skip
    assert found == member.towers
    assert len({id(model.get_parameter(w.path)) for w in weights}) == len(weights)
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    assert not any(id(model.get_parameter(w.path)) in embedded for w in weights)  # nor a head that is tied to one


def test_taps_see_the_stream_and_adapters_can_be_set(member):
    """Parts read the stream as it enters the block; adding zero changes nothing, adding something does."""
    model = member.model()
    anatomy = Anatomy.of(model)
    seen: dict[Tap, torch.Tensor] = {}
    taps = [t for tower in anatomy.towers for t in (tower.output, tower.mask, tower.samples, tower.pooled) if t]
    for block in anatomy.blocks():
        taps += [Tap(block.path, "input"), Tap(block.path)]
        taps += [t for part in block.sublayers for t in (part.read, part.write)]
    for tap in taps:
        read(model, tap, lambda value, tap=tap: seen.__setitem__(tap, value))
    plain = forward(model, member)
    for tower in anatomy.towers:
        width, length = tower.blocks[0].width, member.lengths[tower.name]
        stream: tuple[int, ...] = (2, length, width)
        if tower.samples is not None:
            stream = (length, 2, width) if seen[tower.output].ndim == 3 else (2 * length, width)
            assert len(seen[tower.samples]) == 2
        streams = member.streams.get(tower.name, [stream] * len(tower.blocks))
        assert seen[tower.output].shape == streams[-1]
        if tower.mask is not None:
            assert torch.equal(seen[tower.mask].bool(), member.masks[tower.name].bool())
        for block, stream in zip(tower.blocks, streams, strict=True):
            assert [p.kind for p in block.sublayers] == member.sublayers.get(tower.name, ["attention", "mlp"])
            assert seen[Tap(block.path)].shape == stream
            for part in block.sublayers[:1]:
                assert torch.equal(seen[part.read], seen[Tap(block.path, "input")])
            assert all(seen[t].shape == stream for p in block.sublayers for t in (p.read, p.write))
    for block in anatomy.blocks():
        outs: list = []
        handle = model.get_submodule(block.path).register_forward_hook(lambda m, a, out, outs=outs: outs.append(out))
        assert torch.equal(forward(model, member), plain)
        assert isinstance(outs[0], tuple) == (block.returns_tuple or bool(block.also))
        # BridgeTower's fusion layers hand on both attention maps, of which the model reads the first.
        assert not block.also or len(outs[0]) == (3 if "cross_modal" in block.path else 1 + len(block.also))
        for part in block.sublayers:
            for amount, changes in ((0.0, False), (0.5, True)):
                added = rewrite(model, part.write, lambda x, amount=amount: x + amount * torch.arange(x.shape[-1]))
                forward(model, member)
                same = torch.equal(pick(outs[-1], 0), pick(outs[0], 0))
                assert same != changes, part.write
                added.remove()
        handle.remove()


@pytest.mark.parametrize("method", ["multiflow", "snip"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_pruned_by_what_is_asked_and_still_writes(name, method):
    member = ZOO[name]
    if method == "snip" and member.lossless:
        pytest.skip("it computes no loss")
    model = member.model()
    torch.manual_seed(1)
    masks = trimtab.prune(model, method, 0.5, [member.batch], allow_empty_tower=True).masks
    assert masks.prunable == sum(count for _, _, count in member.towers.values())
    assert abs(masks.sparsity - 0.5) < 0.01
    for path, mask in masks.items():
        assert not model.get_parameter(path)[~mask].any(), path
    if member.generates:
        arguments = {k: v for k, v in member.batch.items() if not k.startswith(("labels", "decoder"))}
        with torch.no_grad():
            written = model.generate(**arguments, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert written.shape[1] >= 3


@pytest.mark.parametrize("name", [n for n in NAMES if ZOO[n].padding])
def test_what_stands_at_padded_places_changes_no_mask(name):
    member = ZOO[name]
    model = member.model()
    masks = []
    for batch in (member.batch, member.padded_otherwise()):
        torch.manual_seed(1)
        (found,) = trimtab.prune(model, "multiflow", [0.5], [batch])
        masks.append(found)
    assert all(torch.equal(masks[0][path], masks[1][path]) for path in masks[0])


def squares(model: nn.Module, anatomy: Anatomy, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    calibration = Calibration(model, model, anatomy, lambda: [batch])
    weights = anatomy.weights(model)
    return {w.path: parts[0].squares for w, parts in collect(calibration, weights, {"squares"}, [batch]).items()}


def test_statistics_are_sums_over_valid_tokens_a_sample(member):
    """Of the first linear layer that a block's input reaches after its norm, image tokens among them."""
    model = member.model()
    anatomy = Anatomy.of(model)
    firsts, inputs = {}, {}
    for tower in anatomy.towers:
        path = tower.blocks[0].path
        firsts[tower.name] = next(w for w in anatomy.weights(model) if w.module.startswith(path + "."))
        tap = Tap(firsts[tower.name].module, "input", 0)
        read(model, tap, lambda x, name=tower.name: inputs.__setitem__(name, x))
    found = squares(model, anatomy, member.batch)
    for tower in anatomy.towers:
        x = inputs[tower.name].detach()
        valid = member.masks.get(tower.name)
        x = x.flatten(0, -2) if valid is None else x[valid.bool()]
        tokens = 2 * member.lengths[tower.name] if valid is None else int(valid.sum())
        assert len(x) == tokens
        torch.testing.assert_close(found[firsts[tower.name].path], x.square().sum(0) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "path", "tokens"),
    [
        ("bridgetower", "bridgetower.cross_modal_text_layers.0.crossattention.self.key", None),  # five image tokens
        ("bridgetower", "bridgetower.cross_modal_image_layers.1.crossattention.self.value", MASK),  # five of text
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k", MASK),
        (
            "florence2",
            "model.language_model.decoder.layers.1.encoder_attn.k_proj",
            MODERN["florence2"].masks["encoder"],
        ),
        ("grounding-dino", "model.decoder.layers.1.encoder_attn_text.key", MODERN["grounding-dino"].masks["text"]),
        (
            "grounding-dino",
            "model.decoder.layers.1.encoder_attn.value_proj",
            MODERN["grounding-dino"].masks["fusion-image"],
        ),
    ],
)
def test_what_is_read_of_another_tower_is_masked_as_that_tower(name, path, tokens):
    """Image and text are equally long here: only where a tensor comes from tells them apart."""
    member = ZOO[name]
    model = member.model()
    inputs: list[torch.Tensor] = []
    read(model, Tap(path, "input", 0), inputs.append)
    found = squares(model, Anatomy.of(model), member.batch)[path + ".weight"]
    x = inputs[-1].detach()
    assert x.shape[:2] == ((2, 5) if tokens is None else tokens.shape)
    x = x.flatten(0, 1) if tokens is None else x[tokens.bool()]
    torch.testing.assert_close(found, x.square().sum(0) / 2, rtol=1e-4, atol=1e-6)


def test_a_text_without_a_mask_is_refused_but_by_siglip():
    for name, member in ZOO.items():
        if "attention_mask" not in member.batch:
            continue
        batch = {k: v for k, v in member.batch.items() if k != "attention_mask"}
        model = member.model()
        if name.startswith("siglip"):
            assert abs(trimtab.prune(model, "wanda", [0.5], [batch])[0].sparsity - 0.5) < 0.01
            continue
        with pytest.raises(ValueError, match="calibration batch 1 has no mask of valid tokens for the tower"):
            trimtab.prune(model, "wanda", [0.5], [batch])


def test_masks_that_are_none_of_tokens_are_refused():
    member = ZOO["bert"]
    with pytest.raises(
        ValueError, match=r"batch 1, tower 'text': expected a mask of valid tokens .B, L., found .2, 1, 5, 5."
    ):
        blown = MASK[:, None, None].expand(-1, -1, 5, -1).float()
        trimtab.prune(member.model(), "wanda", [0.5], [{**member.batch, "attention_mask": blown}])
    with pytest.raises(ValueError, match="tower 'text': no batch's mask marks a token as valid"):
        trimtab.prune(member.model(), "wanda", [0.5], [{**member.batch, "attention_mask": MASK * 0}])


def test_a_model_that_holds_a_described_one_is_described():
    class Classifier(nn.Module):
        def __init__(self, *others: nn.Module):
            super().__init__()
            self.reader = ZOO["bert"].model().bert
            self.head = nn.Linear(16, 3)
            self.others = nn.ModuleList(others)

    model = Classifier()
    found = Anatomy.of(model)
    assert found.tower("text").mask == Tap("reader", "input", "attention_mask")
    assert found.modality("head.weight") is None and len(found.weights(model)) == 12
    two = Classifier(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert {t.name for t in Anatomy.of(two).towers} == {
        "reader_encoder_layer",
        "others",
    }  # discovered: others has blocks


def test_unipt_refuses_a_stream_that_does_not_begin_with_samples():
    for name, path in (("qwen2-vl", "vision"), ("bridgetower", "vision")):
        model = ZOO[name].model()
        with pytest.raises(ValueError, match="tower 'vision' does not begin with the samples"):
            UniPT(reduction=2, towers=(path,)).attach(model, Anatomy.of(model))
