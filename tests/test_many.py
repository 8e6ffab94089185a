"""Whole runs in two processes (gloo): metrics, masks, plans and learned tensors are those of one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests import forked
from tests.models.official import tokenizer
from tests.tasks.tiny import BACKBONES, COLOURS, picture
from trimtab.experiments import many
from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run
from trimtab.experiments.schema import RecipeError

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
DAS = {"name": "das", "skip": 1, "search_steps": 4, "turn": 1, "warmup": 0.2, "gate_rate": 2000.0,
       "dropout_in_rewards": False}  # fmt: skip
PRUNE = {"name": "multiflow", "sparsity": 0.5, "batches": 4}
RANK = {"name": "reranking", "negatives": 2}
RECIPES: dict[str, tuple[str, Any, list[Any], dict[str, Any]]] = {
    "tune": ("clip", "retrieval", ["lora"], {}),  # rows are compared with those of the other process
    "prune": ("vilt", "vqa", [PRUNE, "full"], {"accumulate": 2}),
    "skip": ("vilt", "vqa", [DAS], {}),
    "composed": ("vilt", "vqa", [PRUNE, DAS, "unipt"], {"save_every": 2}),
    "cached": ("clip", "retrieval", ["linear-probe"], {"cache": "fp32"}),
    "collated together": ("vilt", RANK, ["lora"], {}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, and pictures with questions and captions."""
    folder = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    config = hf.ViltConfig(**SIZES, vocab_size=40, image_size=16, patch_size=4, max_position_embeddings=12)
    hf.ViltForImageAndTextRetrieval(config).save_pretrained(folder / "vilt")
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder / "vilt")
    tokenizer(folder / "vilt", 40)
    BACKBONES["clip"]().save_pretrained(folder / "clip")
    for split, count in (("train", 36), ("validation", 16), ("test", 11)):
        rows = []
        for i in range(count):
            shade = picture(COLOURS[i % 3], (16 + i % 5, 16))
            shade.putpixel((i % 16, i % 7), (255, 255, 255))
            shade.save(folder / f"{split}-{i}.png")
            words = " ".join(["red dog", "blue cat", "a big sea"][: 1 + i % 3])
            rows.append({"image": f"{split}-{i}.png", "question": f"is it {words}", "answer": "yes" if i % 3 else "no",
                         "captions": [f"{words} near {i}" if i % 2 else words]})  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(place: Path, name: str, **training: Any) -> Any:
    backbone, task, methods, more = RECIPES[name]
    raw = {
        "backbone": {"name": str(place / backbone)}, "task": task, "methods": methods, "costs": False,
        "data": {"name": "files", **{s: str(place / f"{s}.jsonl") for s in ("train", "validation", "test")}},
        "training": {"steps": 4, "batch_size": 8, "evaluation_batch": 4, "log_every": 1, **more, **training},
    }  # fmt: skip
    return expand(raw, name.replace(" ", "-"))[0]


@pytest.fixture(scope="module")
def done(place) -> Path:
    def work() -> None:
        many.join()
        for name in RECIPES:
            os.environ["TRIMTAB_CACHE"] = str(place / "two")
            with contextlib.redirect_stdout(None):
                run(recipe(place, name), place / "two" / name)
        messages = {}
        for name, change in {"batch": {"batch_size": 7}, "rows": {"batch_size": 40}}.items():
            with pytest.raises(RecipeError) as found:
                run(recipe(place, "tune", **change), place / "refused")
            messages[name] = str(found.value)
        (place / f"messages.{os.environ['RANK']}").write_text(json.dumps(messages))

    forked.together(work, place)
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_find_what_one_finds(name, place, done, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(place / "one"))
    one, two = run(recipe(place, name), place / "one" / name), done / "two" / name
    (a, b) = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert b["test"] == pytest.approx(a["test"], abs=1e-6)
    for x, y in zip(a["history"], b["history"], strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)
    for x, y in zip(*(json.loads((f / "fit.json").read_text())["methods"] for f in (one, two)), strict=True):
        assert x["state"].get("skip") == y["state"].get("skip")
        if gates := x["state"].get("gates"):
            assert max(map(abs, gates.values())) > 1e-2, "the gates moved"
            assert y["state"]["gates"] == pytest.approx(gates, abs=1e-3)
    first, second = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if value.is_floating_point():
            assert torch.allclose(value, second[key], atol=1e-4), key
        else:
            assert torch.equal(value, second[key]), key
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
