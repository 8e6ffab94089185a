"""The page of published figures says what the code gives today: its cheap rows are counted again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from published import page as published
from published.sizes import PUBLISHED, measure
from tests.models import layouts
from trimtab.backbones import ARCHITECTURES, FORMATS, build
from trimtab.backbones.official import Tensors

FOUND = json.loads(published.RESULTS.read_text())
PAGE = Path(__file__).parents[1] / "docs" / "published_figures.md"


def test_the_page_is_made_of_the_kept_figures():
    assert FOUND.keys() == published.pieces().keys()
    assert PAGE.read_text() == published.page(FOUND)


def test_every_size_agrees_to_the_last_digit_or_says_why():
    text = published.sizes(FOUND)
    assert "unexplained" not in text
    exact = [line for line in text.splitlines() if line.endswith("| 0 |  |")]
    assert len(exact) > 80


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda r: f"{r['architecture']}-{r['setting']}")
def test_parameters(row):
    with torch.device("meta"):
        model = build(row["architecture"], **row["settings"])
        getattr(model, "tie_weights", lambda: None)()
    assert sum(p.numel() for p in model.parameters()) == row["params"] - row.get("unused", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sizes/meter/irtr 384 L40", "sizes/clip_vil/RN50 VQA 384x640", "das/vilt/1", "unipt"])
def test_kept_figures_are_what_the_code_gives(name):
    assert published.pieces()[name]() == FOUND[name]


def test_what_the_abstract_says():
    dense, less = FOUND["das/meter/None"]["macs"], FOUND["das/meter/4"]["macs"]
    assert abs(100 * (less - dense) / dense + 11.97) < 0.1
    assert abs((less - dense) / 1e9 + 11.18) < 0.01
    for backbone, millions in (("meter", 5.34), ("vilt", 3.56)):
        counts = [v["without"] / 1e6 for k, v in FOUND.items() if k.startswith(f"das/{backbone}/") and "None" not in k]
        assert all(abs(c - millions) < 0.011 for c in counts) and len(counts) > 2
    assert abs((FOUND["das/vilt/1"]["macs"] - FOUND["das/vilt/None"]["macs"]) / 1e9 + 0.94) < 0.005


LAYOUTS = {
    "meter": layouts.meter(("mlm", "itm")), "vilt": layouts.vilt(("irtr",)), "blip": layouts.blip(),
    "clip_vil": {k.removeprefix("module."): v for k, v in layouts.clip_vil("vqa", 3129).items()},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_architecture_is_what_the_official_file_becomes(name):
    state = Tensors(layouts.fill(LAYOUTS[name], device="meta"), name, name)
    from_file, from_name = FORMATS[name].plan(state, {}), ARCHITECTURES[name]()
    assert from_file[0] is from_name[0]
    assert from_file[1].to_dict() == from_name[1].to_dict()


def test_frozen_norms_of_mdetr_are_buffers():
    with torch.device("meta"):
        model = build("mdetr")
    assert sum(b.numel() for b in model.backbone.buffers()) == 211_202 - 514  # RoBERTa's position ids


def test_measuring_counts_without_memory():
    row = next(r for r in PUBLISHED if r["setting"] == "ViT-B/32 meanP")
    small = {**row, "macs": {"similarity head (1 pair)": 0}}
    assert measure(small)["macs"] == {"similarity head (1 pair)": 512}
