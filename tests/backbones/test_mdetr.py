"""MDETR: its average of weights, its answers, its padding."""

from __future__ import annotations

import pytest
import torch

from tests.models.published import PUBLISHED, build, ids, pixels, tensors
from trimtab.backbones.official import CheckpointError, load_official


def gqa(kinds: int) -> dict[str, torch.Tensor]:
    """A pretrained file with answer heads."""
    heads = {"answer_head": 1853}
    if kinds == 6:
        heads = {f"answer_{k}_head": n for k, n in
                 {"type": 5, "rel": 1594, "obj": 3, "global": 111, "attr": 403, "cat": 678}.items()}  # fmt: skip
    more = {f"{n}.weight": torch.randn(size, 24) for n, size in heads.items()}
    more |= {f"{n}.bias": torch.zeros(size) for n, size in heads.items()}
    return tensors("mdetr") | more | {"qa_embed.weight": torch.randn(kinds, 24)}


def test_the_average_is_taken_only_when_asked_for(tmp_path):
    torch.save(PUBLISHED["mdetr"].file(tensors("mdetr")), tmp_path / "m.pth")
    plain, _ = load_official(tmp_path / "m.pth", **PUBLISHED["mdetr"].settings)
    average, _ = load_official(tmp_path / "m.pth", ema=True, **PUBLISHED["mdetr"].settings)
    for (name, a), b in zip(plain.named_parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(b, a * 1.01, msg=name)
    for extras in ({}, {"model_ema": None}):  # released files may hold an empty one
        with pytest.raises(CheckpointError, match="holds no average of its weights"):
            build("mdetr", extras=extras, ema=True)


def test_frozen_norms_are_no_parameters():
    model, _ = build("mdetr")
    assert not [n for n, _ in model.backbone.named_parameters() if "bn" in n or "downsample.1" in n]
    assert {n for n, _ in model.backbone.named_buffers() if n.startswith("bn1")} == {
        f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    }


@pytest.mark.parametrize("kinds", [1, 6])
@torch.no_grad()
def test_answers_are_read_from_the_first_decoder_layer(kinds):
    model, report = build("mdetr", gqa(kinds))
    assert not report.unused
    before = PUBLISHED["mdetr"].run(model)
    answers = {k for k in before if k.startswith("answer")}
    assert len(answers) == kinds and before["boxes"].shape == (2, 2, 7, 4), "answers are no objects"
    model.transformer.decoder.layers[1].linear1.weight.zero_()
    after = PUBLISHED["mdetr"].run(model)
    assert all(torch.equal(before[k], after[k]) for k in answers)
    assert not torch.allclose(before["boxes"][1], after["boxes"][1])


@torch.no_grad()
def test_padding_of_images_and_texts_changes_nothing():
    model, _ = build("mdetr")
    text, mask = ids()
    image, full = pixels(1, 3, 64, 64), torch.ones(1, 64, 64)
    alone = model(image, text[1:, :4], mask[1:, :4], full)
    wide, seen = torch.zeros(1, 3, 64, 128), torch.zeros(1, 64, 128)
    wide[..., :64], seen[..., :64] = image, 1
    padded = model(wide, text[1:].masked_fill(mask[1:] == 0, 1), mask[1:], seen)
    # Image and text may be padded, but the last convolutions look one place past the image: nearly the same.
    apart = float((alone["boxes"] - padded["boxes"]).abs().mean())
    unmasked = float((alone["boxes"] - model(wide, text[1:, :4], mask[1:, :4])["boxes"]).abs().mean())
    assert apart < unmasked
    longer = model(image, text[1:].masked_fill(mask[1:] == 0, 1), mask[1:], full)
    torch.testing.assert_close(alone["boxes"], longer["boxes"])


def test_variants_that_are_not_read():
    with pytest.raises(CheckpointError, match="4 kinds of answers; only GQA's 6, or 1 for all"):
        build("mdetr", tensors("mdetr") | {"qa_embed.weight": torch.zeros(4, 24)})
    state = {k.replace("body.layer", "body.block"): v for k, v in tensors("mdetr").items()}
    with pytest.raises(
        CheckpointError, match=r"found no 'backbone.0.body.layer1.0.conv2.weight' \(EfficientNet is not"
    ):
        build("mdetr", state)
    with pytest.raises(CheckpointError, match="24 channels are no multiple of 5 heads"):
        build("mdetr", heads=5)


@pytest.mark.slow
def test_a_step_at_the_published_size():
    """ResNet-101, RoBERTa-base, 6 + 6 layers on one picture of 800 x 1333 pixels, trained beside its encoder."""
    import resource

    from trimtab.anatomy import Anatomy
    from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig
    from trimtab.methods import METHODS

    config = MdetrConfig({"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1})
    model = Mdetr(config).eval().requires_grad_(False)
    METHODS["unipt"](towers=("encoder",), form="token").attach(model, Anatomy.of(model))
    text = torch.randint(5, 50000, (1, 20), generator=torch.Generator().manual_seed(0))
    before = model.unipt["encoder"].up.weight.detach().clone()
    out = model(pixels(1, 3, 800, 1333), text, torch.ones_like(text))
    assert out["logits"].shape == (6, 1, 100, 256) and out["words"].shape == (1, 20, 64)
    optimiser = torch.optim.AdamW(model.unipt.parameters(), lr=1e-3)
    (out["logits"].square().mean() + out["boxes"].mean()).backward()
    optimiser.step()
    assert not torch.equal(before, model.unipt["encoder"].up.weight)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 24e9
