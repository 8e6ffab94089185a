"""VSE-infinity: the pooling operator, the two dialects of ResNet, its loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.models.published import build, ids, pixels, tensors
from trimtab.backbones.official import CheckpointError
from trimtab.backbones.vse.model import GPO, hinge_loss
from trimtab.backbones.vse.resnet import FrozenBatchNorm2d, ResNet, ResNetSizes


@torch.no_grad()
def test_pooling_sorts_each_channel_and_sees_no_padding():
    torch.manual_seed(0)
    pool, x = GPO(), torch.randn(2, 6, 5)
    shuffled = x[:, torch.randperm(6)]
    torch.testing.assert_close(pool(x), pool(shuffled))
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    changed = x.clone()
    changed[1, 4:] = 100.0
    assert torch.equal(pool(x, valid), pool(changed, valid))
    torch.testing.assert_close(pool(x, valid)[1], pool(x[1:, :4])[0])
    torch.testing.assert_close(pool(x, torch.ones(2, 6, dtype=torch.bool)), pool(x))
    weights = pool.weights(6, valid)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 1))
    assert not weights[1, 4:].any()


def test_the_loss_by_hand():
    similar = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.5, 0.2], [0.0, 0.0, 0.9]])
    # Rows: 0.2 + 0.4 - 0.5 = 0.1; 0.2 + 0.6 - 0.5 = 0.3; nothing. Columns: 0.3; 0.1; nothing (0.2 + 0.2 - 0.9 < 0).
    assert float(hinge_loss(similar)) == pytest.approx(0.8)
    assert float(hinge_loss(similar, hardest=False)) == pytest.approx(0.8)
    similar[0, 2] = 0.5  # row 0: 0.1 + 0.2, of which 0.2 is hardest
    assert float(hinge_loss(similar)) == pytest.approx(0.9)
    assert float(hinge_loss(similar, hardest=False)) == pytest.approx(1.0)


def test_the_dialect_follows_from_the_groups():
    wsl, caffe = build("vse_grid")[0].img_enc.backbone.resnet, build("vse_caffe")[0].img_enc.backbone.resnet
    assert wsl.sizes.groups == 2 and wsl.layer2[0].conv1.stride == (1, 1) and wsl.layer2[0].conv2.stride == (2, 2)
    assert caffe.sizes.groups == 1 and caffe.layer2[0].conv1.stride == (2, 2) and caffe.layer2[0].conv2.stride == (1, 1)
    # 96 pixels: 48 after the stem, then 24 by padding or by rounding up.
    assert wsl.maxpool(torch.zeros(1, 1, 48, 48)).shape == caffe.maxpool(torch.zeros(1, 1, 48, 48)).shape


@torch.no_grad()
def test_frozen_norms_compute_what_torch_computes():
    torch.manual_seed(0)
    sizes = ResNetSizes(layers=(1, 1, 1, 1), stem=4, inner=4)
    plain, frozen = ResNet(sizes).eval(), ResNet(ResNetSizes(layers=(1, 1, 1, 1), stem=4, inner=4, frozen=True))
    for buffer in plain.parameters():
        buffer.copy_(torch.rand_like(buffer) - 0.3)
    frozen.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked")})
    assert isinstance(frozen.bn1, FrozenBatchNorm2d) and not [n for n, _ in frozen.named_parameters() if "bn" in n]
    torch.testing.assert_close(frozen(pixels(1, 3, 64, 64)), plain(pixels(1, 3, 64, 64)))


def test_training_drops_grid_tokens_and_keeps_the_statistics_of_norms():
    model, _ = build("vse_grid")
    image = pixels(6, 3, 160, 160)
    with torch.no_grad():
        still = model.encode_image(image)
        before = model.img_enc.backbone.resnet.bn1.running_mean.clone()
        torch.manual_seed(0)
        moving = model.train().encode_image(image)
    assert torch.equal(before, model.img_enc.backbone.resnet.bn1.running_mean)
    assert not torch.equal(still, moving)
    assert float(F.cosine_similarity(still, moving).min()) > 0.5, "most tokens stay"


def test_vectors_have_length_1_unless_the_file_says_otherwise():
    from argparse import Namespace

    text, mask = ids()
    model, _ = build("vse_region")
    torch.testing.assert_close(model.encode_text(text, mask).norm(dim=1), torch.ones(2))
    assert torch.equal(model.encode_text(text), model.encode_text(text, mask)), "the mask is where ids are not 0"
    model, _ = build("vse_region", extras={"opt": Namespace(no_imgnorm=True, no_txtnorm=True)})
    assert float((model.encode_text(text, mask).detach().norm(dim=1) - 1).abs().min()) > 0.01


def test_images_for_a_model_of_regions_and_the_other_way_round():
    with pytest.raises(ValueError, match=r"takes regions \(B, R, F\), found the shape \(1, 3, 32, 32\)"):
        build("vse_region")[0].encode_image(pixels(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\), found the shape \(1, 5, 20\)"):
        build("vse_grid")[0].encode_image(pixels(1, 5, 20))


def test_a_file_without_a_stage_is_named():
    state = {k: v for k, v in tensors("vse_grid").items() if ".resnet.layer3." not in k}
    with pytest.raises(CheckpointError, match=r"four stages under '0.backbone.resnet.', found no .*layer3.0.conv2"):
        build("vse_grid", state)


def test_pooling_weights_are_those_of_packed_sequences():
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    from trimtab.backbones.vse.model import GPO

    torch.manual_seed(0)
    pool, lengths = GPO(), torch.tensor([9, 1, 4, 7])
    valid = torch.arange(9)[None] < lengths[:, None]
    positions = pool._positions(9)[None] * valid[..., None]
    packed = pack_padded_sequence(positions, lengths, batch_first=True, enforce_sorted=False)
    forth, back = pad_packed_sequence(pool.gru(packed)[0], batch_first=True)[0].chunk(2, dim=-1)
    scores = pool.linear((forth + back) / 2).masked_fill(~valid[..., None], -10000)
    torch.testing.assert_close(pool.weights(9, valid), (scores / 0.1).softmax(dim=1))
