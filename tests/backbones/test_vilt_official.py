"""ViLT from files in its authors' layout, in transformers' classes."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.models import layouts
from tests.models.official import vilt as tiny
from trimtab.anatomy import Anatomy
from trimtab.backbones.base import WEIGHTS
from trimtab.backbones.family import FAMILIES
from trimtab.backbones.official import FORMATS, CheckpointError, Tensors, build_official
from trimtab.backbones.vilt.official import pixel_mask


def batch(length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 24, 16, generator=generator)
    pixels[0, :, 16:] = 0
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 4:] = 0
    ids = torch.randint(4, 40, (2, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "pixel_mask": pixel_mask(pixels)}


CLASSES = {
    ("mlm", "itm"): "ViltForPretraining", ("vqa",): "ViltForQuestionAnswering",
    ("nlvr2",): "ViltForImagesAndTextClassification", ("itm", "irtr"): "ViltForImageAndTextRetrieval",
}  # fmt: skip


@pytest.mark.parametrize("tasks", CLASSES, ids="-".join)
def test_each_file_becomes_the_class_of_its_task_and_is_saved_bit_for_bit(tasks, tmp_path):
    model, report = tiny(*tasks)
    assert type(model).__name__ == CLASSES[tasks]
    assert not report.unused and not report.fresh
    trimtab.save_pretrained(model, tmp_path / "saved", sparse=False)
    again = trimtab.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert trimtab.load(tmp_path / "saved").model.config.num_labels == model.config.num_labels


def test_a_tokenizer_is_given_by_its_folder_and_settings_belong_to_files(tmp_path):
    shapes = layouts.vilt(("mlm", "itm"), **layouts.TINY_VILT | {"width": 64, "layers": 1, "words": 30522})
    torch.save({"state_dict": layouts.fill(shapes)}, tmp_path / "vilt.ckpt")
    folder = WEIGHTS / "tiny-vilt"
    backbone = trimtab.load(tmp_path / "vilt.ckpt", tokenizer=folder, task="irtr")
    assert backbone.load_report.format == "vilt" and "mlm_score.bias" in backbone.load_report.leftovers
    batch = backbone.texts(["a red ball"]) | {"pixel_values": torch.zeros(1, 3, 24, 24)}
    assert backbone.match(backbone.pair(**batch)).shape == (1,)
    with pytest.raises(ValueError, match="tiny-vilt: task: only official checkpoint files and architectures"):
        trimtab.load("tiny-vilt", task="irtr")


def test_the_decoder_of_words_is_not_tied():
    model, _ = tiny()
    state = layouts.fill(layouts.vilt(("mlm", "itm"), 7, **layouts.TINY_VILT))
    assert torch.equal(model.mlm_score.decoder.weight, state["mlm_score.decoder.weight"])
    assert torch.equal(model.vilt.embeddings.text_embeddings.word_embeddings.weight,
                       state["text_embeddings.word_embeddings.weight"])  # fmt: skip
    words, together = model(**batch())
    assert words.shape == (2, 6, 40) and together.shape == (2, 2)


def test_new_heads_from_the_pretrained_file():
    ranking, report = tiny(task="irtr")
    assert not report.fresh
    assert torch.equal(ranking.rank_output.weight[0], layouts.fill(layouts.vilt(("mlm", "itm"), 7,
                       **layouts.TINY_VILT))["itm_score.fc.weight"][1])  # fmt: skip
    answers, report = tiny(task="vqa", answers=5)
    assert report.fresh and answers.classifier[3].out_features == 5
    pairs, report = tiny(task="nlvr2")
    table = pairs.vilt.embeddings.token_type_embeddings.weight
    assert table.shape[0] == 3 and torch.equal(table[2], table[1])


def test_padding_of_pictures_is_told_by_their_zeros():
    mask = batch()["pixel_mask"]
    assert mask[0, :16].all() and not mask[0, 16:].any() and mask[1].all()


def test_gradients_reach_every_parameter():
    model, _ = tiny()
    words, together = model.train()(**batch())
    (words.square().sum() + together.square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_anatomy_and_tasks():
    model, _ = tiny()
    anatomy = Anatomy.of(model)
    assert [(t.name, t.modality, len(t.blocks)) for t in anatomy.towers] == [("fusion", "fusion", 2)]
    assert set(anatomy.heads) == {"vilt.pooler", "mlm_score", "itm_score"}
    backbone = FAMILIES["vilt"].backbone("vilt.ckpt", model, None)
    example = backbone.example(2, 5)
    assert backbone.match(backbone.pair(**example)).shape == (2,)
    with pytest.raises(ValueError, match="text of 10 tokens: ViLT has positions for 9"):
        backbone.pair(**backbone.example(2, 10))
    with pytest.raises(ValueError, match=r"picture of 20 x 24: ViLT takes multiples of its patch of 8 pixels"):
        backbone.pair(**example | {"pixel_values": example["pixel_values"][:, :, :20]})
    with pytest.raises(ValueError, match=r"no tokenizer, or no vocabulary .* give its folder"):
        backbone.texts(["a picture"])


def test_bad_input():
    with pytest.raises(CheckpointError, match="unknown task of ViLT 'vqq': did you mean 'vqa'"):
        tiny(task="vqq")
    state = layouts.fill(layouts.vilt(**layouts.TINY_VILT))
    half = {k: v for i, (k, v) in enumerate(state.items()) if i % 2 or "blocks" not in k or "mlp.fc1" in k}
    with pytest.raises(
        CheckpointError, match=r"looks like ViLT, but \d+ of \d+ tensors are missing: 'vilt\..*' and more"
    ):
        build_official(half, {}, "vilt.ckpt", heads=2)
    wrong = state | {"transformer.pos_embed": torch.zeros(1, 8, 16)}
    with pytest.raises(CheckpointError, match="'transformer.pos_embed' has 7 places, which are no square grid"):
        build_official(wrong, {}, "vilt.ckpt", heads=2)
    with pytest.raises(CheckpointError, match="this looks like ViLT, not like METER"):
        build_official(state, {}, "vilt.ckpt", "meter")


@pytest.mark.parametrize(("tasks", "published"), [
    (("mlm", "itm"), 135660092), (("vqa",), 117588537), (("nlvr2",), 113962754), (("itm", "irtr"), 111597315),
], ids=["pretrain", "vqa", "nlvr2", "irtr"])  # fmt: skip
def test_published_number_of_parameters(tasks, published):
    """To the last one; for ranking, the authors' model holds its unused matching head too."""
    state = layouts.fill(layouts.vilt(tasks), device="meta")
    kind, config = FORMATS["vilt"].plan(Tensors(state, "vilt.ckpt", "ViLT"), {})
    with torch.device("meta"):
        model = kind(config)
    unused = 2 * 768 + 2 if "irtr" in tasks else 0
    assert sum(p.numel() for p in model.parameters()) == published - unused
