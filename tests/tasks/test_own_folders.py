"""Tasks on a person's own folders and pictures: padding, folders of transformers, what is refused in words."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from PIL import Image

from tests.models.official import tokenizer
from tests.tasks.test_second_runs import made_up, recipe, saved  # noqa: F401 (made_up is used by itself)
from tests.tasks.tiny import BACKBONES
from trimtab import backbones
from trimtab.backbones.base import Unsupported
from trimtab.experiments.assembly import assemble
from trimtab.experiments.estimate import estimate
from trimtab.experiments.schema import RecipeError
from trimtab.tasks import TASKS
from trimtab.tasks.base import TaskModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def vilt(folder, kind: str = "ViltForMaskedLM"):
    """A folder as transformers saves it."""
    torch.manual_seed(0)
    config = hf.ViltConfig(**SIZES, vocab_size=40, image_size=16, patch_size=4, max_position_embeddings=12)
    getattr(hf, kind)(config).save_pretrained(folder)
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder)
    tokenizer(folder, 40)
    return folder


@pytest.mark.parametrize("task", ["grounding", "box-regression"])
def test_boxes_are_the_same_in_any_batch(task, tmp_path):
    """Also where pictures of other shapes stand beside one, to whose size it is padded."""
    backbone = backbones.load(vilt(tmp_path))
    model = TaskModel(backbone, TASKS[task]()).eval()
    rows = [{"image": Image.effect_noise(size, 80).convert("RGB"), "phrase": "is it", "box": [1, 2, size[0] / 2, 12]}
            for size in ((16, 26), (26, 16), (20, 20))]  # fmt: skip
    whole, alone = model.answer(rows), [model.answer([row])[0] for row in rows]
    for a, b in zip(whole, alone, strict=True):
        assert a["box"] == pytest.approx(b["box"], abs=1e-3) and a["iou"] == pytest.approx(b["iou"], abs=1e-4)
    batch = model.task.collate(backbone, rows, True)
    parts = [model.task.collate(backbone, [row], True) for row in rows]
    mean = sum(model(**part)["loss"].item() for part in parts) / 3
    assert model(**batch)["loss"].item() == pytest.approx(mean, rel=1e-4)


def test_a_vilt_is_of_the_class_that_its_folder_names(tmp_path):
    found = backbones.load(vilt(tmp_path / "words")).model  # as transformers' copy of the pretrained ViLT is published
    assert type(found).__name__ == "ViltForMaskedLM"
    folder = vilt(tmp_path / "bare", "ViltModel")
    with pytest.raises(ValueError, match=r"config.json: unknown architecture 'ViltModel': .*ViltForMaskedLM"):
        backbones.load(folder)


def test_a_blip_folder_of_transformers_is_read_as_it_reads_it(tmp_path):
    """No token stands in place of the first where the config names none."""
    text = {**SIZES, "vocab_size": 40, "encoder_hidden_size": 16, "max_position_embeddings": 12, "bos_token_id": 5}
    torch.manual_seed(0)
    model = hf.BlipForImageTextRetrieval(
        hf.BlipConfig(
            text_config=text, image_text_hidden_size=16, vision_config={**SIZES, "image_size": 16, "patch_size": 4}
        )
    )
    model.eval().save_pretrained(tmp_path)
    tokenizer(tmp_path, 40)
    backbone = backbones.load(tmp_path)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), **backbone.texts(["is it", "it"])}
    with torch.no_grad():
        no, yes = model(**batch).itm_score.unbind(-1)
        assert torch.allclose(backbone.match(backbone.pair(**batch)), yes - no, atol=1e-5)
    with pytest.raises(Unsupported, match="no temperature"):
        _ = backbone.temperature
    assert issubclass(Unsupported, ValueError)  # which the command line tells without a traceback


def test_a_recipe_that_leaves_nothing_to_train_is_refused(tmp_path):
    path = saved("vilt", BACKBONES["vilt"](), tmp_path)
    with pytest.raises(RecipeError, match=r"nothing is left to train: the methods \(linear-probe\) .*'reranking'"):
        estimate(recipe({"name": "reranking", "negatives": 2}, path, ["linear-probe"]))


def test_a_classifier_of_pictures_leaves_the_tower_of_texts_alone(tmp_path):
    path = saved("clip", BACKBONES["clip"](), tmp_path)
    task = {"name": "classification"}
    assert [t.name for t in assemble(recipe(task, path, [])).fit.anatomy.towers] == ["vision"]
    task["prompts"] = ["a photo of a {}."]
    assert [t.name for t in assemble(recipe(task, path, [])).fit.anatomy.towers] == ["vision", "text"]


def test_a_row_that_lacks_what_is_asked_about_is_refused(tmp_path):
    model = TaskModel(backbones.load(vilt(tmp_path)), TASKS["grounding"]())
    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 16), "red").save(picture)
    for row, missing in (({"phrase": "it"}, "image"), ({"image": picture}, "phrase")):
        with pytest.raises(ValueError, match=rf"row 1: task 'grounding' needs \['{missing}'\]"):
            model.answer([{"image": picture, "phrase": "it"}, row])
    assert model.answer([{"image": str(picture), "phrase": "it"}])[0]["box"] and model.answer([]) == []
