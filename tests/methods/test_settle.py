"""Calibration that ends when the masks of two halves of the data agree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab
from tests import conformance
from tests.comparisons.prune import LOSS, Toy
from trimtab import Masks
from trimtab.methods import METHODS
from trimtab.methods.prune.calibration import Calibration

GOLDEN = Path(__file__).parents[1] / "golden"
# until, for each pruner, such that it is settled after some of eight batches
UNTIL = {"multiflow": 0.07, "ria": 0.06, "wanda": 0.1, "snip": 0.33, "sparsegpt": 0.3, "chita": 0.001}
SETTINGS = {"chita": {"ridge": 1e-3}}


def toy() -> Toy:
    return Toy(conformance.Case("b1_model", json.loads((GOLDEN / "b1_model.json").read_text()), GOLDEN))


def found(name: str, batches, sparsity=(0.63,), **settings) -> list[Masks]:
    made = toy()
    settings = SETTINGS.get(name, {}) | settings
    return trimtab.prune(made.model, name, list(sparsity), batches, made.model.anatomy(), **settings)


def same(one: Masks, other: Masks) -> bool:
    equal = all(torch.equal(mask, other[path]) for path, mask in one.items())
    return equal and all(torch.equal(w, other.weights[path]) for path, w in one.weights.items())


def differ(one: Masks, other: Masks) -> float:
    """What the first keeps and the second does not, as a share of what it keeps; of both ways the larger."""
    pairs = [(one[path], other[path]) for path in one]
    lost, more = (sum(int((a & ~b).sum()) for a, b in p) for p in (pairs, [(b, a) for a, b in pairs]))
    return max(lost, more) / one.kept


BATCHES = toy().batches(LOSS)


@pytest.mark.parametrize("name", list(UNTIL))
def test_the_masks_are_those_of_one_calibration_on_the_batches_taken(name):
    (masks,) = found(name, BATCHES[:8], until=UNTIL[name])
    told = masks.calibration
    rounds = told.get("rounds", [[told["batches"], told["distance"]]])
    taken = max(batches for batches, _ in rounds)
    assert told["settled"] and told["distance"] <= UNTIL[name] and 2 <= taken < 8, told
    if name == "sparsegpt":  # a round for each block of the model, which may end at different numbers
        assert {batches for batches, _ in rounds} <= {2, 4, 8}
        (masks,) = found(name, BATCHES[:taken], until=0.99)
        (plain,) = found(name, BATCHES[:2])
        assert {b for b, _ in masks.calibration["rounds"]} == {2} and same(masks, plain)
    else:
        assert same(masks, found(name, BATCHES[:taken])[0])


@pytest.mark.parametrize("name", ["multiflow", "snip", "chita"])
def test_the_distance_is_that_of_masks_from_every_second_batch(name):
    sparsities, count = ((0.63,), 2) if name == "chita" else ((0.5, 0.75), 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = found(name, BATCHES[:count], sparsities, until=1e-4)
    halves = [found(name, BATCHES[i:count:2], sparsities) for i in range(2)]
    expected = max(differ(a, b) for a, b in zip(*halves, strict=True))
    assert masks[0].calibration["distance"] == pytest.approx(expected, abs=2e-4) and expected > 0.001
    assert masks[0].calibration["batches"] == count


def test_data_that_end_first_are_told_with_the_distance():
    with pytest.warns(UserWarning, match=r"ended after 3 batches, and the masks are not settled: those of the two hal"):
        (masks,) = found("multiflow", iter(BATCHES[:3]), until=1e-4)
    assert masks.calibration["batches"] == 3 and not masks.calibration["settled"]
    assert masks.calibration["distance"] > 1e-4
    assert same(masks, found("multiflow", BATCHES[:3])[0])


def test_what_is_not_needed_is_not_taken():
    def endless():
        while True:
            yield BATCHES[0]

    (masks,) = found("multiflow", endless(), until=0.5)
    assert masks.calibration["batches"] == 2 and masks.calibration["distance"] == 0


def test_every_step_of_a_pruner_in_steps_is_settled_by_itself():
    (masks,) = found("itersnip", BATCHES[:8], steps=2, until=0.4)
    told = masks.calibration
    assert [n for n, _ in told["rounds"]] == [2, 2] and told["batches"] == 4
    assert told["distance"] == max(d for _, d in told["rounds"]) > 0
    assert same(masks, found("itersnip", BATCHES[:4], steps=2)[0])  # two batches a step


class Expert(nn.Module):
    """A block that multiplies by bare parameters: they are watched while the model computes, and by nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ParameterDict({"w": torch.randn(12, 12)}) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(x @ layer["w"])
        return x


def test_masks_of_halves_are_made_unseen_by_what_watches_parameters():
    def tower(model):
        blocks = tuple(trimtab.Block(f"layers.{i}", 12) for i in range(3))
        return trimtab.Anatomy((trimtab.Tower("vision", "vision", blocks, ("layers",), trimtab.Tap("layers.0")),))

    torch.manual_seed(1)
    data = [{"x": torch.randn(4, 12)} for _ in range(4)]
    models = Expert(), Expert()
    masks = trimtab.prune(models[0], "multiflow", 0.5, data, tower(models[0]), until=0.9).masks
    assert masks.calibration["batches"] == 2
    assert same(masks, trimtab.prune(models[1], "multiflow", 0.5, data[:2], tower(models[1])).masks)


def test_what_is_told_is_saved(tmp_path):
    made = toy()
    fit = trimtab.adapt(made.model, anatomy=made.model.anatomy())
    fit.prune("multiflow", sparsity=0.63, batches=BATCHES[:4], until=0.5)
    told = {"until": 0.5, "batches": 2, "distance": fit.masks.calibration["distance"], "settled": True}
    assert fit.methods[0].state["calibration"] == told == fit.masks.calibration
    fit.masks.save(tmp_path / "masks.safetensors")
    fit.save(tmp_path / "fit")
    for where in ("masks.safetensors", "fit"):
        assert Masks.read(tmp_path / where).calibration == told


@pytest.mark.parametrize(
    ("name", "count", "settings", "message"),
    [
        ("multiflow", 1, {"until": 0.01}, "needs at least 2 calibration batches, found 1"),
        ("multiflow", 0, {"until": 0.01}, "the calibration data are empty"),
        ("multiflow", 2, {"until": 0}, r"until must lie in \(0, 1\), found 0"),
        ("multiflow", 2, {"until": 2}, r"until must lie in \(0, 1\)"),
        ("omp", 2, {"until": 0.01}, "until: omp needs no calibration data; leave it out"),
        ("tamt", 2, {"until": 0.01}, "each batch is a step of TAMT's optimiser"),
    ],
)
def test_what_cannot_settle_is_refused(name, count, settings, message):
    with pytest.raises(ValueError, match=message):
        found(name, BATCHES[:count], **settings)


def test_masks_that_were_found_before_are_not_calibrated():
    with pytest.raises(ValueError, match="masks that were found before are not calibrated"):
        METHODS.make("multiflow", masks="masks.safetensors", until=0.01)


class Session:
    """Endless batches over `count` rows, as a recipe gives them."""

    def __init__(self, count: int, rows: bool = True):
        self.made, self.taken = toy(), 0
        self.with_task = self.plain = self.made.model
        self.anatomy = self.made.model.anatomy()
        if rows:
            self.rows = lambda split: count

    def batches(self, split, size):
        while True:
            self.taken += 1
            yield BATCHES[self.taken % 8]


def test_a_recipe_goes_once_over_its_rows_at_most():
    session = Session(rows := 13)
    calibration = Calibration.of(session, 32, 2, once=1)
    method = METHODS.make("multiflow", sparsity=0.5, until=1e-5)
    with pytest.warns(UserWarning, match="ended after 6 batches"):
        method.calibrate(calibration)
    assert session.taken == 6 and rows // 2 == 6
    with pytest.raises(ValueError, match="13 rows have no 2 batches of 2 for each of 4 rounds"):
        Calibration.of(session, 32, 2, once=4)
    with pytest.raises(ValueError, match="how many rows a Session has before they begin again is not known"):
        Calibration.of(Session(13, rows=False), 32, 2, once=1)
