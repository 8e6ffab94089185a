"""CLIP-ViL from files in its authors' layout. What it computes is compared with their code in `test_golden.py`."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.models import layouts
from tests.models.official import clip_vil as tiny
from trimtab.anatomy import Anatomy
from trimtab.backbones.official import FORMATS, CheckpointError, Tensors, load_official
from trimtab.counting import count_macs
from trimtab.methods import METHODS


def batch(height: int = 64, width: int = 96, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 3:] = 0
    return {"pixel_values": torch.randn(2, 3, height, width, generator=generator),
            "input_ids": torch.randint(4, 40, (2, length), generator=generator), "attention_mask": mask}  # fmt: skip


@pytest.mark.parametrize("task", ["pretrain", "vqa"])
def test_both_files_are_read_and_saved_bit_for_bit(task, tmp_path):
    model, report = tiny(tmp_path, task)
    assert not report.unused and not report.fresh
    assert any(".attnpool." in k for k in report.leftovers) and not any(".layer1." in k for k in report.leftovers
                                                                       if "num_batches" not in k)  # fmt: skip
    trimtab.save_pretrained(model, tmp_path / "saved", sparse=False)
    again = trimtab.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for found, wanted in zip(again(**batch()).to_tuple(), model(**batch()).to_tuple(), strict=True):
            assert torch.equal(found, wanted)
    backbone = trimtab.load(tmp_path / "saved")
    assert backbone.pair(**backbone.example(2, 4)).tokens.shape == (2, 4 + 9, 16)


def test_rows_and_columns_have_their_own_positions(tmp_path):
    model, _ = tiny(tmp_path)
    x = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        model.visn_fc.weight.zero_()
        model.visn_fc.weight[:, 0] = torch.arange(16.0)
        model.x_position_embedding.weight.zero_()[:, 0] = torch.tensor([100.0, -100.0, 0])
        model.y_position_embedding.weight.zero_()
        tokens = model.look(x)[0].view(2, 3, 16)
    assert torch.equal(tokens[0, 0] > 0, tokens[0, 2] > 0) and not torch.equal(tokens[0, 0] > 0, tokens[1, 0] > 0)


def test_padding_changes_nothing_and_gradients_flow(tmp_path):
    model, _ = tiny(tmp_path)
    whole = batch()
    short = {k: v[:1, :3] if k != "pixel_values" else v[:1] for k, v in whole.items()}
    with torch.no_grad():
        assert torch.allclose(model(**whole).pooled[0], model(**short).pooled[0], atol=1e-5)
    out = model.train()(**whole)
    words = model.cls.words(out.text, model.get_input_embeddings().weight)
    (
        words.square().sum() + model.cls.seq_relationship(out.pooled).sum() + model.answer_head(out.pooled).sum()
    ).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_bad_input(tmp_path):
    model, _ = tiny(tmp_path)
    with pytest.raises(ValueError, match="picture of 64 x 100: CLIP-ViL takes multiples of 32 pixels, 96 at most"):
        model(**batch(64, 100))
    with pytest.raises(ValueError, match="picture of 64 x 128"):
        model(**batch(64, 128))
    with pytest.raises(ValueError, match="text of 13 tokens: CLIP-ViL has positions for 12"):
        model(**batch(length=13))
    with pytest.raises(CheckpointError, match="unknown task of CLIP-ViL 'gqa'"):
        load_official(tmp_path / "LXRT.pth", heads=2, task="gqa")
    state = layouts.fill(layouts.clip_vil("pretrain", 7, **layouts.TINY_CLIP_VIL))
    torch.save({k: v for i, (k, v) in enumerate(state.items()) if i % 2 or "running" not in k}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"looks like CLIP-ViL, but \d+ of \d+ tensors are missing: 'vision"):
        load_official(tmp_path / "half.pth", heads=2)


def test_anatomy_and_a_side_network(tmp_path):
    model, _ = tiny(tmp_path)
    anatomy = Anatomy.of(model)
    found = [(t.name, t.layout, len(t.blocks)) for t in anatomy.towers]
    assert found == [("vision", "grid", 5), ("fusion", "tokens", 2)]
    assert [b.keeps_shape for b in anatomy.blocks("vision")] == [False, False, True, False, False]
    assert len(anatomy.weights(model)) == 2 * 6
    model.requires_grad_(False)
    method = METHODS["unipt"](towers=("fusion",))
    method.attach(model, anatomy)
    model(**batch()).text.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("unipt" in n for n in trained)


@pytest.mark.parametrize(("stem", "stages", "parameters", "flops"), [
    (80, (4, 6, 10, 6), 183191793, 163156503552), (64, (3, 4, 6, 3), 140680601, 100003064832),
], ids=["RN50x4", "RN50"])  # fmt: skip
def test_published_parameters_and_multiply_adds(stem, stages, parameters, flops):
    """Of the model for VQA, without what is never used; at 384 x 640 pixels and 20 tokens."""
    state = layouts.fill(layouts.clip_vil("vqa", 3129, stem=stem, stages=stages), device="meta")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    kind, config = FORMATS["clip_vil"].plan(Tensors(state, "LXRT.pth", "CLIP-ViL"), {})
    with torch.device("meta"):
        model = kind(config).eval()
        x = {"pixel_values": torch.zeros(1, 3, 384, 640), "input_ids": torch.zeros(1, 20, dtype=torch.long),
             "attention_mask": torch.ones(1, 20, dtype=torch.long)}  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert 2 * count_macs(lambda: model.logit_fc(model(**x).pooled)) == flops


def test_a_side_network_of_the_first_token_answers_the_same(tmp_path):
    answers = {}
    for tokens in ("all", "first"):
        model, _ = tiny(tmp_path, "vqa")
        torch.manual_seed(0)
        METHODS["unipt"](towers=("fusion",), tokens=tokens).attach(model, Anatomy.of(model))
        answers[tokens] = model(**batch()).pooled
    torch.testing.assert_close(answers["first"], answers["all"])
    assert answers["first"].requires_grad
