"""A checkpoint of published size is not held twice in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.models import layouts

LOAD = """
import sys, pathlib, re
import torch
import trimtab.backbones.meter.model
from trimtab.backbones import load_official

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

before = status("VmRSS")
model, _ = load_official(sys.argv[1])
print(sum(float(p.detach().flatten()[::1024].double().sum()) for p in model.parameters()))  # every page is read
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size_checkpoint_peaks_below_1_3_of_its_file(tmp_path):
    """METER as published: 1.4 GB of weights, read from their mapped file. The peak of the process that loads it."""
    file = tmp_path / "meter.ckpt"
    state = {name: torch.zeros(shape) for name, shape in layouts.meter().items()}
    torch.save({"state_dict": state}, file)
    del state
    size = file.stat().st_size
    assert size > 1.4e9
    run = subprocess.run([sys.executable, "-c", LOAD, str(file)], capture_output=True, text=True, check=True)
    file.unlink()
    assert int(run.stdout.split()[-1]) < 1.3 * size
