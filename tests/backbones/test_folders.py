"""What stands in a folder is used, what is missing or stands there twice is told."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch.nn.functional import pad
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import trimtab
from tests.models.modern import MODERN
from tests.models.official import tokenizer
from tests.models.published import build, tensors
from tests.models.zoo import ZOO
from trimtab.backbones.blip.examples import build as blip
from trimtab.backbones.blip.model import BlipForNlvr2
from trimtab.backbones.official import CheckpointError
from trimtab.backbones.pictures import Pictures
from trimtab.backbones.reading import read_checkpoint

MEMBERS = MODERN | ZOO


def saved(name, folder, side=None):
    """A tiny folder of a family, with a tokenizer that pads on a side."""
    torch.manual_seed(0)
    model = MEMBERS[name].model().eval()
    model.save_pretrained(folder)
    if side:
        words = hf.AutoTokenizer.from_pretrained(tokenizer(folder / "words", 28))
        words.padding_side = side
        words.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["paligemma", "paligemma2", "llava"])
@torch.no_grad()
def test_padding_tells_a_reader_nothing(name, tmp_path):
    model = saved(name, tmp_path)
    backbone = trimtab.load(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(ids)
    plain, padded = backbone.pair(pixels, ids, mask), backbone.pair(pixels, pad(ids, (0, 2)), pad(mask, (0, 2)))
    torch.testing.assert_close(padded.tokens[:, :-2], plain.tokens)
    torch.testing.assert_close(padded.pooled, plain.pooled)
    seen, other = backbone.look(pixels), torch.tensor([[3, 4, 5, 9]])
    for more in (0, 2):
        one, two = (backbone.write(seen, pad(x, (0, more)), pad(mask, (0, more))) for x in (ids, other))
        torch.testing.assert_close(one[:, :3], two[:, :3])  # a word sees none that follow, with padding or without
    if name == "paligemma":  # as transformers reads a prefix
        whole = torch.cat([torch.full((1, seen.shape[1]), 29), ids], dim=1)
        own = model.model(input_ids=whole, pixel_values=pixels, attention_mask=torch.ones_like(whole),
                          token_type_ids=torch.zeros_like(whole)).last_hidden_state  # fmt: skip
        torch.testing.assert_close(plain.tokens, own)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_on_which_side_a_tokenizer_pads(side, tmp_path):
    saved("llava", tmp_path / "llava", side)
    reader = trimtab.load(tmp_path / "llava")
    both = reader.texts(["[UNK]", "[UNK] [UNK] [UNK]"])
    assert both["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]  # behind the words: the picture stands before them

    model = saved("siglip", tmp_path / "siglip", side)
    backbone = trimtab.load(tmp_path / "siglip")
    length = model.config.text_config.max_position_embeddings
    ids = backbone.tokenizer(["[UNK]"], padding="max_length", max_length=length, return_tensors="pt")["input_ids"]
    own = model.get_text_features(input_ids=ids).pooler_output
    for texts in (["[UNK]"], ["[UNK]", "[UNK] [UNK] [UNK]"]):
        torch.testing.assert_close(backbone.text(**backbone.texts(texts)).pooled[:1], own)
    backbone.limit_text(4)
    assert backbone.example()["input_ids"].shape == (1, length)
    torch.testing.assert_close(backbone.text(**backbone.texts(["[UNK]"])).pooled, own)
    cut = backbone.texts(["[UNK] [UNK] [UNK] [UNK] [UNK]"])["attention_mask"]
    assert cut.shape == (1, length) and int(cut.sum()) == 4


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(left, tmp_path):
    saved("clip", tmp_path, "right")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if file not in left:
            (tmp_path / file).unlink(missing_ok=True)
    backbone = trimtab.load(tmp_path)
    assert backbone.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer, or no vocabulary"):
        backbone.texts(["a cat"])
    assert len(trimtab.load(tmp_path, tokenizer=tmp_path / "words").tokenizer) == 28


def test_saving_never_leaves_an_older_folder_in_silence(tmp_path):
    backbone = trimtab.load("tiny-clip", pretrained=False)
    backbone.save_pretrained(tmp_path / "a")
    with pytest.raises(FileExistsError, match="is there already"):
        backbone.save_pretrained(tmp_path / "a")


def test_weights_in_two_layouts_are_refused(tmp_path):
    model = MEMBERS["clip"].model()
    trimtab.save_pretrained(model, tmp_path / "a", sparse=True)
    model.save_pretrained(tmp_path / "a")
    for read in (trimtab.from_pretrained, trimtab.load):
        with pytest.raises(ValueError, match=r"two layouts, model\.sparse\.safetensors and model\.safetensors"):
            read(tmp_path / "a")


def test_a_processor_that_is_not_used_is_saved_as_it_is(tmp_path):
    saved("smolvlm", tmp_path / "a")
    Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}).save_pretrained(
        tmp_path / "a"
    )
    backbone = trimtab.load(tmp_path / "a")
    backbone.save_pretrained(tmp_path / "b")
    own, again = (json.loads((tmp_path / x / "preprocessor_config.json").read_text()) for x in "ab")
    assert own == again and own["max_image_size"] == {"longest_edge": 16}
    assert trimtab.load(tmp_path / "b").pictures == backbone.pictures


def test_models_of_two_pictures_look_at_their_size(tmp_path):
    blip(BlipForNlvr2).save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives 32 x 32 pixels, the model was built for 16 x 16"):
        trimtab.load(tmp_path)
    assert trimtab.load(tmp_path, pictures="squash").pictures.size == 16


def test_a_vision_tower_without_a_processor_says_what_is_assumed(tmp_path, caplog):
    config = hf.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    hf.Dinov2Model(config).save_pretrained(tmp_path)
    found = trimtab.load(tmp_path).pictures
    assert found == Pictures(16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert "no preprocessor_config.json: pictures are squashed to 16 pixels" in caplog.text


def test_a_processor_beside_a_vse_is_followed_or_refused(tmp_path):
    model, _ = build("vse_grid")
    model.save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(tmp_path)
    if model.config.cnn["caffe"]:
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: this network takes blue first"):
            trimtab.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["cnn"]["caffe"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trimtab.load(tmp_path).pictures.shape == (64, 64)


def test_an_average_of_weights_is_whole_or_refused(tmp_path):
    state = tensors("mdetr")
    average = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    wrapped = {"model": {f"module.{k}": v for k, v in state.items()},
               "model_ema": {f"module.{k}": v for k, v in average.items()}}  # fmt: skip
    torch.save(wrapped, tmp_path / "m.pth")
    read, extras = read_checkpoint(tmp_path / "m.pth")
    model, report = build("mdetr", state=read, extras=extras, ema=True)
    assert torch.equal(model.query_embed.weight, average["query_embed.weight"]) and not report.unused
    part = {k: v for k, v in average.items() if not k.startswith("input_proj")}
    with pytest.raises(CheckpointError, match=r"tensors are missing: 'input_proj\.bias'"):
        build("mdetr", state=dict(state), extras={"model_ema": part}, ema=True)


def test_a_fine_tuned_xvlm_may_not_lack_its_decoders_maps():
    model, _ = build("xvlm_clip", task="vqa")
    state = {k: v for k, v in tensors("xvlm_clip").items() if k.startswith("vision_encoder.")}
    own = {n: v for n, v in model.state_dict().items() if not n.startswith("vision_encoder.")}
    state |= {n.replace("text_encoder.bert.", "text_encoder."): v for n, v in own.items()}
    _, report = build("xvlm_clip", state=dict(state))
    assert not report.fresh
    cut = {k: v for k, v in state.items() if "text_decoder" not in k or "layer.0.crossattention.self.key" not in k}
    assert len(cut) < len(state)
    with pytest.raises(CheckpointError, match="2 of .* tensors are missing"):
        build("xvlm_clip", state=cut)
