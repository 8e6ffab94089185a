"""CLIP4Clip: its heads against other ways to compute them, and how new heads start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.published import PUBLISHED, build, ids, pixels, tensors
from trimtab.backbones.clip4clip.model import HEADS, symmetric_loss
from trimtab.backbones.official import CheckpointError


def openai_block(state: dict, prefix: str, heads: int, x: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """A block as OpenAI writes it, with torch's own attention, straight from the file's tensors."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    width = x.shape[-1]
    attention = nn.MultiheadAttention(width, heads, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in own.items() if k.startswith("attn.")})
    y = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"], eps)
    x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
    y = F.linear(F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"], eps), own["mlp.c_fc.weight"],
                 own["mlp.c_fc.bias"])  # fmt: skip
    return x + F.linear(y * torch.sigmoid(1.702 * y), own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])


@torch.no_grad()
def test_text_vectors_from_the_files_tensors_alone():
    state, (text, mask) = tensors("clip4clip_meanP"), ids()
    x = state["clip.token_embedding.weight"][text] + state["clip.positional_embedding"][: text.shape[1]]
    causal = torch.full((7, 7), float("-inf")).triu(1)
    for i in range(3):
        x = openai_block(state, f"clip.transformer.resblocks.{i}.", 3, x, causal, 1e-5)
    x = F.layer_norm(x, (24,), state["clip.ln_final.weight"], state["clip.ln_final.bias"])
    wanted = x[torch.arange(2), text.argmax(dim=1)] @ state["clip.text_projection"]
    model, _ = build("clip4clip_meanP")
    torch.testing.assert_close(model.encode_text(text, mask), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode_text(text), model.encode_text(text, mask)), "the mask is where ids are not 0"


@torch.no_grad()
def test_frames_and_pairs_in_transformers_from_the_files_tensors_alone():
    frames, there = pixels(2, 3, 24), torch.tensor([[1, 1, 1], [1, 1, 0]])
    hidden = ((1 - there) * -1e6).float()
    state = tensors("clip4clip_seqTransf")
    x = frames + state["frame_position_embeddings.weight"][:3]
    for i in range(2):
        x = openai_block(state, f"transformerClip.resblocks.{i}.", 3, x,
                         hidden[:, None].expand(-1, 3, -1).repeat_interleave(3, 0), 1e-12)  # fmt: skip
    model, _ = build("clip4clip_seqTransf")
    # Compared where a frame is there: others are left out of the mean.
    torch.testing.assert_close(
        model._in_time(frames, there)[there == 1], (x + frames)[there == 1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_frames_that_are_not_there_change_nothing(head):
    model, _ = build(f"clip4clip_{head}")
    text, frames, there = pixels(2, 24), pixels(2, 3, 24), torch.tensor([[1, 1, 1], [1, 1, 0]])
    changed = frames.clone()
    changed[1, 2] = 7.0
    torch.testing.assert_close(model.compare(text, frames, there), model.compare(text, changed, there))
    assert not torch.allclose(model.compare(text, frames), model.compare(text, changed))


@torch.no_grad()
def test_patches_over_three_frames_start_as_those_of_one():
    flat, _ = build("clip4clip_meanP")
    deep, _ = build("clip4clip_meanP", depth=3)
    video = pixels(2, 3, 3, 32, 32)
    torch.testing.assert_close(deep.encode_video(video), flat.encode_video(video))
    # Once the neighbours count, a frame's vector depends on them, and on no other.
    deep.clip.vision_model.embeddings.patch_embedding.weight[:, :, 0] = 0.1
    before, video[:, 0] = deep.encode_video(video), 3.0
    after = deep.encode_video(video)
    assert torch.equal(before[:, 2], after[:, 2]) and not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_new_head_starts_from_the_text_tower(head):
    model, report = build("clip4clip_meanP", head=head, cross_layers=2)
    state = tensors("clip4clip_meanP")
    table = model.cross.embeddings.position_embeddings if head == "tightTransf" else model.frame_position_embeddings
    assert torch.equal(table.weight, state["clip.positional_embedding"])
    if head == "seqLSTM":
        assert all(n.startswith("lstm_visual.") for n in report.fresh)
        return
    blocks = model.cross.transformer if head == "tightTransf" else model.transformerClip
    assert len(blocks.layers) == 2
    assert torch.equal(blocks.layers[1].mlp.fc1.weight, state["clip.transformer.resblocks.1.mlp.c_fc.weight"])
    assert PUBLISHED["clip4clip_meanP"].run(model)["similar"].shape == (2, 2)


def test_a_file_with_a_head_gets_no_other_and_none_is_deeper_than_clip():
    with pytest.raises(CheckpointError, match="its head is seqLSTM, which does not become seqTransf"):
        build("clip4clip_seqLSTM", head="seqTransf")
    with pytest.raises(CheckpointError, match="9 cross layers, more than CLIP's text tower has"):
        build("clip4clip_meanP", head="seqTransf", cross_layers=9)
    with pytest.raises(ValueError, match="did you mean 'meanP'"):
        build("clip4clip_meanP", head="meanp")


def test_the_loss_by_hand():
    similar = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    rows = (torch.log1p(torch.tensor(-2.0).exp()) + torch.log(torch.tensor(2.0))) / 2
    columns = (torch.log1p(torch.tensor(-1.0).exp()) + torch.log1p(torch.tensor(-1.0).exp())) / 2
    torch.testing.assert_close(symmetric_loss(similar), (rows + columns) / 2)
