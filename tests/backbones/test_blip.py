"""tiny-blip: described, started from a CLIP, read by transformers' own class; and the other BLIP classes described."""

from __future__ import annotations

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from transformers import BlipModel as TransformersBlip

from trimtab import Anatomy, backbones
from trimtab.data import pictograms
from trimtab.data.images import encoded
from trimtab.tasks import TASKS, TaskModel


@pytest.fixture
def blip():
    torch.manual_seed(0)
    return backbones.load("tiny-blip", pretrained=False).eval()


def config() -> BlipConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BlipConfig(
        text_config={**sizes, "vocab_size": 40, "encoder_hidden_size": 16, "max_position_embeddings": 12},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )


@pytest.mark.parametrize(
    ("cls", "towers", "heads"),
    [
        (BlipForConditionalGeneration, {"vision": 2, "decoder": 2}, {"text_decoder.cls"}),
        (BlipForImageTextRetrieval, {"vision": 2, "text": 2}, {"vision_proj", "text_proj", "itm_head"}),
        (BlipForQuestionAnswering, {"vision": 2, "text": 2, "decoder": 2}, {"text_decoder.cls"}),
        (TransformersBlip, {"vision": 2, "text": 2}, {"visual_projection", "text_projection", "text_model.pooler"}),
    ],
)
def test_anatomy_of_every_class(cls, towers, heads):
    model = cls(config())
    anatomy = Anatomy.of(model)
    assert {t.name: len(t.blocks) for t in anatomy.towers} == towers and set(anatomy.heads) == heads
    assert {t.modality for t in anatomy.towers} == {"vision", "text"}
    # A vision block has 4 linear layers; a text block 4 + 4 of attention and cross-attention, and 2 of its MLP.
    assert len(anatomy.weights(model)) == sum(n * (4 if name == "vision" else 10) for name, n in towers.items())


@torch.no_grad()
def test_start_from_keeps_the_function_of_the_vision_tower():
    clip, blip = backbones.load("tiny-clip"), backbones.load("tiny-blip", pretrained=False)
    blip.start_from(clip)
    x = torch.randn(2, 65, 128)
    mine, theirs = blip.model.vision_model, clip.model.vision_model
    for block, other in zip(mine.encoder.layers, theirs.encoder.layers, strict=True):
        torch.testing.assert_close(block(x), other(x, None), atol=1e-4, rtol=1e-4)
    token = theirs.pre_layrnorm(theirs.embeddings(torch.zeros(1, 3, 64, 64)))[:, 0]
    torch.testing.assert_close(mine.embeddings(torch.zeros(1, 3, 64, 64))[:, 0], token)


@torch.no_grad()
def test_start_from_lets_words_fit_the_picture():
    """Before any training, a caption's words are likelier with the scene that it tells of than with another."""
    rows = list(encoded(pictograms.load("retrieval", rows=32, progress=False)))
    clip, blip = backbones.load("tiny-clip"), backbones.load("tiny-blip", pretrained=False)
    blip.start_from(clip)
    model = TaskModel(blip, TASKS["captioning"]()).eval()
    batch = model.task.collate(blip, rows, train=False)
    own = model(**batch)["loss"]
    other = model(**{**batch, "pixel_values": batch["pixel_values"].roll(1, 0)})["loss"]
    assert own < other - 0.003


def test_start_from_refuses_other_words():
    clip, blip = backbones.load("tiny-clip", pretrained=False), backbones.load("tiny-blip", pretrained=False)
    clip.tokenizer.add_tokens(["zeppelin"])
    with pytest.raises(ValueError, match="their words and widths must be the same"):
        blip.start_from(clip)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"longest": 6}, {"max_new_tokens": 6}),
        ({"longest": 9, "beams": 3}, {"max_length": 10, "num_beams": 3}),
        ({"longest": 12, "shortest": 7, "beams": 2, "no_repeat": 2, "length_penalty": 0.5},
         {"max_length": 13, "min_length": 8, "num_beams": 2, "no_repeat_ngram_size": 2, "length_penalty": 0.5}),
        ({"longest": 9, "beams": 3, "prompt": "a picture of "}, {"max_length": 10, "num_beams": 3}),
    ],
)  # fmt: skip
def test_captions_are_those_of_transformers_after_an_export(blip, tmp_path, settings, theirs):
    """The head is folded into the model's own; transformers writes with its cache of keys and values."""
    torch.manual_seed(1)
    model = TaskModel(blip, TASKS["captioning"](**settings)).eval()
    with torch.no_grad():
        model.head.bias.normal_()
        model.head.bias[blip.tokenizer.sep_token_id] += 3  # so that some captions end early
        model.head.transform[0].weight.normal_()
        for layer in blip.model.text_decoder.bert.encoder.layer:  # fresh weights hardly look at the picture
            layer.crossattention.self.value.weight.normal_()
    x = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        told = [r["caption"] for r in model.predict({"pixel_values": x})]
    model.task.fold(blip, model.head)
    blip.save_pretrained(tmp_path / "out")
    exported = BlipForConditionalGeneration.from_pretrained(tmp_path / "out")
    start = {}
    if "prompt" in settings:  # transformers' class puts [DEC] in front and takes the last token away by itself
        start = {"input_ids": torch.tensor(blip.tokenizer([settings["prompt"]] * len(x))["input_ids"])}
    ids = exported.generate(x, do_sample=False, **start, **theirs)
    prompt = start["input_ids"].shape[1] - 1 if start else 1
    assert [t.strip() for t in blip.tokenizer.batch_decode(ids[:, prompt:], skip_special_tokens=True)] == told
    assert len(set(told)) > 1


def test_an_exported_folder_loads_back_the_same(blip, tmp_path):
    blip.save_pretrained(tmp_path / "out")
    again = backbones.load(tmp_path / "out")
    for (key, a), b in zip(blip.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
