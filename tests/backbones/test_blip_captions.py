"""Captions from an official BLIP file: what is written, and a recipe from the file to captions."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import trimtab
from tests.models.official import converted, file, rows
from trimtab.backbones import convert_official
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run


@pytest.mark.parametrize("task", ["caption", "pretrain"])
@torch.no_grad()
def test_what_is_written_is_what_the_models_own_decoder_writes(task, tmp_path):
    path, settings, words = file(tmp_path, "blip")
    blip = trimtab.load(path, tokenizer=words, task=task, **settings)
    assert len(blip.tokenizer) == 40 and blip.tokenizer.convert_tokens_to_ids("[DEC]") == 38
    batch = {**blip.images([Image.new("RGB", (30, 20), c) for c in ("red", "blue")]),
             **blip.texts(["a red dog", "two cats and a dog"])}  # fmt: skip
    seen = blip.look(batch["pixel_values"])
    hidden = blip.write(seen, batch["input_ids"], batch["attention_mask"])
    ids = batch["input_ids"].clone()
    ids[:, 0] = 38  # [DEC]
    own = blip.model.text_decoder(input_ids=ids, attention_mask=batch["attention_mask"], encoder_hidden_states=seen)
    dense, norm, bias = blip.word_head
    scores = norm(torch.nn.functional.gelu(dense(hidden))) @ blip.model.get_input_embeddings().weight.T + bias
    torch.testing.assert_close(scores, own.logits)
    later = batch["input_ids"].clone()
    later[:, 3:] = 7
    torch.testing.assert_close(blip.write(seen, later, batch["attention_mask"])[:, :3], hidden[:, :3])


def test_pictures_are_normalised_as_clips_whatever_they_were_read_from(tmp_path):
    path, settings, words = file(tmp_path, "blip")
    first = trimtab.load(path, tokenizer=words, task="caption", **settings)
    first.save_pretrained(tmp_path / "with")
    convert_official(path, tmp_path / "without", task="caption", **settings)
    for again in (trimtab.load(tmp_path / "with"), trimtab.load(tmp_path / "without")):
        assert again.pictures == first.pictures and again.pictures.mean[0] == pytest.approx(0.4815, abs=1e-4)
    assert trimtab.load("tiny-blip").pictures.mean == (0.5, 0.5, 0.5)


def test_a_decoder_of_questions_does_not_write(tmp_path):
    path, settings, words = file(tmp_path, "blip")
    vqa = trimtab.load(path, tokenizer=words, task="vqa", **settings)
    with pytest.raises(NotImplementedError, match="BlipForVqa has no decoder that reads pictures: task='caption'"):
        vqa.write(torch.zeros(1, 5, 16), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    assert vqa.word_head is None


@pytest.mark.parametrize("task", ["caption", "pretrain"])
def test_captioning_runs_from_the_file_to_captions(task, tmp_path):
    data = str(rows(tmp_path / "data"))
    raw = {
        "backbone": str(converted(tmp_path, "blip", task=task)), "task": {"name": "captioning", "smoothing": 0.1},
        "data": {"name": "files", "train": data, "test": data}, "methods": [{"name": "omp", "sparsity": 0.75}, "full"],
        "training": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "evaluation_batch": 6},
    }  # fmt: skip
    folder = run.run(recipe.expand(raw, "captions")[0], tmp_path / "run", measure_costs=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"cider", "bleu@4"} <= metrics["test"].keys()
    model = folder_of_runs.load(folder)
    weight = model.backbone.model.get_submodule("text_decoder.bert.encoder.layer.0.crossattention.self.query").weight
    assert 0.3 < float((weight == 0).float().mean()) < 1
    captions = model.answer([{"image": Image.new("RGB", (30, 20), "red")}])
    assert isinstance(captions[0]["caption"], str)
