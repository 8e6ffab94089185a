"""Calibration shared by two processes (gloo) gives the masks of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import trimtab
from tests import conformance
from tests.comparisons.prune import LOSS, Toy
from trimtab import Masks

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SCENARIOS: list[tuple[str, int, dict[str, Any]]] = [
    ("multiflow", 4, {}),
    ("multiflow", 5, {}),  # the second process has none in the last group
    ("multiflow", 1, {}),  # the second process has none at all
    ("ria", 3, {}),
    ("snip", 4, {}),
    ("snip", 5, {}),
    ("snip", 1, {}),
    ("itersnip", 6, {"steps": 2}),  # three batches a step
    ("sparsegpt", 3, {}),
    ("wanda", 5, {"pattern": "2:4"}),
    ("chita", 3, {}),  # each process goes over all
    ("tamt", 3, {}),
    ("multiflow", 6, {"until": 0.02}),
    ("snip", 6, {"until": 0.2}),
]


def toy() -> Toy:
    return Toy(conformance.Case("b1_model", json.loads((GOLDEN / "b1_model.json").read_text()), GOLDEN))


def masks_of(name: str, count: int, settings: dict[str, Any]) -> Masks:
    made = toy()
    sparsity = None if "pattern" in settings else 0.63
    anatomy = made.model.anatomy()
    return trimtab.prune(made.model, name, sparsity, made.batches(LOSS)[:count], anatomy, **settings).masks


def refusals(rank: int) -> dict[str, str]:
    """The messages of what two processes cannot do."""

    def message(change) -> str:
        made = toy()
        batches = made.batches(LOSS)[:3]
        name, batches = change(made, batches)
        try:
            trimtab.prune(made.model, name, 0.5, batches, made.model.anatomy())
        except ValueError as error:
            return str(error)
        return "nothing was refused"

    def other_model(made, batches):
        made.model.text_encoder.bert.encoder.layer["0"].fc1.weight.data += rank
        return "multiflow", batches

    return {
        "divided before": message(lambda made, batches: ("multiflow", batches[rank::2])),
        "other order": message(lambda made, batches: ("snip", batches[:: 1 - 2 * rank])),
        "other model": message(other_model),
        "chita": message(lambda made, batches: ("chita", batches[rank::2])),
        "tamt": message(lambda made, batches: ("tamt", batches[:: 1 - 2 * rank])),
    }


def work_alone(folder: Path) -> None:
    """The same in one process: not that of the tests, whose other libraries may bring another LAPACK."""
    for i, scenario in enumerate(SCENARIOS):
        masks_of(*scenario).save(folder / f"{i}.alone")


def work(rank: int, folder: Path) -> None:
    """What each of the two processes does; leaves masks and messages in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for i, scenario in enumerate(SCENARIOS):
        masks_of(*scenario).save(folder / f"{i}.{rank}")
    torch.manual_seed(rank)  # the masks are those of the first process all the same
    masks_of("random-pruning", 0, {}).save(folder / f"chance.{rank}")
    (folder / f"refused.{rank}").write_text(json.dumps(refusals(rank)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.methods.test_processes"]
    running = [subprocess.Popen([*command, role, str(folder)], env=env, cwd=ROOT, stderr=subprocess.PIPE)
               for role in ("0", "1", "alone")]  # fmt: skip
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    return folder


def same(a: Masks, b: Masks) -> bool:
    equal = list(a) == list(b) and all(torch.equal(mask, b[path]) for path, mask in a.items())
    return equal and all(torch.equal(weight, b.weights[path]) for path, weight in a.weights.items())


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=[f"{n}-{c}" for n, c, _ in SCENARIOS])
def test_two_processes_find_the_masks_of_one(number, done):
    alone = Masks.read(done / f"{number}.alone")
    assert 0 < alone.kept < alone.prunable
    assert bool(alone.calibration) == ("until" in SCENARIOS[number][2])
    for rank in range(2):
        found = Masks.read(done / f"{number}.{rank}")
        assert same(found, alone) and found.calibration == alone.calibration, rank


def test_both_processes_hold_the_same_masks_even_of_chance(done):
    first, second = (Masks.read(done / f"chance.{rank}") for rank in range(2))
    assert same(first, second)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("divided before", "calibration batches 1 to 2 differ between the 2 processes: give every process the same"),
        ("other order", "calibration batches 1 to 2 differ between the 2 processes"),
        ("other model", "the 2 processes hold different models"),
        ("chita", "calibration batches from 1 on differ between the 2 processes: give every process the same"),
        ("tamt", "calibration batches from 1 on differ between the 2 processes"),
    ],
)
def test_what_two_processes_cannot_do_is_refused_in_both(case, message, done):
    for rank in range(2):
        assert message in json.loads((done / f"refused.{rank}").read_text())[case]


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        work_alone(Path(sys.argv[2]))
    else:
        work(int(sys.argv[1]), Path(sys.argv[2]))
