"""UniPT on the backbones of its paper, wired as its authors wire it (Paranioar/UniPT): which maps are read, which of
them are targets, where the result goes, what is trained; against the same computation written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from tests.methods.test_unipt import literal, millions
from tests.models import layouts, published, zoo
from trimtab.anatomy import Anatomy, Tap, read
from trimtab.backbones.official import build_official
from trimtab.counting import saved_bytes
from trimtab.methods import METHODS
from trimtab.methods.tune.listener import Seen

shown = literal.shown


@dataclass
class Use:
    """A published use of UniPT.

    Attributes:
        build: gives the backbone, tiny, of random weights.
        run: model -> what its loss sees.
        hand: the tuned model -> the same, from hidden maps that are looked up and side networks that are called.
        settings: of `trimtab.tune`.
        heads: what the authors train beside the side networks.
        silent: parameters of which the gradient is 0 here.
    """

    build: Callable[[], Any]
    run: Callable[[Any], Tensor]
    hand: Callable[[Any], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def official(name: str) -> Any:
    return build_official(published.tensors(name), {}, name, **published.PUBLISHED[name].settings)[0]


def maps(model: Any, tower: str, run: Callable[[], Any]) -> list[Tensor]:
    """What enters the first block of a tower and what every block puts out, without gradients."""
    found: list[Tensor] = []
    blocks = list(Anatomy.of(model).blocks(tower))
    taps = [Tap(blocks[0].path, "input"), *(Tap(b.path) for b in blocks)]
    handles = [read(model, tap, lambda x: found.append(x.detach())) for tap in taps]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def vse_by_hand(model: Any) -> Tensor:
    ids, mask = published.ids()
    image, text = model.img_enc, model.txt_enc
    grids = []
    with torch.no_grad():
        net = image.backbone.resnet
        x = net.maxpool(torch.relu(net.bn1(net.conv1(published.pixels(2, 3, 96, 64)))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            grids.append(x)
        states = text.bert(ids, mask, output_hidden_states=True).hidden_states
    image = F.normalize(image.image_encoder.gpool(model.unipt["vision"](shown(grids))), dim=-1)
    words = F.normalize(text.gpool(model.unipt["text"](shown(list(states), mask.float())), mask != 0), dim=-1)
    return image @ words.T


def texts() -> Tensor:
    """Ids (2, 7), padded with 0; a text ends with the largest id of all."""
    ids = published.ids(59)[0]
    return ids.scatter(1, (ids != 0).sum(dim=1, keepdim=True) - 1, 59)


def clip4clip_by_hand(model: Any) -> Tensor:
    ids = texts()
    video = published.pixels(2, 3, 3, 32, 32)
    clip, sides, plain = model.clip, model.unipt, model.plain
    frames = maps(model.plain, "vision", lambda: plain.clip.vision_model(video.flatten(0, 1)))
    words = maps(model.plain, "text", lambda: plain.clip.text_model(ids, (ids != 0).long()))
    with torch.no_grad():
        image = F.linear(clip.vision_model.post_layernorm(frames[-1]), clip.visual_projection.weight)[:, 0]
        text = F.linear(clip.text_model.final_layer_norm(words[-1]), clip.text_projection.weight)
        text = text[torch.arange(2), ids.argmax(dim=-1)]
    image = sides["vision"](Seen(frames, None, image)).view(2, 3, -1)
    text = sides["text"](Seen(words, (ids != 0).float(), text, ids.argmax(dim=-1)))
    there = torch.tensor([[1, 1, 1], [1, 1, 0]])[..., None]
    video = (F.normalize(image, dim=-1) * there).sum(dim=1) / there.sum(dim=1)
    return clip.logit_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T


def clip4clip(model: Any) -> Tensor:
    return model(texts(), published.pixels(2, 3, 3, 32, 32), torch.tensor([[1, 1, 1], [1, 1, 0]]))


def clip_vil() -> Any:
    state = layouts.fill(layouts.clip_vil("vqa", 7, **layouts.TINY_CLIP_VIL))
    return build_official({k.removeprefix("module."): v for k, v in state.items()}, {}, "BEST_LXRT.pth", heads=2)[0]


def _words() -> dict[str, Tensor]:
    ids, mask = published.ids(40)
    return {"pixel_values": published.pixels(2, 3, 64, 96), "input_ids": ids, "attention_mask": mask}


def clip_vil_by_hand(model: Any) -> Tensor:
    batch = _words()
    joint = maps(model.plain, "fusion", lambda: model.plain(**batch))
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6)], dim=1).float()  # 2 x 3 places, all valid
    return model.logit_fc(model.pooler(model.unipt["fusion"](shown(joint, mask))))


def mdetr(model: Any) -> Tensor:
    out = published.PUBLISHED["mdetr"].run(model)
    return torch.cat([out[k].flatten() for k in ("logits", "boxes", "objects", "words")])


def mdetr_by_hand(model: Any) -> Tensor:
    text, mask = published.ids()
    text = text.masked_fill(mask == 0, 1)
    seen = torch.ones(2, 64, 96)
    seen[1, 33:] = 0
    image = published.pixels(2, 3, 64, 96) * seen[:, None]
    layers = (0, 1)
    encoder = maps(model.plain, "encoder", lambda: model.plain(image, text, mask, seen))
    decoder = maps(model.plain, "decoder", lambda: model.plain(image, text, mask, seen))
    with torch.no_grad():
        valid = model.encode(image, text, mask, seen)["valid"].float()
        last = model.transformer.decoder.norm(decoder[-1])  # the authors normalise the last one only
    memory = model.unipt["encoder"](shown([encoder[i] for i in layers] + [encoder[-1]], valid))
    read = Seen([decoder[i] for i in layers] + [last], None, last[None], memory=memory, memory_mask=valid)
    states = model.unipt["decoder"](read)  # (levels, B, Q, D)
    objects = F.normalize(model.contrastive_align_projection_image(states), dim=-1)
    words = F.normalize(model.contrastive_align_projection_text(encoder[-1][:, -7:]), dim=-1)  # the frozen encoder's
    outs = (model.class_embed(states), model.bbox_embed(states).sigmoid(), objects, words)
    return torch.cat([out.flatten() for out in outs])


T5 = {k: v for k, v in zoo.ZOO["t5"].batch.items() if k != "labels"}


def t5_by_hand(model: Any) -> Tensor:
    encoder = maps(model.plain, "encoder", lambda: model.plain(**T5))
    decoder = maps(model.plain, "decoder", lambda: model.plain(**T5))
    valid = T5["attention_mask"].float()
    memory = model.unipt["encoder"](shown(encoder, valid))
    read = shown(decoder, T5["decoder_attention_mask"].float(), memory=memory, memory_mask=valid)
    states = model.unipt["decoder"](read)
    scale = model.model_dim**-0.5 if model.config.tie_word_embeddings else 1.0
    return model.lm_head(states * scale)


_MDETR_HEADS = ("class_embed", "bbox_embed", "contrastive_align_projection_image", "contrastive_align_projection_text")

USES = {
    "VSE-infinity": Use(
        lambda: official("vse_grid"), lambda m: published.PUBLISHED["vse_grid"].run(m)["similar"], vse_by_hand,
        heads=("img_enc.image_encoder.gpool", "txt_enc.gpool"),
    ),
    "CLIP4Clip": Use(lambda: official("clip4clip_meanP"), clip4clip, clip4clip_by_hand, {"reduction": 1}),
    "CLIP-ViL": Use(
        clip_vil, lambda m: m.logit_fc(m(**_words()).pooled), clip_vil_by_hand,
        {"towers": ("fusion",), "init": "bert"}, heads=("logit_fc",),
    ),
    "CLIP-ViL, single projection": Use(
        clip_vil, lambda m: m.logit_fc(m(**_words()).pooled), clip_vil_by_hand,
        {"towers": ("fusion",), "init": "bert", "projection": "single"}, heads=("logit_fc",),
    ),
    # What enters the two layers; published: what enters the second, fourth and sixth of six. A decoder starts from 0.
    "MDETR": Use(
        lambda: official("mdetr"), mdetr, mdetr_by_hand,
        {"towers": ("encoder", "decoder"), "layers": (0, 1), "init": "xavier"}, heads=_MDETR_HEADS,
        silent=("unipt.decoder.down.0.0.weight",),
    ),
    "T5": Use(zoo.ZOO["t5"].model, lambda m: m(**T5).logits, t5_by_hand, {"reduction": 1}),
}  # fmt: skip
every = pytest.mark.parametrize("name", USES)


def tuned(name: str) -> tuple[Any, trimtab.Adapted]:
    use = USES[name]
    model = use.build()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)  # with some, a tiny side network's scores are all negative, and a ReLU stops its gradient
    handle = trimtab.tune(model, "unipt", heads=use.heads, **use.settings)
    with torch.no_grad():  # biases of 0 and ReLUs of small weights would hide much
        for p in model.unipt.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    vars(model)["plain"] = plain  # a side network changes what the last block hands on; not a module of the model
    return model, handle


@every
@torch.no_grad()
def test_what_the_heads_read_is_what_the_side_network_makes_of_the_published_maps(name):
    model, _ = tuned(name)
    torch.testing.assert_close(USES[name].run(model), USES[name].hand(model), rtol=1e-4, atol=1e-5)


@every
def test_gradients_are_those_of_the_computation_by_hand_and_reach_nothing_else(name):
    model, _ = tuned(name)
    use, grads = USES[name], []
    for function in (use.run, use.hand):
        model.zero_grad()
        out = function(model)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(n.startswith(("unipt.", *use.heads)) for n in grads[0])
    assert grads[0].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for n, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][n], rtol=1e-3, atol=1e-4)
        assert n in use.silent or bool(grad.abs().sum() > 0), n


@every
def test_no_graph_is_kept_through_the_backbone(name):
    """What autograd keeps is what it keeps if hidden maps are given ready made."""
    model, _ = tuned(name)
    use = USES[name]
    assert saved_bytes(lambda: use.run(model), model) <= 1.02 * saved_bytes(lambda: use.hand(model), model)
    full = use.build()
    assert saved_bytes(lambda: use.run(model), model) < 0.7 * saved_bytes(lambda: use.run(full), full)


@every
def test_what_was_trained_comes_back(name, tmp_path):
    model, handle = tuned(name)
    use = USES[name]
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.01)
    model.train()
    use.run(model).square().mean().backward()
    optimiser.step()
    handle.save(tmp_path / "side")
    with torch.no_grad():
        wanted = use.run(model.eval())
        again = trimtab.adapt(use.build(), tmp_path / "side")
        assert torch.equal(use.run(again.model.eval()), wanted)


def test_vse_drops_tokens_after_the_side_network_has_seen_them_all():
    """Size augmentation in training, as in the authors' encoder: the grid is whole where it is attended to."""
    model, _ = tuned("VSE-infinity")
    lengths = []
    model.img_enc.image_encoder.gpool.register_forward_pre_hook(lambda m, args: lengths.append(args))
    read(model, Tap("unipt.vision"), lambda x: lengths.append(x))
    model.train().encode_image(published.pixels(8, 3, 160, 160))
    made, (pooled, valid) = lengths
    assert made.shape == (8, 25, 24) and pooled.shape == made.shape and int(valid.sum()) < 8 * 25


def meta(model: Callable[[], nn.Module], heads: tuple[str, ...] = (), **settings: Any) -> tuple[float, float]:
    """Millions of parameters of the side networks, and of the heads, at a size of which no weights are made."""
    with torch.device("meta"):
        full = model().requires_grad_(False)
        METHODS["unipt"](**settings).attach(full, Anatomy.of(full))
    return millions(full.unipt), millions(*(full.get_submodule(h) for h in heads))


def test_trained_parameters_at_the_published_sizes():
    from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig
    from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel
    from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig
    from trimtab.backbones.vse.model import VseConfig, VseInfinity

    vse = VseConfig(cnn={"inner": 256, "groups": 32})
    side, pools = meta(lambda: VseInfinity(vse), USES["VSE-infinity"].heads)
    assert side == pytest.approx(12.355, abs=5e-4) and round(side + pools, 1) == 12.4
    clip = {"projection_dim": 512, "vision_config": {"hidden_size": 768, "patch_size": 32}}
    assert round(meta(lambda: Clip4Clip(Clip4ClipConfig(clip, {"num_hidden_layers": 0})), reduction=1)[0], 1) == 9.6
    from transformers import BertConfig

    vil = ClipVilConfig(text_config=BertConfig(), answers=3129)
    head = ("logit_fc",)
    assert round(sum(meta(lambda: ClipVilModel(vil), head, towers=("fusion",))), 2) == 10.73  # as released
    single = meta(lambda: ClipVilModel(vil), head, towers=("fusion",), projection="single")
    assert round(sum(single), 1) == 10.3  # as published
    settings = {"towers": ("encoder", "decoder"), "layers": (1, 3, 5)}
    side, heads = meta(lambda: Mdetr(MdetrConfig(cnn={"frozen": True})), _MDETR_HEADS, **settings)
    assert side == pytest.approx(0.482, abs=5e-4) and heads == pytest.approx(0.231, abs=5e-4)


def test_weights_start_as_in_each_release():
    torch.manual_seed(0)
    model = clip_vil()
    trimtab.tune(model, "unipt", **USES["CLIP-ViL"].settings)
    linear = model.unipt["fusion"].project[0]
    assert 0.015 < float(linear.weight.detach().std()) < 0.025 and not linear.bias.any()
    model = official("mdetr")
    trimtab.tune(model, "unipt", **USES["MDETR"].settings)
    linear = model.unipt["decoder"].project[0]  # 12 -> 24: uniform up to sqrt(6 / 36)
    assert 0.38 < float(linear.weight.detach().abs().max()) <= (6 / 36) ** 0.5


def test_a_form_that_a_tower_has_no_place_for():
    with pytest.raises(ValueError, match="tower 'fusion' has no linear map of its tokens: use another `form`"):
        trimtab.tune(clip_vil(), "unipt", towers=("fusion",), form="projected")
