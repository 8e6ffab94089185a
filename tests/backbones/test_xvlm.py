"""X-VLM: its tasks from a pretrained file, its tables of positions, its decoders."""

from __future__ import annotations

import pytest
import torch

from tests.models.published import PUBLISHED, build, ids, pixels, tensors
from trimtab.anatomy import Anatomy
from trimtab.backbones.official import CheckpointError
from trimtab.backbones.xvlm.vision import resize_bias

OUTPUTS = {"pretrain": {"image_features", "text_features", "similar", "match", "words", "boxes"},
           "retrieval": {"image_features", "text_features", "similar", "match"}, "grounding": {"boxes"},
           "nlvr2": {"classes"}, "vqa": {"words"}, "caption": {"words"}}  # fmt: skip


@pytest.mark.parametrize("name", ["xvlm_swin", "xvlm_clip"])
@pytest.mark.parametrize("task", OUTPUTS)
def test_every_task_starts_from_a_pretrained_file(task, name):
    model, report = build(name, task=task)
    assert not report.unused
    assert set(PUBLISHED[name].run(model)) == OUTPUTS[task]
    # Only what the authors' loaders leave new is new: NLVR2's head, and a decoder's maps of a memory of another width.
    new = {"nlvr2": 6, "vqa": 2 * 2 * 2}.get(task, 0)
    assert len(report.fresh) == new
    Anatomy.of(model)


def test_modalities_are_those_of_multiflow():
    anatomy = Anatomy.of(build("xvlm_clip")[0])
    layer = "text_encoder.bert.encoder.layer"
    assert [anatomy.modality(f"{layer}.{i}.attention.self.query") for i in range(4)] == ["text"] * 2 + ["fusion"] * 2
    assert anatomy.modality("text_encoder.cls.predictions.transform.dense") is None
    for excluded in ("vision_proj", "text_proj", "itm_head.0", "bbox_head.3"):
        assert anatomy.modality(excluded) is None
    answers = Anatomy.of(build("xvlm_clip", task="vqa")[0]).tower("decoder")
    assert answers.modality == "fusion" and answers.causal and answers.memory == "fusion"


def test_nlvr2_doubles_the_fusing_layers_and_shares_their_maps_of_the_images():
    model, _ = build("xvlm_clip", task="nlvr2")
    layers = model.text_encoder.bert.encoder.layer
    assert len(layers) == 2 + 2 * 2
    first, second = layers[2].crossattention.self, layers[3].crossattention.self
    assert first.key is second.key and first.query is not second.query
    assert "text_encoder.bert.encoder.layer.3.crossattention.self.key.weight" not in model.state_dict()
    assert torch.equal(first.query.weight, second.query.weight)
    first.key = torch.nn.Linear(40, 32)  # as LoRA does
    assert second.key is first.key
    text, mask = ids()
    image, other = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32).flip(0)
    assert not torch.allclose(model(image, text, mask, other)["classes"], model(other, text, mask, image)["classes"])


def test_a_decoder_sees_no_later_word_and_the_fusion_does():
    text, _ = ids()
    mask, image = torch.ones_like(text), pixels(2, 3, 32, 32)
    changed = text.clone()
    changed[:, 5] = 1 + changed[:, 5] % 50
    captions, pretrained = build("xvlm_clip", task="caption")[0], build("xvlm_clip")[0]
    early = [m(image, t, mask)["words"][:, :5] for m in (captions, pretrained) for t in (text, changed)]
    assert torch.equal(early[0], early[1])
    assert not torch.allclose(early[2], early[3])


def test_captions_end_where_they_end():
    model, _ = build("xvlm_clip", task="caption")
    prompt = ids()[0][:, :3]
    free = model.caption(pixels(2, 3, 32, 32), prompt, end=-1, length=8)
    assert free.shape == (2, 8) and torch.equal(free[:, :3], prompt)
    end = int(free[0, 3])
    ended = model.caption(pixels(2, 3, 32, 32), prompt, end=end, length=8)
    assert (ended[0, 3:] == end).all()


@pytest.mark.parametrize(("name", "size"), [("xvlm_swin", 128), ("xvlm_clip", 48)])
def test_another_image_size(name, size):
    model, report = build(name, task="retrieval", image_size=size)
    assert report.resized
    assert torch.isfinite(PUBLISHED[name].run(model)["similar"]).all()
    with pytest.raises(ValueError, match=rf"images of 64 x 64 pixels, but this X-VLM is built for {size} x {size}"):
        model.encode_image(pixels(1, 3, 64, 64))


@pytest.mark.parametrize(("name", "size"), [("xvlm_swin", 72), ("xvlm_clip", 36)])
def test_a_resolution_that_patches_do_not_divide(name, size):
    with pytest.raises(CheckpointError, match=f"image_size {size} is no multiple of"):
        build(name, image_size=size)


def test_a_fine_tuned_file_says_its_task_and_becomes_no_other():
    state = {k.replace("text_encoder.bert.", "text_encoder."): v for k, v in tensors("xvlm_clip").items()
             if not k.startswith(("text_encoder.cls", "bbox_head"))}  # fmt: skip
    model, report = build("xvlm_clip", state=state)
    assert model.config.task == "retrieval" and not report.unused
    with pytest.raises(CheckpointError, match="is fine-tuned for retrieval"):
        build("xvlm_clip", state=state, task="vqa")
    with pytest.raises(CheckpointError, match="did you mean 'caption'"):
        build("xvlm_clip", task="captions")


@pytest.mark.parametrize("task", ["nlvr2", "vqa", "caption", "grounding"])
@torch.no_grad()
def test_fine_tuned_files_of_every_task(task):
    """As the authors' code saves them: without `bert.` in text encoders, with maps for NLVR2's second image too."""
    model, _ = build("xvlm_clip", task=task)
    pretrained = tensors("xvlm_clip")
    state = {k: v for k, v in pretrained.items() if k.startswith("vision_encoder.")}
    for name, value in model.state_dict().items():
        if not name.startswith("vision_encoder."):
            state[name.replace("text_encoder.bert.", "text_encoder.")] = value
    if task == "nlvr2":
        first = "text_encoder.encoder.layer.2.crossattention.self."
        for kind in ("key", "value"):
            for part in ("weight", "bias"):
                for turn, layer in ((2, 3), (4, 5)):
                    source = state[f"{first}{kind}.{part}".replace(".2.", f".{turn}.")]
                    state[f"{first}{kind}.{part}".replace(".2.", f".{layer}.")] = source
    again, report = build("xvlm_clip", state=state)
    assert again.config.task == task and not report.unused and not report.fresh
    here, there = PUBLISHED["xvlm_clip"].run(model), PUBLISHED["xvlm_clip"].run(again)
    assert all(torch.allclose(here[k], there[k], atol=1e-6) for k in here)


def test_resized_biases_keep_constants_and_the_middle():
    table = torch.randn(13 * 13, 3, generator=torch.Generator().manual_seed(0))
    resized = resize_bias(table, 12)
    assert resized.shape == (23 * 23, 3)
    torch.testing.assert_close(resized[11 * 23 + 11], table[6 * 13 + 6])
    torch.testing.assert_close(resize_bias(torch.ones(49, 2), 8), torch.ones(225, 2))
    assert resize_bias(table, 7) is table


@torch.no_grad()
def test_captions_of_the_task_are_those_of_the_model(tmp_path):
    """Written greedily, with a prompt; and features that the head maps to words as the model's own does."""
    import trimtab
    from tests.models.official import BERT, file, tokenizer
    from trimtab.tasks import TASKS, TaskModel

    path, settings, _ = file(tmp_path, "xvlm")
    words = tokenizer(tmp_path / "words", 95, BERT)  # as many as the file has embeddings
    whole = trimtab.load(path, tokenizer=words, task="caption", **settings)
    model = TaskModel(whole, TASKS["captioning"](prompt="a red ", longest=9)).eval()
    for parameter in whole.model.text_decoder.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
    model.head = model.task.head(whole)
    x = torch.randn(4, 3, 32, 32)
    start = torch.tensor(whole.tokenizer("a red ")["input_ids"][:-1]).repeat(4, 1)
    own = whole.model.caption(x, start, end=whole.tokenizer.sep_token_id, length=10)
    told = [r["caption"] for r in model.predict({"pixel_values": x})]
    assert told == whole.tokenizer.batch_decode(own[:, start.shape[1] :], skip_special_tokens=True)
    assert len(set(told)) > 1
    batch = {"pixel_values": x, "input_ids": own, "attention_mask": torch.ones_like(own)}
    written = model.head(
        whole.write(whole.look(x), own, batch["attention_mask"]), whole.model.get_input_embeddings().weight
    )
    torch.testing.assert_close(written, whole.model(**batch)["words"])
