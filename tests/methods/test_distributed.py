"""A search in several processes: rewards are averaged over them, all hold the same gates."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_search.py"


def searches(processes: int) -> list[dict]:
    """The results of all processes, joined with gloo on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
                 "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(group if processes > 1 else {})}
        started.append(subprocess.Popen([sys.executable, SCRIPT], env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))  # fmt: skip
    found = []
    for process in started:
        out, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(out.strip().splitlines()[-1]))
    return found


@pytest.mark.slow
def test_two_processes_find_what_one_finds_on_the_same_global_batch():
    (alone,) = searches(1)
    first, second = searches(2)
    assert first == second, "all processes hold the same gates"
    assert first["subsets"] == alone["subsets"] and first["skip"] == alone["skip"]
    assert first["gates"] == pytest.approx(alone["gates"], abs=1e-3)
    assert max(map(abs, alone["gates"])) > 1e-2, "the gates moved"
