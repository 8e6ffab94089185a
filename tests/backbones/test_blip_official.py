"""BLIP from files in its authors' layout, in transformers' classes and ours."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.models import layouts
from tests.models.official import BLIP_FILES as FILES
from tests.models.official import BLIP_HEADS as HEADS
from tests.models.official import blip as tiny
from tests.models.official import tied
from trimtab.anatomy import Anatomy
from trimtab.backbones.family import FAMILIES
from trimtab.backbones.official import FORMATS, CheckpointError, Tensors, build_official
from trimtab.counting import count_macs


def batch(pixels: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    ids = torch.randint(4, 38, (2, 6), generator=generator).masked_fill(mask == 0, 0)
    return {"pixel_values": torch.randn(2, 3, pixels, pixels, generator=generator), "input_ids": ids,
            "attention_mask": mask}  # fmt: skip


def results(model) -> list[torch.Tensor]:
    """Something of everything that a model computes."""
    x, kind = batch(), type(model).__name__
    text = {k: x[k] for k in ("input_ids", "attention_mask")}
    if kind == "BlipForNlvr2":
        return [model(x["pixel_values"], x["pixel_values"].flip(0), **text)]
    seen = model.vision_model(pixel_values=x["pixel_values"]).last_hidden_state
    found = [seen]
    if hasattr(model, "itm_head"):
        found += [model(**x)] if kind == "BlipPretraining" else [model(**x).itm_score]
    if kind == "BlipPretraining":
        found += list(model.contrast(seen, **text))
    if hasattr(model, "text_encoder"):
        found.append(model.text_encoder(encoder_hidden_states=seen, **text).last_hidden_state)
    if hasattr(model, "text_decoder"):
        found.append(model.text_decoder(encoder_hidden_states=seen, **text).logits)
    return found


CLASSES = {"pretrain": "BlipPretraining", "retrieval": "BlipForImageTextRetrieval", "vqa": "BlipForVqa",
           "caption": "BlipForConditionalGeneration", "nlvr2": "BlipForNlvr2"}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_each_file_becomes_the_class_of_its_task_and_is_saved_bit_for_bit(file, tmp_path):
    model, report = tiny(file)
    assert type(model).__name__ == CLASSES[file]
    assert not report.unused and not report.fresh
    trimtab.save_pretrained(model, tmp_path / "saved", sparse=False)
    again = trimtab.from_pretrained(tmp_path / "saved")
    assert type(again).__name__ == CLASSES[file]
    with torch.no_grad():
        for found, wanted in zip(results(again), results(model), strict=True):
            assert torch.equal(found, wanted)


def test_momentum_copies_and_queues_are_left_over():
    _, report = tiny()
    heads = {k.split(".")[0] for k in report.leftovers}
    assert heads >= {"visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m", "image_queue", "queue_ptr"}


def test_encoder_and_decoder_share_all_but_self_attention(tmp_path):
    model, _ = tiny()
    encoder, decoder = model.text_encoder, model.text_decoder.bert
    for a, b in zip(encoder.encoder.layer, decoder.encoder.layer, strict=True):
        assert a.crossattention is b.crossattention and a.intermediate is b.intermediate and a.output is b.output
        assert a.attention is not b.attention
    assert model.text_decoder.cls.predictions.decoder.weight is encoder.embeddings.word_embeddings.weight
    trimtab.save_pretrained(model, tmp_path / "saved")
    again = trimtab.from_pretrained(tmp_path / "saved")
    assert again.text_decoder.bert.encoder.layer[0].crossattention is again.text_encoder.encoder.layer[0].crossattention
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_gradients_reach_every_parameter():
    model, _ = tiny()
    model.train()
    sum(r.square().sum() if i != 2 else r.sum() for i, r in enumerate(results(model))).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["temp"]  # only the contrastive loss uses it
    model, _ = tiny("nlvr2")
    results(model.train())[0].square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_padding_of_a_question_is_not_read_by_the_decoder():
    model, _ = tiny("vqa")
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, 6, 16, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    answer = torch.tensor([[38, 5, 6]])
    changed = states.clone()
    changed[:, 4:] += 5
    with torch.no_grad():
        logits = [model.text_decoder(input_ids=answer, encoder_hidden_states=s, encoder_attention_mask=mask).logits
                  for s in (states, changed)]  # fmt: skip
        assert torch.allclose(*logits, atol=1e-5)


def test_two_pictures_start_with_the_weights_for_one():
    model, report = tiny(task="nlvr2")
    assert report.fresh and all(n.startswith("cls_head.") for n in report.fresh)
    cross = model.text_encoder.encoder.layer[0].crossattention
    assert torch.equal(cross.self0.query.weight, cross.self1.query.weight)
    assert torch.equal(cross.output.dense0.weight, cross.output.dense1.weight)


def test_another_image_size_and_bad_input():
    model, report = tiny(task="retrieval", image_size=32)
    assert report.resized == {"vision_model.embeddings.position_embedding": ((1, 5, 16), (1, 17, 16))}
    assert model(**batch(32)).itm_score.shape == (2, 2)
    with pytest.raises(CheckpointError, match="image_size 20 is no multiple of the patch of 8 pixels of BLIP"):
        tiny(image_size=20)
    with pytest.raises(CheckpointError, match="unknown task of BLIP 'caption-ing'"):
        tiny(task="caption-ing")
    with pytest.raises(CheckpointError, match="looks like BLIP, but lacks 'text_decoder.bert"):
        tiny("retrieval", task="caption")
    state = tied(layouts.fill(layouts.blip(**layouts.TINY_BLIP)))
    half = {k: v for i, (k, v) in enumerate(state.items()) if i % 2 or "attention" not in k}
    with pytest.raises(CheckpointError, match=r"looks like BLIP, but \d+ of \d+ tensors are missing: '.*' and more"):
        build_official(half, {}, "blip.pth", **HEADS)


def test_anatomy_counts_encoder_and_decoder_to_text():
    model, _ = tiny()
    anatomy = Anatomy.of(model)
    assert [(t.name, t.modality, len(t.blocks)) for t in anatomy.towers] == [
        ("vision", "vision", 2), ("text", "text", 2), ("decoder", "text", 2),
    ]  # fmt: skip
    weights = anatomy.weights(model)
    # Vision: fused qkv, projection, two of the MLP. Text: 4 + 4 + 2 a layer; the decoder adds its self-attention alone.
    assert len(weights) == 2 * 4 + 2 * 10 + 2 * 4
    assert not any(w.module.startswith(("vision_proj", "text_proj", "itm_head", "text_decoder.cls")) for w in weights)
    backbone = FAMILIES["blip"].backbone("blip.pth", model, None)
    assert backbone.match(backbone.pair(**backbone.example(2, 5))).shape == (2,)
    for call in (backbone.pair, model):
        with pytest.raises(ValueError, match="text of 13 tokens: BLIP has positions for 12"):
            call(**backbone.example(2, 13))
        with pytest.raises(ValueError, match="picture of 8 x 8: BLIP was built for 16 x 16"):
            call(**batch(8))


@pytest.mark.parametrize(("file", "side", "published"), [
    ("pretrain", 224, 252441919), ("retrieval", 384, 223744258), ("caption", 384, 223971644), ("vqa", 480, 361478972),
    ("nlvr2", 384, 259372034),
])  # fmt: skip
def test_published_number_of_parameters(file, side, published):
    """To the last one, without momentum copies."""
    state = layouts.fill(layouts.blip(FILES[file]), device="meta")
    kind, config = FORMATS["blip"].plan(Tensors(state, "blip.pth", "BLIP"), {}, image_size=side)
    with torch.device("meta"):
        model = kind(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == published


PARTS = {  # published multiply-adds, twice: file, side -> part -> figure of the authors' model
    ("retrieval", 384): {"vision": 110967164928, "text": 5990584320, "fusion": 24061722624},
    ("caption", 384): {"vision": 110967164928, "decoder": 27095384064},
}


@pytest.mark.parametrize(("file", "side"), PARTS, ids=lambda x: str(x))
def test_published_multiply_adds(file, side):
    state = layouts.fill(layouts.blip(FILES[file]), device="meta")
    kind, config = FORMATS["blip"].plan(Tensors(state, "blip.pth", "BLIP"), {}, image_size=side)
    with torch.device("meta"):
        model = kind(config).eval()
        pixels, seen = torch.zeros(1, 3, side, side), torch.zeros(1, (side // 16) ** 2 + 1, 768)
        ids = {n: torch.zeros(1, n, dtype=torch.long) for n in (35, 40)}
    calls = {
        "vision": lambda: model.vision_model(pixel_values=pixels),
        "text": lambda: model.text_encoder(input_ids=ids[35]),
        "fusion": lambda: model.text_encoder(input_ids=ids[35], encoder_hidden_states=seen),
        "decoder": lambda: model.text_decoder(input_ids=ids[40], encoder_hidden_states=seen, use_cache=False),
    }
    for part, published in PARTS[file, side].items():
        assert 2 * count_macs(calls[part]) == published, part
