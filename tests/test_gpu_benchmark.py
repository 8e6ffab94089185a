"""`benchmarks/gpu.py` runs on tiny models: every kind of row is there, and what fails is a row that says why."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import gpu_models

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def bench():
    return gpu.Bench(torch.device("cpu"), tiny=True, budget=600, steps=1)


@pytest.fixture(scope="module")
def found():
    """Rows of one of the papers' models."""
    bench = gpu.Bench(torch.device("cpu"), tiny=True, budget=600, steps=1)
    gpu.training_steps(bench, ["CLIP4Clip"])
    return bench.rows


def test_every_way_of_training_is_measured(found):
    assert {r["way"] for r in found} == {*gpu.WAYS, gpu.CACHED}
    failed = {(r["model"], r["way"]): r["failed"] for r in found if "failed" in r}
    assert not failed
    assert all(r["peak_bytes"] > 0 and r["step_ms"] > 0 and r["trained"] > 0 for r in found)


def test_memory_is_ordered_as_the_methods_promise(found):
    """In sizes of tensors, which do not depend on the machine."""
    share = {r["way"]: r["over_full"] for r in found}
    assert share.pop("full") == 1 and max(share.values()) < 1
    assert share["lora, checkpointing"] < share["lora"] and share[gpu.CACHED] < share["unipt"]


def test_published_shares_stand_beside(found):
    published = {r["way"]: r.get("published_over_full") for r in found}
    assert published["unipt, keep_maps bf16"] == round(13.6 / 48.8, 4) and published["lora"] is None
    text = gpu.table(found)
    assert text.count("\n") == len(found) + 1 and "| CLIP4Clip | lst |" in text


def test_the_other_measurements(bench):
    gpu.skipping(bench)
    gpu.sparse_kernels(bench)
    gpu.calibrating(bench, "SigLIP-so400m")
    what = [r["what"] for r in bench.rows]
    assert what.count("das") == 4 and "calibration" in what
    assert all(r["median"] > 0 and r["over_none"] > 0 for r in bench.rows if r["what"] == "das")
    if not torch.cuda.is_available():
        assert all("no NVIDIA GPU" in r["failed"] for r in bench.rows if r["what"] == "2:4")
    assert json.loads(json.dumps(bench.found()))["rows"] == bench.rows


@pytest.mark.slow
def test_a_compiled_step_is_measured(bench):
    about = {"what": "compiled", "model": "CLIP4Clip", "way": "lora"}
    found = bench.row(about, lambda: gpu.compiled(bench, "CLIP4Clip", "lora", "eager"))
    assert found["compiled_step_ms"] > 0, found


def test_what_fails_or_takes_too_long_is_a_row_with_its_reason(tmp_path):
    bench = gpu.Bench(torch.device("cpu"), True, 600, 1, tmp_path / "gpu.json")
    bench.row({"what": "a"}, lambda: {}["nothing"])
    bench.row({"what": "b"}, lambda: time.sleep(60) or {}, most=0.1)
    bench.budget = 0
    bench.row({"what": "c"}, lambda: {"measured": 1})
    reasons = [r.get("failed") for r in json.loads((tmp_path / "gpu.json").read_text())["rows"]]
    assert reasons == ["KeyError: 'nothing'", "OutOfTimeError: took longer than 0 s",
                       "OutOfTimeError: not measured: the 0 s are over"]  # fmt: skip


def test_models_have_their_published_sizes():
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in gpu_models.SETTINGS[n].make().parameters())
                 for n in ("SigLIP-so400m", "SmolVLM-256M", "Qwen3-VL-2B")}  # fmt: skip
    assert {n: round(size / 1e6) for n, size in sizes.items()} == {
        "SigLIP-so400m": 878, "SmolVLM-256M": 256, "Qwen3-VL-2B": 2128
    }  # fmt: skip
