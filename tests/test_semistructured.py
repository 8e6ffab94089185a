"""Which layers get torch's 2:4 kernels. The kernels need a GPU: here stand-ins take their place."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions
from transformers import ViTConfig, ViTModel

import trimtab
from trimtab import cli
from trimtab import speed as semistructured
from trimtab.speed import is_2_4, speed_up


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    """Four layers of 2:4, in halves, and a head that is dense."""
    made = Model()
    trimtab.prune(made, "omp", pattern="2:4")
    return made.half()


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for the kernels: seconds by the weight's shape, and a weight that only counts as packed."""
    packed = []

    def compress(weight):
        if weight.shape[0] % 16:
            raise RuntimeError("Both dimensions must be a multiple of (16, 16)")
        packed.append(weight.shape)
        return weight.clone()

    def seconds(dense, sparse, device):
        return 1e-3, {32: 0.6e-3, 16: 1.2e-3}[dense().shape[-1]]

    monkeypatch.setattr(semistructured, "_device_obstacle", lambda device: "")
    monkeypatch.setattr(semistructured, "_compress", compress)
    monkeypatch.setattr(semistructured, "_seconds", seconds)
    return packed


def test_without_a_gpu_nothing_is_converted_and_the_report_says_why(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = speed_up(model, tokens=64)
    assert report.device == "cpu" and not report.converted and len(report.layers) == 5
    for layer in report.layers[:4]:
        assert layer.is_2_4 and layer.zeros == 0.5 and layer.ratio is None
        assert layer.why.startswith("no NVIDIA GPU (the weight is on 'cpu')")
    assert report.layers[4].why == "not 2:4"
    assert "0 of 5 linear layers converted on cpu" in str(report)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_only_what_is_measured_to_be_faster_is_converted(model, gpu):
    before = model(torch.ones(2, 16).half())
    parameters = dict(model.named_parameters())
    report = speed_up(model, tokens=64)
    assert [x.path for x in report.converted] == ["blocks.0.0", "blocks.1.0"]
    assert [x.why for x in report.layers] == ["", "slower", "", "slower", "not 2:4"]
    assert report.layers[0].ratio == pytest.approx(0.6) and report.layers[1].ratio == pytest.approx(1.2)
    assert "blocks.0.0 (32, 16) float16: converted 1.000 -> 0.600 ms (0.60x)" in str(report)
    replaced = {n for n, p in model.named_parameters() if p is not parameters[n]}
    assert replaced == {"blocks.0.0.weight", "blocks.1.0.weight"}
    assert not model.blocks[0][0].weight.requires_grad
    torch.testing.assert_close(model(torch.ones(2, 16).half()), before)


def test_layers_of_one_shape_are_measured_once(model, gpu):
    speed_up(model, tokens=64, convert=False)
    assert gpu == [torch.Size([32, 16]), torch.Size([16, 32])]


def test_a_report_alone_changes_nothing(model, gpu):
    parameters = dict(model.named_parameters())
    report = speed_up(model, tokens=64, convert=False)
    assert report.layers[0].why == "faster; not asked to convert" and not report.converted
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_a_gain_within_the_margin_is_none(model, gpu):
    report = speed_up(model, tokens=64, margin=0.5)
    assert not report.converted and report.layers[0].why == "less than 50 % faster"


def test_a_shape_that_the_kernels_refuse_is_reported(gpu):
    model = Model()
    model.blocks[0][0] = nn.Linear(16, 24)
    model.blocks[0][2] = nn.Linear(24, 16)
    trimtab.prune(model, "omp", pattern="2:4")
    report = speed_up(model.half(), tokens=8)
    assert report.layers[0].why.startswith("shape or type not supported: Both dimensions must be a multiple")


def test_a_layer_whose_results_would_change_stays(model, gpu, monkeypatch):
    monkeypatch.setattr(semistructured, "_compress", lambda weight: weight * 1.5)
    report = speed_up(model, tokens=64)
    assert not report.converted and report.layers[0].why.startswith("results differ by")


def test_single_precision_is_left_alone(model, gpu):
    report = speed_up(model.float(), tokens=64)
    assert not gpu and report.layers[0].why.startswith("dtype float32")


@pytest.mark.parametrize(("capability", "wanted"), [((8, 0), ""), ((7, 5), "compute capability 7.5")])
def test_old_gpus_are_named(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert wanted in semistructured._device_obstacle(torch.device("cuda"))
    assert bool(wanted) == bool(semistructured._device_obstacle(torch.device("cuda")))


def test_torchs_kernels_are_called_where_there_is_a_gpu(model, monkeypatch):
    """On a CPU torch itself refuses: the call reaches it, and its refusal is the reason."""
    monkeypatch.setattr(semistructured, "_device_obstacle", lambda device: "")
    report = speed_up(model, tokens=64)
    assert "Only CUDA tensors are currently supported" in report.layers[0].why


def test_torchs_compression_takes_the_pattern_bit_for_bit():
    weight = nn.Linear(128, 64)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)) for _ in range(2))
    trimtab.prune(model, "omp", pattern="2:4")
    weight = model.blocks[0][0].weight.detach().half()
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.numel() == weight.numel() // 2
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([1, 1, 0, 0, 0, 0, 2, 3], True),
        ([1, 0, 0, 0, 0, 0, 0, 0], True),
        ([1, 1, 1, 0, 0, 0, 0, 0], False),
        ([0, 0, 1, 1, 1, 1, 0, 1], False),
        ([1, 1, 0, 0, 0, 0], False),
    ],
)
def test_what_counts_as_2_4(row, wanted):
    assert is_2_4(torch.tensor([row, row], dtype=torch.float32)) is wanted


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match=re.escape("tokens: expected at least 1, found 0")):
        speed_up(model, tokens=0)
    with pytest.raises(ValueError, match="Conv2d has no nn.Linear"):
        speed_up(nn.Conv2d(3, 3, 1), tokens=8)


def test_the_command_reports_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    trimtab.prune(model, "omp", pattern="2:4")
    trimtab.save_pretrained(model, tmp_path / "small", sparse=True)
    assert cli.main(["speed", str(tmp_path / "small"), "--tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "no NVIDIA GPU" in out and "0 of 13 linear layers run faster" in out
    assert cli.main(["speed", str(tmp_path / "small"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert sum(layer["is_2_4"] for layer in layers) == 12 and not any(layer["converted"] for layer in layers)
    assert cli.main(["speed", str(tmp_path / "nowhere")]) == 2
