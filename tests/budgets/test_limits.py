"""Budgets as a person writes them."""

from __future__ import annotations

import pytest

from trimtab.budgets.limits import Budget, BudgetError, parse, shown

BASES = {
    "dense": {"macs": 100e6, "params": 2e6, "nonzero_params": 2e6, "export_bytes": 8e6},
    "full": {"training_peak_bytes": 4e9, "trainable_params": 1e6, "checkpoint_bytes": 4e6, "macs": 100e6},
}


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("macs <= -30%", {"macs": 70e6}),
        ("macs <= 30%", {"macs": 30e6}),
        ("macs<=30% of full", {"macs": 30e6}),
        ("macs <= 1.5 M", {"macs": 1.5e6}),
        ("macs <= 1_500_000", {"macs": 1.5e6}),
        ("train memory <= 2 GB, disk <= 5 MB", {"train memory": 2e9, "disk": 5e6}),
        ("TRAIN_MEMORY = 1 GiB", {"train memory": 2**30}),
        ("trained <= 5% of full\nlatency <= 20ms", {"trained": 5e4, "latency": 20}),
        ("train time <= 10 min; export <= -50%", {"train time": 600, "export": 4e6}),
    ],
)
def test_a_budget_is_read(text, most):
    assert Budget.of(parse(text), BASES).most == pytest.approx(most)


def test_a_mapping_says_the_same():
    assert parse({"macs": "-30%", "train_memory": "2GB", "trained": 1000}) == parse(
        "macs <= -30%, train memory <= 2 GB, trained <= 1000"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least one limit"),
        ({}, "at least one limit"),
        ("mac <= 3", "did you mean 'macs'"),
        ("macs <= 3 gb", "unknown unit 'gb'"),
        ("disk <= 3 mbs", "did you mean 'mb'"),
        ("train memory <= 3", "expected '2 GB'"),
        ("macs <= -130%", "leaves nothing"),
        ("macs <= 0%", "leaves nothing"),
        ("macs >= 3", "expected 'AXIS <= VALUE'"),
        ("macs <= -3", "more than 0"),
        ("macs <= 3e6, macs <= -20%", "stands twice"),
        ("disk <= 30% of dense", "of full"),
        ("macs <= 30% of nothing", "'% of dense' or '% of full'"),
        ("macs <= many", "expected a value"),
    ],
)
def test_what_cannot_be_read_is_said(text, said):
    with pytest.raises(BudgetError, match=said):
        parse(text)


def test_what_is_over_a_budget_is_told_by_how_much():
    budget = Budget.of(parse("macs <= -30%, export <= 4 MB, disk <= 2 MB"), BASES)
    assert budget.over({"macs": 70e6, "export_bytes": 4e6, "checkpoint_bytes": 2e6}) == {}
    assert budget.over({"macs": 77e6, "checkpoint_bytes": 1e6}) == pytest.approx({"macs": 0.1})  # the export is unknown
    assert budget.over({"macs": 1, "export_bytes": None}) == {"export": float("inf")}  # it cannot be exported
    assert budget.told({"macs": 70e6, "export_bytes": None}) == "macs 70 M (-30 %), export not known, disk not known"


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [(1.5e6, "count", "1.5 M"), (999.9e6, "bytes", "1 GB"), (12, "bytes", "12 B"), (90, "seconds", "90 s"),
     (600, "seconds", "10 min"), (3.14159, "ms", "3.14 ms")],
)  # fmt: skip
def test_values_are_shown_with_three_digits(value, kind, text):
    assert shown(value, kind) == text
