"""Captioning: what a word is predicted from, and its metrics."""

from __future__ import annotations

import pytest
import torch

from tests.tasks.parts import rows_of
from trimtab import backbones
from trimtab.metrics.captions import bleu4, cider
from trimtab.tasks.captioning import Captioning
from trimtab.tasks.words import IGNORED, Words, next_words

REFERENCES = [
    ["a dog left of a cat", "there is a dog and a cat", "a picture of a cat and a dog"],
    ["two red apples and a banana", "a banana at the top left and two red apples", "two apples"],
    ["a guitar", "there is a guitar", "a picture of a guitar at the centre"],
    ["three fish, a boat and a star", "a star, three fish and a boat", "there are three fish"],
]
CAPTIONS = ["a dog left of a dog", "two red apples and a banana", "a drum", "there are three fish and a boat"]


@pytest.fixture(scope="module", params=["tiny-vilt", "tiny-blip"])
def backbone(request):
    torch.manual_seed(0)
    return backbones.load(request.param, pretrained=False).eval()


@torch.no_grad()
def test_a_word_sees_the_picture_and_the_words_before_it(backbone):
    seen = backbone.look(torch.randn(2, 3, 64, 64))
    ids = torch.randint(5, 900, (2, 7))
    mask = torch.ones_like(ids)
    before = backbone.write(seen, ids, mask)
    later = torch.cat([ids[:, :4], (ids[:, 4:] + 1)], dim=1)
    after = backbone.write(seen, later, mask)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax(dim=-1).min() > 1e-3
    assert (backbone.write(seen.flip(0), ids, mask) - before).abs().amax(dim=-1).min() > 1e-5
    padded = backbone.write(seen, torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1),
                            torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1))  # fmt: skip
    torch.testing.assert_close(padded[:, :7], before, atol=1e-5, rtol=1e-5)


def test_a_dual_backbone_does_not_write():
    clip = backbones.load("tiny-clip", pretrained=False)
    with pytest.raises(NotImplementedError, match="tiny-clip is a dual backbone: it does not write"):
        clip.write(torch.zeros(1, 5, 64), torch.zeros(1, 2), torch.ones(1, 2))


def test_labels_are_the_words_that_follow():
    ids = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]])
    labels = next_words(ids, (ids > 0).long())
    assert labels.tolist() == [[7, 8, 3, IGNORED, IGNORED], [9, 3, IGNORED, IGNORED, IGNORED]]


@torch.no_grad()
def test_the_head_starts_as_the_models_own():
    blip = backbones.load("tiny-blip", pretrained=False)
    own = blip.model.text_decoder.cls
    own.predictions.bias.normal_()
    tokens = torch.randn(2, 3, 128)
    torch.testing.assert_close(Words(blip)(tokens, blip.model.get_input_embeddings().weight), own(tokens))


def test_metrics_are_those_of_the_coco_evaluation():
    """Values of pycocoevalcap 1.2 on these captions, commas taken out as its tokeniser does."""
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(3.216200123742512, rel=1e-9)
    assert bleu4(CAPTIONS, REFERENCES) == pytest.approx(0.8762461667565413, rel=1e-6)
    assert bleu4(["a", "b", "c", "d"], REFERENCES) == pytest.approx(1.83547636e-06, rel=1e-6)
    assert cider([r[0] for r in REFERENCES], [[r[0]] for r in REFERENCES]) > 5


def test_a_prompt_is_given_and_not_learned(vilt):
    row = {**rows_of("retrieval", 1)[0], "captions": ["two dogs"]}
    plain = Captioning().collate(vilt, [row], train=True)
    prompted = Captioning(prompt="a picture of ").collate(vilt, [row], train=True)
    assert vilt.tokenizer.decode(prompted["input_ids"][0]) == "[CLS] a picture of two dogs [SEP]"
    told = prompted["labels"][0] != IGNORED
    assert told.nonzero()[0, 0] == 3  # the word after "of" is the first that is learned
    assert prompted["labels"][0][told].tolist() == plain["labels"][0][plain["labels"][0] != IGNORED].tolist()


@pytest.mark.parametrize("settings", [{"longest": 0}, {"shortest": 4, "longest": 3}, {"beams": 0}, {"no_repeat": -1}])
def test_lengths_and_beams_that_cannot_be(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        Captioning(**settings)


def test_a_prompt_must_leave_room(vilt):
    task = Captioning(longest=3, prompt="a picture of ")
    with pytest.raises(ValueError, match="has 4 tokens, which leaves no room: a text may have 4"), torch.no_grad():
        task.predict(vilt, task.head(vilt), {"pixel_values": torch.zeros(1, 3, 64, 64)})
