"""Folders of today's families, written by transformers: plain models, and backbones of tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import trimtab
from tests.models.modern import MODERN
from tests.models.zoo import IDS, MASK, ZOO
from trimtab.anatomy import Anatomy
from trimtab.backbones import load_model
from trimtab.backbones.siglip.features import patched

MEMBERS = MODERN | {name: ZOO[name] for name in ("siglip", "siglip2", "llava", "qwen2.5-vl")}
READERS = ("smolvlm", "idefics3", "paligemma", "paligemma2", "llava")


def saved(name: str, folder: Path) -> torch.nn.Module:
    model = MEMBERS[name].model()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MEMBERS)
def test_a_folder_of_transformers_is_read(name, tmp_path):
    model = saved(name, tmp_path)
    again = trimtab.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    empty, anatomy = load_model(tmp_path)
    assert any(p.is_meta for p in empty.parameters())
    assert anatomy == Anatomy.of(model)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_fuses_picture_and_words(name, tmp_path):
    saved(name, tmp_path)
    backbone = trimtab.load(tmp_path)
    assert backbone.kind == "joint" and backbone.width == 16
    pixels = torch.randn(2, 3, backbone.pictures.size, backbone.pictures.size)
    with torch.no_grad():
        seen = backbone.look(pixels)
        found = backbone.pair(pixels, IDS, MASK)
        other = backbone.pair(pixels, IDS.masked_fill(MASK == 0, 7), MASK)
        written = backbone.write(seen, IDS, MASK)
        continued = backbone.write(seen, torch.cat([IDS[:, :4], IDS[:, 4:] + 3], dim=1), MASK)
    patches = seen.shape[1]
    assert seen.shape == (2, 4, 16) and found.tokens.shape == (2, patches + 5, 16)
    assert found.image_tokens == slice(0, patches) and found.mask.tolist() == [[1] * 9, [1] * 7 + [0, 0]]
    torch.testing.assert_close(found.pooled[1], found.tokens[1, patches + 2])  # its last word
    torch.testing.assert_close(found.pooled, other.pooled)  # whatever stands at padded places
    if "paligemma" not in name:  # whose words see each other where nothing is written
        torch.testing.assert_close(written, found.tokens[:, patches:])
    torch.testing.assert_close(written[:, :4], continued[:, :4])  # a word sees none that follow
    assert not torch.allclose(written[0, 4], continued[0, 4])


def test_a_reader_gives_what_the_model_does(tmp_path):
    """Image tokens among its own ids, as transformers puts them in."""
    saved("llava", tmp_path)
    backbone = trimtab.load(tmp_path)
    pixels = ZOO["llava"].batch["pixel_values"]
    ids = torch.cat([torch.full((2, 4), 29), IDS], dim=1)
    mask = torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], dim=1)
    with torch.no_grad():
        expected = backbone.model.model(input_ids=ids, pixel_values=pixels, attention_mask=mask).last_hidden_state
        found = backbone.pair(pixels, IDS, MASK).tokens
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_encodes_pictures_and_texts(name, tmp_path):
    model = saved(name, tmp_path)
    backbone = trimtab.load(tmp_path)
    assert backbone.kind == "dual" and backbone.pictures.size == 16
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        image, text = backbone.image(pixels), backbone.text(IDS, MASK)
        assert torch.equal(text.pooled, model.get_text_features(input_ids=IDS).pooler_output)
    assert image.pooled.shape == (2, 24) and text.pooled.shape == (2, 24)
    with pytest.raises(ValueError, match="no projections to fold"):
        backbone.fold_projections(torch.eye(24), torch.eye(24), torch.zeros(()))


def test_pictures_become_rows_of_patches():
    """A patch is read row by row, its colours last."""
    picture = torch.arange(3 * 4 * 4).float().view(1, 3, 4, 4)
    patches, side = patched(picture, 2)
    assert side == 2 and patches.shape == (1, 4, 12)
    assert patches[0, 1].tolist() == [picture[0, c, y, x] for y in (0, 1) for x in (2, 3) for c in range(3)]


def test_a_chat_model_without_its_processor_is_told_what_is_missing(tmp_path):
    saved("qwen3-vl", tmp_path)
    with pytest.raises(ValueError, match="its Qwen3VLProcessor cannot be made"):
        trimtab.load(tmp_path)


def test_families_that_no_task_reads_are_named(tmp_path):
    hf.BertModel(hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                               vocab_size=20)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown model_type 'bert'.*smolvlm"):
        trimtab.load(tmp_path)
