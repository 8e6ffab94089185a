"""Models that are counted by name: their published sizes, and that nothing is trained with them by accident."""

from __future__ import annotations

import json

import pytest
import torch

from trimtab import backbones
from trimtab.backbones import records
from trimtab.experiments import assembly, recipe
from trimtab.experiments.estimate import estimate
from trimtab.sizes import as_usual, sizes_only
from trimtab.tasks import TASKS

# Parameters as the model cards say, in millions (that of DINO without a pooler, which its files do not have).
PUBLISHED = {"dino-vitb16": 86, "siglip-so400m-patch14-384": 878, "llava-1.5-7b-hf": 7063, "SmolVLM-256M-Instruct": 256,
             "Qwen3-VL-2B-Instruct": 2128}  # fmt: skip


def test_every_record_is_tried_here():
    assert PUBLISHED.keys() == records.FOLDERS.keys() <= set(backbones.ARCHITECTURES)


@pytest.mark.parametrize("name", [*PUBLISHED, "blip"])
def test_sizes_are_the_published_ones(name):
    """Of Qwen3-VL and BLIP the words are tied: what stands twice in the model counts once, in sizes as on meta."""
    with torch.device("meta"):
        there = sum(p.numel() for p in backbones.build(name).parameters())
    with sizes_only():
        counted = sum(p.numel() for p in backbones.build(name).parameters())
    assert counted == there
    if name in PUBLISHED:
        assert round(there / 1e6) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "pictures", "token"),
    [("llava-1.5-7b-hf", 24 * 24, 32000), ("SmolVLM-256M-Instruct", 17 * 64, 49190),
     ("Qwen3-VL-2B-Instruct", 12 * 12, 151655)],
)  # fmt: skip
def test_a_picture_has_as_many_tokens_as_published(name, pictures, token):
    with sizes_only():
        backbone = backbones.load(name, pretrained=False, kind="chat")
        with as_usual():
            row = {"images": [backbone.picture()], "question": "How many\ndogs?", "answer": "two"}
            batch = TASKS["answer"]().collate(backbone, [row], True)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(token) == pictures
    words = len(ids) - pictures
    assert words < 70 if "Smol" in name else words < 25  # 41 of SmolVLM's stand around its tiles
    (told,) = (batch["labels"] != -100).sum(dim=1).tolist()
    assert told == 2  # the word and the end


def test_a_recipe_is_counted_without_folder_data_or_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (r,) = recipe.read("published/multiflow_dino_cifar10", ["variants=[multiflow-0.63]"])
    found = estimate(r)
    assert found["params"] == 85_798_656 + 7_690  # ViT-B/16 without a pooler, and a head of ten classes
    assert found["assumes"][0] == (
        "the sizes of DINO's ViT-B/16 at 224 pixels (huggingface.co/facebook/dino-vitb16), since no folder "
        "'dino-vitb16' is there"
    )
    assert "10 classes" in found["assumes"][1]
    with pytest.raises(recipe.RecipeError, match=r"'dino-vitb16', without weights.*backbone\.name=PATH"):
        assembly.check(r)  # what `trimtab run` does first
    with pytest.raises(recipe.RecipeError, match="without weights"):
        assembly.assemble(r)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = records.FOLDERS["dino-vitb16"]
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 2, "hidden_size": 48}
    (tmp_path / "dino-vitb16").mkdir()
    (tmp_path / "dino-vitb16" / "config.json").write_text(json.dumps(config))
    (r,) = recipe.read("published/multiflow_dino_cifar10", ["variants=[dense]"])
    found = estimate(r)
    assert found["params"] < 1e6 and len(found["assumes"]) == 1
    with pytest.raises(FileNotFoundError, match="safetensors"):
        backbones.load("dino-vitb16")


def test_what_is_only_counted_is_not_trained():
    for more, reason in ((["backbone.pretrained=false"], "without its own tokenizer"), ([], "without weights")):
        (r,) = recipe.read("own/answer", ["variants=[lora]", *more])
        with pytest.raises(recipe.RecipeError, match=f"'SmolVLM-256M-Instruct', {reason}"):
            assembly.check(r)
    with pytest.raises(ValueError, match=r"depth: only official checkpoint files and architectures of"):
        backbones.load("dino-vitb16", pretrained=False, depth=3)
    with pytest.raises(ValueError, match="did you mean 'dino-vitb16'"):
        backbones.load("dino-vit16")
